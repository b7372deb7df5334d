"""Every loss against arithmetic written out in plain Python and against what other projects return."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from aligner import losses
from aligner.losses.pairs import PairLogprobs
from aligner.losses.unpaired import ResponseLogprobs, kto

# The three pairs of torchtune's own test; margins 0, 10 and 20 nats.
TORCHTUNE = {
    "policy_chosen": [-0.5, -10.0, -1.0],
    "policy_rejected": [-0.1, -30.0, -21.0],
    "reference_chosen": [-0.5, -10.1, -0.1],
    "reference_rejected": [-0.1, -20.1, -0.1],
    "chosen_reward": [1.0, 1.0, 1.0],
    "rejected_reward": [0.0, 0.0, 0.0],
    "chosen_length": [2, 5, 4],
    "rejected_length": [3, 10, 7],
}
SIDES = ("chosen", "rejected")
RATED = {"chosen_reward": [4.0, 3.0, 5.0], "rejected_reward": [1.0, 2.5, 0.0]}


def pairs(**changed: list[float]) -> PairLogprobs:
    return PairLogprobs(**{name: torch.tensor(v, dtype=torch.float64) for name, v in {**TORCHTUNE, **changed}.items()})


def swapped(p: PairLogprobs) -> PairLogprobs:
    flipped = {"chosen": "rejected", "rejected": "chosen"}
    names = {name: name.rsplit("_", 1) for name in vars(p)}
    other = {n: f"{a}_{flipped[b]}" if b in flipped else f"{flipped[a]}_{b}" for n, (a, b) in names.items()}
    return PairLogprobs(**{name: getattr(p, other[name]) for name in vars(p)})


def at_start(p: PairLogprobs) -> PairLogprobs:
    return replace(p, policy_chosen=p.reference_chosen, policy_rejected=p.reference_rejected)


# ---- in plain Python ------------------------------------------------------------------------------------------------


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def log_sigmoid(x: float) -> float:
    return -math.log(1 + math.exp(-x))


def kl(a: float, b: float) -> float:
    p, q = sigmoid(a), sigmoid(b)
    return p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))


def log_odds(x: float) -> float:
    return math.log(math.exp(x) / (1 - math.exp(x)))


# Of (r_w, r_l, gap of the rewards, log π(y_w), log π(y_l), log π(y_w)/|y_w|), β = 0.1 where nothing else is said.
BY_HAND: dict[str, Callable[..., float]] = {
    "dpo": lambda w, x, *_: math.log(1 + math.exp(-0.1 * (w - x))),
    "robust_dpo": lambda w, x, *_: (-0.9 * log_sigmoid(0.1 * (w - x)) + 0.1 * log_sigmoid(-0.1 * (w - x))) / 0.8,
    "ipo": lambda w, x, *_: (w - x - 5) ** 2,
    "hinge": lambda w, x, *_: max(0.0, 1 - 0.1 * (w - x)),
    "exo_pair": lambda w, x, *_: kl(0.1 * (w - x), math.log(0.999 / 0.001)),
    "rpo_sq": lambda w, x, gap, *_: (0.1 * (w - x) - gap) ** 2,
    "rpo_bwd_kl": lambda w, x, gap, *_: kl(gap, 0.1 * (w - x)),
    "rpo_fwd_kl": lambda w, x, gap, *_: kl(0.1 * (w - x), gap),
    "apo_zero": lambda w, x, *_: 1 - sigmoid(0.1 * w) + sigmoid(0.1 * x),
    "apo_down": lambda w, x, *_: sigmoid(0.1 * w) + 1 - sigmoid(0.1 * (w - x)),
    "nca_pair": lambda w, x, *_: (
        -log_sigmoid(0.1 * w) - 0.5 * log_sigmoid(-0.1 * w) - 0.5 * log_sigmoid(-0.1 * x)
    ),
    "sppo_hard": lambda w, x, *_: (w - 5) ** 2 + (x + 5) ** 2,
    "simpo": lambda w, x, gap, pw, pl, mean: -log_sigmoid(2 * (pw - pl) - 0.5),
    "orpo": lambda w, x, gap, pw, pl, mean: -mean - 0.1 * log_sigmoid(log_odds(pw) - log_odds(pl)),
}  # fmt: skip


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("name", BY_HAND)
def test_every_loss_by_hand(name: str, average: bool) -> None:
    p = pairs(**RATED)
    expected = []
    for i in range(3):
        pw, pl, rw, rl = (float(getattr(p, f"{who}_{side}")[i]) for who in ("policy", "reference") for side in SIDES)
        gw, gl, nw, nl = (float(getattr(p, f"{side}_{what}")[i]) for what in ("reward", "length") for side in SIDES)
        mean, cut = pw / nw, (nw, nl) if average else (1.0, 1.0)
        expected.append(BY_HAND[name]((pw - rw) / cut[0], (pl - rl) / cut[1], gw - gl, pw / cut[0], pl / cut[1], mean))
    found = getattr(losses, name)(p, average_log_probs=average)
    assert found.shape == (3,)
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)


# ---- what other projects return -------------------------------------------------------------------------------------

SUMMED, AVERAGED = {"average_log_probs": False}, {"average_log_probs": True}


@pytest.mark.parametrize(
    ("loss", "data", "options", "mean"),
    [
        (losses.dpo, {}, {}, 0.3777789597),  # TRL, torchtune, OpenRLHF, LLaMA-Factory, NeMo-RL, NeMo-Aligner
        (losses.dpo, {}, AVERAGED, 0.6338924129),  # TRL's sigmoid_norm
        (losses.dpo, {}, {"label_smoothing": 0.1}, 0.4777789597),  # torchtune, OpenRLHF, TRL before 1.0
        (losses.robust_dpo, {}, {"label_smoothing": 0.1}, 0.2527789597),
        (losses.ipo, {}, SUMMED, 91.6666666667),  # OpenRLHF, NeMo-Aligner's default
        (losses.ipo, {}, {}, 15.3115001701),  # TRL
        (losses.hinge, {}, {}, 0.3333333333),
        (losses.exo_pair, {}, {}, 1.4988375),  # printed from a float32 ln ε
        (losses.nca_pair, {}, {}, 1.2345203487),
        (losses.sppo_hard, {}, {}, 128.5466666667),
        (losses.apo_zero, {}, {}, 0.8003231659),
        (losses.apo_down, {}, {}, 0.7893864993),
        (losses.rpo_sq, {}, {}, 0.6666666667),
        (losses.rpo_sq, {}, AVERAGED, 0.7774245255),
        (losses.rpo_bwd_kl, {}, {}, 0.0645172722),
        (losses.rpo_bwd_kl, {}, AVERAGED, 0.0854926793),
        (losses.rpo_fwd_kl, {}, {}, 0.0624150871),
        (losses.rpo_fwd_kl, {}, AVERAGED, 0.0924141911),
        (losses.rpo_sq, RATED, {"reward_scale": 0.5}, 1.0208333333),
        (losses.rpo_bwd_kl, RATED, {"reward_scale": 0.5}, 0.0979648985),
        (losses.rpo_fwd_kl, RATED, {"reward_scale": 0.5}, 0.1102669827),
        (losses.simpo, {}, {"beta": 2.0, "gamma": 0.6} | SUMMED, 0.5401391366),  # open-instruct
    ],
)
def test_losses_equal_what_other_projects_return(loss: Any, data: dict, options: dict, mean: float) -> None:
    """peers.md 6.1: the projects' own functions on these pairs; printed to ten digits."""
    digits = len(str(mean).partition(".")[2])
    assert loss(pairs(**data), **options).mean().item() == pytest.approx(mean, abs=max(1e-9, 0.6 * 10**-digits))


