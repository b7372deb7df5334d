"""`nemo llm diff-runs`."""

import difflib
from pathlib import Path

from aligner.common.errors import CheckpointError
from aligner.common.run_folder import RECIPE


def diff(one: str, other: str) -> str:
    """Return the unified diff of the recipes of two runs; empty if they are equal.

    Args:
        one: folder of a run.
        other: folder of another run.

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
    """Print the differences between the recipes of two runs.

    Args:
        one: folder of a run.
        other: folder of another run.
    """
    print(diff(one, other) or f"{one} and {other} have the same recipe")
