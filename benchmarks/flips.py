"""A flipped bit in a random file of a run's folder, many times: is it found, harmless, refused, or trained on?

A run of 4 steps with checkpoints, tokens and reference is copied, one bit of one of its files is flipped without a
trace in size or time, and the run goes on to step 8. Its weights must then be those of the run without the flip, or the
job must end with one line of ours that says what is wrong.

    python benchmarks/flips.py [--flips 200] [--seed 1]

Prints a line per kind of file: how often the flip was found (said, and made up for), harmless (the same weights), and
refused. Anything else is a difference, and the exit code is 1.
"""

import argparse
import os
import random
import shutil
import sys
import tempfile
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any

from chaos import differences, outcome, start, wait

FOUND = ("is damaged", "passed over", "made again", "cannot be read", "is gone")
"""What a job says of damage that it makes up for."""


def run(folder: Path, steps: int) -> None:
    """Train up to a step."""
    import fiddle as fdl

    from aligner import recipes
    from aligner.demo import toy

    data = str(folder.parent / "data")
    made = recipes.tiny_llama.dpo_recipe(
        dir=str(folder / "runs"),
        name="run",
        train=toy.arithmetic(data, split="train", rows=64),
        validation=toy.arithmetic(data, split="validation", rows=16),
    )
    made.resume.init_stage = None
    made.model.config.num_layers, made.data.global_batch_size, made.data.micro_batch_size = 2, 8, 8
    made.trainer.max_steps, made.trainer.val_check_interval, made.log.ckpt.every_n_train_steps = steps, 4, 2
    made.log.ckpt.save_top_k, made.trainer.log_every_n_steps = 2, 1
    fdl.build(made)()


def carry_out(folder: Path, steps: int) -> int | None:
    return wait(start(lambda where: run(where, steps), folder, folder.with_suffix(".log")), 300, lambda: False)


def flip(path: Path, draw: random.Random) -> int:
    """Flip one bit; return where."""
    stat, content = path.stat(), bytearray(path.read_bytes())
    at = draw.randrange(len(content))
    content[at] ^= 1 << draw.randrange(8)
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    return at


def kind_of(path: Path) -> str:
    parts = path.parts
    if "weights" in parts or "context" in parts or "huggingface" in parts:
        return "checkpoint"
    if "checkpoints" in parts:
        return f"checkpoint: {path.name}"
    return f"{parts[1]}/" if parts[1] in ("tokens", "reference") else f"run: {parts[2]}"


def judged(code: int | None, said: str, told: list[str], path: Path) -> tuple[str, str]:
    """Return what became of a flip, and a description if it is a fault."""
    if code == 0:
        # A damaged checkpoint stays, unlike an older one; and the curves of the file that was flipped differ.
        if [each for each in told if ": all" not in each and not ("metrics.csv" in each and path.name in each)]:
            return "TRAINED ON", "; ".join(told)
        return ("found" if any(text in said for text in FOUND) else "harmless"), ""
    last = (said.strip().splitlines() or [""])[-1]
    if code == 1 and last.startswith("aligner.common.errors."):
        return "refused", ""
    return "UNCLEAR", f"code {code}: {last[:300]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--flips", type=int, default=200)
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    import nemo.collections.llm
    import nemo.lightning.io  # noqa: F401

    import aligner.train.training_run  # noqa: F401

    draw, home = random.Random(given.seed), Path(tempfile.mkdtemp(prefix="flips-"))
    first, at = home / "first", home / "at"
    assert carry_out(at, 4) == 0, at.with_suffix(".log").read_text()[-3000:]
    shutil.copytree(at, first, symlinks=True)
    assert carry_out(at, 8) == 0, at.with_suffix(".log").read_text()[-3000:]
    expected: dict[str, Any] = outcome(at)
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file() and path.stat().st_size)
    # Each kind of file as often as another, not as it has files.
    kinds: dict[str, list[Path]] = defaultdict(list)
    for path in files:
        kinds[kind_of(path)].append(path)
    became: dict[str, Counter[str]] = defaultdict(Counter)
    wrong = []
    for number in range(given.flips):
        kind = "checkpoint" if draw.random() < 0.3 else draw.choice(sorted(kinds))
        path = draw.choice(kinds[kind])
        shutil.rmtree(at)  # the same place, which reference and provenance name
        shutil.copytree(first, at, symlinks=True)
        at.with_suffix(".log").write_text("")
        where = flip(at / path, draw)
        code = carry_out(at, 8)
        said = at.with_suffix(".log").read_text(errors="replace")
        what, why = judged(code, said, differences(expected, outcome(at)) if code == 0 else [], path)
        became[kind][what] += 1
        if why:
            wrong.append(f"{path}, byte {where}: {what}: {why}")
            shutil.copy(at.with_suffix(".log"), home / f"{number}.log")
    total: Counter[str] = Counter()
    for kind, counts in sorted(became.items()):
        print(f"{kind}: {', '.join(f'{count} {what}' for what, count in sorted(counts.items()))}")
        total += counts
    print(f"{total.total()} flips: {dict(total)}; {len(wrong)} differences")
    print("\n".join(wrong))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
