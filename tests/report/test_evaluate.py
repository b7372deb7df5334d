"""Scores of a checkpoint on rows: those of transformers, and those that its training would log."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nemo_run as run
import pytest
import torch
from hand import save_llama
from making import write_rows
from nemo.lightning import RestoreConfig
from transformers import AutoModelForCausalLM, AutoTokenizer

from aligner.common.errors import ConfigError, RowError
from aligner.common.run_folder import read_metrics
from aligner.data.tokenization import ResponseTokenizer
from aligner.report.evaluate import evaluate

Tiny = Callable[..., Any]
Execute = Callable[[Any], Path]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hf") / "llama"
    save_llama(path)
    return path


def logp_of(model: Path, prompt: str, response: str) -> float:
    """By transformers."""
    hf = AutoTokenizer.from_pretrained(model)
    ids, (tokens,) = ResponseTokenizer(hf)("", prompt, [response])
    loaded: Any = AutoModelForCausalLM.from_pretrained(model)
    with torch.no_grad():
        logits = loaded(torch.tensor([ids + tokens])).logits[0].log_softmax(-1)
    at = torch.arange(len(tokens)) + len(ids) - 1
    return float(logits[at, torch.tensor(tokens)].sum())


def test_log_probabilities_are_those_of_transformers(model: Path, tmp_path: Path) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", 9)
    metrics = evaluate(str(rows), str(model), output=str(tmp_path / "out.jsonl"), micro_batch_size=4, seq_length=64)
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["source"] for line in lines] == [f"{rows}:{i}" for i in range(1, 10)]
    for line in lines:
        for side in ("chosen", "rejected"):
            expected = logp_of(model, line["prompt"], line[f"{side}_response"])
            assert line[f"{side}_logp"] == pytest.approx(expected, rel=1e-5)
        assert line["margin"] == line["chosen_logp"] - line["rejected_logp"]
    assert metrics["acc"] == sum(line["margin"] > 0 for line in lines) / 9
    assert metrics["logps_chosen_mean"] == pytest.approx(sum(line["chosen_logp"] for line in lines) / 9)
    nll = -sum(line["chosen_logp"] for line in lines) / sum(line["chosen_tokens"] for line in lines)
    assert metrics["nll_per_token"] == pytest.approx(nll)
    with pytest.raises(ConfigError, match=r"output: .* exists already"):
        evaluate(str(rows), str(model), output=str(tmp_path / "out.jsonl"))
    with pytest.raises(RowError, match="none of 9 rows has at most seq_length=3 tokens"):
        evaluate(str(rows), str(model), seq_length=3)


def test_with_a_reference_it_is_what_the_run_validated(
    tiny: Tiny, execute: Execute, model: Path, tmp_path: Path
) -> None:
    recipe = tiny()
    recipe.model.tokenizer = None
    recipe.resume.restore_config = run.Config(RestoreConfig, path=str(model))
    recipe.optim.config.lr = 1e-2
    folder = execute(recipe)
    last = [row for row in read_metrics(folder / "metrics.csv") if "val/loss" in row][-1]
    beta = recipe.loss.beta
    metrics = evaluate(recipe.data.validation, str(folder), reference=str(model), beta=beta)
    assert metrics["loss"] == pytest.approx(last["val/loss"], rel=1e-4)
    assert metrics["acc"] == pytest.approx(last["val/acc"])
    assert metrics["logps_rejected_mean"] == pytest.approx(last["val/logps_rejected_mean"], rel=1e-5)
    same = evaluate(recipe.data.validation, str(model), reference=str(model))
    assert same["loss"] == pytest.approx(math.log(2)) and same["acc"] == 0.5


def test_single_responses(model: Path, tmp_path: Path) -> None:
    rows = [{"prompt": "1+1=", "completion": str(i), "label": i == 2} for i in range(3)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    evaluate(str(tmp_path / "rows.jsonl"), str(model), output=str(tmp_path / "out.jsonl"))
    lines = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [line["preference"] for line in lines] == ["rejected", "rejected", "chosen"]
    assert lines[1]["logp"] == pytest.approx(logp_of(model, "1+1=", "1"), rel=1e-5)
