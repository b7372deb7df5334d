"""What a run refuses, by one clear message and with nothing written."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nemo_run as run
import pytest
from lightning.pytorch.loggers import WandbLogger

from aligner.common.errors import CheckpointError, ConfigError, RowError, SanityCheckError

Recipe = Any
Tiny = Callable[..., Recipe]
Execute = Callable[[Recipe], Path]


@pytest.mark.parametrize(
    ("path", "value", "error", "message"),
    [
        ("data.train", "none.jsonl", RowError, "none.jsonl: no such file"),
        (
            "data.global_batch_size",
            32,
            ConfigError,
            r"data.global_batch_size: 32 examples a step, but .* holds only 16",
        ),
        (
            "data.micro_batch_size",
            3,
            ConfigError,
            r"data.global_batch_size: 4 cannot be cut .* multiple of 3",
        ),
        ("data.micro_batch_size", 0, ConfigError, "data.micro_batch_size: must be at least 1"),
        ("data.seq_length", 8, ConfigError, "data.max_dropped_fraction"),
        ("preference_loss_weight", 0.0, ConfigError, "both are 0"),
        ("sft_loss_weight", -1.0, ConfigError, "sft_loss_weight: must not be negative"),
        ("reference", None, ConfigError, "reference: is None"),
        ("optim", None, ConfigError, "optim: is None"),
        ("optim.config.use_distributed_optimizer", True, ConfigError, "neither Transformer Engine nor Apex"),
        ("optim.lr_scheduler.min_lr", 1.0, ConfigError, "optim.lr_scheduler.min_lr: 1.0 is above optim.config.lr="),
        ("trainer.limit_train_batches", 1, ConfigError, "the same global batches over and over"),
        ("trainer.devices", 2, ConfigError, r"2 x 1 = 2 ranks, but 1 were started"),
        ("trainer.strategy.tensor_model_parallel_size", 2, ConfigError, "1 ranks cannot be divided"),
        ("trainer.strategy.context_parallel_size", 2, ConfigError, "1 ranks cannot be divided"),
        ("trainer.strategy.sequence_parallel", True, ConfigError, "tensor_model_parallel_size is 1; set it to False"),
        (
            "trainer.strategy.virtual_pipeline_model_parallel_size",
            2,
            ConfigError,
            "virtual_pipeline_model_parallel_size: 2 with .* set it to None",
        ),
        (
            "data.packed_sequence_size",
            99,
            ConfigError,
            "data.packed_sequence_size: 99, but data.batching is 'padded', which has no packs",
        ),
        ("data.batching", "pack", ConfigError, "data.batching: 'pack' is not one of padded, length_grouped"),
        ("model.tokenizer", None, ConfigError, "model.tokenizer: is None"),
        ("data.train", "", ConfigError, "data.train: is empty"),
        ("data.overlong", "cut", ConfigError, "data.overlong: 'cut' is not one of drop, truncate, error"),
        ("log.explicit_log_dir", "here", ConfigError, "log.explicit_log_dir: is set"),
        ("resume.resume_from_path", "there", ConfigError, "resume.resume_from_path: is set"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_written(
    tiny: Tiny, execute: Execute, tmp_path: Path, path: str, value: Any, error: type[Exception], message: str
) -> None:
    recipe = tiny()
    *parents, last = path.split(".")
    target = recipe
    for name in parents:
        target = getattr(target, name)
    setattr(target, last, value)
    with pytest.raises(error, match=message):
        execute(recipe)
    # Tokenized rows may stay; no run was begun.
    assert {path.name for path in (tmp_path / "runs").glob("*")} <= {"tokens"}


def test_a_start_that_is_no_checkpoint_is_refused(tiny: Tiny, execute: Execute, tmp_path: Path) -> None:
    from nemo.lightning import RestoreConfig

    recipe = tiny()
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder/readme.txt").touch()
    recipe.resume.restore_config = run.Config(RestoreConfig, path=str(tmp_path / "folder"))
    with pytest.raises(CheckpointError, match=r"folder is not a checkpoint; .* found readme.txt"):
        execute(recipe)
    recipe.resume.restore_config.path = str(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="does not exist"):
        execute(recipe)


def test_other_data_under_an_old_name_is_refused(tiny: Tiny, execute: Execute) -> None:
    execute(tiny())
    changed = tiny(rows=20)
    changed.trainer.max_steps = 6
    with pytest.raises(ConfigError, match=r"data.train: was '16 of 16 pairs.*', is '20 of 20 pairs"):
        execute(changed)
    reseeded = tiny()
    reseeded.trainer.max_steps = 6
    reseeded.data.seed = 5
    with pytest.raises(ConfigError, match=r"data.seed: was 1234, is 5\. .*resume.allow_changes=data\.seed"):
        execute(reseeded)
    resized = tiny()
    resized.trainer.max_steps, resized.data.global_batch_size = 6, 8
    with pytest.raises(ConfigError, match=r"data.global_batch_size"):
        execute(resized)


def test_a_policy_that_is_not_its_reference_stops_the_run(
    tiny: Tiny, execute: Execute, monkeypatch: pytest.MonkeyPatch
) -> None:
    from aligner.model import reference

    true = reference.score_split
    monkeypatch.setattr(reference, "score_split", lambda *args: true(*args) - 0.1)
    with pytest.raises(SanityCheckError, match=r"step 0: policy and reference differ"):
        execute(tiny())


@pytest.mark.parametrize(
    ("packed_sequence_size", "message"),
    [
        (0, "data.packed_sequence_size: must be at least 1"),
        (30, r"data.packed_sequence_size: 30 tokens, but .*train16.jsonl:\d+ alone takes"),
    ],
)
def test_packs_that_are_too_small_are_refused(
    tiny: Tiny, execute: Execute, packed_sequence_size: int, message: str
) -> None:
    recipe = tiny()
    recipe.data.batching, recipe.data.packed_sequence_size = "packed", packed_sequence_size
    with pytest.raises(ConfigError, match=message):
        execute(recipe)


def test_packs_need_plain_attention_without_transformer_engine(tiny: Tiny, execute: Execute) -> None:
    recipe = tiny()
    recipe.data.batching, recipe.model.config.window_size = "packed", (8, 0)
    with pytest.raises(ConfigError, match=r"data.batching: packed .* the model asks for window_size"):
        execute(recipe)


def test_a_relative_folder_in_nemo_runs_own_is_refused(
    tiny: Tiny, execute: Execute, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain Slurm and Docker executors begin in a copy of the code, of which each job has another."""
    (tmp_path / "job/configs").mkdir(parents=True)
    (tmp_path / "job/code").mkdir()
    monkeypatch.chdir(tmp_path / "job/code")
    recipe = tiny()
    recipe.log.log_dir = "runs"
    with pytest.raises(ConfigError, match=r"log.log_dir: 'runs' is relative, and this job begins in NeMo-Run's own"):
        execute(recipe)
    assert not list((tmp_path / "job/code").iterdir())


def test_wandb_is_asked_before_anything_is_trained(
    tiny: Tiny, execute: Execute, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its client takes two minutes to find out that there is no network."""
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    recipe = tiny()
    recipe.log.wandb = run.Config(WandbLogger, project="mine")
    with pytest.raises(ConfigError, match=r"log.wandb: there is no API key; run `wandb login`, or set WANDB_API_KEY"):
        execute(recipe)
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setattr("socket.create_connection", no_network)
    with pytest.raises(
        ConfigError, match=r"log.wandb: https://.* cannot be reached \(no route\); log.wandb.offline=True"
    ):
        execute(recipe)
    assert not (tmp_path / "runs").exists()


def no_network(*_: Any, **__: Any) -> Any:
    raise OSError("no route")
