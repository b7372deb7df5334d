"""Loss and gradient of every parameter against DPO written out by hand over a plain transformers Llama."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fiddle as fdl
import nemo_run as run
import pytest
import torch
from hand import Capture, llama, logp, to_hugging_face
from torch import Tensor
from transformers import LlamaForCausalLM

from aligner.common.errors import SanityCheckError
from aligner.data.examples import Example


def by_hand(
    model: LlamaForCausalLM, pairs: list[Example], reference: Tensor, beta: float
) -> tuple[float, dict[str, Tensor]]:
    total = torch.zeros(())
    for pair, (chosen, rejected) in zip(pairs, reference, strict=True):
        delta = (
            logp(model, pair.prompt, pair.responses[0])
            - chosen
            - logp(model, pair.prompt, pair.responses[1])
            + rejected
        )
        total = total + torch.log1p(torch.exp(-beta * delta))
    loss = total / len(pairs)
    loss.backward()
    return loss.item(), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("micro_batch_size", [1, 4])
@pytest.mark.parametrize("equal", [True, False], ids=["policy-is-reference", "policy-has-moved"])
def test_loss_and_gradients_equal_those_written_by_hand(
    tiny: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, micro_batch_size: int, equal: bool
) -> None:
    from aligner.common.run_folder import read_metrics
    from aligner.model import reference

    # Rewards far from zero, as in the middle of a run; the step-0 gate rightly objects, after the gradient is taken.
    shift = torch.linspace(-3, 4, 32).view(16, 2)
    true = reference.score_split

    def moved(trainer: Any, data: Any, split: Any) -> Tensor:
        return true(trainer, data, split) + (0 if equal or split != "train" else shift)

    monkeypatch.setattr(reference, "score_split", moved)
    recipe = tiny(held_out=0)
    recipe.data.global_batch_size, recipe.data.micro_batch_size = 16, micro_batch_size
    recipe.trainer.max_steps = 1
    recipe.trainer.callbacks = [run.Config(Capture)]
    # Random weights that are not small, so that no term hides in rounding.
    recipe.model.config.init_method_std = 0.15
    built: Any = fdl.build(recipe)
    data = built.keywords["data"]
    if equal:
        folder = built()
        ours = read_metrics(folder / "metrics.csv")[0]["train/loss"]
    else:
        with pytest.raises(SanityCheckError) as stopped:
            built()
        ours = None
        assert "step 0" in str(stopped.value)

    pairs = data.datasets["train"]
    lengths = {len(response) for p in pairs for response in p.responses}
    assert len(lengths) > 4 and any(p.responses[0][0] != p.responses[1][0] for p in pairs)
    model = llama(to_hugging_face(Capture.weights))
    with torch.no_grad():
        start = torch.stack([torch.stack([logp(model, p.prompt, response) for response in p.responses]) for p in pairs])
    loss, gradients = by_hand(model, pairs, start + (0 if equal else shift), beta=0.1)

    if ours is not None:
        assert ours == pytest.approx(loss, rel=1e-5)
        assert loss == pytest.approx(math.log(2), rel=1e-5)
    found = to_hugging_face(Capture.gradients)
    assert found.keys() == gradients.keys()
    for name, expected in gradients.items():
        error = (found[name] - expected).norm() / expected.norm()
        assert error < 1e-4, f"{name}: {error:.2g}"


def test_one_token_answers_that_differ_at_once_have_a_gradient(tmp_path: Path, tiny: Callable[..., Any]) -> None:
    """Projects that score from the second answer token on learn nothing here."""
    (tmp_path / "one.jsonl").write_text('{"prompt": "a", "chosen_response": "b", "rejected_response": "c"}\n' * 4)
    recipe = tiny(held_out=0)
    recipe.data.train = str(tmp_path / "one.jsonl")
    recipe.trainer.max_steps = 2
    recipe.trainer.callbacks = [run.Config(Capture)]
    fdl.build(recipe)()
    assert Capture.gradients["output_layer.weight"].norm() > 1e-3
