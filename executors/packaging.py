"""The code that a job runs: what git knows of the folder where it is called, as it stands there, or nothing."""

import shlex
import subprocess
from pathlib import Path

import nemo_run as run

from aligner.common.console import log
from aligner.common.errors import ConfigError


def code() -> tuple[run.Packager, dict[str, str]]:
    """What ships the code of this folder's git repository, changes that are not committed among it, and its names.

    Outside of a repository nothing is shipped: the job runs what is installed where it runs.
    """
    if _git("rev-parse", "--is-inside-work-tree") != "true" or not _git("rev-parse", "--verify", "-q", "HEAD"):
        return run.Packager(), {}
    changed = (_git("status", "--porcelain", "--untracked-files=no") or "").splitlines()
    new = (_git("ls-files", "--others", "--exclude-standard", "--full-name", "*.py") or "").splitlines()
    if new:
        log(f"not known to git, so not shipped: {_few(new)}; `git add` them if the job needs them")
    # A commit of the tree as it is, which no branch shows and the tree does not notice; empty if nothing changed.
    snapshot = _git("stash", "create", "nemo-align: what a job was shipped") if changed else None
    if changed and snapshot is None:
        raise ConfigError(
            f"run.executor: git cannot record the changes of {_few([line[3:] for line in changed])} "
            "(`git stash create` fails, as in the middle of a merge, or after `git add -N`); commit them"
        )
    if snapshot:
        log(f"shipped as they are, not as they were committed: {_few([line[3:] for line in changed])}")
    head = _git("rev-parse", "HEAD") or "HEAD"
    top = _git("rev-parse", "--show-toplevel") or "."
    shipped = run.GitArchivePackager(
        ref=snapshot or head,
        include_submodules=(Path(top) / ".gitmodules").exists(),
        basepath=shlex.quote(top),  # which NeMo-Run writes into a command as it is
    )
    return shipped, {"NEMO_ALIGN_COMMIT": head, "NEMO_ALIGN_SNAPSHOT": snapshot or head}


def _git(*words: str) -> str | None:
    try:
        done = subprocess.run(["git", *words], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.rstrip("\n")


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
