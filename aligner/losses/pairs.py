"""Preference losses: pure functions from the log-probabilities of pairs to one loss per pair.

Dimension P: pairs. Every field and result is a float tensor of shape [P]. No loss reduces over pairs, because the
number of valid pairs depends on the global batch. In the docstrings

    r_w = log π(y_w|x) - log π_ref(y_w|x)      chosen response, nats,
    r_l = log π(y_l|x) - log π_ref(y_l|x)      rejected response, nats,
    Δ   = r_w - r_l,

r_w and r_l divided by the response's number of tokens with `average_log_probs`. σ is the logistic function; β (`beta`)
weights the Kullback-Leibler penalty (NeMo-Aligner: `ref_policy_kl_penalty`). "At the start" means policy equal to
reference.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class OneShape:
    """Base class that checks that all fields have one shape [P]."""

    def __post_init__(self) -> None:
        shapes = {name: tuple(value.shape) for name, value in vars(self).items()}
        if len(set(shapes.values())) != 1 or len(next(iter(shapes.values()))) != 1:
            raise ValueError(f"{type(self).__name__}: every field must have one shape [P]; found {shapes}")


@dataclass(frozen=True, kw_only=True)
class PairLogprobs(OneShape):
    """Inputs of a loss of pairs: log-probabilities of P pairs under policy and reference.

    Log-probabilities are in nats, summed over the tokens of a response (never of the prompt).
    """

    policy_chosen: Tensor
    policy_rejected: Tensor
    reference_chosen: Tensor
    reference_rejected: Tensor
    chosen_length: Tensor
    """Scored tokens of the chosen response, including its end-of-turn token."""
    rejected_length: Tensor
    chosen_reward: Tensor
    """Reward of the chosen response in the data; only reward-aware losses read it."""
    rejected_reward: Tensor


PairLoss = Callable[[PairLogprobs], Tensor]


def log_ratios(pairs: PairLogprobs, *, average_log_probs: bool = False) -> tuple[Tensor, Tensor]:
    """Compute r_w and r_l, nats (nats per token with `average_log_probs`)."""
    chosen = pairs.policy_chosen - pairs.reference_chosen
    rejected = pairs.policy_rejected - pairs.reference_rejected
    if average_log_probs:
        return chosen / pairs.chosen_length, rejected / pairs.rejected_length
    return chosen, rejected


def margin(pairs: PairLogprobs, *, average_log_probs: bool = False) -> Tensor:
    """Compute Δ, the policy's log-ratio of chosen to rejected minus the reference's. 0 at the start."""
    chosen, rejected = log_ratios(pairs, average_log_probs=average_log_probs)
    return chosen - rejected


# ---- losses of the margin -----------------------------------------------------------------------------------------


def dpo(
    pairs: PairLogprobs, *, beta: float = 0.1, label_smoothing: float = 0.0, average_log_probs: bool = False
) -> Tensor:
    """Direct preference optimization: -(1-ε) log σ(βΔ) - ε log σ(-βΔ). ln 2 = 0.6931 at the start.

    ε (`label_smoothing`) is the assumed fraction of flipped labels; ε > 0 is conservative DPO.

    Source: Rafailov et al. 2023, arXiv 2305.18290, equation 7; ε: Mitchell's note "cDPO", equation 3. TRL's `sigmoid`
    (TRL ignores ε there since 1.0); with `average_log_probs`, TRL's `sigmoid_norm` and open-instruct's `dpo_norm`.
    """
    check_hyperparameters(beta=beta, label_smoothing=label_smoothing)
    logit = beta * margin(pairs, average_log_probs=average_log_probs)
    # logsigmoid, not log(σ(x)), which is -inf in float32 from x = -104 down.
    return -(1 - label_smoothing) * F.logsigmoid(logit) - label_smoothing * F.logsigmoid(-logit)


def robust_dpo(
    pairs: PairLogprobs, *, beta: float = 0.1, label_smoothing: float = 0.1, average_log_probs: bool = False
) -> Tensor:
    """DPO, unbiased under flipped labels: (-(1-ε) log σ(βΔ) + ε log σ(-βΔ)) / (1-2ε). ln 2 at the start.

    Unbounded below: as the margin grows, the loss falls by εβ/(1-2ε) per nat.

    Source: Chowdhury et al. 2024, arXiv 2403.00409, the unbiased (rDPO) loss. TRL's `robust`.
    """
    check_hyperparameters(beta=beta, label_smoothing=label_smoothing)
    if label_smoothing == 0.5:
        raise ValueError("label_smoothing: must be below 0.5 in robust_dpo, which divides by 1-2ε; found 0.5")
    logit = beta * margin(pairs, average_log_probs=average_log_probs)
    wrong = -(1 - label_smoothing) * F.logsigmoid(logit) + label_smoothing * F.logsigmoid(-logit)
    return wrong / (1 - 2 * label_smoothing)


def ipo(pairs: PairLogprobs, *, beta: float = 0.1, average_log_probs: bool = True) -> Tensor:
    """Identity preference optimization: (Δ - 1/(2β))². 1/(4β²) at the start: 25 for β = 0.1.

    Equation 17 has log-probabilities of whole responses (`average_log_probs=False`), as have NeMo-Aligner and OpenRLHF.
    The authors told TRL that they average over tokens, which TRL and LLaMA-Factory do and which is the default here. It
    is a different objective: docs/losses.md has numbers.

    Source: Azar et al. 2023, arXiv 2310.12036, equation 17, where β is τ; the average: TRL issues 1265 and 1677.
    """
    check_hyperparameters(beta=beta)
    return (margin(pairs, average_log_probs=average_log_probs) - 1 / (2 * beta)) ** 2


def hinge(pairs: PairLogprobs, *, beta: float = 0.1, average_log_probs: bool = False) -> Tensor:
    """Hinge: max(0, 1 - βΔ). 1 at the start.

    Source: RSO, Liu et al. 2023, arXiv 2309.06657, equation 10 (γ = β): SLiC's hinge on log-ratios. TRL's
    `hinge`, torchtune's `RSOLoss`.
    """
    check_hyperparameters(beta=beta)
    return F.relu(1 - beta * margin(pairs, average_log_probs=average_log_probs))


def exo_pair(
    pairs: PairLogprobs, *, beta: float = 0.1, label_smoothing: float = 1e-3, average_log_probs: bool = False
) -> Tensor:
    """Exact optimization on pairs: the reverse divergence KL(Bern σ(βΔ) ‖ Bern(1-ε)). 2.7612 at the start.

    σ(βΔ)(log σ(βΔ) - log(1-ε)) + σ(-βΔ)(log σ(-βΔ) - log ε); needs 0 < ε < 1/2.

    Source: Ji et al. 2024, arXiv 2402.00856, equation 16. TRL's `exo_pair`.
    """
    check_hyperparameters(beta=beta, label_smoothing=label_smoothing)
    if label_smoothing in (0, 0.5):
        raise ValueError(f"label_smoothing: must be above 0 and below 0.5 in exo_pair, found {label_smoothing}")
    target = torch.full_like(pairs.policy_chosen, math.log1p(-label_smoothing) - math.log(label_smoothing))
    return _bernoulli_kl(beta * margin(pairs, average_log_probs=average_log_probs), target)


# ---- reward-aware losses ------------------------------------------------------------------------------------------


def rpo_sq(
    pairs: PairLogprobs, *, beta: float = 0.1, reward_scale: float = 1.0, average_log_probs: bool = False
) -> Tensor:
    """Reward-aware preference optimization, squared: (βΔ - G)², G = η(chosen_reward - rejected_reward).

    η is `reward_scale` (NeMo-Aligner: `gt_reward_scale`). G² at the start. With G = 1/2 the loss is β² times `ipo`.

    Source: Sun et al. 2025, arXiv 2502.00203, squared distance. NVIDIA's RPO (NeMo-Aligner's `rpo_sq`). TRL's
    `rpo_alpha` differs: it adds the chosen response's likelihood to DPO, here `align(sft_loss_weight=...)`.
    """
    check_hyperparameters(beta=beta, reward_scale=reward_scale)
    return (beta * margin(pairs, average_log_probs=average_log_probs) - _gap(pairs, reward_scale)) ** 2


def rpo_bwd_kl(
    pairs: PairLogprobs, *, beta: float = 0.1, reward_scale: float = 1.0, average_log_probs: bool = False
) -> Tensor:
    """Reward-aware preference optimization, backward: KL(Bern σ(G) ‖ Bern σ(βΔ)), G as in `rpo_sq`.

    The gradient is DPO's with the soft target σ(G); a constant G is label smoothing with ε = σ(-G). 0.1109 at the
    start for G = 1. The loss approaches DPO as G grows.

    Source: Nemotron-4 340B, arXiv 2406.11704 (RPO); Sun et al. 2025, arXiv 2502.00203. NeMo-Aligner's `rpo_bwd_kl`.
    """
    check_hyperparameters(beta=beta, reward_scale=reward_scale)
    return _bernoulli_kl(_gap(pairs, reward_scale), beta * margin(pairs, average_log_probs=average_log_probs))


def rpo_fwd_kl(
    pairs: PairLogprobs, *, beta: float = 0.1, reward_scale: float = 1.0, average_log_probs: bool = False
) -> Tensor:
    """Reward-aware preference optimization, forward: KL(Bern σ(βΔ) ‖ Bern σ(G)), G as in `rpo_sq`.

    0.1201 at the start for G = 1. The gradient vanishes at large |βΔ|, for right and wrong preferences alike.

    Source: Sun et al. 2025, arXiv 2502.00203. NeMo-Aligner's `rpo_fwd_kl`.
    """
    check_hyperparameters(beta=beta, reward_scale=reward_scale)
    return _bernoulli_kl(beta * margin(pairs, average_log_probs=average_log_probs), _gap(pairs, reward_scale))


def _gap(pairs: PairLogprobs, reward_scale: float) -> Tensor:
    return reward_scale * (pairs.chosen_reward - pairs.rejected_reward)


def _bernoulli_kl(a: Tensor, b: Tensor) -> Tensor:
    """Compute KL(Bern σ(a) ‖ Bern σ(b)) from logits."""
    positive = torch.sigmoid(a) * (F.logsigmoid(a) - F.logsigmoid(b))
    return positive + torch.sigmoid(-a) * (F.logsigmoid(-a) - F.logsigmoid(-b))


# ---- losses of each response --------------------------------------------------------------------------------------


def apo_zero(pairs: PairLogprobs, *, beta: float = 0.1, average_log_probs: bool = False) -> Tensor:
    """Anchored preference optimization, up and down: (1 - σ(βr_w)) + σ(βr_l). 1 at the start.

    For chosen responses that are better than the policy's current ones.

    Source: D'Oosterlinck et al. 2024, arXiv 2408.06266, equation 7. TRL's `apo_zero`.
    """
    check_hyperparameters(beta=beta)
    chosen, rejected = log_ratios(pairs, average_log_probs=average_log_probs)
    return torch.sigmoid(-beta * chosen) + torch.sigmoid(beta * rejected)


def apo_down(pairs: PairLogprobs, *, beta: float = 0.1, average_log_probs: bool = False) -> Tensor:
    """Anchored preference optimization, both down: σ(βr_w) + (1 - σ(βΔ)). 1 at the start.

    For chosen responses that are worse than the policy's current ones, and rejected responses that are worse still.

    Source: D'Oosterlinck et al. 2024, arXiv 2408.06266, equation 8. TRL's `apo_down`.
    """
    check_hyperparameters(beta=beta)
    chosen, rejected = log_ratios(pairs, average_log_probs=average_log_probs)
    return torch.sigmoid(beta * chosen) + torch.sigmoid(-beta * (chosen - rejected))


def nca_pair(pairs: PairLogprobs, *, beta: float = 0.1, average_log_probs: bool = False) -> Tensor:
    """Noise contrastive alignment on pairs: -log σ(βr_w) - ½ log σ(-βr_w) - ½ log σ(-βr_l). 2 ln 2 at the start.

    Source: Chen et al. 2024, arXiv 2402.05369, NCA for pairs (K = 2). TRL's `nca_pair`.
    """
    check_hyperparameters(beta=beta)
    chosen, rejected = log_ratios(pairs, average_log_probs=average_log_probs)
    return -F.logsigmoid(beta * chosen) - 0.5 * F.logsigmoid(-beta * chosen) - 0.5 * F.logsigmoid(-beta * rejected)


def sppo_hard(pairs: PairLogprobs, *, beta: float = 0.1, average_log_probs: bool = False) -> Tensor:
    """Self-play preference optimization with hard labels: (r_w - 1/(2β))² + (r_l + 1/(2β))². 1/(2β²) at the start.

    Source: Wu et al. 2024, arXiv 2405.00675, equation 4.7 with η = 1/β and win rates 1 and 0. TRL's `sppo_hard`.
    """
    check_hyperparameters(beta=beta)
    chosen, rejected = log_ratios(pairs, average_log_probs=average_log_probs)
    return (chosen - 1 / (2 * beta)) ** 2 + (rejected + 1 / (2 * beta)) ** 2


# ---- losses without a reference -----------------------------------------------------------------------------------


def simpo(pairs: PairLogprobs, *, beta: float = 2.0, gamma: float = 0.5, average_log_probs: bool = True) -> Tensor:
    """SimPO: -log σ(β(log π(y_w|x)/|y_w| - log π(y_l|x)/|y_l|) - γ). Needs no reference.

    γ (`gamma`) is the target margin, in units of βΔ (TRL: `simpo_gamma`; the authors' code sets γ/β). TRL adds a
    likelihood unless `cpo_alpha=0`: `align(sft_loss_weight=...)`.

    Source: Meng et al. 2024, arXiv 2405.14734, equation 6.
    """
    check_hyperparameters(beta=beta)
    chosen, rejected = _logps(pairs, average_log_probs)
    return -F.logsigmoid(beta * (chosen - rejected) - gamma)


def orpo(pairs: PairLogprobs, *, beta: float = 0.1, average_log_probs: bool = True) -> Tensor:
    """Odds-ratio preference optimization: -log π(y_w|x)/|y_w| - β log σ(log odds_w - log odds_l).

    odds = p / (1-p) with p = exp(log π(y|x)/|y|), the geometric mean of the tokens' probabilities; β is the paper's
    λ. The loss includes the likelihood: keep `sft_loss_weight` at 0. No reference; one stage from a base model. The
    likelihood is of the response alone, per response, as equation 6 has it; the authors' trainer and TRL take it over
    prompt and response and over all tokens of a micro-batch (docs/losses.md).

    Source: Hong et al. 2024, arXiv 2403.07691, equations 3, 4, 6 and 7.
    """
    check_hyperparameters(beta=beta)
    chosen, rejected = _logps(pairs, average_log_probs)
    likelihood = -pairs.policy_chosen / pairs.chosen_length
    return likelihood - beta * F.logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def _logps(pairs: PairLogprobs, average: bool) -> tuple[Tensor, Tensor]:
    if average:
        return pairs.policy_chosen / pairs.chosen_length, pairs.policy_rejected / pairs.rejected_length
    return pairs.policy_chosen, pairs.policy_rejected


def _log_odds(logp: Tensor) -> Tensor:
    """Compute log(p / (1-p)); a p that rounds to 1 has the odds of the largest number below 1."""
    logp = logp.clamp(max=-torch.finfo(logp.dtype).eps)
    near = torch.log(-torch.expm1(logp))
    # Clamped where `near` is selected; otherwise the gradient there would be 0 times infinity.
    far = torch.log1p(-torch.exp(logp.clamp(max=-math.log(2))))
    return logp - torch.where(logp > -math.log(2), near, far)


# ---- combined losses -----------------------------------------------------------------------------------------------


def mix(pairs: PairLogprobs, *, losses: Sequence[PairLoss], weights: Sequence[float]) -> Tensor:
    """Weighted sum of losses: Σ weight · loss.

    mix(pairs, losses=[run.Partial(dpo, beta=0.1), run.Partial(ipo)], weights=[1.0, 0.01]) in a recipe. Rewards are
    logged in the units of the first loss (its β and `average_log_probs`).

    TRL's `loss_type` and `loss_weights` lists; the idea of MPO, arXiv 2411.10442, section 3.2.
    """
    if len(losses) != len(weights) or not losses:
        raise ValueError(f"losses, weights: must be as many, found {len(losses)} losses and {len(weights)} weights")
    return torch.stack([weight * loss(pairs) for loss, weight in zip(losses, weights, strict=True)]).sum(dim=0)


def check_hyperparameters(*, beta: float, label_smoothing: float = 0.0, **positive: float) -> None:
    """Refuse hyperparameters outside the range of the formulas."""
    for name, value in {"beta": beta, **positive}.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name}: must be above 0, found {value}")
    if not 0 <= label_smoothing <= 0.5:
        raise ValueError(f"label_smoothing: must be from 0 to 0.5, found {label_smoothing}")
