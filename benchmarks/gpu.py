"""DPO on one GPU: tokens per second, MFU (output layer counted) and peak memory, ours beside TRL's, in one run.

    python benchmarks/gpu.py [--sizes 1b 8b] [--trl python-that-has-trl] [--pairs 64] [--length 2048]

Models are Llamas with random weights, the same for both; rows are random digits, chosen and rejected of unlike
lengths; nothing is downloaded. Each side runs in a process of its own, turn by turn; printed are medians over turns of
tokens (of sequences, padding not counted) a second, over all optimizer steps but the first. Full weights of the 8B need
a GPU of 141 GB or more, or fail and say so. Without a GPU it prints what it would run; `--sizes tiny` runs our sides on
a CPU, to see that they do.
"""

import argparse
import json
import random
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

SIZES: dict[str, dict[str, Any]] = {
    name: dict(
        zip(
            ("num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "num_query_groups"),
            sizes,
            strict=True,
        )
    )
    for name, sizes in {
        "tiny": (2, 64, 128, 4, 2),
        "1b": (16, 2048, 8192, 32, 8),
        "8b": (32, 4096, 14336, 32, 8),
    }.items()
}
"""Llama 3.2 1B and Llama 3.1 8B, the first with an output layer of its own."""
VOCABULARY = 128256
SIDES = [
    {"side": "ours", "reference": reference, "batching": batching, "peft": peft}
    for peft in (None, "lora")
    for reference in ("cached", "frozen" if peft is None else "base_model")
    for batching in ("padded", "packed")
] + [
    {"side": "trl", "reference": reference, "batching": batching, "peft": peft}
    for peft in (None, "lora")
    for reference in ("cached", "live")
    for batching in ("padded", "padding_free")
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["1b", "8b"])
    parser.add_argument("--trl", help="Python that has TRL; without it only ours run")
    parser.add_argument("--pairs", type=int, default=64, help="of an optimizer step")
    parser.add_argument("--micro", type=int, default=2, help="pairs of a micro-batch")
    parser.add_argument("--length", type=int, default=2048, help="longest sequence")
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        settings = json.loads(asked.one)
        print(json.dumps({"ours": ours, "trl": trl, "make": make}[settings["side"]](settings)))
        return
    plan = [(size, side) for size in asked.sizes for side in SIDES if side["side"] == "ours" or asked.trl]
    if not torch.cuda.is_available() and asked.sizes != ["tiny"]:
        print("no GPU here; with one this would run, each", asked.turns, "times:")
        for size, side in plan:
            print(f"  {size:<5}{name_of(side)}")
        return
    with tempfile.TemporaryDirectory() as folder:
        compare(asked, plan, Path(folder))


def name_of(side: dict[str, Any]) -> str:
    return f"{side['side']:<5} {side['peft'] or 'full':<5} {side['reference']:<13}{side['batching']}"


def compare(asked: argparse.Namespace, plan: list[tuple[str, dict[str, Any]]], folder: Path) -> None:
    """All sides, turn by turn, and the medians."""
    rows = write_rows(folder / "rows.jsonl", asked.pairs * asked.steps, asked.length)
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{card}, torch {torch.__version__}, CUDA {torch.version.cuda}")
    for size in asked.sizes:
        settings = {"side": "make", "size": size, "model": str(folder / size), "length": asked.length}
        subprocess.run([sys.executable, __file__, "--one", json.dumps(settings)], check=True, capture_output=True)
    found: dict[tuple[str, str], list[dict[str, float]]] = {}
    for turn in range(asked.turns):
        for number, (size, side) in enumerate(plan):
            settings = side | {"size": size, "data": str(rows), "out": str(folder), "name": f"{turn}-{number}"}
            settings |= {"model": str(folder / size)}
            settings |= {name: getattr(asked, name) for name in ("pairs", "micro", "length", "steps")}
            python = sys.executable if side["side"] == "ours" else asked.trl
            command = [python, str(Path(__file__).resolve()), "--one", json.dumps(settings)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                last = (done.stderr.strip().splitlines() or ["?"])[-1]
                print(f"{size:<5}{name_of(side)}  failed: {last[:160]}", flush=True)
                continue
            found.setdefault((size, name_of(side)), []).append(json.loads(done.stdout.splitlines()[-1]))
    print(f"{'':<36}{'tokens/s':>10}{'MFU':>8}{'GB':>8}")
    for (size, name), results in found.items():
        speed, memory = (statistics.median(result[what] for result in results) for what in ("speed", "memory"))
        share = speed * flops(size, name, asked.length) / peak()
        print(f"{size:<5}{name:<31}{speed:>10,.0f}{share:>8.1%}{memory / 1e9:>8.1f}")


def flops(size: str, name: str, length: int) -> float:
    """Of a token, by `aligner.estimate.sizing`: what the method needs, nothing that is made again."""
    from aligner.estimate import memory, step_time
    from aligner.estimate.parameters import ModelShape

    given = SIZES[size]
    model = ModelShape(
        layers=given["num_layers"], hidden=given["hidden_size"], heads=given["num_attention_heads"],
        groups=given["num_query_groups"], channels=given["hidden_size"] // given["num_attention_heads"],
        ffn=given["ffn_hidden_size"], gated=True, vocabulary=VOCABULARY, tied=False, experts=0, topk=1, shared_ffn=0,
        num_norm_bias_params=0, last_norm=0,
    )  # fmt: skip
    plan = memory.Plan(
        ranks=1, gpus_per_node=1, adapter_rank=32 if "lora" in name else None,
        reference="none" if "cached" in name else "frozen",
    )  # fmt: skip
    return step_time.step_flops(model, plan, length=length / 2, epochs=1)[0]


def peak() -> float:
    """FLOP/s of this card in bfloat16."""
    from aligner.estimate.recipe_plan import this_machine

    return this_machine(1).peak or float("inf")


def write_rows(file: Path, count: int, length: int) -> Path:
    """Pairs of digits: prompts of up to a quarter, responses of up to three quarters of the length."""
    draw = random.Random(0)

    def digits(most: int) -> str:
        return "".join(str(draw.randint(0, 9)) for _ in range(draw.randint(most // 8, most)))

    with file.open("w") as rows:
        for _ in range(count):
            row = {"prompt": digits(length // 4) + "="}
            row |= {f"{side}_response": digits(length * 3 // 4 - 8) for side in ("chosen", "rejected")}
            rows.write(json.dumps(row) + "\n")
    return file


def make(settings: dict[str, Any]) -> dict[str, float]:
    """A folder of transformers with random weights, and a tokenizer of digits."""
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from aligner.demo import toy

    sizes = SIZES[settings["size"]]
    config: Any = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=sizes["hidden_size"], intermediate_size=sizes["ffn_hidden_size"],
        num_hidden_layers=sizes["num_layers"], num_attention_heads=sizes["num_attention_heads"],
        num_key_value_heads=sizes["num_query_groups"], max_position_embeddings=settings["length"], rope_theta=500000.0,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(settings["model"])
    AutoTokenizer.from_pretrained(toy.TOKENIZER).save_pretrained(settings["model"])
    return {}


def ours(settings: dict[str, Any]) -> dict[str, float]:
    """A run of ours."""
    import csv

    import fiddle as fdl
    import nemo_run as run

    from aligner import recipes
    from aligner.model.reference import BaseModelReference, FrozenReference

    packed = settings["batching"] == "packed"
    recipe: Any = recipes.llama31_8b.dpo_recipe(
        dir=settings["out"], name=settings["name"], num_nodes=1, num_gpus_per_node=1, seq_length=settings["length"],
        train=settings["data"], peft_scheme=settings["peft"], packed_sequence=packed, init_from=settings["model"],
    )  # fmt: skip
    strategy = recipe.trainer.strategy
    strategy.tensor_model_parallel_size, strategy.sequence_parallel = 1, False
    recipe.data.apply_chat_template = False
    recipe.data.global_batch_size = settings["pairs"]
    recipe.data.micro_batch_size = 1 if packed else settings["micro"]
    if packed:
        # As many tokens as micro-batches of the padded side can have.
        recipe.data.packed_sequence_size = 2 * settings["micro"] * settings["length"]
    live = {"frozen": FrozenReference, "base_model": BaseModelReference}.get(settings["reference"])
    if live is not None:
        recipe.reference = run.Config(live)
    recipe.trainer.max_steps = recipe.optim.lr_scheduler.max_steps = settings["steps"]
    recipe.log.ckpt.every_n_train_steps = 10 * settings["steps"]
    folder = fdl.build(recipe)()
    with (folder / "metrics.csv").open() as file:
        speeds = [float(row["train/tokens_per_second"]) for row in csv.DictReader(file)]
    memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0
    return {"speed": statistics.median(speeds[1:]), "memory": float(memory)}


def trl(settings: dict[str, Any]) -> dict[str, float]:
    """A run of TRL's on the same rows and sizes."""
    import time

    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer  # type: ignore[import-not-found]

    tokenizer: Any = AutoTokenizer.from_pretrained(settings["model"])
    rows = [json.loads(line) for line in Path(settings["data"]).read_text().splitlines()]
    tokens = [
        sum(len(tokenizer(row[k]).input_ids) for k in row) + len(tokenizer(row["prompt"]).input_ids) for row in rows
    ]

    class Clock(TrainerCallback):
        seconds: list[float] = []  # noqa: RUF012

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            torch.cuda.synchronize()
            self.seconds.append(time.perf_counter() - self.began)

    free = settings["batching"] == "padding_free"
    kind = {"attn_implementation": "flash_attention_2" if free else "sdpa"}
    model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.bfloat16, **kind)
    args = DPOConfig(
        output_dir=f"{settings['out']}/{settings['name']}", per_device_train_batch_size=settings["micro"],
        max_length=settings["length"],
        gradient_accumulation_steps=settings["pairs"] // settings["micro"], max_steps=settings["steps"], bf16=True,
        precompute_ref_log_probs=settings["reference"] == "cached", padding_free=free, max_prompt_length=None,
        gradient_checkpointing=False, learning_rate=9e-7, logging_steps=1, save_strategy="no", report_to="none",
    )  # fmt: skip
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapters = LoraConfig(r=32, lora_alpha=32, target_modules=names) if settings["peft"] else None
    data = Dataset.from_list(
        [{"prompt": r["prompt"], "chosen": r["chosen_response"], "rejected": r["rejected_response"]} for r in rows]
    )
    trainer = DPOTrainer(
        model=model, args=args, train_dataset=data, processing_class=tokenizer,
        callbacks=[Clock()], peft_config=adapters,
    )  # fmt: skip
    trainer.train()
    each = statistics.fmean(tokens) * settings["pairs"]
    return {"speed": each / statistics.median(Clock.seconds[1:]), "memory": float(torch.cuda.max_memory_allocated())}


if __name__ == "__main__":
    main()
