from typing import Any

import pytest
import torch

from aligner.data.batch import Batch, Item, collate
from aligner.data.examples import Example
from aligner.model import policy

PAIRS = [Example("f:1", [1, 2], ([3, 9], [4, 5, 9])), Example("f:2", [6], ([9], [7, 9]), (2.0, -1.0))]


def batch(**options: Any) -> Batch:
    return collate([Item(i, pair, valid=i == 0) for i, pair in enumerate(PAIRS)], pad_id=0, **options)


def test_chosen_come_first_padded_on_the_right_with_labels_one_ahead() -> None:
    b = batch()
    assert b.tokens_RT.tolist() == [[1, 2, 3, 0], [6, 0, 0, 0], [1, 2, 4, 5], [6, 7, 0, 0]]
    assert b.labels_RT.tolist() == [[2, 3, 9, 0], [9, 0, 0, 0], [2, 4, 5, 9], [7, 9, 0, 0]]
    # What is padded has no place of its own.
    assert b.positions_RT.tolist() == [[0, 1, 2, 0], [0, 0, 0, 0], [0, 1, 2, 3], [0, 1, 0, 0]]
    assert b.cu_seqlens is None


def test_packed_sequences_lie_end_to_end_with_positions_of_their_own() -> None:
    b = batch(packed=True)
    assert b.tokens_RT.tolist() == [[1, 2, 3, 6, 1, 2, 4, 5, 6, 7]]
    assert b.labels_RT.tolist() == [[2, 3, 9, 9, 2, 4, 5, 9, 7, 9]]
    assert b.positions_RT.tolist() == [[0, 1, 2, 0, 0, 1, 2, 3, 0, 1]]
    assert b.cu_seqlens is not None and b.cu_seqlens.tolist() == [0, 3, 4, 8, 10] and b.cu_seqlens.dtype == torch.int32
    assert b.max_seqlen == 4


def test_padding_stands_right_of_its_own_sequence_where_parallelism_needs_multiples() -> None:
    b = batch(packed=True, multiple=4, row_multiple=10)
    assert b.tokens_RT.tolist() == [[1, 2, 3, 0, 6, 0, 0, 0, 1, 2, 4, 5, 6, 7, 0, 0, 0, 0, 0, 0]]
    assert b.cu_seqlens is not None and b.cu_seqlens.tolist() == [0, 4, 8, 12, 20]
    assert batch(row_multiple=8).tokens_RT.shape == batch(multiple=8).tokens_RT.shape == (4, 8)
    assert torch.equal(batch(row_multiple=8).tokens_RT[:, :4], batch().tokens_RT)


@pytest.mark.parametrize(
    "options", [{}, {"packed": True}, {"packed": True, "multiple": 4}, {"multiple": 4}, {"row_multiple": 16}], ids=str
)
def test_all_response_tokens_and_no_others_are_scored(options: Any) -> None:
    b = batch(**options)
    flat = b.labels_RT.flatten().tolist()
    scored = [flat[i : i + n] for i, n in zip(b.start_S.tolist(), b.length_S.tolist(), strict=True)]
    assert scored == [[3, 9], [9], [4, 5, 9], [7, 9]]
    assert b.total_S.tolist() == [4, 2, 5, 3]


def test_columns_are_the_responses_of_an_example() -> None:
    b = batch()
    assert b.columns(b.length_S).tolist() == [[2, 3], [1, 2]]
    assert b.valid_P.tolist() == [1.0, 0.0]
    assert b.reward_P2.tolist() == [[1.0, 0.0], [2.0, -1.0]]


@pytest.mark.parametrize("packed", [False, True])
def test_single_responses_and_their_mismatched_ones(packed: bool) -> None:
    one, other = Example("f:1", [1, 2], ([3, 9],), desirable=False), Example("f:1", [1, 2], ([7, 7, 9],))
    b = collate([Item(0, one, mismatched=Item(4, other))], pad_id=0, packed=packed)
    assert b.tokens_RT.tolist() == [[1, 2, 3]]
    assert b.desirable_P.tolist() == [0.0]
    assert b.mismatched is not None
    assert b.mismatched.tokens_RT.tolist() == [[1, 2, 7, 7]]
    assert b.mismatched.index_P.tolist() == [4]
    assert (b.mismatched.cu_seqlens is not None) == packed


@pytest.mark.parametrize("packed", [False, True])
def test_results_of_tools_are_read_and_not_scored(packed: bool) -> None:
    """A call (3), its result (8, 8), an answer (4, 9): log-probabilities and lengths are of the call and the answer."""
    mixed = Example("f:1", [1, 2], ([3, 8, 8, 4, 9], [7, 9]), unscored=([1, 2], []))
    plain = Example("f:2", [6], ([5, 9], [9]))
    b = collate([Item(0, mixed), Item(1, plain)], pad_id=0, packed=packed)
    assert b.tokens_RT.flatten()[:6].tolist() == [1, 2, 3, 8, 8, 4]
    assert b.labels_RT[b.loss_mask_RT()].tolist() == [3, 4, 9, 5, 9, 7, 9, 9]
    nll = torch.arange(b.labels_RT.numel(), dtype=torch.float32).reshape(b.labels_RT.shape) + 1
    expected = [[0.0, 0.0], [0.0, 0.0]]
    flat, mask = nll.flatten().tolist(), b.loss_mask_RT().flatten().tolist()
    for s, (start, length) in enumerate(zip(b.start_S.tolist(), b.length_S.tolist(), strict=True)):
        expected[s % 2][s // 2] = -sum(flat[i] for i in range(start, start + length) if mask[i])
    assert policy.logps(b, nll).tolist() == expected
    assert policy.lengths(b).tolist() == [[3.0, 2.0], [2.0, 1.0]]
