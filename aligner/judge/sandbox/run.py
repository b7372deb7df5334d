"""Runs an answer's code and its tests, and reads the verdict from the tests' side only.

The answer may be hostile: it runs in a sandbox of bubblewrap without network, home folder, environment or other
processes, with limits. The tests run in a second sandbox. Their exit status and a pipe that the first has not got are
the verdict.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import platform
import select
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from aligner.common.errors import ConfigError
from aligner.judge.sandbox import entry, system_calls, test_side

PROCESSES = 32
"""Processes and threads that a sandbox may have at a time."""
WORK_MB = 64
"""Size of the folder in which a side runs, and which it may write."""
START_SECONDS = 60
"""How long a sandbox may take to start, on a machine under load."""
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
ISOLATIONS = ("bubblewrap", "none")
PROGRAM = "import sys; sys.path.insert(0, {!r}); from aligner.judge.sandbox.entry import main; main()"
ROOT = "/program"
"""Where a sandbox has this folder, as a part of its package."""
HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Limits:
    seconds: float
    memory_mb: int


def passes(code: str, tests: str, limits: Limits, isolation: str) -> bool:
    """Return whether the tests of the code come to their end.

    Raises:
        ConfigError: `isolation` is unknown, or bubblewrap is missing or refused.
    """
    if isolation not in ISOLATIONS:
        raise ConfigError(f"isolation: {isolation!r} is not one of {', '.join(ISOLATIONS)}")
    if isolation == "bubblewrap":
        _check_bubblewrap()
    from_tests, to_answer = os.pipe()
    from_answer, to_tests = os.pipe()
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="python-tests-"))
        try:
            side = functools.partial(Side, limits=limits, isolation=isolation, folder=folder)
            answer = stack.enter_context(side("answer", code, from_tests, to_tests).running())
            verdict = stack.enter_context(side("tests", tests, from_answer, to_answer).running())
        finally:
            for number in (from_tests, to_answer, from_answer, to_tests):
                os.close(number)
        verdict.wait_until_started()
        answer.wait_until_started()
        deadline = time.monotonic() + limits.seconds
        return verdict.read_status(deadline) == test_side.PASSED and verdict.exit_code(deadline + 1) == 0


class Side:
    """A process that runs the answer or the tests."""

    def __init__(
        self, name: str, text: str, reading: int, writing: int, *, limits: Limits, isolation: str, folder: str
    ) -> None:
        self._name, self._isolated, self._folder = name, isolation == "bubblewrap", folder
        self._task = {
            "text": text,
            "seconds": math.ceil(limits.seconds),
            "memory_mb": limits.memory_mb,
            "processes": PROCESSES if self._isolated else None,
        }
        self._pipes = reading, writing

    @contextlib.contextmanager
    def running(self) -> Iterator[Side]:
        """Start it, and end it with all that it started."""
        self._status, status = os.pipe()
        with tempfile.TemporaryFile() as task, tempfile.TemporaryFile() as calls, contextlib.ExitStack() as opened:
            opened.callback(os.close, self._status)
            task.write(json.dumps(self._task).encode())
            task.seek(0)
            numbers = [*self._pipes, status]
            root = ROOT if self._isolated else str(HERE.parents[2])
            program = ["-I", "-S", "-B", "-c", PROGRAM.format(root), self._name, *map(str, numbers)]
            mapping = _Mapping() if self._isolated and os.geteuid() == 0 else None
            command = [_python(), *program]
            if self._isolated:
                calls.write(system_calls.seccomp_filter())
                calls.seek(0)
                command = [*_bubblewrap(mapping), "--seccomp", str(calls.fileno()), *command]
            try:
                self._process = subprocess.Popen(
                    command, cwd=self._folder, env={}, stdin=task, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
                    start_new_session=True, pass_fds=[*numbers, calls.fileno(), *(mapping.passed if mapping else ())],
                )  # fmt: skip
            finally:
                os.close(status)
                if mapping:
                    mapping.close_passed()
            try:
                if mapping:
                    mapping.write()
                yield self
            finally:
                # bubblewrap ends its sandbox when it ends; without it, this ends the process group.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
                assert self._process.stderr is not None
                self._process.stderr.close()

    def wait_until_started(self) -> None:
        """Wait until limits are set and nothing of the code has run.

        Raises:
            OSError: the process ended before.
        """
        if self.read_status(time.monotonic() + START_SECONDS, len(entry.STARTED)) != entry.STARTED:
            raise OSError(f"the sandbox of the {self._name} did not start: {self.complaint()}")

    def read_status(self, deadline: float, size: int = 64) -> bytes:
        """Return what the process writes to its status pipe until it closes it, or until the deadline."""
        said = b""
        while len(said) < size and select.select([self._status], [], [], max(0, deadline - time.monotonic()))[0]:
            more = os.read(self._status, size - len(said))
            if not more:
                break
            said += more
        return said

    def exit_code(self, deadline: float) -> int | None:
        try:
            return self._process.wait(max(0.1, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            return None

    def complaint(self) -> str:
        """Return the last line that the process wrote to standard error."""
        assert self._process.stderr is not None
        os.set_blocking(self._process.stderr.fileno(), False)
        lines = (self._process.stderr.read(4096) or b"").decode(errors="replace").strip().splitlines()
        return lines[-1] if lines else f"exit code {self._process.poll()}, no message"


class _Mapping:
    """The users of a sandbox that root starts: root, which prepares it, and nobody, which the code runs as.

    bubblewrap by itself maps one user, and the machine's root is exempt from the limit of processes.
    """

    def __init__(self) -> None:
        blocked, self._unblock = os.pipe()
        self._info, info = os.pipe()
        self.passed = blocked, info

    def options(self) -> list[str]:
        blocked, info = map(str, self.passed)
        capabilities = ("--cap-add", "CAP_SETUID", "--cap-add", "CAP_SETGID")
        return ["--userns-block-fd", blocked, "--info-fd", info, *capabilities]

    def close_passed(self) -> None:
        for number in self.passed:
            os.close(number)

    def write(self) -> None:
        with open(self._info, "rb") as info, open(self._unblock, "wb") as unblock, contextlib.suppress(ValueError):
            # A ValueError: bubblewrap ended and says why on its standard error.
            process = json.load(info)["child-pid"]
            for kind in ("uid", "gid"):
                Path(f"/proc/{process}/{kind}_map").write_text(f"0 0 1\n{entry.NOBODY} {entry.NOBODY} 1\n")
            unblock.write(b"1")


@functools.cache
def _check_bubblewrap() -> None:
    """Start an empty sandbox, once.

    Raises:
        ConfigError: it does not start.
    """
    remedy = (
        "install bubblewrap (`apt install bubblewrap`) and allow user namespaces, or, inside a container of its own, "
        'pass isolation="none"'
    )
    if shutil.which("bwrap") is None:
        raise ConfigError(f"isolation: bubblewrap was tried, and there is no `bwrap` on the PATH; {remedy}")
    if not system_calls.machine_is_known():
        raise ConfigError(f"isolation: bubblewrap has no list of system calls for {platform.machine()}; {remedy}")
    pipe = os.pipe()
    try:
        with Side("answer", "", *pipe, limits=Limits(10, 1024), isolation="bubblewrap", folder="/").running() as side:
            side.wait_until_started()
    except OSError as error:
        tried = shlex.join(_bubblewrap(None)[:7])
        raise ConfigError(f"isolation: bubblewrap was tried ({tried} ...), and answered: {error}; {remedy}") from None
    finally:
        for number in pipe:
            os.close(number)


def _python() -> str:
    return os.path.realpath(sys.executable)


def _bubblewrap(mapping: _Mapping | None) -> list[str]:
    """Return the command that a sandbox's command follows."""
    options = [
        "--unshare-user", "--unshare-all", "--die-with-parent", "--new-session", "--clearenv", "--cap-drop", "ALL",
        *(mapping.options() if mapping else ("--uid", str(entry.NOBODY), "--gid", str(entry.NOBODY))),
        *_read_only(), "--proc", "/proc",
        *(part for device in DEVICES for part in ("--dev-bind", device, device)),
        "--size", str(WORK_MB << 20), "--perms", "0777", "--tmpfs", "/work", "--chdir", "/work", "--remount-ro", "/",
    ]  # fmt: skip
    return [shutil.which("bwrap") or "bwrap", *options]


