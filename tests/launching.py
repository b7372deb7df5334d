"""Runs of more than one rank, with a time limit."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path
from typing import Any

import pytest
from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer

TIME_LIMIT = 1200
"""Seconds; a guard against what hangs, not a measure."""

PYTHON = [sys.executable, str(Path(__file__).parent / "warm.py")]
"""A Python that has NeMo imported: for what is about what a process does, not about how it comes to be."""
NEMO = str(Path(sys.executable).parent / "nemo")


def nemo_each(commands: list[list[str]], folder: Path) -> list[tuple[int, str, str]]:
    """Exit code, output and errors of `nemo` commands, each in a process of its own, one after another."""
    env = os.environ | {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    told = []
    for words in commands:
        done = subprocess.run(
            [*PYTHON, NEMO, *words], cwd=folder, env=env, capture_output=True, text=True, timeout=TIME_LIMIT
        )
        told.append((done.returncode, done.stdout, done.stderr))
    return told


def in_time_zones(job: Any) -> None:
    """Do a job on the clock of a time zone by rank; the dates of ranks 0 and 1 always differ."""
    os.environ["TZ"] = ("Etc/GMT-14", "Etc/GMT+12")[int(os.environ["RANK"])]
    time.tzset()
    job()


FORKED = """
import json, os, socket, sys, traceback
import fiddle as fdl
from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer

def rank_of(job, rank, ranks, port):
    child = os.fork()
    if child:
        return child
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "forked",
                   "GROUP_RANK": "0", "OMP_NUM_THREADS": "1"}
    import torch
    torch.set_num_threads(1)
    code = 1
    try:
        fdl.build(ZlibJSONSerializer().deserialize(job))()
        code = 0
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        # In one piece, or ranks would write into each other's lines.
        sys.stderr.write(traceback.format_exc())
    sys.stdout.flush(); sys.stderr.flush()
    os._exit(code)

for line in open(sys.argv[1]):
    ranks, job = line.split(" ", 1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    children = [rank_of(job, rank, int(ranks), port) for rank in range(int(ranks))]
    codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
    print("ended", json.dumps(codes), file=sys.__stdout__, flush=True)
"""


def forked(folder: Path, jobs: list[tuple[int, Any]], limit: int = TIME_LIMIT) -> tuple[list[list[int]], str]:
    """Run (ranks, recipe) one after another, each rank a process of its own.

    Returns the exit codes of each job's ranks, and everything that was said.
    """
    file, output = folder / f"jobs-{uuid.uuid4().hex[:6]}.txt", folder / f"output-{uuid.uuid4().hex[:6]}.txt"
    file.write_text("\n".join(f"{ranks} {ZlibJSONSerializer().serialize(job)}" for ranks, job in jobs))
    with output.open("w") as said:
        process = subprocess.Popen(
            [*PYTHON, "-c", FORKED, str(file)],
            start_new_session=True,
            stdout=said,
            stderr=subprocess.STDOUT,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parent)},
        )
        try:
            process.wait(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            pytest.fail(f"hung after {limit} s:\n{output.read_text()[-4000:]}")
    text = output.read_text(errors="replace")
    assert process.returncode == 0, text[-4000:]
    return [json.loads(line.removeprefix("ended ")) for line in text.splitlines() if line.startswith("ended [")], text
