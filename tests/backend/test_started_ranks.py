"""How many processes were started, in Slurm's batch scripts and shells as under srun and torchrun."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aligner.backend import distributed
from aligner.common.errors import ConfigError

Tiny = Callable[..., Any]
SHELL = {
    "SLURM_NTASKS": "4", "SLURM_NTASKS_PER_NODE": "4", "SLURM_JOB_ID": "11", "SLURM_JOB_NAME": "myjob",
    "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NODELIST": "localhost",
    "SLURM_JOB_NODELIST": "localhost", "SLURM_NNODES": "1",
}  # fmt: skip
"""Of a script that asked for four tasks and starts one without srun."""


@pytest.fixture
def shell(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name, value in SHELL.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("more", "expected"),
    [({"SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_ID": "0"}, 4), ({"WORLD_SIZE": "2"}, 2), ({"SLURM_NTASKS": "1"}, 1)],
)
def test_what_was_started_counts(shell: pytest.MonkeyPatch, more: dict[str, str], expected: int) -> None:
    for name, value in more.items():
        shell.setenv(name, value)
    assert distributed.started_ranks() == expected


def test_a_process_that_would_wait_for_others_for_ever_is_told(
    shell: pytest.MonkeyPatch, tiny: Tiny, execute: Callable[[Any], Path]
) -> None:
    told = "SLURM_NTASKS: 4 tasks were asked for, but one process is here, which srun did not start; start it by srun"
    with pytest.raises(ConfigError, match=told), distributed.rank_zero_first():
        pass
    with pytest.raises(ConfigError, match=told):
        execute(tiny())
