"""What the functions that make executors take, refuse, and read from a site's file."""

import os
import sys
from pathlib import Path

import nemo_run as run
import pytest

from aligner import executors
from aligner.common.errors import ConfigError
from aligner.executors.slurm import seconds_of


@pytest.mark.parametrize(
    ("time", "seconds"),
    [("90", 5400), ("90:30", 5430), ("04:00:00", 14400), ("1-2", 93600), ("1-2:03", 93780), ("2-00:00:01", 172801)],
)
def test_slurms_times(time: str, seconds: int) -> None:
    assert seconds_of(time) == seconds


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"time": "4h"}, r"run.executor.time: '4h' is not a time; write \[D-\]HH:MM:SS"),
        ({"time": "00:01:00"}, r"run.executor.signal_delay_s: 120 s before the end of a job of 00:01:00"),
        ({"ssh": "me@there"}, r"run.executor.job_dir: missing"),
        ({"ssh": "there", "job_dir": "/jobs"}, r"run.executor.ssh: 'there'; write user@host"),
        (
            {"ssh": "me@there", "job_dir": "/j", "ssh_identity": "/none"},
            r"run.executor.ssh_identity: there is no /none",
        ),
        ({"launcher": "torchrun"}, r"run.executor.launcher: 'torchrun' is neither None nor ft"),
        ({"launcher": "ft", "retries": 0}, r"run.executor.retries: 0, and with launcher=ft"),
        ({"env_vars": {"WANDB_API_KEY": "x"}}, r"WANDB_API_KEY looks like a secret"),
        ({"env_vars": {"lower": "x"}}, r"lower, but NeMo-Run exports names in capitals only"),
        ({"env_vars": {"LINES": "a\nb"}}, r"LINES has more than one line"),
    ],
)
def test_what_slurm_cannot_be_asked_is_refused(given: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        executors.slurm(account="a", **given)  # type: ignore[arg-type]


def test_the_guides_script_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight nodes of eight GPUs in a container: what docs/slurm.md sets beside NVIDIA's own script."""
    monkeypatch.chdir(tmp_path)
    made = executors.slurm(
        account="acct", partition="batch", nodes=8, gpus_per_node=8, time="04:00:00",
        container_image="nemo:25.07", container_mounts=["/data:/data"],
    )  # fmt: skip
    assert (made.nnodes(), made.nproc_per_node(), made.ntasks_per_node, made.gpus_per_node) == (8, 8, 8, 8)
    assert made.exclusive and made.additional_parameters == {"overcommit": True, "kill_on_invalid_dep": "yes"}
    assert made.signal == "TERM@120" and made.retries == 20
    assert made.container_mounts == ["/data:/data", f"{tmp_path}:{tmp_path}"]
    assert not any("workdir" in argument or "chdir" in argument for argument in made.srun_args or [])
    # Not this machine's Python, in a container or on another machine.
    assert str(Path(sys.executable).parent) not in str(made.setup_lines)


def test_outside_of_a_repository_nothing_is_shipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert type(executors.slurm(account="a").packager) is run.Packager


def test_a_site_has_its_executors_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "executors.toml"
    monkeypatch.setenv("NEMO_ALIGN_EXECUTORS", str(file))
    with pytest.raises(ConfigError, match=r"there is no \[mine\]; there are: none"):
        executors.profile("mine")
    file.write_text(
        '[mine]\nexecutor = "slurm"\naccount = "acct"\nnodes = 2\n[here]\nexecutor = "local"\nntasks_per_node = 2\n'
    )
    assert executors.profile("mine", nodes=4).nnodes() == 4
    assert executors.profile("here").nproc_per_node() == 2
    for text, message in (
        ("[mine", "is not TOML"),
        ('[mine]\naccount = "acct"', r'\[mine\]: expected executor = "slurm", "docker" or "local"'),
        ('[mine]\nexecutor = "slurm"\nqueue = "x"', r"slurm has no setting 'queue'; it has: account, partition"),
    ):
        file.write_text(text)
        with pytest.raises(ConfigError, match=message):
            executors.profile("mine")


def test_jobs_use_the_python_that_launches_them() -> None:
    path = executors.local(ntasks_per_node=3, env_vars={"MINE": "x"}).env_vars
    assert path["PATH"].split(os.pathsep)[0] == str(Path(sys.executable).parent)
    assert path["MINE"] == "x"
    assert executors.local(ntasks_per_node=3).nproc_per_node() == 3
