"""`nemo llm verify-resume`: bitwise comparison of a killed and resumed run with an uninterrupted one."""

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

HELP = """Run a recipe without interruption, and again with a kill -9 in the middle, and compare both bit by bit.

Compared are weights, optimizer and schedule, and for every step and rank the rows, loss, gradient norm, learning rate
and random states. Prints "identical", or the first difference with exit code 1.

nemo llm verify-resume --factory tiny_dpo -y steps=8

steps=8 is the number of optimizer steps; everything else is as in `nemo llm align`. As many ranks as trainer.devices
are started on this machine.
"""


def verify_resume() -> None:
    """Compare a run with one that was killed and resumed."""


class VerifyContext(RecipeContext):
    """Context that parses `steps=`, and the rest as `nemo llm align` does."""

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
    """Run both in a new folder beside the recipe's run, and compare them.

    Args:
        recipe: recipe of any run; its number of steps and its checkpoint schedule are replaced.
        steps: number of optimizer steps; one run saves and is killed in the middle.

    Returns:
        The first difference, or None.

    Raises:
        ConfigError: there are too few steps, or a run did not end as expected.
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
        copied: Any = copy.deepcopy(recipe)
        copied.log.log_dir, copied.log.name = str(home), name
        copied.log.ckpt.every_n_train_steps, copied.log.ckpt.every_n_minutes = middle, None
        copied.log.ckpt.monitor = None
        copied.trainer.max_steps, copied.trainer.max_epochs = steps, -1
        trace = run.Config(step_trace.StepTrace, path=str(home / f"{name}.steps"), kill_after=kill_after)
        copied.trainer.callbacks = [*(getattr(copied.trainer, "callbacks", None) or []), trace]
        return copied

    home.mkdir(parents=True)
    print(f"straight: {steps} steps", flush=True)
    _run_job(job("straight"), ranks, home, killed=False)
    print(f"killed: kill -9 after {middle + 1} steps, {middle} of them saved", flush=True)
    _run_job(job("resumed", kill_after=middle + 1), ranks, home, killed=True)
    saved = folders.latest_checkpoint(home / "resumed")
    if saved is None or folders.step_of(saved) != middle:
        raise ConfigError(
            f"trainer.strategy.ckpt_async_save, resume: the killed run left {saved or 'no checkpoint'}, and one of "
            f"step {middle} was to be gone on from; save without writing beside the training, and let it resume"
        )
    print(f"resumed: to {steps} steps", flush=True)
    _run_job(job("resumed"), ranks, home, killed=False)
    traces = [
        tuple(step_trace.read(home / f"{name}.steps", rank) for name in ("straight", "resumed"))
        for rank in range(ranks)
    ]
    for step in range(steps):
        for rank, (straight, resumed) in enumerate(traces):
            for field in straight[step]:
                if straight[step][field] != resumed[step][field]:
                    return f"step {step}, rank {rank}: {field}: {straight[step][field]} and {resumed[step][field]}"
    latest = [folders.latest_checkpoint(home / name) for name in ("straight", "resumed")]
    assert latest[0] is not None and latest[1] is not None
    return checkpoint_diff.first_difference(*(checkpoint_diff.read(path) for path in latest if path))


def _run_job(job: Any, ranks: int, home: Path, *, killed: bool) -> None:
    """Run one job in its own processes, with its output in a file."""
    from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer

    file, log = home / "job", home / "output.txt"
    file.write_text(ZlibJSONSerializer().serialize(job))
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"] if ranks > 1 else []
    command = [sys.executable, *launcher, "-m", "aligner.cli.verify_resume", str(file)]
    with log.open("ab") as output:
        done = subprocess.run(command, stdout=output, stderr=subprocess.STDOUT, env=os.environ | {"COLUMNS": "200"})
    if killed == (done.returncode != 0) and (ranks > 1 or not killed or done.returncode == -signal.SIGKILL):
        return
    tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
    raise ConfigError(f"a run ended with exit code {done.returncode}; its output is in {log}, and ends with:\n{tail}")


def main() -> None:
    """Run one job; the command line names the file of its recipe."""
    import fiddle as fdl
    import nemo.lightning.io  # noqa: F401 - registers torch's types with fiddle
    from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer

    fdl.build(ZlibJSONSerializer().deserialize(Path(sys.argv[1]).read_text()))()


if __name__ == "__main__":
    main()
