"""Recipes with NeMo-Run's own DockerExecutor on a real dockerd, as docs/executors.md, "Plain NeMo-Run", has it."""

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nemo_run as run
import pytest
from dockerd import docker, image

from aligner.common.run_folder import ending, read_metrics

Tiny = Callable[..., Any]
pytestmark = pytest.mark.slow
ROOT = str(Path(__file__).parent.parent.parent)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    from nemo_run.config import set_nemorun_home

    folder = tmp_path_factory.mktemp("docker")
    with docker(folder / "daemon") as host, pytest.MonkeyPatch.context() as patch, open(os.devnull) as nothing:
        set_nemorun_home(str(folder / "nemorun"))
        patch.setenv("DOCKER_HOST", host)
        patch.setattr("sys.stdin", nothing)
        (folder / "image").write_text(image(host))
        yield folder


def plain(home: Path, folder: Path, **settings: Any) -> run.DockerExecutor:
    """Return what a user of NeMo-Run writes; this machine's programs are mounted into an image that has none."""
    base, prefix = os.path.realpath(sys.base_prefix), sys.prefix
    mounts = ["/usr", "/etc/hosts", base, prefix, ROOT]
    env_vars = {"PATH": f"{prefix}/bin:/usr/bin:/bin", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    return run.DockerExecutor(
        container_image=(home / "image").read_text(),
        volumes=[*(f"{path}:{path}:ro" for path in dict.fromkeys(mounts)), f"{folder}:{folder}"],
        network="host",
        shm_size="256m",
        packager=run.Packager(),
        env_vars=env_vars | settings.pop("env_vars", {}),
        **settings,
    )


def status(title: str) -> dict[str, str]:
    """Return the state of each stage of the newest experiment of a title, as `nemo experiment status` has it."""
    found = run.Experiment.from_title(title).status(return_dict=True) or {}
    return {name: str(said["status"]).rsplit(".", 1)[-1] for name, said in found.items()}


def steps(folder: Path) -> list[int]:
    return [int(row["step"]) for row in read_metrics(folder / "metrics.csv") if "train/loss" in row]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_first_run_and_a_second_submission(home: Path, tiny: Tiny, tmp_path: Path, ranks: int) -> None:
    settings: dict[str, Any] = {"ntasks_per_node": ranks}
    if ranks > 1:
        settings |= {"launcher": "torchrun", "env_vars": {"PET_LOCAL_ADDR": "127.0.0.1"}}
    recipe = tiny("inside", num_gpus_per_node=ranks)
    run.run(recipe, executor=plain(home, tmp_path, **settings), name=f"inside{ranks}")
    assert status(f"inside{ranks}") == {f"inside{ranks}": "SUCCEEDED"}
    assert steps(tmp_path / "runs/inside") == [0, 1, 2, 3] and ending(tmp_path / "runs/inside") == "success"
    recipe = tiny("inside", num_gpus_per_node=ranks)
    recipe.trainer.max_steps = 6
    run.run(recipe, executor=plain(home, tmp_path, **settings), name=f"inside{ranks}")
    assert steps(tmp_path / "runs/inside") == [0, 1, 2, 3, 4, 5]


def test_a_failed_stage(home: Path, tiny: Tiny, tmp_path: Path) -> None:
    broken = tiny("broken")
    broken.data.train = str(tmp_path / "none.jsonl")
    run.run(broken, executor=plain(home, tmp_path), name="broken")
    assert status("broken") == {"broken": "FAILED"}
    (log,) = (home / "nemorun/experiments/broken").glob("*/broken/log_*.out")
    assert f"{tmp_path / 'none.jsonl'}: no such file" in log.read_text()


def test_a_relative_folder_is_refused(home: Path, tiny: Tiny, tmp_path: Path) -> None:
    recipe = tiny("lost")
    recipe.log.log_dir = "runs"
    run.run(recipe, executor=plain(home, tmp_path), name="lost")
    assert status("lost") == {"lost": "FAILED"}
    (log,) = (home / "nemorun/experiments/lost").glob("*/lost/log_*.out")
    assert "ConfigError: log.log_dir" in log.read_text()
    assert not list((home / "nemorun").glob("**/metrics.csv"))
