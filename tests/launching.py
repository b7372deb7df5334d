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
GRACE = 120
"""Seconds that the other ranks have to end after one has failed."""

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
import json, os, signal, sys, time, traceback
import fiddle as fdl
from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer

def forked(function, *arguments):
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        function(*arguments)
        code = 0
    except SystemExit as ended:
        code = ended.code
    except BaseException:
        # In one piece, or ranks would write into each other's lines.
        sys.stderr.write(traceback.format_exc())
    sys.stdout.flush(); sys.stderr.flush()
    os._exit(code)

# As torchrun has it: a process that outlives the ranks' groups has the store, on a port that it took itself.
def serve_store(told):
    from torch.distributed import TCPStore
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    os.write(told, str(store.port).encode())
    signal.pause()

def rank_of(job, rank, ranks, port):
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
                   "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "forked",
                   "TORCHELASTIC_USE_AGENT_STORE": "True", "GROUP_RANK": "0", "OMP_NUM_THREADS": "1"}
    import torch
    torch.set_num_threads(1)
    fdl.build(ZlibJSONSerializer().deserialize(job))()

def codes_of(children):
    # A rank that waits for one that has failed waits for ever.
    codes, end = {}, float("inf")
    while len(codes) < len(children):
        child, status = os.waitpid(-1, os.WNOHANG if any(codes.values()) else 0)
        assert not child or child in children, "the store has ended"
        if child:
            codes[child] = os.waitstatus_to_exitcode(status)
            end = min(end, time.monotonic() + GRACE) if codes[child] else end
        elif time.monotonic() > end:
            [os.kill(each, signal.SIGKILL) for each in children if each not in codes]
            end = float("inf")
        else:
            time.sleep(0.1)
    return [codes[child] for child in children]

for line in open(sys.argv[1]):
    ranks, job = line.split(" ", 1)
    heard, told = os.pipe()
    store = forked(serve_store, told)
    os.close(told)
    try:
        port = int(os.read(heard, 16))
        os.close(heard)
        children = [forked(rank_of, job, rank, int(ranks), port) for rank in range(int(ranks))]
        codes = codes_of(children)
    finally:
        os.kill(store, signal.SIGKILL)
    os.waitpid(store, 0)
    print("ended", json.dumps(codes), file=sys.__stdout__, flush=True)
""".replace("GRACE", str(GRACE))


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
