"""`python tests/warm.py ...` does what `python ...` does, in a process that has NeMo imported already.

Importing NeMo costs ten seconds in every process. The first call starts a server that imports it, and forks for each
call, of all workers of a session. A call hands over its arguments, environment, folder and streams; it ends with the
code of the forked process, passes SIGTERM and SIGINT on to all processes of it, as a scheduler does, and takes them
with it where it is killed.
"""

import array
import contextlib
import fcntl
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from types import ModuleType
from typing import Any

PLACE, SESSION = "NEMO_ALIGN_WARM", "NEMO_ALIGN_WARM_SESSION"
"""Environment: the folder of the socket, and the process that the server ends with."""
SHOWN = {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
"""What Rich reads when it is imported."""


def prepare() -> None:
    """Have the calls of this process and of those that it starts go to one server, which ends with this process."""
    place = tempfile.mkdtemp(prefix="warm-")
    os.environ |= {PLACE: place, SESSION: str(os.getpid())}
    os.mkdir(f"{place}/bin")
    with open(f"{place}/bin/python", "w", opener=lambda path, flags: os.open(path, flags, 0o755)) as file:
        file.write(f'#!/bin/sh\nexec "{sys.executable}" "{__file__}" "$@"\n')


def programs() -> str:
    """A folder for PATH, whose `python` is a warm one."""
    return f"{os.environ[PLACE]}/bin"


def export_lines() -> list[str]:
    """Lines of a shell after which `python` and the ranks of `torchrun` are warm ones.

    The server is started here: a scheduler ends what a job has started.
    """
    ask(["-c", ""])
    places = [f"export {name}={os.environ[name]}" for name in (PLACE, SESSION)]
    return [*places, f"export PATH={programs()}:$PATH PYTHON_EXEC={programs()}/python"]


def ask(arguments: list[str], *, passing_on: bool = False) -> int:
    """Have the server run `python *arguments`, and pass signals on to it; the exit code."""
    asked = json.dumps({"arguments": arguments, "folder": os.getcwd(), "environment": dict(os.environ)}).encode()
    with _connect() as server:
        socket.send_fds(server, [len(asked).to_bytes(8, "big")], [0, 1, 2])
        server.sendall(asked)
        answers = server.makefile("rb")
        child = int(answers.readline())
        if passing_on:
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda number, _: os.killpg(child, number))
        return int(answers.readline() or 1)


def _connect() -> socket.socket:
    """To the server, which is started where there is none."""
    path = os.path.join(os.environ[PLACE], "socket")
    connection = socket.socket(socket.AF_UNIX)
    with open(f"{path}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        try:
            connection.connect(path)
        except (FileNotFoundError, ConnectionRefusedError):
            with contextlib.suppress(FileNotFoundError):
                os.remove(path)
            with open(f"{path}.log", "a") as log:
                command = [sys.executable, __file__, "--serve", path]
                quiet: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": log}
                subprocess.Popen(command, cwd="/", env=os.environ | SHOWN, start_new_session=True, **quiet)
            while not os.path.exists(path):
                time.sleep(0.01)
            connection.connect(path)
    return connection


def serve(path: str) -> None:
    """Import NeMo, and fork for every call until the session has ended."""
    session = int(os.environ[SESSION])
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(f"{path}.begun")
    listening.listen(64)
    os.rename(f"{path}.begun", path)
    sys.path.remove(os.path.dirname(os.path.abspath(__file__)))
    import gc

    import nemo.collections.llm
    import nemo.lightning.io  # noqa: F401

    import aligner.cli.commands
    import aligner.train.training_run  # noqa: F401
    from aligner.checkpoint import huggingface

    huggingface.PYTHON = f"{programs()}/python"

    # Nothing of it is garbage, and pages that a collection writes to are no longer shared with those forked.
    gc.collect()
    gc.freeze()
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while os.path.exists(f"/proc/{session}"):
        if select.select([listening], [], [], 1.0)[0]:
            connection, _ = listening.accept()
            if not os.fork():
                listening.close()
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                os._exit(_watch(connection))
            connection.close()
    shutil.rmtree(os.environ[PLACE])


def _watch(connection: socket.socket) -> int:
    """Fork for one call, and tell its end; end it when the caller has ended."""
    head, streams, *_ = socket.recv_fds(connection, 8, 3)
    size, asked = int.from_bytes(head, "big"), array.array("B")
    while len(asked) < size:
        asked.frombytes(connection.recv(size - len(asked)))
    child = os.fork()
    if not child:
        connection.close()
        _become(json.loads(asked.tobytes()), streams)
    for stream in streams:
        os.close(stream)
    ended = os.pidfd_open(child)
    with contextlib.suppress(BrokenPipeError):
        connection.sendall(f"{child}\n".encode())
    while ended not in select.select([ended, connection], [], [])[0]:
        os.killpg(child, signal.SIGKILL)
        select.select([ended], [], [])
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    with contextlib.suppress(BrokenPipeError):
        connection.sendall(f"{code}\n".encode())
    return 0


def _become(asked: dict[str, Any], streams: list[int]) -> None:
    """Be the process that was asked for."""
    os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    sys.stdin, sys.stdout = open(0), open(1, "w")  # noqa: SIM115
    sys.stderr = open(2, "w", buffering=1, errors="backslashreplace")  # noqa: SIM115
    sys.__stdin__, sys.__stdout__, sys.__stderr__ = sys.stdin, sys.stdout, sys.stderr
    os.environ.clear()
    os.environ.update(asked["environment"])
    os.chdir(asked["folder"])
    _end(_run(asked["arguments"]))


def _run(arguments: list[str]) -> int:
    """`-c code`, `-m module` or a script, as Python itself runs them; the exit code."""
    kind, *rest = arguments[1:] if arguments[0] == "-u" else arguments
    before = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    sys.path[:0] = [os.path.dirname(os.path.abspath(kind)) if kind[0] != "-" else "", *before]
    if "NEMORUN_HOME" in os.environ:
        from nemo_run.config import set_nemorun_home

        set_nemorun_home(os.environ["NEMORUN_HOME"])
    try:
        if kind == "-c":
            sys.argv = ["-c", *rest[1:]]
            main = sys.modules["__main__"] = ModuleType("__main__")
            exec(compile(rest[0], "<string>", "exec"), main.__dict__)
        elif kind == "-m":
            sys.argv = rest
            runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
        else:
            sys.argv = [kind, *rest]
            runpy.run_path(kind, run_name="__main__")
    except SystemExit as ended:
        if isinstance(ended.code, str):
            print(ended.code, file=sys.stderr)
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())  # type: ignore[arg-type]
        return 1
    return 0


def _end(code: int) -> None:
    """What an interpreter does at its end, except to take itself apart."""
    import atexit
    import threading

    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code & 0xFF)


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve(sys.argv[2])
    else:
        ended = ask(sys.argv[1:], passing_on=True)
        if ended < 0:
            # By a signal, as the forked process.
            if -ended != signal.SIGKILL:
                signal.signal(-ended, signal.SIG_DFL)
            os.kill(os.getpid(), -ended)
        sys.exit(ended)
