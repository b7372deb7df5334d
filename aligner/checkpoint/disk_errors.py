"""Disk errors of a run, as one CheckpointError."""

from __future__ import annotations

import contextlib
import errno
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch.distributed.checkpoint.api import CheckpointException

from aligner.checkpoint import folders
from aligner.common.errors import AlignError, CheckpointError


@contextlib.contextmanager
def translate_io_errors(run: Path) -> Iterator[None]:
    """Turn disk errors of the run in this folder into one message.

    Raises:
        CheckpointError: the disk is full, or a checkpoint cannot be written or read.
    """
    try:
        yield
    except AlignError:
        raise
    except (Exception, CheckpointException) as error:  # torch derives the latter from BaseException
        maybe_disk = isinstance(error, CheckpointException | OSError | RuntimeError) and not _is_gpu_oom(error)
        full = _full_disk(error)
        if full is not None or (maybe_disk and _lacks_disk_space(run)):
            raise CheckpointError(
                f"log.log_dir: the disk of {full or run} is full; the checkpoint being written is not usable and will "
                "be passed over. Free some room and run the same command again: it goes on from the newest whole one"
            ) from error
        if isinstance(error, CheckpointException):
            failures = "; ".join(f"rank {rank}: {failed[0]}" for rank, failed in error.failures.items())
            raise CheckpointError(f"log.log_dir: a checkpoint of {run} failed: {failures}") from error
        raise


def _is_gpu_oom(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError)


def _full_disk(error: BaseException | None) -> str | None:
    """Return the file whose disk or quota is full, as far as the error knows it; None for another error."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            return str(error.filename or "")
        if any(text in str(error) for text in ("No space left", "Disk quota exceeded")):
            return ""
        error = error.__cause__ or error.__context__
    return None


def _lacks_disk_space(run: Path) -> bool:
    """Return whether a checkpoint of the run is unfinished and the free space is below a checkpoint's size.

    torch's writer reports a short write as a position in its archive, not as a full disk.
    """
    checkpoints = folders.folders(run)
    if not any(map(folders.is_unfinished, checkpoints)):
        return False
    return shutil.disk_usage(run).free < max(map(folders.disk_usage, checkpoints))
