"""The last layer and the cross-entropy as one, against torch's two. On tensor-parallel ranks: test_parallelism.py."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from aligner.data.batch import Item, collate
from aligner.data.examples import Example
from aligner.model import head


class One:
    """A group of one rank."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 1


def inputs(count: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(count, 16, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(50, 16, generator=generator).to(dtype).requires_grad_()
    return hidden, weight, torch.randint(50, (count,), generator=generator)


def gradients(nll: Tensor, *of: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad((nll * torch.linspace(-1, 2, len(nll))).sum(), of)


@pytest.mark.parametrize("rows", [1, 3, 100])
@pytest.mark.parametrize("count", [0, 7])
def test_values_and_gradients_are_those_of_all_logits_at_once(
    rows: int, count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head, "CHUNK_SIZE", rows)
    hidden, weight, label = inputs(count)
    nll: Any = head.TokenNLL.apply(hidden, weight, label, One())
    expected = cross_entropy(hidden @ weight.T, label, reduction="none")
    torch.testing.assert_close(nll, expected)
    for ours, theirs in zip(gradients(nll, hidden, weight), gradients(expected, hidden, weight), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_in_half_precision_log_probabilities_are_in_float32_and_pieces_lose_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(head, "CHUNK_SIZE", 5)
    hidden, weight, label = inputs(400, torch.bfloat16)
    nll: Any = head.TokenNLL.apply(hidden, weight, label, One())
    expected = cross_entropy((hidden @ weight.T).float(), label, reduction="none")
    assert nll.dtype == torch.float32
    torch.testing.assert_close(nll, expected)
    # 80 pieces added up in bfloat16 would be off by several per cent.
    (ours,), (theirs,) = gradients(nll, weight), gradients(expected, weight)
    exact = (ours.float() - theirs.float()).norm() / theirs.float().norm()
    assert float(exact) < 0.004


def test_what_does_not_learn_gets_no_gradient() -> None:
    hidden, weight, label = inputs(4)
    frozen: Any = head.TokenNLL.apply(hidden, weight.detach(), label, One())
    frozen.sum().backward()
    assert hidden.grad is not None and weight.grad is None


@pytest.mark.parametrize("packed", [False, True])
def test_only_labels_of_responses_are_scored(packed: bool) -> None:
    rows = [Example("f:1", [1, 2], ([3, 9], [4, 5, 9])), Example("f:2", [6], ([9], [7, 9]))]
    batch = collate([Item(i, row) for i, row in enumerate(rows)], pad_id=0, packed=packed, row_multiple=4)
    assert batch.labels_RT[batch.loss_mask_RT()].tolist() == [3, 9, 9, 4, 5, 9, 7, 9]
