"""Each architecture, small and random: imported it says what transformers says; aligned and exported, still."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import nemo_run as run
import pytest
import torch
import transformers
from launching import TIME_LIMIT, forked
from making import write_rows
from nemo.lightning import RestoreConfig
from reading import read_rows

from aligner import recipes
from aligner.checkpoint import huggingface
from aligner.checkpoint.imports import config_checks
from aligner.common.errors import CheckpointError
from aligner.common.run_folder import read_metrics
from aligner.data.examples import examples
from aligner.data.tokenization import ResponseTokenizer
from aligner.demo import toy
from aligner.recipes.families import Layout

SIZES = {
    "vocab_size": 85, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "initializer_range": 0.2,
}  # fmt: skip
ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
EXPERTS = {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 16, "decoder_sparse_step": 1}
pytestmark = pytest.mark.slow
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2_7b": ("Llama", {}),
    "llama3_8b": ("Llama", {"rope_theta": 500000.0}),
    "llama31_8b": (
        "Llama",
        {"rope_theta": 500000.0, "rope_scaling": ROPE | {"original_max_position_embeddings": 8192}},
    ),
    "llama32_1b": ("Llama", {"rope_theta": 500000.0, "tie_word_embeddings": True}),
    "mistral_7b": ("Mistral", {"sliding_window": None}),
    "mixtral_8x7b": ("Mixtral", {"num_local_experts": 4, "vocab_size": 128}),
    "nemotron4_15b": ("Nemotron", {}),
    "qwen2_7b": ("Qwen2", {}),
    "qwen3_8b": ("Qwen3", {"head_dim": 128}),
    "qwen3_30b_a3b": ("Qwen3Moe", {"head_dim": 128, "norm_topk_prob": True} | EXPERTS),
}
"""A recipe of each, and the small model of its kind that it starts from."""
HALF = ("llama3_8b", "nemotron4_15b")
"""Those whose weights are stored in bfloat16, as the real ones' are."""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("architectures")


@pytest.fixture(scope="module")
def rows(home: Path) -> str:
    return str(write_rows(home / "rows.jsonl", 8))