@pytest.mark.parametrize(
    ("delta", "gap", "beta", "scale", "dpo", "ipo", "sq", "bwd", "fwd"),
    [
        (0, 1, 0.2, 1, 0.693147, 6.25, 1, 0.110944, 0.120115),
        (1, 1, 0.1, 1, 0.644397, 16, 0.81, 0.089088, 0.096384),
        (5, 1, 0.2, 1, 0.313262, 6.25, 0, 0, 0),
        (-3, 2, 0.1, 1, 0.854355, 64, 5.29, 0.453261, 0.593791),
        (5, 0.5, 0.2, 1, 0.313262, 6.25, 0.25, 0.027955, 0.026345),
        (10, 3, 0.1, 0.5, 0.313262, 25, 0.25, 0.020636, 0.022622),
    ],
)
def test_losses_equal_nemo_aligners(
    delta: float, gap: float, beta: float, scale: float, dpo: float, ipo: float, sq: float, bwd: float, fwd: float
) -> None:
    """nemo_aligner.md 1.2: its functions, executed; printed to six digits, so the closed form too, at 1e-9."""
    p = one(policy_chosen=delta, chosen_reward=gap)
    x, g = beta * delta, scale * gap
    rpo: Any = {"beta": beta, "reward_scale": scale}
    for found, printed, exact in (
        (losses.dpo(p, beta=beta), dpo, -log_sigmoid(x)),
        (losses.ipo(p, beta=beta, average_log_probs=False), ipo, (delta - 1 / (2 * beta)) ** 2),
        (losses.rpo_sq(p, **rpo), sq, (x - g) ** 2),
        (losses.rpo_bwd_kl(p, **rpo), bwd, kl(g, x)),
        (losses.rpo_fwd_kl(p, **rpo), fwd, kl(x, g)),
    ):
        assert found.item() == pytest.approx(printed, abs=6e-7)
        assert found.item() == pytest.approx(exact, abs=1e-9)


