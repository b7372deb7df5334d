"""What tests of hostile files share."""

import shutil
from pathlib import Path
from typing import Any

import fiddle as fdl
import pytest


@pytest.fixture(scope="module")
def hostile_run(tmp_path_factory: pytest.TempPathFactory, tiny_in: Any) -> Path:
    """A run of four steps."""
    return fdl.build(tiny_in(tmp_path_factory.mktemp("hostile"))())()


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file, and a module `evil` in sys.path that creates it when it is imported."""
    (tmp_path / "EXECUTED.d").mkdir()
    found = tmp_path / "EXECUTED.d/EXECUTED"
    (tmp_path / "evil.py").write_text(
        f"open({str(found)!r}, 'w').close()\nclass Config: ...\ndef call(*_, **__): ...\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return found


@pytest.fixture
def checkpoint(hostile_run: Path, tmp_path: Path) -> Path:
    """A copy of the run's checkpoint, in a copy of the run."""
    shutil.copytree(hostile_run, tmp_path / "copy/run")
    (found,) = (tmp_path / "copy/run/checkpoints").glob("*")
    # Hashes find damage; whoever can write the files can write hashes, too.
    (found / "hashes.json").unlink()
    return found


@pytest.fixture
def resume(checkpoint: Path, tiny: Any, execute: Any, tmp_path: Path) -> Any:
    """A function that goes on with the copy of the run."""

    def go_on() -> None:
        recipe = tiny()
        recipe.log.log_dir, recipe.trainer.max_steps = str(tmp_path / "copy"), 6
        execute(recipe)

    return go_on
