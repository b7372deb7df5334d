from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hand import save_llama
from transformers import AutoModelForCausalLM, AutoTokenizer

from aligner.checkpoint.huggingface import export_hf, import_hf
from aligner.common.errors import CheckpointError
from aligner.common.run_folder import read_metrics

Tiny = Callable[..., Any]
Execute = Callable[[Any], Path]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Hugging Face Llama with grouped queries and tied embeddings, as SmolLM2 is."""
    path = tmp_path_factory.mktemp("hf") / "llama"
    save_llama(path, tie_word_embeddings=True, rope_theta=50000.0)
    return path


def recipe_for(tiny: Tiny, folder: Path) -> Any:
    import nemo_run as run
    from nemo.lightning import RestoreConfig

    recipe = tiny()
    recipe.model.tokenizer = None
    recipe.resume.restore_config = run.Config(RestoreConfig, path=str(folder))
    return recipe


@pytest.mark.slow
def test_a_hugging_face_model_is_aligned_and_comes_back(
    tiny: Tiny, execute: Execute, folder: Path, tmp_path: Path
) -> None:
    before = AutoModelForCausalLM.from_pretrained(folder)
    recipe = recipe_for(tiny, folder)
    run_folder = execute(recipe)
    measured = read_metrics(run_folder / "metrics.csv")

    # The recipe's model has other norms, rotary base and embeddings; it takes over the checkpoint's.
    # The policy that NeMo starts from says what transformers says.
    from reading import read_rows

    from aligner.data.examples import examples
    from aligner.data.tokenization import ResponseTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    pairs, _ = examples(read_rows(recipe.data.validation), ResponseTokenizer(tokenizer), kind="pairs", seq_length=64)

    def mean_logp(model: Any) -> float:
        total = 0.0
        with torch.no_grad():
            for p in pairs:
                chosen = p.responses[0]
                logits = model(torch.tensor([p.prompt + chosen])).logits[0].log_softmax(-1)
                at = torch.arange(len(chosen)) + len(p.prompt) - 1
                total += float(logits[at, torch.tensor(chosen)].sum())
        return total / len(pairs)

    assert measured[0]["val/logps_chosen_mean"] == pytest.approx(mean_logp(before), rel=1e-5)

    # Going on, the run still knows what it adopted, and validates the same weights alike.
    longer = recipe_for(tiny, folder)
    longer.trainer.max_steps = 6
    execute(longer)
    again = read_metrics(run_folder / "metrics.csv")
    at_4 = [
        row["val/logps_chosen_mean"]
        for rows in (measured, again)
        for row in rows
        if row["step"] == 4 and "val/loss" in row
    ]
    assert at_4[0] == at_4[1]
    measured = again

    out = export_hf(str(run_folder), str(tmp_path / "aligned"))
    after = AutoModelForCausalLM.from_pretrained(out)
    assert measured[-1]["val/logps_chosen_mean"] == pytest.approx(mean_logp(after), rel=1e-5)
    assert AutoTokenizer.from_pretrained(out)("12+3=").input_ids == tokenizer("12+3=").input_ids
    with pytest.raises(CheckpointError, match="exists already"):
        export_hf(str(run_folder), str(out))


def test_the_round_trip_is_exact(folder: Path, tmp_path: Path) -> None:
    back = export_hf(str(import_hf(str(folder), str(tmp_path / "nemo"))), str(tmp_path / "back"))
    a, b = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (folder, back))
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(CheckpointError, match="architecture 'bert'"):
        import_hf(str(tmp_path), str(tmp_path / "out"))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="is not JSON"):
        import_hf(str(tmp_path), str(tmp_path / "out"))
    with pytest.raises(CheckpointError, match="is not a checkpoint"):
        export_hf(str(tmp_path), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_nemo_checkpoint_of_another_shape_is_refused(
    tiny: Tiny, execute: Execute, folder: Path, tmp_path: Path
) -> None:
    recipe = recipe_for(tiny, import_hf(str(folder), str(tmp_path / "nemo")))
    with pytest.raises(CheckpointError, match=r"model.config: does not fit .*rotary_base 50000.0 \(recipe: 10000\)"):
        execute(recipe)


def test_a_tokenizer_from_a_checkpoint_outlives_it(tiny: Tiny, execute: Execute, folder: Path) -> None:
    """Each job removes the checkpoint that the one before it left, and with it the tokenizer that it was given."""
    for steps in (2, 6, 8):
        recipe = recipe_for(tiny, folder)
        recipe.trainer.max_steps = steps
        run_folder = execute(recipe)
    assert max(row["step"] for row in read_metrics(run_folder / "metrics.csv")) == 8
