"""Runs of more than one rank, with a time limit."""

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer

TIME_LIMIT = 300


def torchrun(folder: Path, ranks: int, jobs: list[Any]) -> None:
    """Run recipes in one set of ranks; a hung one ignores SIGTERM, so the whole session is killed."""
    (folder / "jobs.txt").write_text("\n".join(ZlibJSONSerializer().serialize(job) for job in jobs))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        f"--nproc_per_node={ranks}",
        f"--master_port={port}",
    ]
    process = subprocess.Popen(
        [*command, str(Path(__file__).parent / "ranks.py"), str(folder)],
        start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=TIME_LIMIT)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"hung after {TIME_LIMIT} s:\n{output[-14000:]}")
    assert process.returncode == 0, output[-14000:]


EACH = """
import json, os, sys
import aligner.cli, aligner.engine, nemo.collections.llm
for i, words in enumerate(json.loads(sys.argv[1])):
    child = os.fork()
    if not child:
        for stream, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{i}.{name}", os.O_WRONLY | os.O_CREAT), stream)
        sys.argv = ["nemo", *words]
        from nemo_run.__main__ import app
        sys.exit(app())
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def nemo_each(commands: list[list[str]], folder: Path) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of `nemo` commands, each in a process of its own; NeMo is imported once for all."""
    env = os.environ | {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    done = subprocess.run(
        [sys.executable, "-c", EACH, json.dumps(commands)],
        cwd=folder, env=env, capture_output=True, text=True, timeout=TIME_LIMIT,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    codes = map(int, done.stdout.split())
    return [
        (code, (folder / f"{i}.out").read_text(), (folder / f"{i}.err").read_text()) for i, code in enumerate(codes)
    ]
