"""`nemo llm verify-resume`: whether a run that was killed ends where one that was not does, to the last bit."""

from __future__ import annotations

import copy
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import nemo_run as run

from aligner.cli.context import RecipeContext
from aligner.common.errors import ConfigError

HELP = """Run a recipe straight, and again with a kill -9 in its middle, and compare them bit by bit.

Compared are weights, optimizer, schedule, and of every step the rows, the loss, the gradient norm and the random states
of every rank. Prints "identical" or the first difference, which makes the exit code 1.

nemo llm verify-resume --factory tiny_dpo steps=8

steps=8 is how many optimizer steps are made; everything else is as in `nemo llm align`. As many ranks as
trainer.devices are started on this machine.
"""


def verify_resume() -> None:
    """Compare a run with one that was killed and went on."""


class VerifyContext(RecipeContext):
    """Reads `steps=` for itself and the rest as `nemo llm align` does."""

    own = ("steps",)
    recipes_of = ("align",)

    def _execute_task(self, fn: Any, task_args: list[str]) -> None:
        from aligner.api import align

        own, rest = self.split(task_args)
        steps = own.get("steps", "8")
        recipe = self.parse_fn(align, rest)
        run.dryrun_fn(recipe)
        if self.dryrun or not self._should_continue(self.skip_confirmation):
            return
        if self.executor is not None:
            raise ConfigError("run.executor: verify-resume runs on this machine; leave it out")
        if not steps.isdigit():
            raise ConfigError(f"steps: {steps!r} is not a number of steps")
        difference = verify(recipe, steps=int(steps))
        print(difference or "identical", flush=True)
        if difference:
            sys.exit(1)


def verify(recipe: run.Partial, *, steps: int) -> str | None:
    """Do both runs in a folder of their own beside the recipe's.

    Args:
        recipe: of any run; how long it goes and when it saves are set here.
        steps: how many optimizer steps; saved and killed in the middle.

    Returns:
        The first difference, or None.

    Raises:
        ConfigError: there are too few steps to kill anything between; or a run ended otherwise than it should.
    """
    from aligner.callbacks import step_trace
    from aligner.checkpoint import checkpoint_diff, folders

    if steps < 4:
        raise ConfigError(f"steps: {steps} are too few; at least 4, so that some lie before the kill and some after it")
    home = Path(recipe.log.log_dir or "nemo_experiments").expanduser() / f"verify-{recipe.log.name}"
    if home.exists():
        raise ConfigError(f"log.name: {home} is left of an earlier comparison; remove it, or choose another log.name")
    middle, ranks = steps // 2, int(recipe.trainer.num_nodes or 1) * int(recipe.trainer.devices)

    def job(name: str, kill_after: int | None = None) -> Any:
        made = copy.deepcopy(recipe)
        made.log.log_dir, made.log.name = str(home), name
        made.log.ckpt.every_n_train_steps, made.log.ckpt.every_n_minutes = middle, None
        made.log.ckpt.monitor = None
        made.trainer.max_steps, made.trainer.max_epochs = steps, -1
        recorder = run.Config(step_trace.StepTrace, path=str(home / f"{name}.steps"), kill_after=kill_after)
        made.trainer.callbacks = [*(getattr(made.trainer, "callbacks", None) or []), recorder]
        return made

    home.mkdir(parents=True)
    print(f"straight: {steps} steps", flush=True)
    _do(job("straight"), ranks, home, killed=False)
    print(f"killed: kill -9 after {middle + 1} steps, {middle} of them saved", flush=True)
    _do(job("resumed", kill_after=middle + 1), ranks, home, killed=True)
    saved = folders.latest_checkpoint(home / "resumed")
    if saved is None or folders.step_of(saved) != middle:
        raise ConfigError(
            f"trainer.strategy.ckpt_async_save, resume: the killed run left {saved or 'no checkpoint'}, and one of "
            f"step {middle} was to be gone on from; save without writing beside the training, and let it resume"
        )
    print(f"resumed: to {steps} steps", flush=True)
    _do(job("resumed"), ranks, home, killed=False)
    notes = [
        tuple(step_trace.read(home / f"{name}.steps", rank) for name in ("straight", "resumed"))
        for rank in range(ranks)
    ]
    for step in range(steps):
        for rank, (one, other) in enumerate(notes):
            for what in one[step]:
                if one[step][what] != other[step][what]:
                    return f"step {step}, rank {rank}: {what}: {one[step][what]} and {other[step][what]}"
    found = [folders.latest_checkpoint(home / name) for name in ("straight", "resumed")]
    assert found[0] is not None and found[1] is not None
    return checkpoint_diff.first_difference(*(checkpoint_diff.read(path) for path in found if path))


def _do(job: Any, ranks: int, home: Path, *, killed: bool) -> None:
    """One job in processes of its own, with its output in a file."""
    from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer

    file, log = home / "job", home / "output.txt"
    file.write_text(ZlibJSONSerializer().serialize(job))
    started = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *started, "-m", "aligner.cli.verify_resume", str(file)]
    with log.open("ab") as output:
        done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | {"COLUMNS": "200"})
    if killed == (done.returncode != 0) and (ranks > 1 or not killed or done.returncode == -signal.SIGKILL):
        return
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
    raise ConfigError(f"a run ended with exit code {done.returncode}; its output is in {log}, and ends with:\n{tail}")


def main() -> None:
    """One job, whose recipe stands in the file that the command line names."""
    import fiddle as fdl
    import nemo.lightning.io  # noqa: F401 - teaches fiddle torch's types
    from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer

    fdl.build(ZlibJSONSerializer().deserialize(Path(sys.argv[1]).read_text()))()


if __name__ == "__main__":
    main()
