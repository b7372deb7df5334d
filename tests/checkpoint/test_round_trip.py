"""Imports and exports without training: a model comes back as it went, and another one is told."""

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from launching import PYTHON, TIME_LIMIT
from tokenizing import CHATML, byte_level

from aligner.checkpoint import connectors, source_files
from aligner.checkpoint.huggingface import export_hf, import_hf
from aligner.checkpoint.imports import config_checks
from aligner.common.errors import CheckpointError

EXPERTS = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 16, "norm_topk_prob": True}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"rope_theta": 50000.0, "max_position_embeddings": 300}),
    "llama tied": ("Llama", {"tie_word_embeddings": True}),
    "mistral": ("Mistral", {"sliding_window": None}),
    "mistral window": ("Mistral", {"sliding_window": 32}),
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "nemotron": ("Nemotron", {}),
    "qwen2": ("Qwen2", {}),
    "qwen2 tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 128}),
    "qwen3 tied": ("Qwen3", {"head_dim": 128, "tie_word_embeddings": True}),
    "qwen3 moe": ("Qwen3Moe", {"head_dim": 128} | EXPERTS),
}
GENERATION = {"eos_token_id": [1, 3], "temperature": 0.6, "top_p": 0.9, "do_sample": True}


def made(folder: Path, kind: str = "Llama", *, rows: int = 384, template: str | None = CHATML, **options: Any) -> Path:
    """A random model of two layers that says <|im_end|> at once, and the files that a published one has."""
    hf = byte_level()
    hf.chat_template = template
    hf.add_tokens([f"<{i}>" for i in range(rows - len(hf))])
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 200, "initializer_range": 0.2, "vocab_size": rows}
    ids = {"bos_token_id": None, "eos_token_id": 3, "pad_token_id": None}
    model = getattr(transformers, f"{kind}ForCausalLM")(getattr(transformers, f"{kind}Config")(**sizes | ids | options))
    model.save_pretrained(folder)
    hf.save_pretrained(folder)
    (folder / "generation_config.json").write_text(json.dumps(GENERATION))
    (folder / "LICENSE").write_text("as it was")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix != ".safetensors"}


@pytest.mark.parametrize("name", KINDS)
def test_what_comes_back_is_what_went(name: str, tmp_path: Path) -> None:
    kind, options = KINDS[name]
    source = made(tmp_path / "source", kind, **options)
    (source / "README.md").write_text("another model's card")
    nemo = import_hf(str(source), str(tmp_path / "nemo"))
    back = export_hf(str(nemo), str(tmp_path / "back"))
    (source / "README.md").unlink()
    assert contents(back) == contents(source)
    os.umask(mask := os.umask(0))
    assert {path.stat().st_mode & 0o777 for path in back.iterdir()} == {0o666 & ~mask}
    before, after = (transformers.AutoModelForCausalLM.from_pretrained(folder) for folder in (source, back))
    ours, theirs = (model.state_dict() for model in (after, before))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) and ours[key].dtype == theirs[key].dtype for key in ours)
    comparison = source_files.origin(nemo)["comparison"]
    assert comparison["tokens"] == min(384, options.get("max_position_embeddings", 200) - 1)
    assert comparison["precision"] == "float32" and comparison["mean_difference"] < 1e-5


def test_generation_stops_where_it_did(tmp_path: Path) -> None:
    for kind in ("Qwen2", "Mistral", "Llama"):
        window: dict[str, Any] = {"sliding_window": None} if kind == "Mistral" else {}
        source = made(tmp_path / kind, kind, **window)
        model = transformers.AutoModelForCausalLM.from_pretrained(source)
        with torch.no_grad():
            # The last layer sees the same vector everywhere, and its row of <|im_end|> is the only one.
            model.model.embed_tokens.weight.fill_(1.0)
            model.lm_head.weight.zero_()
            for layer in model.model.layers:
                layer.self_attn.o_proj.weight.zero_()
                layer.mlp.down_proj.weight.zero_()
            model.lm_head.weight[1].fill_(1.0)
        model.generation_config = transformers.GenerationConfig(**GENERATION)
        model.save_pretrained(source)
        back = export_hf(str(import_hf(str(source), str(tmp_path / "nemo"))), str(tmp_path / f"{kind} back"))
        (tmp_path / "nemo").rename(tmp_path / f"{kind} nemo")
        for folder in (source, back):
            said: Any = transformers.AutoModelForCausalLM.from_pretrained(folder).generate(
                torch.tensor([[70]]), attention_mask=torch.ones(1, 1), max_new_tokens=20, do_sample=False
            )
            assert said.tolist() == [[70, 1]]


def test_a_model_without_generation_settings_stays_without(tmp_path: Path) -> None:
    source = made(tmp_path / "source", "Qwen2", template=None)
    (source / "generation_config.json").unlink()
    back = export_hf(str(import_hf(str(source), str(tmp_path / "nemo"))), str(tmp_path / "back"))
    assert contents(back) == contents(source)


def test_the_end_of_a_turn_is_added_where_it_is_no_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = made(tmp_path / "source")
    (source / "generation_config.json").write_text(json.dumps(GENERATION | {"eos_token_id": 3}))
    back = export_hf(str(import_hf(str(source), str(tmp_path / "nemo"))), str(tmp_path / "back"))
    assert json.loads((back / "generation_config.json").read_text()) == GENERATION | {"eos_token_id": [3, 1]}
    assert "eos_token_id [3, 1]; it was [3], and answers end with [1]" in capsys.readouterr().out


