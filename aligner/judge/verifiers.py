"""Rule-based verifiers of responses, for `Verifier(function=...)`.

Each takes the prompt's JSON line and the response text, and returns a score from 0 to 1.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aligner.common.errors import RowError

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
    row: JsonObject, response: str, field: str = "tests", seconds: int = 10, memory_mb: int = 1024
) -> float:
    """Return 1 if the response's Python code, followed by the tests under `field`, runs to the end.

    The code runs in its own process, in an empty folder, with an empty environment and with limits on time, memory and
    files. Where Linux permits it, the process has no network and its own process namespace. This contains mistakes and
    endless loops, but not an attacker: for possibly hostile code, run the stage in a container.
    """
    blocks = re.findall(r"^```([^\n`]*)\n(.*?)^```", response, flags=re.DOTALL | re.MULTILINE)
    code = "\n".join(text for name, text in blocks if name.strip().lower() in ("", "python", "py", "python3"))
    # A response that exits early must not pass: the script creates a file with a random name at its end.
    marker = uuid.uuid4().hex
    with tempfile.TemporaryDirectory(prefix="python-tests-") as folder:
        script = f"{code if blocks else response}\n\n{row[field]}\n\nopen({marker!r}, 'w').close()\n"
        (Path(folder) / "answer.py").write_text(script)
        command = [*_without_network(), sys.executable, "-I", "-S", "-B", "answer.py"]
        process = subprocess.Popen(
            command, cwd=folder, env={}, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True, preexec_fn=lambda: _limit(seconds, memory_mb),
        )  # fmt: skip
        try:
            return float(process.wait(timeout=seconds + 2) == 0 and (Path(folder) / marker).exists())
        except subprocess.TimeoutExpired:
            return 0.0
        finally:
            # Kill the whole process group.
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _limit(seconds: int, memory_mb: int) -> None:
    for kind, limit in (
        (resource.RLIMIT_CPU, seconds),
        (resource.RLIMIT_AS, memory_mb << 20),
        (resource.RLIMIT_FSIZE, 16 << 20),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(kind, (limit, limit))


def _without_network() -> list[str]:
    """Return a command prefix that disables the network; empty if `unshare` is not permitted."""
    global _unshare
    if _unshare is None:
        command = [
            shutil.which("unshare") or "unshare",
            "--user",
            "--map-root-user",
            "--net",
            "--pid",
            "--fork",
            "--kill-child",
        ]
        try:
            allowed = subprocess.run([*command, "true"], capture_output=True).returncode == 0
        except OSError:
            allowed = False
        _unshare = command if allowed else []
    return _unshare


_unshare: list[str] | None = None


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True
