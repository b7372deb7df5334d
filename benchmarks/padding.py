"""Tokens a second of the engine, padded against packed, on the HHH preferences, in one run.

    python benchmarks/padding.py PAIRS.jsonl [SMOLLM2_FOLDER]

Each model makes the same steps on the same global batches of 8 pairs both ways, full parameters, SimPO (no reference
to score). Tokens are those of the data, prompts and answers; padding does not count. The first step of each run warms
up and is left out. `python -m aligner.demo.smollm2 FOLDER` makes the second model's folder; without it the
tiny model is measured alone.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

PAIRS = 8
SEQ_LENGTH = {"tiny": 4096, "smollm2": 256}
"""The tiny model's tokens are characters. Eight pairs of SmolLM2, padded, take 20 GB at 256 tokens without recomputing
activations, so longer pairs are left out (it says how many), which makes the padding less than it is."""
STEPS = {"tiny": 12, "smollm2": 4}


def recipe(model: str, rows: str, batching: str, folder: Path, source: str | None) -> Any:
    import nemo_run as run

    from aligner import losses, recipes

    length = SEQ_LENGTH[model]
    if model == "tiny":
        made: Any = recipes.tiny_llama.sft_recipe(
            dir=str(folder), name=f"tiny_{batching}", seq_length=length, train=rows
        )
        made.model.config.seq_length = length
        made.preference_loss_weight, made.sft_loss_weight = 1.0, 0.0
    else:
        made = recipes.smollm2_135m.dpo_recipe(
            dir=str(folder), name=f"smollm2_{batching}", seq_length=length, train=rows, init_from=source or ""
        )
        made.reference = None
    made.loss = run.Partial(losses.simpo)
    made.data.batching, made.data.max_dropped_fraction = batching, 1.0
    made.data.global_batch_size = PAIRS
    made.data.micro_batch_size = PAIRS if batching == "padded" else 1
    if batching == "packed":
        made.data.packed_sequence_size = 2 * PAIRS * length
    made.trainer.max_steps, made.trainer.max_epochs, made.trainer.val_check_interval = STEPS[model], -1, STEPS[model]
    made.log.ckpt.every_n_train_steps, made.log.ckpt.save_last = 10 * STEPS[model], False
    made.optim.config.lr = made.optim.lr_scheduler.min_lr = 1e-6
    made.optim.lr_scheduler.warmup_steps = 0
    return made


def main(rows: str, source: str | None) -> None:
    import fiddle as fdl

    from aligner.common.run_folder import read_metrics

    with tempfile.TemporaryDirectory() as folder:
        for model in ("tiny", "smollm2") if source else ("tiny",):
            speed, loss = {}, {}
            for batching in ("padded", "packed"):
                made: Any = fdl.build(recipe(model, rows, batching, Path(folder), source))
                steps = [row for row in read_metrics(made() / "metrics.csv") if "train/loss" in row]
                seconds = sum(row["train/step_time"] for row in steps[1:])
                tokens = sum(row["train/step_time"] * row["train/tokens_per_second"] for row in steps[1:])
                speed[batching], loss[batching] = tokens / seconds, steps[0]["train/loss"]
                data = made.keywords["data"]
            print(f"{model}: {data.datasets['train'].report}")
            positions = data.cutting("train")
            padded = packed = 0
            for step in range(1, STEPS[model]):
                units = data.global_batch(step)
                padded += 2 * PAIRS * int(positions.longest[units].max())
                packed += int(positions.tokens[units].sum())
            print(
                f"{model:<8} padded {speed['padded']:>9,.0f}  packed {speed['packed']:>9,.0f} tokens a second: "
                f"{speed['packed'] / speed['padded']:.2f} times; padding wasted {padded / packed:.2f} times "
                f"(first losses {loss['padded']:.6f}, {loss['packed']:.6f})",
                flush=True,
            )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else None)