@functools.cache
def _read_only() -> tuple[str, ...]:
    """Return the options that show the system's programs, Python, and this folder."""
    options = ["--ro-bind", "/usr", "/usr"]
    for name in ("bin", "sbin", "lib", "lib32", "lib64"):
        folder = Path("/", name)
        if folder.is_symlink():
            options += ["--symlink", os.readlink(folder), str(folder)]
        elif folder.is_dir():
            options += ["--ro-bind", str(folder), str(folder)]
    # The libraries of the interpreter, which may stand in somebody's home folder.
    needed = {_python()}
    for prefix in (sys.base_prefix, sys.base_exec_prefix):
        needed |= {os.path.join(prefix, name) for name in ("lib", "lib64")}
    shown = {path: os.path.realpath(path) for path in needed if not path.startswith("/usr/") and os.path.exists(path)}
    shown[f"{ROOT}/aligner/judge/sandbox"] = str(HERE)
    if os.path.exists("/etc/ld.so.cache"):
        shown["/etc/ld.so.cache"] = "/etc/ld.so.cache"
    # bubblewrap makes folders that only root of the sandbox may enter.
    for folder in sorted({str(folder) for path in [*shown, *DEVICES] for folder in Path(path).parents} - {"/"}):
        options += ["--perms", "0755", "--dir", folder]
    for path, source in sorted(shown.items()):
        options += ["--ro-bind", source, path]
    return tuple(options)
