"""Packaging of a job's code: the git-tracked files of the current folder, uncommitted changes included."""

import shlex
import subprocess
from pathlib import Path

import nemo_run as run

from aligner.common.console import log
from aligner.common.errors import ConfigError


def code() -> tuple[run.Packager, dict[str, str]]:
    """Return a packager for this folder's git repository, with uncommitted changes, and variables with its commits.

    Outside a git repository no code is shipped: the job runs the code that is installed on its machine.

    Raises:
        ConfigError: git cannot record the uncommitted changes.
    """
    if _git("rev-parse", "--is-inside-work-tree") != "true" or not _git("rev-parse", "--verify", "-q", "HEAD"):
        return run.Packager(), {}
    changed = (_git("status", "--porcelain", "--untracked-files=no") or "").splitlines()
    untracked = (_git("ls-files", "--others", "--exclude-standard", "--full-name", "*.py") or "").splitlines()
    if untracked:
        log(f"not known to git, so not shipped: {_first_names(untracked)}; `git add` them if the job needs them")
    # A commit of the working tree, on no branch; the working tree stays as it is. None if nothing changed.
    snapshot = _git("stash", "create", "nemo-align: what a job was shipped") if changed else None
    if changed and snapshot is None:
        raise ConfigError(
            f"run.executor: git cannot record the changes of {_first_names([line[3:] for line in changed])} "
            "(`git stash create` fails, as in the middle of a merge, or after `git add -N`); commit them"
        )
    if snapshot:
        log(f"shipped as they are, not as they were committed: {_first_names([line[3:] for line in changed])}")
    head = _git("rev-parse", "HEAD") or "HEAD"
    repository = _git("rev-parse", "--show-toplevel") or "."
    packager = run.GitArchivePackager(
        ref=snapshot or head,
        include_submodules=(Path(repository) / ".gitmodules").exists(),
        basepath=shlex.quote(repository),  # NeMo-Run writes it into a command without quotes
    )
    return packager, {"NEMO_ALIGN_COMMIT": head, "NEMO_ALIGN_SNAPSHOT": snapshot or head}


def _git(*words: str) -> str | None:
    try:
        result = subprocess.run(["git", *words], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.rstrip("\n")


def _first_names(names: list[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