def test_keys_of_transformers_5_are_read(tmp_path: Path) -> None:
    source = made(tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    for key in ("rope_theta", "rope_scaling"):
        del config[key]
    config |= {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}, "transformers_version": "5.1.0"}
    (source / "config.json").write_text(json.dumps(config))
    nemo = import_hf(str(source), str(tmp_path / "nemo"))
    from nemo.lightning.io import load_context

    assert load_context(nemo / "context", "model").config.rotary_base == 500000.0  # type: ignore[attr-defined]
    assert contents(export_hf(str(nemo), str(tmp_path / "back"))) == contents(source)
    yarn = config | {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 500000.0}}
    with pytest.raises(CheckpointError, match=r"has rope_scaling \{'rope_type': 'yarn'"):
        config_checks.check("x", yarn)
    with pytest.raises(CheckpointError, match=r"has rope_theta 10000\.0, and 500000.0 in rope_parameters"):
        config_checks.check("x", config | {"rope_theta": 10000.0})
    with pytest.raises(CheckpointError, match="one for each kind of layer"):
        config_checks.check("x", config | {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}})


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (
            {"quantization_config": {"bits": 4}},
            r"has quantization_config \{'bits': 4\} in its config.json, which",
        ),
        ({"logit_scale": 0.0625}, "has logit_scale 0.0625"),
        ({"residual_multiplier": 0.22}, "has residual_multiplier 0.22"),
        ({"auto_map": {"AutoModel": "x.Y"}}, "has auto_map"),
        ({"rope_interleaved": True}, "has rope_interleaved True"),
        ({"sliding_window": 4096}, "has sliding_window 4096"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "has layer_types"),
    ],
)
def test_a_key_that_no_list_has_is_refused(more: dict[str, Any], message: str) -> None:
    config = {"model_type": "llama", "vocab_size": 8, "hidden_size": 8, "rope_interleaved": False, "use_mrope": None}
    config_checks.check("x", config)
    with pytest.raises(CheckpointError, match=message):
        config_checks.check("x", config | more)


@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Mixtral", "Nemotron", "Qwen2", "Qwen3", "Gemma2"])
def test_the_keys_that_transformers_writes_are_known(kind: str) -> None:
    config = getattr(transformers, f"{kind}Config")(sliding_window=None, head_dim=None)
    told = config.to_dict() | {"head_dim": {"Qwen3": 128, "Gemma2": 256}.get(kind)}
    if kind == "Nemotron":
        told["hidden_act"] = "relu2"
    config_checks.check("x", told)


def test_an_import_that_went_wrong_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, right = made(tmp_path / "source"), connectors.Importer.config.fget

    def wrong(self: Any) -> Any:
        assert right
        config = right(self)
        config.rotary_base = 500.0
        return config

    monkeypatch.setattr(connectors.Importer, "config", property(wrong))
    with pytest.raises(CheckpointError, match=r"not the one of transformers: .*mean difference .* compare=False"):
        import_hf(str(source), str(tmp_path / "nemo"))
    assert not (tmp_path / "nemo").exists()
    nemo = import_hf(str(source), str(tmp_path / "nemo"), compare=False)
    assert "comparison" not in source_files.origin(nemo)


def test_two_imports_at_once_have_a_tokenizer_each(tmp_path: Path) -> None:
    """And nothing is written to a place that the whole machine shares. A script needs no guard."""
    before = Path("/tmp/nemo_tokenizer").stat().st_mtime_ns if Path("/tmp/nemo_tokenizer").exists() else None
    script = tmp_path / "script.py"
    script.write_text("import sys\nfrom aligner.checkpoint.huggingface import import_hf\nimport_hf(*sys.argv[1:])\n")
    processes = []
    for i, template in enumerate((CHATML, None)):
        made(tmp_path / str(i), rows=384 + 128 * i, template=template)
        words = [*PYTHON, str(script), str(tmp_path / str(i)), str(tmp_path / f"nemo {i}")]
        processes.append(subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    for process in processes:
        said, _ = process.communicate(timeout=TIME_LIMIT)
        assert process.returncode == 0, said[-2000:]
    for i, template in enumerate((CHATML, None)):
        hf = transformers.AutoTokenizer.from_pretrained(tmp_path / f"nemo {i}/context/nemo_tokenizer")
        assert (len(hf), hf.chat_template) == (384 + 128 * i, template)
    after = Path("/tmp/nemo_tokenizer").stat().st_mtime_ns if Path("/tmp/nemo_tokenizer").exists() else None
    assert after == before


def test_only_files_that_belong_beside_weights_are_kept(tmp_path: Path) -> None:
    wanted = [
        "config.json",
        "tokenizer.json",
        "merges.txt",
        "chat_template.jinja",
        "spiece.model",
        "LICENSE.md",
        "NOTICE",
    ]
    others = ["model.safetensors", "model.safetensors.index.json", "flax_model.msgpack", "model.onnx_data", "a.npz"]
    for name in [*wanted, *others, "README.md", ".gitattributes", "events.out.tfevents.1"]:
        (tmp_path / name).write_text("x")
    assert source_files.names(tmp_path) == sorted(wanted)


def test_keys_of_published_configurations_are_known() -> None:
    config_checks.check("x", {"model_type": "gemma2", "head_dim": 256, "cache_implementation": "hybrid"})
    config_checks.check("x", {"model_type": "llama", "attention_bias": None, "max_sequence_length": 2048})
