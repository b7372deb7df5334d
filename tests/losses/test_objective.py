"""What an objective asks for, found out from the loss itself."""

from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch

from aligner import losses
from aligner.cli.parsing.named_parts import LOSSES
from aligner.losses import unpaired
from aligner.losses.metrics import finalize, sums
from aligner.losses.objective import Objective, Scored
from aligner.losses.pairs import PairLogprobs

UNFIT: dict[str, Any] = {"losses": [unpaired.kto], "beta": "0.1"}
REFERENCE_FREE = {"simpo", "orpo"}
REWARD_AWARE = {"rpo_sq", "rpo_bwd_kl", "rpo_fwd_kl"}


@pytest.mark.parametrize("loss", LOSSES)
def test_what_a_loss_reads_is_found_out(loss: Any) -> None:
    objective = Objective(loss=loss)
    name = loss.__name__
    assert objective.kind == ("unpaired" if name == "kto" else "pairs")
    assert objective.needs_reference == (name not in REFERENCE_FREE)
    assert ("chosen_reward" in objective.required_fields) == (name in REWARD_AWARE)
    lengths = "length" if name == "kto" else "chosen_length"
    assert (lengths in objective.required_fields) == (name in {"ipo", "simpo", "orpo"})
    assert lengths in Objective(loss=partial(loss, average_log_probs=True)).required_fields


def test_a_mix_reads_what_its_parts_read() -> None:
    free = partial(losses.mix, losses=[losses.simpo, losses.orpo], weights=[1, 1])
    assert not Objective(loss=free).needs_reference
    mixed = Objective(loss=partial(losses.mix, losses=[partial(losses.simpo, beta=2.5), losses.dpo], weights=[1, 1]))
    assert mixed.needs_reference
    assert (mixed.beta, mixed.average_log_probs) == (2.5, True)


def test_any_function_of_pairs_is_a_loss() -> None:
    def cpo(pairs: PairLogprobs, *, beta: float = 0.3) -> torch.Tensor:
        return -torch.nn.functional.logsigmoid(beta * (pairs.policy_chosen - pairs.policy_rejected))

    objective = Objective(loss=cpo)
    assert (objective.kind, objective.needs_reference, objective.beta) == ("pairs", False, 0.3)
    assert Objective(loss=lambda pairs: pairs.policy_chosen - pairs.reference_chosen).needs_reference
    assert Objective(loss=lambda pairs: pairs.policy_chosen).beta == 1.0


def test_a_reference_that_only_decides_is_read_all_the_same() -> None:
    def gated(pairs: PairLogprobs) -> torch.Tensor:
        return torch.where(losses.margin(pairs) > 0, 0.5 * losses.simpo(pairs), losses.simpo(pairs))

    assert Objective(loss=gated).needs_reference
    assert Objective(loss=lambda pairs: losses.dpo(replace(pairs, policy_chosen=pairs.policy_chosen))).needs_reference


class Object:
    def __call__(self, pairs: PairLogprobs) -> torch.Tensor:
        return -pairs.policy_chosen


@pytest.mark.parametrize("loss", [Object(), torch.nn.Identity()])
def test_objects_that_can_be_called_are_losses_too(loss: Any) -> None:
    assert Objective(loss=loss).kind == "pairs"


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda pairs: losses.ipo(pairs).mean(), r"must return one number for each example, \[P\]; .* returned \(\)"),
        (lambda pairs: 3, "it returned int"),
        (
            lambda pairs: pairs.nothing,
            "fails on two examples of PairLogprobs: AttributeError: .* no attribute 'nothing'",
        ),
        (partial(losses.mix, losses=UNFIT["losses"], weights=[1]), "fails on two examples of PairLogprobs"),
        (partial(losses.dpo, beta=UNFIT["beta"]), "fails on two examples of PairLogprobs: TypeError"),
    ],
)
def test_what_is_no_loss_says_so(loss: Any, message: str) -> None:
    """The mean of a micro-batch would be broadcast, and pairs weighted by how they fell."""
    with pytest.raises(ValueError, match=message):
        assert Objective(loss=loss).required_fields


def test_without_a_preference_demonstrations_are_learned_from() -> None:
    objective = Objective(loss=losses.dpo, preference_loss_weight=0.0, sft_loss_weight=1.0)
    assert (objective.kind, objective.needs_reference) == ("demonstrations", False)


def scored(**changed: Any) -> Scored:
    values = {
        "logp_PK": torch.tensor([[-4.0], [-9.0], [-6.0]]), "reference_PK": torch.tensor([[-5.0], [-7.0], [-6.5]]),
        "length_PK": torch.tensor([[2.0], [3.0], [1.0]]), "reward_P2": torch.zeros(3, 2),
        "desirable_P": torch.tensor([1.0, 0.0, 1.0]), "valid_P": torch.tensor([1.0, 1.0, 0.0]),
        "tokens_P": torch.tensor([5.0, 6.0, 7.0]), "kl": 0.25,
    }  # fmt: skip
    return Scored(**{**values, **changed})


def test_single_responses_are_measured_by_what_is_wanted() -> None:
    objective = Objective(loss=partial(unpaired.kto, beta=0.5), sft_loss_weight=0.1)
    s = scored()
    found = finalize(sums(objective.compute_metrics(s, *objective(s))))
    # The third is a weightless copy.
    assert found["rewards_chosen_mean"] == pytest.approx(0.5 * 1.0)
    assert found["rewards_rejected_mean"] == pytest.approx(0.5 * -2.0)
    assert found["rewards_margin_mean"] == pytest.approx(1.5)
    assert (found["chosen_lengths"], found["rejected_lengths"]) == (2.0, 3.0)
    assert (found["kl"], found["tokens"]) == (0.25, 5.5)
    # The likelihood is of the wanted response, over all that are wanted; in the loss, over all.
    assert found["sft_loss"] == pytest.approx(2.0)
    assert found["loss"] == pytest.approx(found["preference_loss"] + 0.1 * 2.0 / 2)
    assert found["step0_loss"] == pytest.approx(0.5)
    assert "acc" not in found


def test_a_tie_counts_half_and_rewards_have_the_losses_own_units() -> None:
    pairs = scored(
        logp_PK=torch.tensor([[-4.0, -8.0], [-2.0, -6.0], [-1.0, -2.0]]),
        reference_PK=torch.tensor([[-5.0, -5.0], [-2.0, -6.0], [-2.0, -2.0]]),
        length_PK=torch.tensor([[2.0, 4.0], [2.0, 4.0], [1.0, 1.0]]),
    )
    for loss, chosen, rejected in ((losses.dpo, 1.0, -3.0), (losses.ipo, 0.5, -0.75)):
        objective = Objective(loss=partial(loss, beta=0.2))
        found = finalize(sums(objective.compute_metrics(pairs, *objective(pairs))))
        assert found["acc"] == 0.75
        assert found["rewards_chosen_mean"] == pytest.approx(0.2 * chosen / 2)
        assert found["rewards_rejected_mean"] == pytest.approx(0.2 * rejected / 2)
    free = Objective(loss=losses.simpo)
    bare = scored(logp_PK=pairs.logp_PK, reference_PK=torch.zeros(3, 2), length_PK=pairs.length_PK)
    found = finalize(sums(free.compute_metrics(bare, *free(bare))))
    assert found["rewards_chosen_mean"] == pytest.approx(2.0 * (-2.0 - 1.0) / 2)
    assert "step0_error" not in found