@pytest.fixture(scope="module")
def made(home: Path, rows: str) -> Path:
    """Runs of the recipes themselves, two steps on one rank; and what they export."""
    jobs: list[tuple[int, Any]] = []
    for name, (kind, options) in MODELS.items():
        folder = home / name
        config = getattr(transformers, f"{kind}Config")(**SIZES | options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(toy.TOKENIZER)
        tokenizer.add_tokens([f"<extra {i}>" for i in range(config.vocab_size - len(tokenizer))])
        tokenizer.save_pretrained(folder)
        torch.manual_seed(0)
        model = getattr(transformers, f"{kind}ForCausalLM")(config)
        (model.bfloat16() if name in HALF else model).save_pretrained(folder)
        (folder / "generation_config.json").write_text('{"eos_token_id": [1, 2], "top_p": 0.9}')
        # Where a run looks before it imports in a process of its own.
        imported = home / "runs/models" / huggingface.cache_name(str(folder))
        jobs.append((1, run.Partial(huggingface.import_hf, source=str(folder), output=str(imported))))
        jobs.append((1, _recipe(name, home, rows, folder)))
        back = run.Partial(
            huggingface.export_hf, checkpoint=str(home / "runs" / name), output=str(home / f"{name} aligned")
        )
        jobs.append((1, back))
    # A second round: what it starts from is a run, whose sizes are not the recipe's.
    second = _recipe("llama32_1b", home, rows, home / "runs/llama32_1b")
    second.log.name = "second round"
    jobs.append((1, second))
    codes, said = forked(home, jobs, limit=2 * TIME_LIMIT)
    (home / "said").write_text(said)
    ended = [*((name, what) for name in MODELS for what in ("import", "run", "export")), ("second", "run")]
    assert not [job for job, code in zip(ended, codes, strict=True) if code != [0]], said[-3000:]
    return home


def _recipe(name: str, home: Path, rows: str, start: Path) -> Any:
    recipe: Any = getattr(recipes, name).dpo_recipe(
        dir=str(home / "runs"), name=name, num_nodes=1, num_gpus_per_node=1, seq_length=64, train=rows, validation=rows
    )
    recipe.resume.restore_config = run.Config(RestoreConfig, path=str(start))
    Layout().apply(recipe)
    recipe.data.apply_chat_template = False
    recipe.data.global_batch_size = recipe.data.micro_batch_size = 4
    recipe.trainer.max_steps, recipe.trainer.val_check_interval = 2, 2
    recipe.optim.config.lr, recipe.log.ckpt.every_n_train_steps = 1e-3, 2
    return recipe


def mean_logp(folder: Path, rows: str) -> float:
    """Of the chosen responses, by transformers."""
    tokenizer = ResponseTokenizer(transformers.AutoTokenizer.from_pretrained(folder))
    pairs, _ = examples(read_rows(rows), tokenizer, kind="pairs", seq_length=64)
    model: Callable[..., Any] = transformers.AutoModelForCausalLM.from_pretrained(folder)
    total = 0.0
    for pair in pairs:
        chosen = pair.responses[0]
        with torch.inference_mode():
            logits = model(torch.tensor([pair.prompt + chosen])).logits[0].log_softmax(-1)
        at = torch.arange(len(chosen)) + len(pair.prompt) - 1
        total += float(logits[at, torch.tensor(chosen)].sum())
    return total / len(pairs)


@pytest.mark.parametrize("name", MODELS)
def test_a_recipe_aligns_its_architecture_there_and_back(made: Path, rows: str, name: str) -> None:
    first, *_, last = [row for row in read_metrics(made / f"runs/{name}/metrics.csv") if "val/loss" in row]
    assert first["val/loss"] == pytest.approx(0.6931471806, abs=1e-6)
    assert first["val/logps_chosen_mean"] == pytest.approx(mean_logp(made / name, rows), rel=1e-5)
    assert last["val/loss"] < first["val/loss"]
    # All but the weights is as it came, and is stored in the precision that it came in.
    before, after = (
        {path.name: path.read_bytes() for path in (made / folder).iterdir() if path.suffix != ".safetensors"}
        for folder in (name, f"{name} aligned")
    )
    assert before == after
    rounded = 2e-2 if name in HALF else 1e-5
    assert last["val/logps_chosen_mean"] == pytest.approx(mean_logp(made / f"{name} aligned", rows), rel=rounded)


def test_a_run_that_came_from_an_import_is_gone_on_with_by_its_recipe(made: Path) -> None:
    before, after = (read_metrics(made / f"runs/{name}/metrics.csv") for name in ("llama32_1b", "second round"))
    last = [row for row in before if "val/loss" in row][-1]
    assert after[0]["val/logps_chosen_mean"] == pytest.approx(last["val/logps_chosen_mean"], rel=1e-5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "llama", "rope_scaling": {"type": "linear", "factor": 2.0}}, "has rope_scaling"),
        ({"model_type": "llama", "rope_scaling": ROPE | {"original_max_position_embeddings": 32}}, "knows only as"),
        ({"model_type": "qwen2", "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "importer of qwen2 ignores"),
        ({"model_type": "mixtral", "sliding_window": 4096}, "has sliding_window 4096"),
        ({"model_type": "qwen3", "head_dim": 64}, "has head_dim 64, and NeMo's importer of qwen3 knows 128"),
        ({"model_type": "llama", "attention_bias": True}, "has attention_bias True"),
        ({"model_type": "gemma2", "head_dim": 128}, "has head_dim 128"),
        ({"model_type": "qwen3_moe", "num_experts": 64}, "has num_experts 64"),
    ],
)
def test_what_an_importer_would_get_wrong_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        config_checks.check("model", config)


def test_what_importers_know_is_let_through() -> None:
    config_checks.check(
        "model", {"model_type": "llama", "rope_scaling": ROPE | {"original_max_position_embeddings": 8192}}
    )
    config_checks.check("model", {"model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": False})
    config_checks.check("model", {"model_type": "mistral", "sliding_window": 4096})
    config_checks.rows("model", stored=85, vocabulary=85)
    with pytest.raises(CheckpointError, match="has 85 tokens, which NeMo's importer padded to 128"):
        config_checks.rows("model", stored=128, vocabulary=85)
