"""The same Slurm with accounts (slurmdbd, MariaDB and the real `sacct`), from its login node and by SSH."""

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from cluster import HERE, slurm, sshd, wait
from launching import TIME_LIMIT
from submitting import submitting_from

from aligner import executors
from aligner.common.errors import ConfigError
from aligner.common.run_folder import job_folders, read_metrics
from aligner.executors.sacct_shim import SHIM

Tiny = Callable[..., Any]
pytestmark = pytest.mark.slow
SMALL: dict[str, Any] = {"account": "tests", "mem": "3000", "exclusive": False, "env_vars": HERE}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("accounts")
    with (
        slurm(folder / "cluster", accounts=True) as environment,
        submitting_from(folder, environment),
        sshd(folder / "ssh", environment) as (port, key),
    ):
        (folder / "port").write_text(str(port))
        assert key == folder / "ssh/user"
        yield folder


def test_a_job_is_followed_by_its_accounts(home: Path, tiny: Tiny, tmp_path: Path) -> None:
    executor = executors.slurm(**SMALL)
    executors.launch({"short": tiny("short")}, executor, name="short")
    assert str(SHIM) not in os.environ["PATH"]
    assert (tmp_path / "runs/short/succeeded.json").is_file()
    broken = tiny("broken")
    broken.data.train = str(tmp_path / "none.jsonl")
    with pytest.raises(executors.JobFailed, match=r"'broken' ended as FAILED \(job \d+, exit code 1, on n"):
        executors.launch({"broken": broken}, executor, name="broken")


def by_ssh(home: Path, **settings: Any) -> Any:
    given: dict[str, Any] = {
        "ssh": f"root@127.0.0.1:{(home / 'port').read_text()}",
        "ssh_identity": str(home / "ssh/user"),
    }
    activate = f"export PATH={Path(sys.executable).parent}:$PATH"
    return executors.slurm(**SMALL, job_dir=str(home / "there"), setup_lines=[activate], **(given | settings))


def test_a_job_is_submitted_and_followed_by_ssh(home: Path, tiny: Tiny, tmp_path: Path) -> None:
    executors.launch({"far": tiny("far")}, by_ssh(home), name="far")
    assert (tmp_path / "runs/far/succeeded.json").is_file()
    assert read_metrics(tmp_path / "runs/far/metrics.csv")[-1]["step"] == 4
    assert list((home / "there").glob("**/far_sbatch.sh")), "it was sent there"
    broken = tiny("broken")
    broken.data.train = str(tmp_path / "none.jsonl")
    with pytest.raises(executors.JobFailed, match=r"'broken' ended as FAILED \(job \d+, exit code 1, on n") as found:
        executors.launch({"broken": broken}, by_ssh(home), name="broken")
    assert "none.jsonl: no such file" in str(found.value)


def test_a_key_that_opens_nothing_is_told(home: Path, tiny: Tiny, tmp_path: Path) -> None:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(tmp_path / "other")], check=True)
    with pytest.raises(ConfigError, match=r"run.executor.ssh: root@127.0.0.1 lets nobody in with this key"):
        executors.launch({"far": tiny("far")}, by_ssh(home, ssh_identity=str(tmp_path / "other")), name="far")


def test_a_job_that_is_put_back_is_still_followed(home: Path, tiny: Tiny, tmp_path: Path) -> None:
    import threading

    from hand import Slow
    from nemo_run import Config

    recipe = tiny("requeued")
    recipe.trainer.max_steps, recipe.trainer.callbacks = 8, [Config(Slow, seconds=1.0)]
    tests = str(Path(__file__).parent.parent)
    executor = executors.slurm(**SMALL, setup_lines=[f"export PYTHONPATH=$PYTHONPATH:{tests}"])
    failed: list[BaseException] = []

    def work() -> None:
        try:
            executors.launch({"requeued": recipe}, executor, name="requeued")
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    file = tmp_path / "runs/requeued/metrics.csv"
    wait(lambda: file.is_file() and len(read_metrics(file)) >= 2, "two steps")
    shown = subprocess.run(["squeue", "-h", "-o", "%i"], capture_output=True, text=True, check=True).stdout
    subprocess.run(["scontrol", "requeue", shown.split()[0]], check=True)
    thread.join(timeout=TIME_LIMIT)
    assert not thread.is_alive() and not failed, failed
    assert len(job_folders(tmp_path / "runs/requeued")) == 2
