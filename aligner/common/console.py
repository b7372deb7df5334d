"""Messages on the screen; NeMo's own stay in the run's log files.

NeMo and Megatron print a few hundred lines before the first step. They stay in `nemo_log_globalrank-*.txt` of the
run; with NEMO_ALIGN_VERBOSE=1 they appear on the screen too.
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
from typing import Any

from aligner.common.errors import UserError

VERBOSE = os.environ.get("NEMO_ALIGN_VERBOSE", "0") != "0"

# Loggers that speak at import of things that a user cannot change.
CHATTY = (
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
def _end_soon() -> None:
    # Python would go through the 850,000 objects of NeMo's imports several times before it ends: three seconds.
    atexit.register(gc.freeze)


def silence_nemo() -> None:
    """Keep NeMo's messages to its log files, and its end short.

    To be called before the rest of NeMo is imported, and after it, too: its import gives Lightning its voice back.
    """
    _end_soon()
    if VERBOSE:
        return
    warnings.filterwarnings("ignore", message=".*pynvml package is deprecated")
    warnings.filterwarnings("ignore", module="megatron|nemo|lightning|modelopt|torch|transformers")
    # For the process that Megatron's checkpoint writer starts, too.
    os.environ.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")
    # Messages of the root logger: "Cannot import zarr", "fused_indices_to_multihot has reached end of life".
    logging.getLogger().setLevel(logging.ERROR)
    import lightning.pytorch  # noqa: F401 - sets its loggers' levels when imported
    from nemo.utils import logging as nemo_logging

    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.ERROR)
    nemo_logging.remove_stream_handlers()


def install_excepthook() -> None:
    """In a job that NeMo-Run started, have an error end the log in one piece; a user's own by its message alone.

    Python writes a traceback bit by bit, which Slurm would make a line each.
    """
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec is None or spec.name != "nemo_run.core.runners.fdl_runner":
        return

    def told(kind: type[BaseException], error: BaseException, trace: Any) -> None:
        user = isinstance(error, UserError)
        said = [f"{kind.__name__}: {error}\n"] if user else traceback.format_exception(kind, error, trace)
        sys.stderr.write("".join(said))

    sys.excepthook = told


def is_first_rank() -> bool:
    """Whether the launcher made this process rank 0; known before torch.distributed is."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def log_rank0(message: str) -> None:
    """One line of this package's own, on the screen of rank 0 and in the run's log file."""
    from nemo.utils import logging as nemo_logging

    nemo_logging.info(message)
    if not VERBOSE and is_first_rank():
        log(message)


def log(message: str) -> None:
    """Print one line of this package's own, without importing NeMo: for those who launch runs."""
    print(f"[align] {message}", file=sys.stderr, flush=True)