def one(dtype: torch.dtype = torch.float64, /, **values: float) -> PairLogprobs:
    """One pair, zero but for `values`; responses of one token."""
    fields = dict.fromkeys(TORCHTUNE, 0.0) | {"chosen_length": 1.0, "rejected_length": 1.0} | values
    return PairLogprobs(**{name: torch.tensor([v], dtype=dtype) for name, v in fields.items()})


@pytest.mark.parametrize(
    ("loss", "options", "value", "gradient"),
    [
        (losses.dpo, {}, 0.4374879505, -0.035434),
        (losses.hinge, {}, 0.4, -0.1),
        (losses.ipo, {}, 1.0, 2.0),
    ],
)
def test_each_loss_at_margin_6_is_itself(loss: Any, options: dict, value: float, gradient: float) -> None:
    """ms-swift#10167: hinge and ipo were configured and sigmoid was trained."""
    p = one(policy_chosen=6.0)
    x = p.policy_chosen.clone().requires_grad_()
    found = loss(replace(p, policy_chosen=x), beta=0.1, **options)
    found.sum().backward()
    assert x.grad is not None
    assert found.item() == pytest.approx(value, abs=1e-9)
    assert x.grad.item() == pytest.approx(gradient, abs=1e-6)


def test_llama_factorys_fixture() -> None:
    p = PairLogprobs(
        policy_chosen=torch.tensor([-3, -2.5, -4, -1.5], dtype=torch.float64),
        policy_rejected=torch.tensor([-5, -3.5, -6, -2.5], dtype=torch.float64),
        reference_chosen=torch.tensor([-2.8, -2.3, -3.8, -1.4], dtype=torch.float64),
        reference_rejected=torch.tensor([-3.2, -2.7, -4.2, -1.8], dtype=torch.float64),
        **{f: torch.ones(4, dtype=torch.float64) for f in list(TORCHTUNE)[4:]},
    )
    assert losses.dpo(p).mean().item() == pytest.approx(0.6399704431, abs=1e-9)
    assert losses.dpo(p)[:2].tolist() == pytest.approx([0.6163437730, 0.6635971131], abs=1e-9)


# ---- where policy equals reference ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "value"),
    [
        (losses.dpo, math.log(2)),
        (partial(losses.dpo, average_log_probs=True), math.log(2)),
        (partial(losses.dpo, label_smoothing=0.3), math.log(2)),
        (losses.robust_dpo, math.log(2)),
        (losses.hinge, 1.0),
        (losses.ipo, 25.0),
        (partial(losses.ipo, average_log_probs=False), 25.0),
        (losses.nca_pair, 2 * math.log(2)),
        (losses.sppo_hard, 50.0),
        (losses.apo_zero, 1.0),
        (losses.apo_down, 1.0),
        (losses.exo_pair, kl(0, math.log(999))),
        (losses.rpo_sq, 1.0),
        (losses.rpo_bwd_kl, kl(1, 0)),
        (losses.rpo_fwd_kl, kl(0, 1)),
    ],
)
def test_a_known_constant_where_policy_equals_reference(loss: Any, value: float) -> None:
    """peers.md 6.3, whose printed values follow."""
    assert loss(at_start(pairs())).tolist() == pytest.approx([value] * 3, abs=1e-9)


def test_the_constants_are_those_of_other_projects() -> None:
    found = [kl(0, math.log(999)), kl(1, 0), kl(0, 1)]
    assert found[1:] == pytest.approx([0.1109440717, 0.1201145070], abs=1e-9)
    # printed from a float32 ln ε.
    assert found[0] == pytest.approx(2.761230757, abs=6e-8)


