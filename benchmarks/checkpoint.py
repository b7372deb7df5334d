"""What saving costs: time and size of a save and of going on, and the share of a run that saving takes.

Four runs of SmolLM2-135M in one process, all else alike: without saving, and saving every N steps, waited for and
beside
the training. The shares are ratios of their step times; a machine that is busy slows all of them.

    python benchmarks/checkpoint.py [--every 4] [--steps 12] [--model tiny]
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any


def recipe(folder: Path, name: str, model: str, steps: int, every: int) -> Any:
    """A DPO run of all weights on sums, so that no data need be at hand."""
    from aligner import recipes
    from aligner.demo import smollm2, toy

    train = toy.arithmetic(str(folder / "data"), split="train", rows=64)
    if model == "tiny":
        made = recipes.tiny_llama.dpo_recipe(dir=str(folder / "runs"), name=name, train=train)
        made.resume.init_stage = None
    else:
        start = folder / "smollm2"
        if not start.exists():
            smollm2.fetch(str(start))
        made = recipes.smollm2_135m.dpo_recipe(
            dir=str(folder / "runs"), name=name, train=train, init_from=str(start), peft_scheme=None
        )
    made.data.global_batch_size, made.data.micro_batch_size, made.data.seq_length = 4, 4, 64
    made.trainer.max_steps, made.trainer.max_epochs = steps, -1
    made.log.ckpt.every_n_train_steps = every
    return made


def run(job: Any) -> tuple[float, Path]:
    """Seconds from the second step to the end of the job, and its folder."""
    import fiddle as fdl
    import lightning.pytorch as pl

    class Clock(pl.Callback):
        began = ended = 0.0

        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            # The first step scores the reference before it, and makes everything that is made once.
            if not self.began:
                self.began = time.perf_counter()

        def on_train_end(self, *_: Any) -> None:
            self.ended = time.perf_counter()

    clock = Clock()
    built: Any = fdl.build(job)
    built.keywords["trainer"].callbacks.append(clock)
    folder = built()
    return clock.ended - clock.began, folder


def main() -> None:
    """Print a table of times, sizes and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=4)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--model", choices=("smollm2", "tiny"), default="smollm2")
    asked = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="checkpoint-"))

    from aligner.checkpoint import folders

    # The first run of a process imports and caches; it is thrown away.
    run(recipe(folder, "warm", asked.model, 2, 100))
    found: dict[str, float] = {}
    ways = (("never", 10**6, False), ("waited for", asked.every, False), ("beside", asked.every, True))
    home = folder
    for name, every, beside in ways:
        job = recipe(folder, name.replace(" ", "_"), asked.model, asked.steps, every)
        job.trainer.strategy.ckpt_async_save = beside
        found[name], home = run(job)
    newest = folders.latest_checkpoint(home)
    assert newest is not None
    size = folders.disk_usage(newest) / 1e6
    saves = -(-asked.steps // asked.every)
    longer = recipe(folder, "beside", asked.model, asked.steps + 1, 10**6)
    began = time.perf_counter()
    run(longer)
    resumed = time.perf_counter() - began
    anew = recipe(folder, "anew", asked.model, 1, 10**6)
    began = time.perf_counter()
    run(anew)
    print(
        f"\n{asked.model}, all weights, {asked.steps} steps, saved every {asked.every} and at the end ({saves} times)"
    )
    print(f"a checkpoint        {size:8.0f} MB")
    print(f"a job of one step   {time.perf_counter() - began:8.1f} s from the start, {resumed:.1f} s going on")
    for name, seconds in found.items():
        # All of them save once at their end.
        share = "" if name == "never" else f", {(seconds - found['never']) / seconds:.0%} of it for saving"
        print(f"{name:<20}{seconds:8.1f} s{share} ({seconds / found['never']:.2f} times)")
    one, other = ((found[name] - found["never"]) / max(1, saves - 1) for name in ("waited for", "beside"))
    print(f"one save            {one:8.2f} s waited for, {other:.2f} s beside")


if __name__ == "__main__":
    main()
