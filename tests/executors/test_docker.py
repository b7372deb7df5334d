"""A real dockerd on this machine, with an image that no registry knows: a run in it, what fails in it, what goes on."""

import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nemo_run as run
import pytest
from cluster import wait
from dockerd import PROGRAMS, image, mounted, submitting_to
from launching import TIME_LIMIT
from submitting import in_background, steps_of

from aligner import executors
from aligner.checkpoint import folders
from aligner.common.errors import ConfigError

Tiny = Callable[..., Any]


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with submitting_to(tmp_path_factory.mktemp("docker")) as host:
        yield host


def in_a_container(host: str, folder: Path, **settings: Any) -> Any:
    return executors.docker(
        container_image=settings.pop("image", None) or image(host),
        volumes=mounted(folder),
        ulimits=[],  # this machine may raise none
        shm_size="256m",
        env_vars=PROGRAMS,
        **settings,
    )


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_in_a_container_goes_on_where_it_was(
    host: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    monkeypatch.chdir(tmp_path)
    executor = in_a_container(host, tmp_path, ntasks_per_node=ranks)
    executors.launch({"inside": tiny("inside", num_gpus_per_node=ranks)}, executor, name="inside")
    assert steps_of(tmp_path / "runs/inside") == [0, 1, 2, 3]
    longer = tiny("inside", num_gpus_per_node=ranks)
    longer.trainer.max_steps = 6
    executors.launch({"inside": longer}, executor, name="inside")
    assert steps_of(tmp_path / "runs/inside") == [0, 1, 2, 3, 4, 5]


def test_a_failure_in_a_container_is_one(
    host: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    broken = tiny("broken")
    broken.data.train = str(tmp_path / "none.jsonl")
    with pytest.raises(
        executors.JobFailed, match=r"'broken' ended as FAILED \(exit code 1\)(.|\n)*none.jsonl: no such"
    ):
        executors.launch({"broken": broken}, in_a_container(host, tmp_path), name="broken")


@pytest.mark.slow
def test_a_container_is_cancelled_from_another_process(
    host: str, tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = tiny("endless")
    recipe.trainer.max_steps = 100_000
    executor = in_a_container(host, tmp_path)
    thread, failed = in_background(lambda: executors.launch({"endless": recipe}, executor, name="endless"))
    wait((tmp_path / "runs/endless/checkpoints/step=4").exists, "a checkpoint")
    run.Experiment.from_title("endless").cancel("endless")
    thread.join(timeout=TIME_LIMIT)
    (error,) = failed
    assert isinstance(error, executors.JobFailed) and "stage 'endless' ended as" in str(error)
    assert folders.latest_checkpoint(tmp_path / "runs/endless") is not None
    shown = subprocess.run(
        ["docker", "ps", "-q"], capture_output=True, text=True, env=os.environ | {"DOCKER_HOST": host}
    )
    assert not shown.stdout.split()


def test_what_docker_has_not_is_refused_at_once(host: str, tiny: Tiny, tmp_path: Path) -> None:
    executor = in_a_container(host, tmp_path, image="nemo-align-nobody-made-this:1")
    with pytest.raises(
        ConfigError, match=r"run.executor.container_image: 'nemo-align-nobody-made-this:1' is neither here"
    ):
        executors.launch({"refused": tiny("refused")}, executor, name="refused")
    with pytest.raises(ConfigError, match=r"run.executor.volumes: /nowhere:/data: there is no /nowhere"):
        executors.docker(container_image="x", volumes=["/nowhere:/data"])


def test_without_docker_it_is_said(tiny: Tiny, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none")
    with pytest.raises(ConfigError, match=r"run.executor: Docker does not answer"):
        executors.launch({"refused": tiny("refused")}, executors.docker(container_image="x"), name="refused")
