"""Kills at random moments: what a run, a round, an import and a scored reference are in the end, and what is left over.

Each scenario is first carried out undisturbed. Then it is started, killed by SIGKILL with all its processes at a random
moment, and started again, until it ends by itself. Half of the kills fall anywhere, half as soon as something is being
written. In the end its files must be those of the undisturbed one (weights and rows to the last bit, metrics without
their times), no half-written file may be left, files of others in its folders must be untouched, and the disk must hold
little more.

    python benchmarks/chaos.py [--minutes 30] [--seed 1] [--only train]

Prints a line per scenario, and at the end the kills, by where they fell, and every difference.
"""

import argparse
import csv
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

TIMES = ("tokens_per_second", "step_time")
MINE = b"somebody's, not a run's"


# ---- what is done --------------------------------------------------------------------------------------------------


def train(folder: Path) -> None:
    """A DPO run of 12 steps with a reference to be scored, saves, validations and a page."""
    import fiddle as fdl

    from aligner import recipes
    from aligner.demo import toy

    made = recipes.tiny_llama.dpo_recipe(
        dir=str(folder / "runs"),
        name="run",
        train=toy.arithmetic(str(folder / "data"), split="train", rows=96),
        validation=toy.arithmetic(str(folder / "data"), split="validation", rows=16),
    )
    made.resume.init_stage = None
    made.model.config.num_layers, made.data.global_batch_size, made.data.micro_batch_size = 2, 8, 8
    made.trainer.max_steps, made.trainer.val_check_interval, made.log.ckpt.every_n_train_steps = 12, 4, 2
    made.log.ckpt.save_top_k, made.trainer.log_every_n_steps = 2, 1
    fdl.build(made)()


def rounds(folder: Path) -> None:
    """A first stage and a self-rewarding iteration: answers, judgments, pairs, training, score."""
    import fiddle as fdl
    import nemo_run as run

    from aligner import recipes
    from aligner.judge import verifiers

    prompts = folder / "prompts.jsonl"
    if not prompts.exists():
        check = {"instructions": [{"matches": r"^\d\d$"}]}
        rows = [{"prompt": f"{a}+{b}=", **check} for a in range(5) for b in range(4)]
        prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = recipes.tiny_llama.self_rewarding_recipe(
        dir=str(folder), name="sums", prompts=str(prompts), iterations=1, num_generations=4
    )
    (one,) = made.iterations
    for stage in (made.start, one.align):
        stage.model.config.num_layers, stage.model.config.hidden_size, stage.model.config.ffn_hidden_size = 2, 64, 96
        stage.data.micro_batch_size = stage.data.global_batch_size = 4
        stage.trainer.max_steps = stage.optim.lr_scheduler.max_steps = 8
        stage.log.ckpt.every_n_train_steps = 2
    made.start.data.micro_batch_size = made.start.data.global_batch_size = 64
    made.start.trainer.max_steps = made.start.optim.lr_scheduler.max_steps = 40
    made.start.optim.config.lr, made.start.log.ckpt.every_n_train_steps = 5e-3, 10
    for judged in (one.judge.judge, one.evaluate.judge):
        judged.function = run.Partial(verifiers.instructions)
    one.evaluate.prompts = str(prompts)
    one.generate.engine.batch_size = 8
    fdl.build(made)()


def importing(folder: Path) -> None:
    """An import of a Hugging Face model."""
    from aligner.checkpoint import huggingface

    target = folder / "imported"
    if not target.exists():
        huggingface.import_hf(str(folder / "source"), str(target), compare=False)


