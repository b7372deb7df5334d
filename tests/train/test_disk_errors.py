"""Disks that are full or over a quota, and writers that a system ends."""

import errno
import functools
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aligner.checkpoint import folders
from aligner.checkpoint.disk_errors import translate_io_errors
from aligner.common.errors import CheckpointError

Tiny = Callable[..., Any]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk_names_the_file(tmp_path: Path, number: int) -> None:
    file = str(tmp_path / "tokens/x.arrow")
    with (
        pytest.raises(CheckpointError, match=rf"log.log_dir: the disk of {file} is full"),
        translate_io_errors(tmp_path),
    ):
        raise ValueError("while tokenizing") from OSError(number, os.strerror(number), file)
    with pytest.raises(CheckpointError, match=rf"the disk of {tmp_path} is full"), translate_io_errors(tmp_path):
        raise RuntimeError(os.strerror(number))
    with pytest.raises(OSError, match="Permission"), translate_io_errors(tmp_path):
        raise OSError(errno.EACCES, "Permission denied", file)


def test_a_writer_that_is_killed_is_told_and_the_run_goes_on(
    tiny: Tiny, execute: Callable[[Any], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a system does that has no memory left; Megatron waits for such a process for ever."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    parent = os.getpid()
    real = filesystem_async._write_item

    @functools.wraps(real)
    def killed(*arguments: Any, **named: Any) -> Any:
        if os.getpid() != parent and not (tmp_path / "calm").exists():
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*arguments, **named)

    monkeypatch.setattr(filesystem_async, "_write_item", killed)
    with pytest.raises(
        CheckpointError, match=r"a process that wrote it was ended by signal 9, most likely for want of"
    ):
        execute(tiny())
    (tmp_path / "calm").touch()
    newest = folders.latest_checkpoint(execute(tiny()))
    assert newest is not None and newest.name == "step=4"
