"""What a run keeps of where it comes from: enough to do it again, and nothing secret."""

import json
import re
import subprocess
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import fiddle as fdl
import nemo_run as run
import numpy as np
import pytest
import torch
from lightning.pytorch.callbacks import Callback, LambdaCallback
from lightning.pytorch.loggers import WandbLogger
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.transformer.enums import AttnBackend
from nemo import lightning as nl
from nemo_run.cli.config import ConfigSerializer

from aligner.checkpoint import checkpoint_diff, folders
from aligner.cli import diff_runs
from aligner.cli.parsing.yaml_recipe import load_yaml
from aligner.common import yaml_values
from aligner.common.errors import CheckpointError


def test_a_run_is_done_again_by_what_it_kept(
    tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "not-for-anyone")
    recipe = tiny("one")
    recipe.loss.beta = 0.3
    run.run(recipe, direct=True)
    folder = tmp_path / "runs/one"
    again = load_yaml(folder / "config.yaml")
    assert again.loss.beta == 0.3
    again.log.name = "other"
    fdl.build(again)()
    one, other = (folders.latest_checkpoint(tmp_path / "runs" / name) for name in ("one", "other"))
    assert (
        one
        and other
        and checkpoint_diff.first_difference(checkpoint_diff.read(one), checkpoint_diff.read(other)) is None
    )
    difference = diff_runs.diff(str(folder), str(tmp_path / "runs/other"))
    assert [line for line in difference.splitlines() if line[0] in "+-"][2:] == ["-  name: one", "+  name: other"]
    job = folder / "provenance/job-1"
    said = json.loads((job / "job.json").read_text())
    assert said["settings"]["loss.beta"] == 0.3 and "data.train" in said["settings"]
    assert any(line.startswith("torch==") for line in (job / "packages.txt").read_text().splitlines())
    assert not any("not-for-anyone" in path.read_text() for path in job.iterdir())


SEKRET = "Wd4Rk8" + "SEKRET"
"""Not in this file as a run would show it."""


def test_no_file_of_a_run_has_a_secret(
    tiny: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """By name, by value, in a URL, in the recipe, on the command line, in uncommitted code, in an error."""
    for name, value in {
        "HF_ENDPOINT": f"https://user:{SEKRET}@hub", "WANDB_BASE_URL": f"https://u:{SEKRET}@wb", "NEMO_PW": SEKRET,
        "HF_COOKIE": SEKRET, "NCCL_NOTE": f"as {SEKRET} says", "WANDB_REMARK": "ghp_" + "a1B2" * 9,
        "TORCH_URL": f"https://h/x?token={SEKRET}", "HF_HOME_NOTE": "kept",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    repository = tmp_path / "code"
    repository.mkdir()
    monkeypatch.chdir(repository)
    (repository / "a.py").write_text("x = 1\n")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *words], check=True)
    (repository / "a.py").write_text(f'x = 2\nserver = "http://me:{SEKRET}@host/v1"\n')
    words = ["nemo", "llm", f"engine.base_url=http://u:{SEKRET}@h/v1", "engine.api_key=swordfish7", "--token", SEKRET]
    monkeypatch.setattr("sys.argv", words)
    recipe = tiny("one")
    recipe.log.wandb = run.Config(WandbLogger, project="p", offline=True)
    recipe.trainer.callbacks = [run.Config(Remembers, url=f"http://me:{SEKRET}@host/v1", password="swordfish7")]
    with pytest.raises(RuntimeError):
        run.run(recipe, direct=True)
    folder = tmp_path / "runs/one"
    texts = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    told = "".join(capfd.readouterr())
    assert any(path.suffix == ".wandb" for path in texts)
    for secret in (SEKRET, "swordfish7", "ghp_"):
        assert [path for path, text in texts.items() if secret.encode() in text] == []
        assert secret not in told
    job = json.loads((folder / "provenance/job-1/job.json").read_text())
    assert job["environment"]["HF_ENDPOINT"] == "https://[hidden: credentials]@hub"
    assert job["environment"]["HF_HOME_NOTE"] == "kept" and "HF_COOKIE" not in job["environment"]
    assert job["command"][2] == "engine.base_url=http://[hidden: credentials]@h/v1"
    assert job["ended"]["error"] == "RuntimeError: http://[hidden: credentials]@host/v1 is down"
    assert '+server = "http://[hidden: credentials]@host/v1"' in (folder / "provenance/job-1/code.diff").read_text()
    hint = "config.yaml can be run again after trainer.callbacks[0].url, trainer.callbacks[0].password is set"
    assert hint in told
    monkeypatch.setenv("NEMO_ALIGN_TRUST", __name__)  # whose callback it names
    assert load_yaml(folder / "config.yaml").trainer.callbacks[0].password == "[hidden: password]"


