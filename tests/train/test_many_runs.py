"""Many runs in one process, as in a notebook: nothing of a run is left when it has ended."""

import gc
import logging
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil


def left() -> dict[str, int]:
    gc.collect()
    loggers = [logging.getLogger(), *logging.Logger.manager.loggerDict.values()]
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "handlers": sum(len(logger.handlers) for logger in loggers if isinstance(logger, logging.Logger)),
        "threads": threading.active_count(),
        "system threads": psutil.Process().num_threads(),
    }


def test_nothing_is_left_of_ten_runs(tiny: Callable[..., Any], execute: Callable[[Any], Path]) -> None:
    folders, counts, memory = [], [], []
    for i in range(10):
        recipe = tiny(f"run-{i}")
        recipe.trainer.max_steps = 2
        folders.append(execute(recipe))
        counts.append(left())
        memory.append(psutil.Process().memory_info().rss / 2**20)
    # The first runs make what the process keeps: caches, the checkpoint writer.
    for name, number in counts[-1].items():
        # A thread may be on its way out.
        assert number <= counts[2][name] + (2 if "threads" in name else 0), (name, counts)
    assert memory[-1] - memory[2] < 50, memory
    for i, folder in enumerate(folders):
        (log,) = folder.glob("nemo_log_globalrank-0*")
        said = log.read_text()
        assert said.count("train: 16 of 16 pairs") == 1
        assert not any(str(other) + "/" in said for j, other in enumerate(folders) if j != i), "of another run"
