"""`nemo llm diff-runs`."""

import difflib
from pathlib import Path

from aligner.common.errors import CheckpointError
from aligner.common.run_folder import RECIPE


def diff(one: str, other: str) -> str:
    """How the recipes of two runs differ, as a unified diff; empty if they do not.

    Args:
        one: a run's folder.
        other: another's.

    Raises:
        CheckpointError: a folder has no recipe.
    """
    lines = []
    for name in (one, other):
        file = Path(name).expanduser() / RECIPE
        if not file.is_file():
            raise CheckpointError(f"{name}: has no {RECIPE}; expected the folder of a run, as runs/tiny_dpo")
        lines.append(file.read_text().splitlines())
    return "\n".join(difflib.unified_diff(lines[0], lines[1], one, other, lineterm="", n=2))


def diff_runs(one: str, other: str) -> None:
    """Print how the recipes of two runs differ.

    Args:
        one: a run's folder.
        other: another's.
    """
    print(diff(one, other) or f"{one} and {other} have the same recipe")
