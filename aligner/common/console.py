"""Console messages; NeMo's messages go to the run's log files only.

NeMo and Megatron print a few hundred lines before the first step. The run's `nemo_log_globalrank-*.txt` has these
lines; NEMO_ALIGN_VERBOSE=1 also prints them to the console.
"""

from __future__ import annotations

import atexit
import functools
import gc
import logging
import os
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any, TextIO

from aligner.common.errors import UserError
from aligner.common.secrets_filter import hidden

VERBOSE = os.environ.get("NEMO_ALIGN_VERBOSE", "0") != "0"

# Loggers that print messages at import on which a user cannot act.
NOISY_LOGGERS = (
    "nemo",
    "megatron",
    "nv_one_logger",
    "lightning",
    "lightning.pytorch",
    "lightning.fabric",
    "pytorch_lightning",
    "torch.distributed",
)


@functools.cache
def _skip_gc_at_exit() -> None:
    # At exit Python would traverse the 850,000 objects of NeMo's imports several times: three seconds.
    atexit.register(gc.freeze)


def silence_nemo() -> None:
    """Restrict NeMo's messages to its log files, and shorten the exit of the process.

    Call it before the rest of NeMo is imported, and again after: importing NeMo re-enables Lightning's messages.
    """
    _skip_gc_at_exit()
    if VERBOSE:
        return
    warnings.filterwarnings("ignore", message=".*pynvml package is deprecated")
    warnings.filterwarnings("ignore", module="megatron|nemo|lightning|modelopt|torch|transformers")
    # The process of Megatron's checkpoint writer inherits this.
    os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")
    # Messages of the root logger: "Cannot import zarr", "fused_indices_to_multihot has reached end of life".
    logging.getLogger().setLevel(logging.ERROR)
    import lightning.pytorch  # noqa: F401 - the import sets the levels of Lightning's loggers
    from nemo.utils import logging as nemo_logging

    for name in NOISY_LOGGERS:
        logging.getLogger(name).setLevel(logging.ERROR)
    nemo_logging.remove_stream_handlers()


def install_excepthook() -> None:
    """In a job started by NeMo-Run, write an uncaught exception in one write; a UserError without traceback.

    Python writes a traceback in fragments, and Slurm would print each fragment as a line.
    """
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None or spec.name != "nemo_run.core.runners.fdl_runner":
        return

    def write_exception(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        user = isinstance(error, UserError)
        lines = [f"{kind.__name__}: {error}\n"] if user else traceback.format_exception(kind, error, trace)
        sys.stderr.write(hidden("".join(lines)))

    sys.excepthook = write_exception


def close_log_files(folder: Path) -> None:
    """Close the log files below a folder; else the log of a run would hold all later ones of the process."""
    from nemo.utils import logging as nemo_logging

    def belongs(handler: logging.Handler) -> bool:
        return isinstance(handler, logging.FileHandler) and Path(handler.baseFilename).is_relative_to(folder.resolve())

    loggers = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
    for logger in (logger for logger in loggers if isinstance(logger, logging.Logger)):
        for handler in filter(belongs, list(logger.handlers)):
            logger.removeHandler(handler)
            handler.close()
    # NeMo would add these to loggers again, and a closed file opens at the next line.
    for name, handler in list(nemo_logging._handlers.items()):
        if belongs(handler):
            del nemo_logging._handlers[name]


def is_first_rank() -> bool:
    """Whether the launcher's environment names this process rank 0; needs no torch.distributed."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def messages() -> TextIO:
    """Return the stream of messages and progress: standard error; in a notebook, which shows that in red, output."""
    return sys.stdout if "ipykernel" in sys.modules else sys.stderr


def log_rank0(message: str) -> None:
    """Log one line of this package on the console of rank 0 and in the run's log file."""
    from nemo.utils import logging as nemo_logging

    nemo_logging.info(hidden(message))
    if not VERBOSE and is_first_rank():
        log(message)


def log(message: str) -> None:
    """Print one line of this package without importing NeMo, for launchers."""
    print(f"[align] {hidden(message)}", file=messages(), flush=True)
