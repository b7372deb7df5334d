"""The same Slurm with accounts: slurmdbd and MariaDB, and the real `sacct`."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cluster import HERE, slurm

from aligner import executors
from aligner.executors.accounting import STAND_IN


@pytest.mark.slow
def test_a_job_is_followed_by_its_accounts(
    tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nemo_run.config import set_nemorun_home

    set_nemorun_home(str(tmp_path / "nemorun"))
    monkeypatch.chdir(tmp_path)
    with slurm(tmp_path / "cluster", accounts=True) as environment, open(os.devnull) as nothing:
        monkeypatch.setattr("sys.stdin", nothing)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        executor = executors.slurm(account="tests", mem="3000", exclusive=False, env_vars=HERE)
        executors.launch({"short": tiny("short")}, executor, name="short")
        assert str(STAND_IN) not in os.environ["PATH"]
        assert (tmp_path / "runs/short/launched.json").is_file()
        broken = tiny("broken")
        broken.data.train = str(tmp_path / "none.jsonl")
        with pytest.raises(executors.JobFailed, match=r"'broken' ended as FAILED \(job \d+, exit code 1, on n"):
            executors.launch({"broken": broken}, executor, name="broken")
