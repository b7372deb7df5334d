"""A run touches what it wrote: copies, links and other files of its owner stay; what is damaged is not trained on."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from aligner.checkpoint import folders
from aligner.checkpoint.safety import integrity
from aligner.checkpoint.safety.ledger import Ledger
from aligner.checkpoint.verify import verify_checkpoint
from aligner.common.errors import CheckpointError, ConfigError
from aligner.common.run_folder import read_metrics
from aligner.data import token_cache

Tiny = Callable[..., Any]
Execute = Callable[[Any], Path]


def flip(path: Path, at: float = 0.5) -> None:
    """Change a byte, and neither length nor time."""
    stat, content = path.stat(), bytearray(path.read_bytes())
    content[int(len(content) * at)] ^= 0x40
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.fixture
def four(tiny: Tiny, execute: Execute) -> Path:
    """A run of four steps, with a checkpoint after 2 and 4."""
    recipe = tiny()
    recipe.log.ckpt.save_top_k = 2
    return execute(recipe)


def longer(tiny: Tiny, steps: int = 8) -> Any:
    recipe = tiny()
    recipe.trainer.max_steps, recipe.log.ckpt.save_top_k = steps, 2
    return recipe


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ---- what is somebody's --------------------------------------------------------------------------------------------


def test_copies_and_other_files_stay(four: Path, tiny: Tiny, execute: Execute) -> None:
    made = four / "checkpoints"
    for name in ("step=4.bak", "best", "step=2 of monday"):
        shutil.copytree(made / "step=4", made / name)
    (made / "notes").mkdir()
    for path in (made / "notes/x.txt", made / "read me", four / "train.jsonl", four / "thesis.tex", four / "run_0"):
        path.write_text("mine")
    (four / "provenance/job-1.bak").mkdir()
    (four / "run_7").mkdir()
    mine = {
        name: value
        for name, value in content(four).items()
        if value.startswith(b"mine") or name.startswith("checkpoints/")
    }
    execute(longer(tiny))
    now = content(four)
    removed = {name.split("/")[1] for name in mine.keys() - now.keys()}
    assert removed == {"step=2", "step=4"}, "its own, for newer ones"
    assert all(now[name] == value for name, value in mine.items() if name in now)
    assert {path.name for path in made.iterdir()} == {
        "step=4.bak", "best", "step=2 of monday", "notes", "read me", "step=6", "step=8",
    }  # fmt: skip
    assert not list(four.glob("run_0/*"))


def test_data_may_lie_in_the_folder_of_the_run(tiny: Tiny, execute: Execute, tmp_path: Path) -> None:
    run = tmp_path / "runs/run"
    run.mkdir(parents=True)
    recipe = tiny()
    for split in ("train", "validation"):
        source = Path(getattr(recipe.data, split))
        setattr(recipe.data, split, shutil.copy(source, run / source.name))
    execute(recipe)
    recipe.trainer.max_steps = 6
    execute(recipe)
    assert read_metrics(run / "metrics.csv")[-1]["step"] == 6
    assert not list(run.glob("run_*"))


@pytest.mark.parametrize("name", ["metrics.csv", "config.yaml", "report.html", "samples.jsonl", "provenance"])
def test_files_of_another_under_names_of_a_run_are_not_written_over(
    tiny: Tiny, execute: Execute, tmp_path: Path, name: str
) -> None:
    run = tmp_path / "runs/run"
    run.mkdir(parents=True)
    (run / name).write_text("mine")
    with pytest.raises(ConfigError, match=rf"log.name: {run} has {name}, which no run wrote"):
        execute(tiny())
    assert (run / name).read_text() == "mine"


@pytest.mark.parametrize("name", ["..", "../x", "a/../../b", "/abs", ".", "a\nb", "a\x00b"])
def test_a_name_stays_in_its_folder(tiny: Tiny, execute: Execute, tmp_path: Path, name: str) -> None:
    recipe = tiny()
    recipe.log.name = name
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ConfigError, match=r"log.name: .* does not lead to a folder of its own within log.log_dir"):
        execute(recipe)
    assert sorted(tmp_path.rglob("*")) == before


def test_what_is_in_the_way_of_a_checkpoint_is_not_removed(four: Path, tiny: Tiny, execute: Execute) -> None:
    for name in ("step=8", "step=6.partial"):
        (four / "checkpoints" / name).mkdir()
        (four / "checkpoints" / name / "mine").write_text("mine")
    with pytest.raises(CheckpointError, match=r"step=6.partial is in the way, and this run did not write it"):
        execute(longer(tiny))
    shutil.rmtree(four / "checkpoints/step=6.partial")
    with pytest.raises(CheckpointError, match=r"step=8 is in the way, and this run did not write it"):
        execute(longer(tiny))
    assert (four / "checkpoints/step=8/mine").read_text() == "mine"


# ---- what was moved, or is gone ------------------------------------------------------------------------------------


def test_a_checkpoint_that_was_moved_and_linked_is_followed(
    four: Path, tiny: Tiny, execute: Execute, tmp_path: Path, capfd: Any
) -> None:
    shutil.rmtree(four / "checkpoints/step=2")
    moved = shutil.move(four / "checkpoints/step=4", tmp_path / "big")
    (four / "checkpoints/step=4").symlink_to(moved)
    execute(longer(tiny))
    assert "resuming from step 4" in capfd.readouterr().err
    assert (Path(moved) / "weights").is_dir(), "what is linked is not the run's to remove"
    assert {row["step"] for row in read_metrics(four / "metrics.csv")} == set(range(9))


def test_all_checkpoints_may_lie_elsewhere(four: Path, tiny: Tiny, execute: Execute, tmp_path: Path) -> None:
    moved = shutil.move(four / "checkpoints", tmp_path / "big")
    (four / "checkpoints").symlink_to(moved)
    execute(longer(tiny))
    assert {path.name for path in Path(moved).iterdir()} == {"step=6", "step=8"}


def test_a_run_whose_checkpoints_are_gone_does_not_begin_anew(
    four: Path, tiny: Tiny, execute: Execute, tmp_path: Path, capfd: Any
) -> None:
    metrics = (four / "metrics.csv").read_bytes()
    shutil.rmtree(four / "checkpoints/step=2")
    moved = shutil.move(four / "checkpoints/step=4", tmp_path / "big")
    for _ in range(2):
        with pytest.raises(
            CheckpointError, match=r"step=4, which this run wrote, is gone, so that it would begin anew"
        ):
            execute(longer(tiny))
        # The same where the disk that it was linked to is not there.
        (four / "checkpoints/step=4").unlink(missing_ok=True)
        (four / "checkpoints/step=4").symlink_to(tmp_path / "not mounted")
    assert (four / "metrics.csv").read_bytes() == metrics
    (four / "checkpoints/step=4").unlink()
    shutil.move(moved, four / "checkpoints/step=4")
    execute(longer(tiny))
    capfd.readouterr()
    # Back to an older one: its owner's wish, and said.
    shutil.rmtree(four / "checkpoints/step=8")
    execute(longer(tiny))
    told = capfd.readouterr().err
    assert "step=8, which this run wrote, is gone; it goes on from step=6" in told
    assert "metrics.csv goes to step 7; steps 6 to 7 are made again" in told


def test_a_killed_end_is_made_up_for(four: Path, tiny: Tiny, execute: Execute) -> None:
    """A kill between the last save and its validation: row, page and record are made by the next job."""
    execute(longer(tiny))
    whole = read_metrics(four / "metrics.csv")
    lines = (four / "metrics.csv").read_text().splitlines()
    assert lines[-1].startswith("8,")
    (four / "metrics.csv").write_text("\n".join(lines[:-1]) + "\n")
    (four / "report.html").unlink()
    job = json.loads((four / "provenance/job-2/job.json").read_text())
    del job["ended"]
    (four / "provenance/job-2/job.json").write_text(json.dumps(job))
    weights = content(four / "checkpoints/step=8")
    execute(longer(tiny))
    again = read_metrics(four / "metrics.csv")
    assert [row["step"] for row in again] == [row["step"] for row in whole]
    timed = ("val/tokens_per_second", "val/step_time")
    assert {k: v for k, v in again[-1].items() if k not in timed} == {
        k: v for k, v in whole[-1].items() if k not in timed
    }
    assert "val/loss" in again[-1] and (four / "report.html").is_file()
    assert content(four / "checkpoints/step=8") == weights
    # The page alone.
    (four / "report.html").unlink()
    execute(longer(tiny))
    assert (four / "report.html").is_file()


# ---- damage --------------------------------------------------------------------------------------------------------


def newest(folder: Path) -> list[Path]:
    return sorted(path for path in (folder / "checkpoints/step=4").rglob("*") if path.is_file())


def test_a_byte_of_any_file_of_a_checkpoint_is_noticed(four: Path, tiny: Tiny) -> None:
    checkpoint = four / "checkpoints/step=4"
    hashed = set(integrity.read(checkpoint) or {})
    files = newest(four)
    assert hashed == {str(path.relative_to(checkpoint)) for path in files} - {integrity.HASHES}
    for path in files:
        kept = path.read_bytes()
        if not kept:
            continue
        flip(path)
        integrity._whole.clear()
        found = folders.latest_checkpoint(four, damage=integrity.damage_where_cheap)
        assert found == four / "checkpoints/step=2", path
        path.write_bytes(kept)
    integrity._whole.clear()
    assert folders.latest_checkpoint(four, damage=integrity.damage_where_cheap) == checkpoint


SMALL = (
    "weights/common.pt",
    "weights/metadata.json",
    "weights/.metadata",
    "context/io.json",
    "align.json",
    "hashes.json",
)


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("left", [0, 0.5])
def test_a_file_that_is_empty_or_cut_is_noticed_without_its_hash_too(
    four: Path, tiny: Tiny, execute: Execute, name: str, left: float
) -> None:
    path = four / "checkpoints/step=4" / name
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * left)])
    assert folders.latest_checkpoint(four) == four / "checkpoints/step=2"
    if name != integrity.HASHES:
        (four / "checkpoints/step=4" / integrity.HASHES).unlink()
        assert folders.latest_checkpoint(four) == four / "checkpoints/step=2"


def test_it_goes_on_from_the_older_one(four: Path, tiny: Tiny, execute: Execute, capfd: Any) -> None:
    flip(max(newest(four), key=lambda path: path.stat().st_size))
    execute(longer(tiny))
    told = capfd.readouterr().err
    assert "resuming from step 2" in told and "is not what was written) and is passed over" in told


def test_without_hashes_nothing_is_compared(tiny: Tiny, execute: Execute) -> None:
    recipe = tiny()
    recipe.log.ckpt.hash_files = False
    run = execute(recipe)
    (found,) = (run / "checkpoints").iterdir()
    assert not (found / integrity.HASHES).exists() and integrity.damage_where_cheap(found) is None


def test_a_model_to_start_from_is_compared(four: Path, tiny: Tiny, execute: Execute) -> None:
    flip(max(newest(four), key=lambda path: path.stat().st_size))
    from nemo.lightning import RestoreConfig
    from nemo_run import Config

    recipe = tiny("other")
    recipe.resume.restore_config = Config(RestoreConfig, path=str(four / "checkpoints/step=4"))
    with pytest.raises(CheckpointError, match=r"resume.restore_config.path: .*step=4 is not whole: weights/.* is not"):
        execute(recipe)
    recipe.resume.verify = False
    execute(recipe)


def test_damaged_tokens_are_made_again(four: Path, tiny: Tiny, execute: Execute, capfd: Any) -> None:
    files = list((four.parent / "tokens").glob("*/tokens.arrow"))
    kept = [file.read_bytes() for file in files]
    for file in files:
        flip(file)
    token_cache._content.cache_clear()
    execute(longer(tiny))
    told = capfd.readouterr().err
    assert told.count("tokens.arrow is not what was written) and will be made again") == len(files) == 2
    assert [file.read_bytes() for file in files] == kept


def test_a_damaged_reference_is_made_again_or_refused(four: Path, tiny: Tiny, execute: Execute) -> None:
    files = sorted((four.parent / "reference").glob("*.safetensors"))
    kept = [file.read_bytes() for file in files]
    for file in files:
        flip(file, at=0.99)
    with pytest.raises(CheckpointError, match=r"is gone or damaged, or data.train is not what it was"):
        execute(longer(tiny))
    execute(tiny("anew"))
    assert [file.read_bytes() for file in files] == kept


# ---- what cannot be compared, and odd files ------------------------------------------------------------------------


def test_without_its_settings_a_checkpoint_is_not_gone_on_from(four: Path, tiny: Tiny, execute: Execute) -> None:
    for name in ("align.json", integrity.HASHES):
        (four / "checkpoints/step=4" / name).unlink()
    with pytest.raises(CheckpointError, match=r"step=4: has no align.json with the settings that it was made under"):
        execute(longer(tiny))


def test_odd_files_do_not_stop_a_run(four: Path, tiny: Tiny, execute: Execute) -> None:
    shutil.copytree(four / "provenance/job-1", four / "provenance/job-1.bak")
    (four / "provenance/job-x").mkdir()
    (four / "provenance/job-1/job.json").write_text("")
    (four / "provenance/notes.jsonl").write_bytes(b'[1]\n{"step"\n\xff\xfe\n')
    lines = (four / "metrics.csv").read_text().splitlines()
    (four / "metrics.csv").write_text("\n".join(lines[1:]) + "\n")
    execute(longer(tiny, 14))
    (headless,) = four.glob("metrics-*.csv")
    assert headless.read_text().splitlines() == lines[1:], "it is kept"
    assert [row["step"] for row in read_metrics(four / "metrics.csv")][-1] == 14
    assert (four / "report.html").is_file() and (four / "provenance/job-2/job.json").is_file()


def test_a_checkpoint_of_a_later_version_is_named(four: Path, tiny: Tiny, execute: Execute) -> None:
    path = four / "checkpoints/step=4/align.json"
    path.write_text('{"format": 99, "step": 4}')
    with pytest.raises(CheckpointError, match=r"written by nemo-align of another version in format 99"):
        execute(longer(tiny))


def test_the_list_of_names_outlives_a_torn_line(four: Path) -> None:
    ledger = Ledger(four)
    assert ledger.named("complete") == ["step=2", "step=4"]
    with ledger.path.open("a") as file:
        file.write('{"name": "step=6", "sta')
    assert ledger.named("complete") == ["step=2", "step=4"]
    ledger.record("step=8", "complete")
    assert ledger.named("complete") == ["step=2", "step=4", "step=8"]


def test_a_checkpoint_holds_what_its_recipe_had(tiny: Tiny, execute: Execute) -> None:
    """NeMo leaves an empty io.json, which nothing can load, where a value of the recipe has no JSON."""
    from lightning.pytorch.callbacks import LambdaCallback
    from nemo.lightning.io import load_context

    recipe = tiny()
    recipe.data.train = Path(recipe.data.train)
    run = execute(recipe)
    whole: Any = load_context(run / "checkpoints/step=4/context")
    assert whole.model.config.num_layers == 2 and whole.trainer.max_steps == 4
    other = tiny("other")
    other.trainer.callbacks = [LambdaCallback(on_exception=lambda *_: None)]
    model: Any = load_context(execute(other) / "checkpoints/step=4/context", "model")
    assert model.config.num_layers == 2
    execute(longer(tiny))


def test_a_checkpoint_is_verified_when_asked(four: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verify_checkpoint(str(four))
    told = capsys.readouterr().out
    assert told.count("are what was written") == 2 and "step=2: " in told and "step=4: " in told
    path = max(newest(four), key=lambda path: path.stat().st_size)
    flip(path)
    named = f"step=4: weights/{path.name} is not what was written"
    with pytest.raises(CheckpointError, match=named):
        verify_checkpoint(str(four))
    with pytest.raises(CheckpointError, match=named):
        verify_checkpoint(str(four / "checkpoints/step=4"))
    (four / "checkpoints/step=2" / integrity.HASHES).unlink()
    with pytest.raises(
        CheckpointError, match=r"step=2: has no hashes.json, so its files cannot be compared; .*step=4: "
    ):
        verify_checkpoint(str(four))
    with pytest.raises(CheckpointError, match=r"is neither a checkpoint nor a run with checkpoints/"):
        verify_checkpoint(str(four.parent))