# ---- laws -----------------------------------------------------------------------------------------------------------


def test_identities_between_losses() -> None:
    p = pairs(**RATED)
    half = pairs(chosen_reward=[0.5] * 3)
    torch.testing.assert_close(losses.rpo_sq(half), 0.01 * losses.ipo(half, average_log_probs=False))
    sure = pairs(chosen_reward=[60.0] * 3)
    torch.testing.assert_close(losses.rpo_bwd_kl(sure), losses.dpo(sure))
    # A gap that is the same everywhere is label smoothing with ε = σ(-1), up to the target's own entropy.
    smooth = losses.dpo(pairs(), label_smoothing=sigmoid(-1))
    shift = losses.rpo_bwd_kl(pairs()) - smooth
    torch.testing.assert_close(shift, shift[:1].expand(3))
    assert not torch.allclose(losses.ipo(p), losses.ipo(p, average_log_probs=False))


def test_swapping_chosen_and_rejected_mirrors_what_it_should() -> None:
    p, mirrored = pairs(**RATED), swapped(pairs(**RATED))
    delta = losses.margin(p)
    torch.testing.assert_close(losses.margin(mirrored), -delta)
    torch.testing.assert_close(losses.dpo(mirrored) - losses.dpo(p), 0.1 * delta)
    # With half of the labels taken to be flipped, order carries no information.
    torch.testing.assert_close(losses.dpo(mirrored, label_smoothing=0.5), losses.dpo(p, label_smoothing=0.5))
    summed = {"average_log_probs": False}
    torch.testing.assert_close(losses.ipo(mirrored, **summed) - losses.ipo(p, **summed), 20 * delta)
    torch.testing.assert_close(losses.sppo_hard(mirrored) - losses.sppo_hard(p), 20 * delta)
    # The rewards are swapped along, so that the same thing is asked for.
    for loss in (losses.rpo_sq, losses.rpo_bwd_kl, losses.rpo_fwd_kl):
        torch.testing.assert_close(loss(mirrored), loss(p))
    ahead = losses.simpo(p, gamma=0.5) - losses.simpo(p, gamma=-0.5)
    assert bool((ahead > 0).all())
    torch.testing.assert_close(
        losses.simpo(mirrored, gamma=0.5) - losses.simpo(p, gamma=-0.5),
        2 * (p.policy_chosen / p.chosen_length - p.policy_rejected / p.rejected_length) + 0.5,
    )


@pytest.mark.parametrize("average", [False, True])
@pytest.mark.parametrize("name", BY_HAND)
def test_gradients_are_those_of_finite_differences(name: str, average: bool) -> None:
    p = pairs(policy_chosen=[-0.7, -9.0, -1.3], **RATED)

    def loss(policy_chosen: Tensor, policy_rejected: Tensor) -> Tensor:
        moved = replace(p, policy_chosen=policy_chosen, policy_rejected=policy_rejected)
        return getattr(losses, name)(moved, average_log_probs=average)

    inputs = (p.policy_chosen.clone().requires_grad_(), p.policy_rejected.clone().requires_grad_())
    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("ratio", [-1e4, -1e-9, 0.0, 1e4])
@pytest.mark.parametrize("name", BY_HAND)
def test_huge_log_ratios_are_finite_in_float32_with_the_right_gradient(name: str, ratio: float, side: str) -> None:
    # Log-probabilities are never positive, so that of the reference is huge where the ratio is.
    values = {f"policy_{other}": -1.0 for other in SIDES} | {f"policy_{side}": min(ratio, 0.0)}
    values |= {f"reference_{side}": -max(ratio, 0.0), "chosen_reward": 1.0}
    results = []
    for dtype in (torch.float32, torch.float64):
        p = one(dtype, **values)
        x = getattr(p, f"policy_{side}").clone().requires_grad_()
        loss = getattr(losses, name)(replace(p, **{f"policy_{side}": x}))
        loss.sum().backward()
        results.append((loss.item(), x.grad.item()))
    (loss32, grad32), (loss64, grad64) = results
    assert math.isfinite(loss32) and math.isfinite(grad32)
    if name == "orpo" and ratio > -1:
        # A probability that rounds to 1: its odds are those of the largest number below 1, which precision decides.
        return
    assert loss32 == pytest.approx(loss64, rel=1e-5, abs=1e-6)
    assert grad32 == pytest.approx(grad64, rel=1e-5, abs=1e-6)


