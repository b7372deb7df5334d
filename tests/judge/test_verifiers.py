"""Verifiers: functions that check a response, and what they hold its code to."""
# ruff: noqa: E501

import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from aligner.common.errors import RowError
from aligner.judge import verifiers


@pytest.mark.parametrize(
    ("function", "row", "response", "score"),
    [
        (verifiers.exact_match, {"answer": 4}, " 4\n", 1), (verifiers.exact_match, {"answer": "Paris"}, "paris", 1), (verifiers.exact_match, {"answer": 4}, "44", 0),
        (verifiers.last_number, {"answer": 1200}, "It is 3 times 400 = 1,200.", 1), (verifiers.last_number, {"answer": "-2.5"}, "so -2.50", 1),
        (verifiers.last_number, {"answer": 4}, "4, or perhaps 5", 0), (verifiers.last_number, {"answer": 4}, "four", 0),
        (verifiers.instructions, {"instructions": [{"max_words": 3}, {"contains": "YES"}]}, "yes it is", 1),
        (verifiers.instructions, {"instructions": [{"max_words": 2}, {"contains": "yes"}]}, "yes it is", 0.5),
        (verifiers.instructions, {"instructions": [{"json": True}]}, '{"a": 1}', 1), (verifiers.instructions, {"instructions": [{"matches": "^a.c$"}, {"lowercase": True}]}, "abc", 1),
        (verifiers.python_tests, {"tests": "assert add(1, 2) == 3"}, "Here:\n```python\ndef add(a, b):\n    return a + b\n```", 1),
        (verifiers.python_tests, {"tests": "assert add(1, 2) == 3"}, "def add(a, b): return a - b", 0),
        (verifiers.python_tests, {"tests": ""}, "this is not Python", 0),
        (verifiers.python_tests, {"tests": "assert False"}, "import sys; sys.exit(0)", 0), (verifiers.python_tests, {"tests": "assert False"}, "import os; os._exit(0)", 0),
        (verifiers.python_tests, {"tests": "assert x == 1"}, "```bash\npip install x\n```\nThen:\n```Python\nx = 1\n```\nIt prints\n```text\nx\n```", 1),
    ],
)  # fmt: skip
def test_verifiers(function: Any, row: dict[str, Any], response: str, score: float) -> None:
    assert function(row, response) == score


def test_code_is_held_to_its_limits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_OF_THE_JOB", "x")
    tests = partial(verifiers.python_tests, seconds=1, memory_mb=256)
    assert tests({"tests": ""}, "while True: pass") == 0
    assert tests({"tests": ""}, "import time; time.sleep(60)") == 0
    assert tests({"tests": ""}, "x = bytearray(1 << 30)") == 0
    assert tests({"tests": ""}, "open('big', 'wb').write(bytes(64 << 20))") == 0
    assert tests({"tests": "assert 'SECRET_OF_THE_JOB' not in os.environ"}, "import os") == 1
    # What it leaves running ends with it.
    marker = tmp_path / "alive"
    code = f"import subprocess, sys\nsubprocess.Popen([sys.executable, '-c', \"import time; time.sleep(2); open({str(marker)!r}, 'w')\"])"
    assert tests({"tests": ""}, code) == 1
    time.sleep(2.5)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ([{"no_such": 1}], "there is no check 'no_such'; there are: contains"),
        ([{"matches": "("}], "cannot be checked"),
        ([], "is empty"),
    ],
)
def test_instructions_that_are_none(asked: list[Any], message: str) -> None:
    with pytest.raises(RowError, match=message):
        verifiers.instructions({"instructions": asked}, "text")