class Remembers(Callback):
    def __init__(self, url: str, password: str) -> None:
        self.url = url

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == 2:
            raise RuntimeError(f"{self.url} is down")


def test_what_yaml_has_no_word_for_reads_back(tiny: Callable[..., Any], execute: Callable[[Any], Path]) -> None:
    """Numbers of a sweep, paths, enumerations as NeMo writes them, objects in place of configs."""
    recipe = tiny("one")
    recipe.optim.config.lr = np.float32(1e-3)
    recipe.data.seed = np.int64(7)
    recipe.data.train = Path(recipe.data.train)
    recipe.model.config.attention_backend = AttnBackend.unfused
    recipe.trainer.strategy.ddp = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
    again = load_yaml(execute(recipe) / "config.yaml")
    assert (again.data.seed, again.optim.config.lr) == (7, pytest.approx(1e-3))
    built: Any = fdl.build(again)
    assert built.keywords["trainer"].strategy.ddp_config.grad_reduce_in_fp32
    assert built.keywords["model"].config.attention_backend is AttnBackend.unfused
    assert built.keywords["data"].train == recipe.data.train


def test_plain_values_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEMO_ALIGN_TRUST", __name__)
    given: dict[str, Any] = {
        "time": timedelta(hours=9), "dtype": torch.bfloat16, "inner": [(Path("a"), np.bool_(True))], 
        "by": {1: np.ones(1)[0]},
    }  # fmt: skip
    written, as_text = yaml_values.representable(run.Partial(dict_of, **given))
    (tmp_path / "x.yaml").write_text(ConfigSerializer().serialize_yaml(written))
    built: Any = fdl.build(load_yaml(tmp_path / "x.yaml"))
    found = built.keywords
    assert as_text == ["by"], "its keys are text in YAML"
    assert found == given | {"inner": [[Path("a"), True]], "by": {"1": 1.0}}
    assert yaml_values.representable(run.Partial(dict_of, time=object()))[1] == ["time"]


def dict_of(**values: Any) -> dict[str, Any]:
    return values


def test_what_cannot_be_written_is_told(
    tiny: Callable[..., Any], execute: Callable[[Any], Path], capfd: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny("one")
    recipe.trainer.callbacks = [LambdaCallback(on_exception=lambda *_: None)]
    recipe.trainer.plugins = nl.MegatronMixedPrecision(precision="32")
    folder = execute(recipe)
    told = "".join(capfd.readouterr())
    # By its argument, if something that this process has read before had such a callback.
    place = r"trainer\.callbacks\[0\](\.on_exception)?"
    assert re.search(rf"config\.yaml cannot be run again, because {place} cannot be written as YAML", told)
    assert "LambdaCallback" in (folder / "config.yaml").read_text()
    plugins = load_yaml(folder / "config.yaml").trainer.plugins
    assert (plugins.__fn_or_cls__, plugins.precision) == (nl.MegatronMixedPrecision, "32"), "what it was built from"


def test_every_job_of_a_run_is_kept(tiny: Callable[..., Any], tmp_path: Path) -> None:
    first = tiny()
    fdl.build(first)()
    longer = tiny()
    longer.trainer.max_steps = 6
    fdl.build(longer)()
    folder = tmp_path / "runs/run"
    steps = [load_yaml(folder / f"provenance/job-{n}/config.yaml").trainer.max_steps for n in (1, 2)]
    assert steps == [4, 6] and load_yaml(folder / "config.yaml").trainer.max_steps == 6
    with pytest.raises(CheckpointError, match=r"nowhere: has no config.yaml"):
        diff_runs.diff(str(folder), str(tmp_path / "nowhere"))