def make_source(folder: Path) -> None:
    """Write the Hugging Face model of `importing`."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from aligner.demo import toy

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=96, hidden_size=64, intermediate_size=96, num_hidden_layers=8, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "source")
    AutoTokenizer.from_pretrained(toy.TOKENIZER).save_pretrained(folder / "source")


@dataclass(frozen=True)
class Scenario:
    work: Callable[[Path], None]
    prepare: Callable[[Path], None]
    seconds: float
    """A job is killed after at most this time."""
    foreign: tuple[str, ...]
    """Files of others."""


SCENARIOS = {
    "train": Scenario(
        train, lambda _: None, 7.0, ("runs/thesis.tex", "runs/run/notes.txt", "runs/run/checkpoints/best/mine")
    ),
    "rounds": Scenario(rounds, lambda _: None, 14.0, ("notes.txt", "sums/iteration-1/mine.txt")),
    "import": Scenario(importing, make_source, 3.0, ("imported.mine.partial/x", "notes.txt")),
}


# ---- how it is done ------------------------------------------------------------------------------------------------


def start(work: Callable[[Path], None], folder: Path, log: Path) -> int:
    """Fork a process that does the work, in a session of its own; return its id."""
    child = os.fork()
    if child:
        return child
    os.setsid()
    for stream in (1, 2):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644), stream)
    code = 1
    try:
        work(folder)
        code = 0
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def wait(child: int, seconds: float, until: Callable[[], bool]) -> int | None:
    """Wait for a process; return its exit code, or None if the time is over or `until` holds."""
    end = time.monotonic() + seconds
    while time.monotonic() < end and not until():
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    return None


def half_written(folder: Path) -> set[Path]:
    found: set[Path] = set()
    for place, folders, files in os.walk(folder):
        found |= {Path(place) / name for name in (*folders, *files) if name.endswith((".partial", ".parts"))}
    return found


def kill_until_done(scenario: Scenario, folder: Path, draw: random.Random, where: Counter[str]) -> str | None:
    """Start and kill until it ends by itself; return what went wrong."""
    log, foreign = folder.with_suffix(".log"), {folder / name for name in scenario.foreign}
    for _ in range(200):
        before = half_written(folder)
        child = start(scenario.work, folder, log)
        while True:
            try:
                if os.getpgid(child) == child:
                    break
            except ProcessLookupError:
                break
        writing = draw.random() < 0.5
        code = wait(
            child,
            scenario.seconds if writing else draw.uniform(0.05, scenario.seconds),
            (lambda before=before: bool(half_written(folder) - before)) if writing else lambda: False,
        )
        if code is None and writing:
            code = wait(child, draw.uniform(0, 0.3), lambda: False)
        if code is None:
            os.killpg(child, signal.SIGKILL)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if code == -signal.SIGKILL:
            where["while something was being written" if half_written(folder) - foreign else "elsewhere"] += 1
        elif code:
            return f"ended with code {code}:\n{log.read_text(errors='replace')[-3000:]}"
        else:
            return None
    return "did not come to its end in 200 jobs"


# ---- what came out -------------------------------------------------------------------------------------------------


def outcome(folder: Path) -> dict[str, Any]:
    """Return what must be equal: rows, metrics without times, values of the newest checkpoints."""
    from aligner.checkpoint import checkpoint_diff, folders

    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.name == "metrics.csv":
            with path.open() as file:
                rows = [{k: v for k, v in row.items() if not k.endswith(TIMES)} for row in csv.DictReader(file)]
            found[name] = rows
        elif path.name == "checkpoints" and path.is_dir():
            newest = folders.latest_checkpoint(path.parent)
            assert newest is not None
            found[f"{name}: newest"] = newest.name
            found[f"{name}: all"] = sorted(each.name for each in path.iterdir() if each.name != "best")
            found[f"{name}: values"] = checkpoint_diff.read(newest)
        elif path.name == "imported":
            found[f"{name}: values"] = checkpoint_diff.read(path)
        elif path.suffix == ".jsonl" and path.name != "notes.jsonl" and "provenance" not in name:
            found[name] = path.read_bytes()
        elif path.name == "score.json":
            found[name] = {k: v for k, v in json.loads(path.read_text()).items() if "seconds" not in k}
        elif path.name == "report.html":
            found[name] = True
    return found


def differences(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    from aligner.checkpoint import checkpoint_diff

    told = []
    for name in sorted({*expected, *found}):
        if name not in expected or name not in found:
            told.append(f"{name} is {'missing' if name not in found else 'new'}")
        elif name.endswith(": values"):
            difference = checkpoint_diff.first_difference(expected[name], found[name])
            told += [f"{name}: {difference}"] if difference else []
        elif expected[name] != found[name]:
            told.append(f"{name} differs")
    return told


def disk_usage(folder: Path) -> int:
    return sum(path.lstat().st_size for path in folder.rglob("*") if path.is_file() and not path.is_symlink())


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--only", choices=SCENARIOS)
    given = parser.parse_args()
    import nemo.collections.llm
    import nemo.lightning.io  # noqa: F401

    import aligner.train.training_run  # noqa: F401

    draw, end = random.Random(given.seed), time.monotonic() + 60 * given.minutes
    home = Path(tempfile.mkdtemp(prefix="chaos-"))
    names = [given.only] if given.only else list(SCENARIOS)
    expected, sizes = {}, {}
    for name in names:
        folder = home / f"{name}-undisturbed"
        folder.mkdir()
        SCENARIOS[name].prepare(folder)
        code = wait(start(SCENARIOS[name].work, folder, folder.with_suffix(".log")), 600, lambda: False)
        assert code == 0, folder.with_suffix(".log").read_text()[-3000:]
        expected[name], sizes[name] = outcome(folder), disk_usage(folder)
    where: Counter[str] = Counter()
    wrong: list[str] = []
    done: Counter[str] = Counter()
    while time.monotonic() < end:
        name = names[done.total() % len(names)]
        scenario, folder = SCENARIOS[name], home / f"{name}-{done.total()}"
        folder.mkdir()
        scenario.prepare(folder)
        for foreign in scenario.foreign:
            (folder / foreign).parent.mkdir(parents=True, exist_ok=True)
            (folder / foreign).write_bytes(MINE)
        kills = where.total()
        problem = kill_until_done(scenario, folder, draw, where)
        told = [problem] if problem else differences(expected[name], outcome(folder))
        for foreign in scenario.foreign:
            if not (folder / foreign).is_file() or (folder / foreign).read_bytes() != MINE:
                told.append(f"{foreign}, which is somebody's, was touched")
        foreign_places = {folder / part for name in scenario.foreign for part in (name, Path(name).parent)}
        told += [f"{path.relative_to(folder)} is left over" for path in half_written(folder) - foreign_places]
        share = disk_usage(folder) / sizes[name]
        print(f"{name}: {where.total() - kills} kills, {share:.2f} times the bytes; {'; '.join(told) or 'the same'}")
        sys.stdout.flush()
        wrong += [f"{folder}: {each}" for each in told]
        done[name] += 1
        if not told:
            shutil.rmtree(folder)
    print(f"{where.total()} kills in {done.total()} scenarios ({dict(done)}): {dict(where)}; {len(wrong)} differences")
    print("\n".join(wrong))
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
