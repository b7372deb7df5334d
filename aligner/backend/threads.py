"""Number of threads of a run on CPUs."""

import os

import torch

from aligner.backend.device import no_cuda

SMALL = 256
"""Hidden size below which a second thread waits more than it computes."""


def choose_num_threads(hidden_size: int) -> None:
    """Compute with one thread if the model is small; `OMP_NUM_THREADS` in the environment has precedence.

    OpenMP's threads wait for each other in a busy loop. Beside one other program on two cores, a step of the demo's
    model takes three times as long with two threads as with one (`benchmarks/threads.py`).
    """
    if no_cuda() and hidden_size < SMALL and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)
        os.environ["OMP_NUM_THREADS"] = "1"  # otherwise Lightning sets both to the number of cores
