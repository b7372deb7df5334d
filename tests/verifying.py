"""A verifier, in a module that worker processes find and import at once."""

from typing import Any


def by_length(row: Any, response: str) -> float:
    return float(len(response) == 2)
