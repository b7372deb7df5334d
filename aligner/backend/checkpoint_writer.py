"""Parts of the processes with which Megatron writes a checkpoint; `aligner.backend.patches` puts them in place."""

from __future__ import annotations

import contextlib
import multiprocessing
import multiprocessing.connection
import multiprocessing.context
import os
import pickle
import threading
from typing import Any


class PickledQueue:
    """Queue of a manager that holds bytes; unpickling the results would import torch in the manager's process."""

    def __init__(self, queue: Any) -> None:
        self._queue = queue

    def put(self, value: Any) -> None:
        self._queue.put(pickle.dumps(value))

    def get_nowait(self) -> Any:
        return pickle.loads(self._queue.get_nowait())


class WriterProcess(multiprocessing.context.ForkProcess):
    """A process that writes shards; a killed one is told to the process that waits for it for ever."""

    def start(self) -> None:
        given = dict(getattr(self, "_kwargs"))  # noqa: B009 - a process forgets its arguments when it starts
        super().start()
        threading.Thread(target=self._watch, args=(given,), daemon=True).start()

    def _watch(self, given: dict[str, Any]) -> None:
        multiprocessing.connection.wait([self.sentinel])
        code = None
        with contextlib.suppress(ChildProcessError):  # it ended well, and was waited for
            code = os.waitid(os.P_PID, self.pid or 0, os.WEXITED | os.WNOWAIT)
        if code is not None and code.si_code in (os.CLD_KILLED, os.CLD_DUMPED):
            why = f"a process that wrote it was ended by signal {code.si_status}"
            error = RuntimeError(f"{why}, most likely for want of memory" if code.si_status == 9 else why)
            given["results_queue"].put((given["local_proc_idx"], error))
            given["count_queue"].get()
            given["count_queue"].task_done()


class WatchedContext(multiprocessing.context.ForkContext):
    """A context whose processes are watched."""

    Process = WriterProcess
