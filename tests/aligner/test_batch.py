import torch

from aligner.batch import Batch, Item, collate
from aligner.examples import Example

PAIRS = [Example("f:1", [1, 2], ([3, 9], [4, 5, 9])), Example("f:2", [6], ([9], [7, 9]), (2.0, -1.0))]


def batch(**options: int) -> Batch:
    return collate([Item(i, pair, valid=i == 0) for i, pair in enumerate(PAIRS)], pad_id=0, **options)


def test_chosen_come_first_padded_on_the_right_with_labels_one_ahead() -> None:
    b = batch()
    assert b.tokens_ST.tolist() == [[1, 2, 3, 0], [6, 0, 0, 0], [1, 2, 4, 5], [6, 7, 0, 0]]
    assert b.labels_ST.tolist() == [[2, 3, 9, 0], [9, 0, 0, 0], [2, 4, 5, 9], [7, 9, 0, 0]]
    assert b.positions_ST.tolist() == [[0, 1, 2, 3]] * 4


def test_all_response_tokens_and_no_others_are_scored() -> None:
    b = batch()
    scored = [b.labels_ST[s][b.response_mask_ST[s].bool()].tolist() for s in range(4)]
    assert scored == [[3, 9], [9], [4, 5, 9], [7, 9]]


def test_columns_are_the_responses_of_an_example() -> None:
    b = batch()
    assert b.columns(b.response_mask_ST.sum(dim=1)).tolist() == [[2, 3], [1, 2]]
    assert b.valid_P.tolist() == [1.0, 0.0]
    assert b.reward_P2.tolist() == [[1.0, 0.0], [2.0, -1.0]]


def test_single_responses_and_their_mismatched_ones() -> None:
    one, other = Example("f:1", [1, 2], ([3, 9],), desirable=False), Example("f:1", [1, 2], ([7, 7, 9],))
    b = collate([Item(0, one, mismatched=Item(4, other))], pad_id=0)
    assert b.tokens_ST.tolist() == [[1, 2, 3]]
    assert b.desirable_P.tolist() == [0.0]
    assert b.mismatched is not None
    assert b.mismatched.tokens_ST.tolist() == [[1, 2, 7, 7]]
    assert b.mismatched.index_P.tolist() == [4]


def test_width_is_a_multiple_where_tensor_parallelism_needs_one() -> None:
    assert batch(multiple=8).tokens_ST.shape == (4, 8)
    assert torch.equal(batch(multiple=8).tokens_ST[:, :4], batch().tokens_ST)
