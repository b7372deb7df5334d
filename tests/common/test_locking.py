"""Locks between processes, on file systems with locks of their own and without."""

import errno
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from aligner.common import locking
from aligner.common.locking import Busy, Lock

HOLD = """
import fcntl, os, socket, sys, time
number, host, seconds = int(sys.argv[2]), sys.argv[3], float(sys.argv[4])
if number:
    def refused(*_):
        raise OSError(number, os.strerror(number))
    fcntl.flock = refused
if host:
    socket.gethostname = lambda: host
from pathlib import Path
from aligner.common import locking
locking.LEASE_S = seconds
from aligner.train.run_lock import lock_run
with lock_run(Path(sys.argv[1]).parent):
    print("has it", flush=True)
    time.sleep(1000)
"""
WITHOUT = [
    pytest.param(errno.ENOLCK, id="ENOLCK"),
    *(pytest.param(getattr(errno, name), id=name, marks=pytest.mark.slow) for name in ("ENOSYS", "EOPNOTSUPP")),
]


def holder(path: Path, number: int = 0, host: str = "", lease: float = 2.0) -> "subprocess.Popen[str]":
    """Another process that has the lock."""
    words = [sys.executable, "-c", HOLD, str(path), str(number), host, str(lease)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "has it\n"
    return process


@pytest.fixture
def without(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Error number of a file system without locks; 0: it has them."""

    def refused(*_: object) -> None:
        raise OSError(request.param, os.strerror(request.param))

    if request.param:
        monkeypatch.setattr(fcntl, "flock", refused)
    monkeypatch.setattr(locking, "LEASE_S", 2.0)
    return request.param


@pytest.mark.parametrize("without", [pytest.param(0, id="flock"), *WITHOUT], indirect=True)
def test_who_has_it_is_told_and_a_killed_owner_holds_nobody_up(tmp_path: Path, without: int) -> None:
    path = tmp_path / "deep/.lock"
    other = holder(path, without)
    lock = Lock(path)
    with pytest.raises(Busy, match=rf" \(process {other.pid} on \S+, since 20"):
        lock.acquire(waiting=None)
    told: list[str] = []
    os.kill(other.pid, signal.SIGKILL)
    other.wait()
    began = time.monotonic()
    lock.acquire(waiting=told.append)
    assert time.monotonic() - began < 30
    assert json.loads((tmp_path / "deep/.lock.json").read_text())["process"] == os.getpid()
    with pytest.raises(Busy, match=rf"process {os.getpid()} on"):
        Lock(path).acquire(waiting=None)
    lock.release()
    lock.release()
    with Lock(path):
        pass
    assert {file.name for file in path.parent.iterdir()} <= {".lock"}


@pytest.mark.parametrize("waits", [True, False])
@pytest.mark.parametrize("without", WITHOUT, indirect=True)
def test_an_owner_on_another_machine_that_is_gone_is_waited_for_only_so_long(
    tmp_path: Path, without: int, waits: bool
) -> None:
    path = tmp_path / ".lock"
    other = holder(path, without, host="node17")
    told: list[str] = []
    other.kill()
    other.wait()
    lock = Lock(path)
    # A job that does not wait looks for so long whether the owner lives.
    lock.acquire(waiting=told.append if waits else None)
    assert len(told) == waits and all("on node17" in text for text in told), "it says what it waits for"
    lock.release()


@pytest.mark.parametrize("without", [0, errno.ENOLCK], indirect=True, ids=["flock", "ENOLCK"])
def test_an_owner_that_lives_keeps_it(tmp_path: Path, without: int) -> None:
    path = tmp_path / ".lock"
    other = holder(path, without, host="node17" if without else "")
    end = time.monotonic() + 5
    while time.monotonic() < end:  # more than twice the lease
        with pytest.raises(Busy):
            Lock(path).acquire(waiting=None)
        time.sleep(0.2)
    other.kill()
    other.wait()


@pytest.mark.parametrize("without", [errno.ENOLCK], indirect=True, ids=["ENOLCK"])
def test_a_job_that_was_suspended_until_another_had_its_folder_ends(tmp_path: Path, without: int) -> None:
    path = tmp_path / ".lock"
    other = holder(path, without, host="node17")
    os.kill(other.pid, signal.SIGSTOP)
    lock = Lock(path)
    lock.acquire(waiting=None)
    os.kill(other.pid, signal.SIGCONT)
    _, said = other.communicate(timeout=60)
    assert other.returncode == 1 and "another job may be at work in it; this one ends" in said
    with pytest.raises(Busy, match=rf"process {os.getpid()} on"):
        Lock(path).acquire(waiting=None)
    lock.release()


def test_another_error_is_no_missing_lock(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="directory"):
        Lock(tmp_path).acquire(waiting=None)
