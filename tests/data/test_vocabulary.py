"""Tokens that have no row in the embedding: refused by name before anything is computed; padding needs none."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nemo_run as run
import pytest
import torch
import transformers
from nemo.lightning import RestoreConfig
from tokenizing import byte_level

from aligner.common.errors import RowError
from aligner.common.run_folder import read_metrics
from aligner.generate.generation import generate_responses
from aligner.generate.megatron_engine import MegatronEngine

Tiny = Callable[..., Any]
Execute = Callable[[Any], Path]


def model(folder: Path, change: Callable[[Any], None]) -> Path:
    """A Llama whose tokenizer was changed after its embedding was made."""
    hf, torch_seed = byte_level(), 0
    rows = len(hf)
    change(hf)
    torch.manual_seed(torch_seed)
    sizes: Any = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=rows, max_position_embeddings=128, eos_token_id=3, **sizes)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    hf.save_pretrained(folder)
    return folder


def recipe_from(tiny: Tiny, folder: Path) -> Any:
    recipe = tiny()
    recipe.model.tokenizer = None
    recipe.resume.restore_config = run.Config(RestoreConfig, path=str(folder))
    return recipe


def test_padding_needs_no_row(tiny: Tiny, execute: Execute, tmp_path: Path) -> None:
    folder = model(tmp_path / "pad", lambda hf: hf.add_special_tokens({"pad_token": "[PAD]"}))
    rows = read_metrics(execute(recipe_from(tiny, folder)) / "metrics.csv")
    assert rows[-1]["step"] == 4


def test_a_token_without_a_row_is_refused_with_its_line(tiny: Tiny, execute: Execute, tmp_path: Path) -> None:
    folder = model(tmp_path / "added", lambda hf: hf.add_tokens(["zebra"]))
    recipe = recipe_from(tiny, folder)
    lines = Path(recipe.data.train).read_text().splitlines()
    lines[6] = json.dumps({"prompt": "a", "chosen_response": "the zebra", "rejected_response": "no"})
    Path(recipe.data.train).write_text("\n".join(lines) + "\n")
    with pytest.raises(RowError, match=r"train16\.jsonl:7: holds the token 'zebra' of id 260, but the model's"):
        execute(recipe)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "the zebra"}\n')
    with pytest.raises(RowError, match=r"prompts\.jsonl:1: holds the token 'zebra' of id 260, but the embedding of"):
        generate_responses(
            str(tmp_path / "prompts.jsonl"), str(tmp_path / "out.jsonl"), MegatronEngine(str(folder)), max_tokens=4
        )


def test_mistral_without_a_window_answers(tmp_path: Path) -> None:
    """Its length is that of its positions, where NeMo takes it from the window."""
    hf = byte_level()
    hf.save_pretrained(tmp_path / "mistral")
    sizes: Any = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 64, "sliding_window": None}
    config = transformers.MistralConfig(vocab_size=len(hf), **sizes)
    transformers.MistralForCausalLM(config).save_pretrained(tmp_path / "mistral")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    engine = MegatronEngine(str(tmp_path / "mistral"))
    out = generate_responses(str(tmp_path / "prompts.jsonl"), str(tmp_path / "out.jsonl"), engine, 1, max_tokens=4)
    assert json.loads(out.read_text())["num_tokens"] <= 4
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "a" * 61}) + "\n")
    with pytest.raises(RowError, match="61 tokens, and 64 less max_tokens=4 leave 60"):
        generate_responses(str(tmp_path / "prompts.jsonl"), str(tmp_path / "long.jsonl"), engine, 1, max_tokens=4)