def test_orpo_at_certainty_stays_finite() -> None:
    for logp in (0.0, -1e-30, -1e-8, -math.log(2), -104.0, -1e4):
        for dtype in (torch.float32, torch.float64):
            x = torch.tensor([logp], dtype=dtype, requires_grad=True)
            loss = losses.orpo(replace(one(dtype, policy_rejected=-1.0), policy_chosen=x))
            loss.backward()
            assert x.grad is not None
            assert bool(loss.isfinite()) and bool(x.grad.isfinite())


# ---- several, unpaired, refused -------------------------------------------------------------------------------------


def test_a_mix_is_the_weighted_sum() -> None:
    p = pairs()
    mixed = losses.mix(p, losses=[partial(losses.dpo, beta=0.2), losses.ipo], weights=[0.7, 0.01])
    torch.testing.assert_close(mixed, 0.7 * losses.dpo(p, beta=0.2) + 0.01 * losses.ipo(p))
    with pytest.raises(ValueError, match="losses, weights: must be as many, found 1 losses and 2 weights"):
        losses.mix(p, losses=[losses.dpo], weights=[1, 2])


def responses(**changed: list[float]) -> ResponseLogprobs:
    values = {
        "policy": [-3.0, -8.0], "reference": [-4.0, -5.0], "length": [2.0, 5.0],
        "desirable": [1.0, 0.0], "kl": [0.5, 0.5],
    }  # fmt: skip
    return ResponseLogprobs(**{n: torch.tensor(v, dtype=torch.float64) for n, v in {**values, **changed}.items()})


def test_kto_by_hand() -> None:
    """r = 1 and -3, z = 0.5: λ_D (1 - σ(0.1 · 0.5)) and λ_U (1 - σ(0.1 · 3.5))."""
    found = kto(responses(), desirable_weight=1.33, undesirable_weight=0.8)
    assert found.tolist() == pytest.approx([1.33 * (1 - sigmoid(0.05)), 0.8 * (1 - sigmoid(0.35))], abs=1e-9)
    averaged = kto(responses(), average_log_probs=True)
    assert averaged.tolist() == pytest.approx([1 - sigmoid(0.0), 1 - sigmoid(0.1 * (0.5 + 0.6))], abs=1e-9)
    start = kto(responses(policy=[-4.0, -5.0], kl=[0.0, 0.0]))
    assert start.tolist() == pytest.approx([0.5, 0.5], abs=1e-12)


def test_kto_gradient_is_that_of_finite_differences() -> None:
    r = responses()
    assert torch.autograd.gradcheck(lambda x: kto(replace(r, policy=x)), (r.policy.clone().requires_grad_(),))


@pytest.mark.parametrize("ratio", [-1e4, 1e4])
def test_kto_is_finite_in_float32(ratio: float) -> None:
    x = torch.tensor([ratio, ratio], requires_grad=True)
    zero = torch.zeros(2)
    loss = kto(ResponseLogprobs(policy=x, reference=zero, length=zero + 1, desirable=torch.tensor([1.0, 0]), kl=zero))
    loss.sum().backward()
    assert x.grad is not None
    assert loss.tolist() == pytest.approx([0.0, 1.0] if ratio > 0 else [1.0, 0.0])
    assert bool(x.grad.isfinite().all())


def test_unequal_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="one shape"):
        pairs(chosen_reward=[1.0])
    with pytest.raises(ValueError, match="one shape"):
        responses(kl=[0.5])


@pytest.mark.parametrize(
    ("loss", "options", "message"),
    [
        (losses.dpo, {"beta": 0.0}, "beta: must be above 0, found 0.0"),
        (losses.ipo, {"beta": -1}, "beta: must be above 0"),
        (losses.dpo, {"label_smoothing": 0.6}, "label_smoothing: must be from 0 to 0.5"),
        (losses.robust_dpo, {"label_smoothing": 0.5}, "below 0.5 in robust_dpo"),
        (losses.exo_pair, {"label_smoothing": 0.0}, "above 0 and below 0.5 in exo_pair"),
        (losses.rpo_sq, {"reward_scale": 0.0}, "reward_scale: must be above 0"),
    ],
)
def test_hyper_parameters_without_meaning_are_refused(loss: Any, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loss(pairs(), **options)
