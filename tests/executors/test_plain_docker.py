"""Recipes with NeMo-Run's own DockerExecutor on a real dockerd, as docs/executors.md, "Plain NeMo-Run", has it."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import nemo_run as run
import pytest
from dockerd import PROGRAMS, image, mounted, submitting_to
from submitting import status, steps_of

from aligner.common.run_folder import ending

Tiny = Callable[..., Any]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("docker")
    with submitting_to(folder) as host:
        (folder / "image").write_text(image(host))
        yield folder


def plain(home: Path, folder: Path, **settings: Any) -> run.DockerExecutor:
    """Return what a user of NeMo-Run writes; this machine's programs are mounted into an image that has none."""
    return run.DockerExecutor(
        container_image=(home / "image").read_text(),
        volumes=mounted(folder),
        network="host",
        shm_size="256m",
        packager=run.Packager(),
        env_vars=PROGRAMS | settings.pop("env_vars", {}),
        **settings,
    )


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_first_run_and_a_second_submission(home: Path, tiny: Tiny, tmp_path: Path, ranks: int) -> None:
    settings: dict[str, Any] = {"ntasks_per_node": ranks}
    if ranks > 1:
        settings |= {"launcher": "torchrun", "env_vars": {"PET_LOCAL_ADDR": "127.0.0.1"}}
    recipe = tiny("inside", num_gpus_per_node=ranks)
    run.run(recipe, executor=plain(home, tmp_path, **settings), name=f"inside{ranks}")
    assert status(f"inside{ranks}") == {f"inside{ranks}": "SUCCEEDED"}
    assert steps_of(tmp_path / "runs/inside") == [0, 1, 2, 3] and ending(tmp_path / "runs/inside") == "success"
    recipe = tiny("inside", num_gpus_per_node=ranks)
    recipe.trainer.max_steps = 6
    run.run(recipe, executor=plain(home, tmp_path, **settings), name=f"inside{ranks}")
    assert steps_of(tmp_path / "runs/inside") == [0, 1, 2, 3, 4, 5]


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
