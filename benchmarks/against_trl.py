"""Tokens per second of DPO: ours padded, packed and with a live reference, against TRL's DPOTrainer.

    python benchmarks/against_trl.py --model FOLDER --data pairs.jsonl --trl .venv-parity/bin/python

One machine, one model (a Hugging Face folder), the same pairs, tokens, batch and float32 (bfloat16 on a GPU). Turn by
turn, each in a process of its own, each one epoch: rows have unlike lengths, and over an epoch both sides see the same.
Counted are the optimizer steps, without start-up and the reference that is computed beforehand; medians of the turns.
TRL's best is padding-free with its reference computed beforehand; ours is packed with the cached one.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

SIDES = {
    "ours, padded": {"side": "ours", "batching": "padded", "reference": "cached"},
    "TRL, padded": {"side": "trl", "batching": "padded", "reference": "cached"},
    "ours, padded, live reference": {"side": "ours", "batching": "padded", "reference": "frozen"},
    "TRL, padded, live reference": {"side": "trl", "batching": "padded", "reference": "frozen"},
    "ours, packed (our best)": {"side": "ours", "batching": "packed", "reference": "cached"},
    "TRL, padding-free (its best)": {"side": "trl", "batching": "padding_free", "reference": "cached"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a Hugging Face folder")
    parser.add_argument("--data", required=True, help="rows of prompt, chosen_response and rejected_response")
    parser.add_argument("--trl", default=".venv-parity/bin/python", help="Python that has TRL")
    parser.add_argument("--batch", type=int, default=16, help="pairs of an optimizer step")
    parser.add_argument("--micro", type=int, default=4, help="pairs of a micro-batch")
    parser.add_argument("--length", type=int, default=512, help="longest sequence; longer pairs are left out")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--only", nargs="*", help="of the sides, those whose name has one of these words")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        settings = json.loads(asked.one)
        (ours if settings["side"] == "ours" else trl)(settings)
        return
    with tempfile.TemporaryDirectory() as folder:
        compare(asked, Path(folder))


def compare(asked: argparse.Namespace, folder: Path) -> None:
    """All sides, turn by turn."""
    rows = kept(asked, folder / "pairs.jsonl")
    found: dict[str, list[float]] = {}
    for turn in range(asked.turns):
        for name, side in SIDES.items():
            if asked.only and not any(word in name for word in asked.only):
                continue
            settings = {**side, **{k: getattr(asked, k) for k in ("batch", "micro", "length", "steps")}}
            settings |= {"model": str(Path(asked.model).resolve()), "data": str(rows)}
            settings |= {"out": str(folder / f"{turn}-{list(SIDES).index(name)}"), "tokens": tokens_of(rows)}
            python = sys.executable if side["side"] == "ours" else asked.trl
            command = [
                python,
                str(Path(__file__).resolve()),
                "--model",
                "-",
                "--data",
                "-",
                "--one",
                json.dumps(settings),
            ]
            done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
            if done.returncode:
                raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
            seconds = json.loads(done.stdout.splitlines()[-1])["seconds"]
            assert len(seconds) == asked.steps, f"{name}: {len(seconds)} steps"
            found.setdefault(name, []).append(statistics.fmean(seconds))
            print(f"turn {turn + 1}: {name:<32} {found[name][-1]:8.2f} s a step", flush=True)
    tell(found, asked.batch * tokens_of(rows))


def tell(found: dict[str, list[float]], tokens: float) -> None:
    """Medians over turns, and how they compare."""
    middle = {name: statistics.median(values) for name, values in found.items()}
    print()
    for name, seconds in middle.items():
        print(f"{name:<32} {seconds:8.2f} s a step {tokens / seconds:10,.0f} tokens/s")
    names = list(SIDES)
    for one, other in zip(names[::2], names[1::2], strict=True):
        if one in middle and other in middle:
            ratios = sorted(b / a for a, b in zip(found[one], found[other], strict=True))
            print(
                f"{one} : {other}  {middle[other] / middle[one]:.2f} times (turns {ratios[0]:.2f} to {ratios[-1]:.2f})"
            )


def kept(asked: argparse.Namespace, file: Path) -> Path:
    """Pairs that are short enough, with how many tokens they have; both sides see the same."""
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
    wanted = asked.batch * asked.steps
    repeated = (lines * -(-wanted // len(lines)))[:wanted]
    file.write_text("\n".join(repeated) + "\n")
    return file


def tokens_of(file: Path) -> float:
    """Tokens of a pair on average."""
    return statistics.fmean(json.loads(line)["tokens"] for line in file.read_text().splitlines())


def ours(settings: dict[str, Any]) -> None:
    """A run of ours; its own `step_time`."""
    import csv

    import fiddle as fdl
    import nemo_run as run

    from aligner import recipes
    from aligner.reference import Frozen

    recipe: Any = recipes.smollm2_135m.dpo_recipe(
        dir=settings["out"], name="run", train=settings["data"], start=settings["model"], seq_length=settings["length"],
        packed_sequence=settings["batching"] == "packed",
    )  # fmt: skip
    recipe.data.as_chat = False
    recipe.data.global_batch_size = settings["batch"]
    recipe.data.micro_batch_size = 1 if settings["batching"] == "packed" else settings["micro"]
    if settings["batching"] == "packed":
        # As many tokens as the other sides' micro-batches can hold.
        recipe.data.pack_size = int(settings["micro"] * settings["tokens"])
    if settings["reference"] == "frozen":
        recipe.reference = run.Config(Frozen)
    recipe.trainer.max_steps = recipe.optim.lr_scheduler.max_steps = settings["steps"]
    recipe.log.ckpt.every_n_train_steps = 10 * settings["steps"]
    recipe.log.ckpt.save_last = False
    folder = fdl.build(recipe)()
    with (folder / "metrics.csv").open() as file:
        print(json.dumps({"seconds": [float(row["train/step_time"]) for row in csv.DictReader(file)]}))


def trl(settings: dict[str, Any]) -> None:
    """A run of TRL's, timed from one optimizer step's beginning to its end."""
    import time

    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer  # type: ignore[import-not-found]

    class Clock(TrainerCallback):
        seconds: list[float] = []  # noqa: RUF012

        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.began = time.perf_counter()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            self.seconds.append(time.perf_counter() - self.began)

    half = torch.cuda.is_available()
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
        bf16=half, use_cpu=not half, precompute_ref_log_probs=settings["reference"] == "cached", padding_free=free,
        max_prompt_length=None, gradient_checkpointing=False, disable_tqdm=True, weight_decay=0.1,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        settings["model"], dtype=torch.bfloat16 if half else torch.float32, **kind
    )
    trainer = DPOTrainer(
        model=model, args=config, train_dataset=data, callbacks=[Clock()],
        processing_class=AutoTokenizer.from_pretrained(settings["model"]),
    )  # fmt: skip
    trainer.train()
    print(json.dumps({"seconds": Clock.seconds}))


if __name__ == "__main__":
    main()
