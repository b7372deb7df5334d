"""Checks of answers where right and wrong can be told, for `Verifier(function=...)`.

Each takes the prompt's whole line and the answer's text, and returns a score from 0 to 1.
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
    """1 if the answer is the text under `field`, spaces at both ends and case apart."""
    return float(response.strip().casefold() == str(row[field]).strip().casefold())


def last_number(row: JsonObject, response: str, field: str = "answer") -> float:
    """1 if the last number of the answer is the one under `field`; commas between thousands are allowed."""
    found = re.findall(r"-?\d[\d,]*(?:\.\d+)?", response)
    try:
        wanted = float(str(row[field]).replace(",", ""))
    except ValueError:
        raise RowError(f"{field}: {row[field]!r} is not a number, in {str(row)[:80]}") from None
    return float(bool(found) and float(found[-1].replace(",", "")) == wanted)


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
"""What an instruction can ask of a text."""


def instructions(row: JsonObject, response: str, field: str = "instructions") -> float:
    """The share of instructions that the answer follows, `[{"max_words": 50}, {"contains": "because"}]` under `field`.

    Raises:
        RowError: there is no such check, or its value does not fit.
    """
    if not isinstance(row[field], list) or not all(isinstance(each, dict) for each in row[field]):
        raise RowError(f"{field}: must be a list of checks, [{{'max_words': 50}}], found {str(row[field])[:80]}")
    asked = [item for each in row[field] for item in each.items()]
    if not asked:
        raise RowError(f"{field}: is empty, in {str(row)[:80]}")
    followed = 0
    for name, wanted in asked:
        if name not in CHECKS:
            raise RowError(f"{field}: there is no check {name!r}; there are: {', '.join(CHECKS)}")
        try:
            followed += CHECKS[name](response, wanted)
        except (TypeError, AttributeError, re.error) as error:
            raise RowError(f"{field}: {name}={wanted!r} cannot be checked ({error})") from None
    return followed / len(asked)


def python_tests(
    row: JsonObject, response: str, field: str = "tests", seconds: int = 10, memory_mb: int = 1024
) -> float:
    """1 if the answer's Python code, and the tests under `field` after it, run to their end.

    It runs in a process of its own, in an empty folder, with an empty environment, and with limits on time, memory and
    files; where Linux lets it, without a network and with its children. That holds mistakes and loops, not an attacker:
    for code that may be hostile run the stage in a container.
    """
    blocks = re.findall(r"^```([^\n`]*)\n(.*?)^```", response, flags=re.DOTALL | re.MULTILINE)
    code = "\n".join(text for name, text in blocks if name.strip().lower() in ("", "python", "py", "python3"))
    # An answer that ends the process early must not pass for one whose tests went well.
    word = uuid.uuid4().hex
    with tempfile.TemporaryDirectory(prefix="python-tests-") as folder:
        script = f"{code if blocks else response}\n\n{row[field]}\n\nopen({word!r}, 'w').close()\n"
        (Path(folder) / "answer.py").write_text(script)
        command = [*_without_network(), sys.executable, "-I", "-S", "-B", "answer.py"]
        process = subprocess.Popen(
            command, cwd=folder, env={}, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            start_new_session=True, preexec_fn=lambda: _limit(seconds, memory_mb),
        )  # fmt: skip
        try:
            return float(process.wait(timeout=seconds + 2) == 0 and (Path(folder) / word).exists())
        except subprocess.TimeoutExpired:
            return 0.0
        finally:
            # With what it may have started.
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
    """A command that runs another one without a network; nothing where that is not allowed."""
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
