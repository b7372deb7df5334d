"""Folders that are no whole model for transformers: each is refused in one line, without NeMo."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nemo_run as run
import pytest
import safetensors.torch
import torch
from nemo.lightning import RestoreConfig

from aligner.checkpoint.huggingface import check_source, import_once
from aligner.checkpoint.imports import file_checks
from aligner.checkpoint.tokenizers import named_tokenizer
from aligner.cli import dryrun
from aligner.common import hub
from aligner.common.errors import CheckpointError, ConfigError
from aligner.demo import toy

LLAMA: dict[str, Any] = {"model_type": "llama", "vocab_size": 85, "hidden_size": 8, "num_hidden_layers": 1}


def write(folder: Path, **config: Any) -> None:
    (folder / "config.json").write_text(json.dumps(LLAMA | config))


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-5])


def sharded(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    names = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def gguf(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model.Q4.gguf")


def adapters(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "adapter_model.safetensors")


def int8(folder: Path) -> None:
    safetensors.torch.save_file({"a": torch.zeros(2, dtype=torch.int8)}, folder / "model.safetensors")


def pointer(folder: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n"
    (folder / "model.safetensors").write_text(text)


BROKEN: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), r"has no tokenizer \(none of tokenizer.json, "),
    "missing shard": (
        sharded,
        "lacks 1 of 2 files that model.safetensors.index.json names, first model-00002-of-00002",
    ),
    "cut": (cut, r"bytes, and its table of contents says .*; it was cut off, download it again"),
    "empty": (lambda f: (f / "model.safetensors").write_bytes(b""), "is no safetensors file; download it again"),
    "pointer": (pointer, r"is no safetensors file \(it is a pointer of Git LFS: git lfs pull\)"),
    "quantized": (
        lambda f: write(f, quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}),
        r"has quantized weights \(bitsandbytes\), which cannot be trained; take the model in bfloat16",
    ),
    "int8": (int8, "has weights of type I8 in model.safetensors, which cannot be trained"),
    "gguf": (gguf, "model.Q4.gguf is GGUF"),
    "adapters": (adapters, r"holds adapters \(adapter_model.safetensors\) and no model; merge them into their base"),
    "own code": (
        lambda f: write(f, auto_map={"AutoModelForCausalLM": "modeling_x.X"}),
        r"needs code of its own \(auto_map in config.json: AutoModelForCausalLM\)",
    ),
    "architecture": (
        lambda f: write(f, model_type="phi3"),
        "is of the architecture 'phi3'; can be imported: llama, mis",
    ),
    "unknown key": (lambda f: write(f, residual_multiplier=0.2), "has residual_multiplier 0.2 in its config.json"),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files that are whole, as far as they can be checked without reading them."""
    made = tmp_path / "model"
    made.mkdir()
    write(made)
    safetensors.torch.save_file({"a": torch.zeros(2)}, made / "model.safetensors")
    shutil.copy(Path(toy.TOKENIZER) / "tokenizer.json", made)
    return made


@pytest.mark.parametrize("name", BROKEN)
def test_a_folder_that_is_no_whole_model_is_refused_in_a_line(
    folder: Path, tmp_path: Path, tiny: Callable[..., Any], name: str
) -> None:
    assert check_source(str(folder))[0] == folder
    spoil, message = BROKEN[name]
    spoil(folder)
    began = time.monotonic()
    with pytest.raises(CheckpointError, match=message) as refused:
        import_once(str(folder), tmp_path / "cache")
    assert "\n" not in str(refused.value) and time.monotonic() - began < 10
    recipe = tiny()
    recipe.resume.restore_config = run.Config(RestoreConfig, path=str(folder))
    with pytest.raises(CheckpointError, match=message):
        dryrun.check_recipe(recipe, None)


def test_the_check_needs_no_nemo(folder: Path) -> None:
    code = (
        "import sys; from aligner.checkpoint.huggingface import check_source; check_source(sys.argv[1]); "
        "sys.exit(any(name.partition('.')[0] in ('nemo', 'megatron', 'transformers') for name in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr


def test_tokens_without_a_row_are_told(folder: Path) -> None:
    assert file_checks.tokens_without_row(folder, 85) is None
    told = file_checks.tokens_without_row(folder, 80)
    assert told and told.startswith("5 tokens of the tokenizer have no row in the embedding of 80 rows, first ")


def test_without_a_way_to_the_hub_a_name_is_refused_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own client tries six times, for a minute and a half; what was downloaded earlier is found."""
    monkeypatch.setattr(hub, "is_reachable", lambda: False)
    began = time.monotonic()
    with pytest.raises(
        ConfigError, match=r"tokenizer: some/name is neither .* \(the hub cannot be reached from here, and"
    ):
        named_tokenizer("some/name")
    with pytest.raises(CheckpointError, match=r"source: some/name is neither .* \(the hub cannot be reached from here"):
        check_source("some/name")
    assert time.monotonic() - began < 10
    kept = tmp_path / "hub/models--some--name"
    (kept / "refs").mkdir(parents=True)
    (kept / "refs/main").write_text("abc")
    shutil.copytree(toy.TOKENIZER, kept / "snapshots/abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub._snapshot_download.HF_HUB_CACHE", str(tmp_path / "hub"), raising=False)
    assert hub.name_or_folder("some/name").endswith("snapshots/abc")


def test_the_hub_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    assert hub.is_reachable.__wrapped__() is False


def test_whole_weights_beside_a_table_of_shards_that_are_elsewhere_are_read(folder: Path) -> None:
    """As a download without *.bin leaves them."""
    names = {"a": "pytorch_model-00001-of-00002.bin"}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
    assert check_source(str(folder))[0] == folder
