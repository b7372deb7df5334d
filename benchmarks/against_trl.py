"""Seconds of a DPO step: ours against TRL's DPOTrainer, padded, with a live reference, and the best of each.

    python benchmarks/against_trl.py --model FOLDER --data pairs.jsonl --trl .venv-parity/bin/python

One machine, one model (a Hugging Face folder), the same pairs in every step, the same batch and float32 (bfloat16 on a
GPU). Both sides of a comparison live at once and take turns, step by step, so that a machine that is shared slows both
alike; a step's ratio is that of neighbors, and medians are told. Counted are optimizer steps, without start-up, the
first step and the reference that is computed beforehand. TRL's best is padding-free with its reference computed
beforehand; ours is packed with the cached one.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

CACHED, LIVE = "cached", "frozen"
COMPARISONS = {
    "padded, reference cached": (("ours", "padded", CACHED), ("trl", "padded", CACHED)),
    "padded, live reference": (("ours", "padded", LIVE), ("trl", "padded", LIVE)),
    "packed, reference cached : padding-free, the same": (("ours", "packed", CACHED), ("trl", "padding_free", CACHED)),
    "packed : padded, reference cached": (("ours", "packed", CACHED), ("trl", "padded", CACHED)),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a Hugging Face folder")
    parser.add_argument("--data", required=True, help="rows of prompt, chosen_response and rejected_response")
    parser.add_argument("--trl", default=".venv-parity/bin/python", help="Python that has TRL")
    parser.add_argument("--batch", type=int, default=16, help="pairs of an optimizer step")
    parser.add_argument("--micro", type=int, default=4, help="pairs of a micro-batch")
    parser.add_argument("--length", type=int, default=512, help="longest sequence; longer pairs are left out")
    parser.add_argument("--steps", type=int, default=8, help="of each side, after the first")
    parser.add_argument("--only", type=int, nargs="*", help=f"comparisons, 0 to {len(COMPARISONS) - 1}")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        settings = json.loads(asked.one)
        (ours if settings["side"] == "ours" else trl)(settings)
        return
    for number, (name, sides) in enumerate(COMPARISONS.items()):
        if asked.only is None or number in asked.only:
            with tempfile.TemporaryDirectory() as folder:
                compare(name, sides, asked, Path(folder))


def compare(name: str, sides: tuple[tuple[str, str, str], ...], asked: argparse.Namespace, folder: Path) -> None:
    """Both sides, a step of one after a step of the other."""
    rows = kept(asked, folder / "pairs.jsonl")
    tokens = tokens_of(rows)
    runs = [start(side, asked, folder, rows, tokens) for side in sides]
    try:
        for run in runs:
            said(run, "ready")
        found = [[took(run) for run in runs] for _ in range(asked.steps + 1)][1:]
    finally:
        for run in runs:
            run.kill()
            run.wait()
    ratios = sorted(theirs / mine for mine, theirs in found)
    mine, theirs = (statistics.median(column) for column in zip(*found, strict=True))
    speeds = " : ".join(f"{asked.batch * tokens / seconds:,.0f}" for seconds in (mine, theirs))
    print(
        f"{name}: {mine:.2f} s : TRL {theirs:.2f} s a step, {speeds} tokens/s, "
        f"{statistics.median(ratios):.2f} times as fast (steps {ratios[0]:.2f} to {ratios[-1]:.2f})",
        flush=True,
    )


class Side(subprocess.Popen[str]):
    """The process of a side."""

    name: str
    log: Path


def start(side: tuple[str, str, str], asked: argparse.Namespace, folder: Path, rows: Path, tokens: float) -> Side:
    """A side in a process of its own, which waits before each step until it is told to."""
    whose, batching, reference = side
    settings = {"side": whose, "batching": batching, "reference": reference, "out": str(folder / whose)}
    settings |= {k: getattr(asked, k) for k in ("batch", "micro", "length")} | {"steps": asked.steps + 1}
    settings |= {"model": str(Path(asked.model).resolve()), "data": str(rows), "tokens": tokens}
    python = sys.executable if whose == "ours" else asked.trl
    command = [python, str(Path(__file__).resolve()), "--model", "-", "--data", "-", "--one", json.dumps(settings)]
    log = folder / f"{whose}.log"
    with log.open("w") as errors:
        run = Side(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True, bufsize=1,
            env=os.environ | {"HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
    run.name, run.log = whose, log
    return run


def said(run: Side, word: str) -> str:
    """The line in which a side says something; what else is printed is passed over."""
    assert run.stdout
    for line in run.stdout:
        if line.startswith(word):
            return line.removeprefix(word)
    raise SystemExit(f"{run.name} ended early:\n{run.log.read_text()[-3000:]}")


def took(run: Side) -> float:
    """Have a side make a step, and its seconds."""
    assert run.stdin
    with contextlib.suppress(BrokenPipeError):
        run.stdin.write("\n")
    return float(said(run, "seconds"))


class Gate:
    """Between the steps of one side."""

    def begin(self) -> None:
        """Wait to be told."""
        if not hasattr(self, "began"):
            print("ready", flush=True)
        sys.stdin.readline()
        self.began = time.perf_counter()

    def end(self) -> None:
        """Say how long it took."""
        print(f"\nseconds {time.perf_counter() - self.began}", flush=True)


def kept(asked: argparse.Namespace, file: Path) -> Path:
    """As many pairs as a step has, none too long, with how many tokens they have; both sides see these in each step."""
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(asked.model)
    lines = []
    for line in Path(asked.data).read_text().splitlines():
        row = json.loads(line)
        texts = {name: row[name] for name in ("prompt", "chosen_response", "rejected_response")}
        if not all(isinstance(text, str) for text in texts.values()):
            continue
        prompt, *both = (len(tokenizer(text).input_ids) for text in texts.values())
        if max(both) + prompt < asked.length - 2:
            lines.append(json.dumps(texts | {"tokens": 2 * prompt + sum(both) + 2}))
    file.write_text("\n".join((lines * -(-asked.batch // len(lines)))[: asked.batch]) + "\n")
    return file


def tokens_of(file: Path) -> float:
    """Tokens of a pair on average."""
    return statistics.fmean(json.loads(line)["tokens"] for line in file.read_text().splitlines())


def ours(settings: dict[str, Any]) -> None:
    """A run of ours."""
    import fiddle as fdl
    import nemo_run as run
    from lightning.pytorch import Callback

    from aligner import recipes
    from aligner.model.reference import FrozenReference

    class StepGate(Gate, Callback):
        def on_train_batch_start(self, *_: Any) -> None:
            self.begin()

        def on_train_batch_end(self, *_: Any) -> None:
            self.end()

    recipe: Any = recipes.smollm2_135m.dpo_recipe(
        dir=settings["out"], name="run", train=settings["data"], init_from=settings["model"],
        seq_length=settings["length"], packed_sequence=settings["batching"] == "packed",
    )  # fmt: skip
    recipe.data.apply_chat_template = False
    recipe.data.global_batch_size = settings["batch"]
    recipe.data.micro_batch_size = 1 if settings["batching"] == "packed" else settings["micro"]
    if settings["batching"] == "packed":
        # As many tokens as the other sides' micro-batches can hold.
        recipe.data.packed_sequence_size = int(settings["micro"] * settings["tokens"])
    if settings["reference"] == "frozen":
        recipe.reference = run.Config(FrozenReference)
    recipe.trainer.max_steps = recipe.optim.lr_scheduler.max_steps = settings["steps"]
    recipe.trainer.max_epochs = settings["steps"]
    recipe.log.ckpt.every_n_train_steps = 10 * settings["steps"]
    recipe.log.ckpt.save_last = False
    recipe.trainer.callbacks = [run.Config(StepGate)]
    fdl.build(recipe)()


def trl(settings: dict[str, Any]) -> None:
    """A run of TRL's."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer  # type: ignore[import-not-found]

    class StepGate(Gate, TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.begin()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.end()

    bf16 = torch.cuda.is_available()
    rows = [json.loads(line) for line in Path(settings["data"]).read_text().splitlines()]
    data = Dataset.from_list(
        [{"prompt": r["prompt"], "chosen": r["chosen_response"], "rejected": r["rejected_response"]} for r in rows]
    )
    free = settings["batching"] == "padding_free"
    # Without flash attention transformers tells sequences apart by their positions, through a mask.
    flash = free and importlib.util.find_spec("flash_attn")
    kind = {"attn_implementation": "flash_attention_2"} if flash else {}
    config = DPOConfig(
        output_dir=settings["out"], per_device_train_batch_size=settings["micro"], max_length=settings["length"],
        gradient_accumulation_steps=settings["batch"] // settings["micro"], max_steps=settings["steps"], beta=0.1,
        learning_rate=9e-7, lr_scheduler_type="constant", logging_steps=1, save_strategy="no", report_to="none",
        bf16=bf16, use_cpu=not bf16, precompute_ref_log_probs=settings["reference"] == "cached", padding_free=free,
        max_prompt_length=None, gradient_checkpointing=False, disable_tqdm=True, weight_decay=0.1,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        settings["model"], dtype=torch.bfloat16 if bf16 else torch.float32, **kind
    )
    trainer = DPOTrainer(
        model=model, args=config, train_dataset=data, callbacks=[StepGate()],
        processing_class=AutoTokenizer.from_pretrained(settings["model"]),
    )  # fmt: skip
    trainer.train()


if __name__ == "__main__":
    main()
