"""Rule-based verifiers of responses, for `Verifier(function=...)`.

Each takes the prompt's JSON line and the response text, and returns a score from 0 to 1.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

from aligner.common.errors import RowError
from aligner.judge.sandbox import run

JsonObject = dict[str, Any]


def exact_match(row: JsonObject, response: str, field: str = "answer") -> float:
    """Return 1 if the response equals the text under `field`, ignoring case and surrounding whitespace."""
    return float(response.strip().casefold() == str(row[field]).strip().casefold())


def last_number(row: JsonObject, response: str, field: str = "answer") -> float:
    """Return 1 if the last number of the response equals the number under `field`; thousands separators are allowed.

    Raises:
        RowError: the value under `field` is not a number.
    """
    numbers = re.findall(r"-?\d[\d,]*(?:\.\d+)?", response)
    try:
        expected = float(str(row[field]).replace(",", ""))
    except ValueError:
        raise RowError(f"{field}: {row[field]!r} is not a number, in {str(row)[:80]}") from None
    return float(bool(numbers) and float(numbers[-1].replace(",", "")) == expected)


CHECKS: dict[str, Callable[[str, Any], bool]] = {
    "contains": lambda text, wanted: wanted.casefold() in text.casefold(),
    "excludes": lambda text, wanted: wanted.casefold() not in text.casefold(),
    "starts_with": lambda text, wanted: text.strip().startswith(wanted),
    "ends_with": lambda text, wanted: text.strip().endswith(wanted),
    "matches": lambda text, wanted: re.search(wanted, text) is not None,
    "min_words": lambda text, wanted: len(text.split()) >= wanted,
    "max_words": lambda text, wanted: len(text.split()) <= wanted,
    "min_lines": lambda text, wanted: len([line for line in text.splitlines() if line.strip()]) >= wanted,
    "max_lines": lambda text, wanted: len([line for line in text.splitlines() if line.strip()]) <= wanted,
    "lowercase": lambda text, wanted: (text == text.lower()) is wanted,
    "json": lambda text, wanted: _is_json(text) is wanted,
}
"""Instruction checks: name -> function of the response text and the required value."""


def instructions(row: JsonObject, response: str, field: str = "instructions") -> float:
    """Return the fraction of followed instructions, `[{"max_words": 50}, {"contains": "because"}]` under `field`.

    Raises:
        RowError: the list is empty or invalid, a check is unknown, or its value has the wrong type.
    """
    if not isinstance(row[field], list) or not all(isinstance(check, dict) for check in row[field]):
        raise RowError(f"{field}: must be a list of checks, [{{'max_words': 50}}], found {str(row[field])[:80]}")
    checks = [item for check in row[field] for item in check.items()]
    if not checks:
        raise RowError(f"{field}: is empty, in {str(row)[:80]}")
    followed = 0
    for name, required in checks:
        if name not in CHECKS:
            raise RowError(f"{field}: there is no check {name!r}; there are: {', '.join(CHECKS)}")
        try:
            followed += CHECKS[name](response, required)
        except (TypeError, AttributeError, re.error) as error:
            raise RowError(f"{field}: {name}={required!r} cannot be checked ({error})") from None
    return followed / len(checks)


def python_tests(
    row: JsonObject,
    response: str,
    field: str = "tests",
    seconds: int = 10,
    memory_mb: int = 1024,
    isolation: str = "bubblewrap",
) -> float:
    """Return 1 if the tests under `field` come to their end with the response's Python code: ``` blocks, or all of it.

    The code may be hostile. It runs in a sandbox of bubblewrap: an empty folder, an empty environment, no network, no
    home folder, no other processes, and limits. The tests run in a second sandbox, with proxies of the names that the
    code defines; the verdict comes from there. Both use the standard library only.

    Arguments and results that are plain data (numbers, text, lists, dicts, sets, of the built-in types) are copied, and
    compared in the tests' sandbox; changes of an argument are copied back. Functions and instances of the code's own
    classes are used from afar. An instance never equals plain data, unless its class derives from the data's type.
    Compared with another instance, or asked by `in`, `len` or a method, it answers by the code's own methods, which the
    tests trust. They also trust a function which only the code imports, as `isclose`; let tests import what they use. A
    test cannot pass instances of its own classes, or files. Built-in names have their usual sense in tests that use any
    other name of the code.

    Args:
        row: the prompt's JSON line.
        response: text of the response.
        field: key of the tests: Python code, or a list of pieces of it.
        seconds: limit on the time of code and tests together.
        memory_mb: limit on the address space of each process.
        isolation: `bubblewrap`, or `none`: limits on time, memory and files only, for stages that run in a container of
            their own. The code can then read what the job can, and end it.

    Raises:
        RowError: the tests are no text.
        ConfigError: `isolation` is unknown, or bubblewrap is missing, or the machine refuses it.
        OSError: a sandbox did not start.
    """
    tests = row[field]
    if isinstance(tests, list) and all(isinstance(part, str) for part in tests):
        tests = "\n".join(tests)
    if not isinstance(tests, str):
        raise RowError(f"{field}: must be Python code, found {str(tests)[:80]}")
    blocks = re.findall(r"^```([^\n`]*)\n(.*?)^```", response, flags=re.DOTALL | re.MULTILINE)
    code = "\n".join(text for name, text in blocks if name.strip().lower() in ("", "python", "py", "python3"))
    return float(run.passes(code if blocks else response, tests, run.Limits(seconds, memory_mb), isolation))


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True
