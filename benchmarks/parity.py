"""Our losses against TRL's own functions on random inputs: `make parity` writes docs/parity.md.

Runs in an environment of its own (benchmarks/parity.txt), since TRL and NeMo ask for different libraries. TRL has no
reward-aware losses; those are compared with torch.distributions.
"""

# pyright: reportMissingImports=false
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Bernoulli, kl_divergence

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from aligner import losses  # noqa: E402
from aligner.losses import unpaired  # noqa: E402
from aligner.losses.pairs import PairLogprobs  # noqa: E402
from aligner.losses.unpaired import ResponseLogprobs  # noqa: E402

PAIRS = 10_000
BETA = 0.1


def random_pairs() -> PairLogprobs:
    """Responses of 1 to 500 tokens, about a nat a token, the policy up to some tens of nats from the reference."""
    draw = torch.Generator().manual_seed(0)
    fields: dict[str, Tensor] = {}
    for side in ("chosen", "rejected"):
        length = torch.randint(1, 501, (PAIRS,), generator=draw).double()
        reference = -length * (0.05 + torch.rand(PAIRS, generator=draw, dtype=torch.float64))
        moved = reference + length.sqrt() * torch.randn(PAIRS, generator=draw, dtype=torch.float64)
        fields |= {f"{side}_length": length, f"reference_{side}": reference}
        fields |= {f"policy_{side}": moved.clamp(max=-1e-3)}
        fields |= {f"{side}_reward": torch.randn(PAIRS, generator=draw, dtype=torch.float64)}
    return PairLogprobs(**fields)


def trl_dpo(kind: str, p: PairLogprobs, *, label_smoothing: float = 0.0, average: bool = False) -> Tensor:
    """DPOTrainer.dpo_loss, called without a trainer; TRL averages before it."""
    from trl.trainer.dpo_config import FDivergenceType
    from trl.trainer.dpo_trainer import DPOTrainer

    settings = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu"), beta=BETA, label_smoothing=label_smoothing, reference_free=False,
        f_divergence_type=FDivergenceType.REVERSE_KL.value, f_divergence_params=None,
    )  # fmt: skip
    n_w, n_x = (p.chosen_length, p.rejected_length) if average else (1.0, 1.0)
    logps = (p.policy_chosen / n_w, p.policy_rejected / n_x, p.reference_chosen / n_w, p.reference_rejected / n_x)
    return DPOTrainer.dpo_loss(settings, *logps, loss_type=kind)[0]


def trl_simpo(p: PairLogprobs) -> Tensor:
    from trl.trainer.cpo_trainer import CPOTrainer

    settings = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu"), beta=2.0, simpo_gamma=0.5, label_smoothing=0.0, alpha=0.0,
        loss_type="simpo",
    )  # fmt: skip
    return CPOTrainer.cpo_loss(settings, p.policy_chosen / p.chosen_length, p.policy_rejected / p.rejected_length)[0]


def trl_orpo(p: PairLogprobs) -> Tensor:
    """The odds-ratio term is TRL's; its likelihood is a mean over a batch's tokens, ours over each response's."""
    from trl.trainer.orpo_trainer import ORPOTrainer

    settings = SimpleNamespace(accelerator=SimpleNamespace(device="cpu"), beta=BETA)
    chosen, rejected = p.policy_chosen / p.chosen_length, p.policy_rejected / p.rejected_length
    return -chosen - ORPOTrainer.odds_ratio_loss(settings, chosen, rejected)[0]


def trl_kto(p: PairLogprobs, kl: float) -> Tensor:
    """Chosen and rejected as single responses; TRL clamps and averages its own estimate, so it gets one of it."""
    from trl.trainer.kto_trainer import KTOTrainer

    settings = SimpleNamespace(
        accelerator=SimpleNamespace(device="cpu", gather_for_metrics=lambda x: x), beta=BETA, calculate_KL=True,
        loss_type="kto", desirable_weight=1.0, undesirable_weight=1.3,
    )  # fmt: skip
    estimate = torch.full((4,), kl, dtype=torch.float64)
    return KTOTrainer.kto_loss(
        settings, p.policy_chosen, p.policy_rejected, estimate,
        p.reference_chosen, p.reference_rejected, torch.zeros_like(estimate),
    )[0]  # fmt: skip


def our_kto(p: PairLogprobs, kl: float) -> Tensor:
    def both(chosen: Tensor, rejected: Tensor) -> Tensor:
        return torch.cat([chosen, rejected])

    desirable = both(torch.ones(PAIRS, dtype=torch.float64), torch.zeros(PAIRS, dtype=torch.float64))
    responses = ResponseLogprobs(
        policy=both(p.policy_chosen, p.policy_rejected), reference=both(p.reference_chosen, p.reference_rejected),
        length=both(p.chosen_length, p.rejected_length), desirable=desirable, kl=torch.full_like(desirable, kl),
    )  # fmt: skip
    return unpaired.kto(responses, beta=BETA, undesirable_weight=1.3)


def bernoulli_kl(p: PairLogprobs, *, backward: bool) -> Tensor:
    gap, logit = p.chosen_reward - p.rejected_reward, BETA * losses.margin(p)
    target, policy = Bernoulli(logits=gap), Bernoulli(logits=logit)
    return kl_divergence(target, policy) if backward else kl_divergence(policy, target)


def mse(p: PairLogprobs) -> Tensor:
    gap = p.chosen_reward - p.rejected_reward
    return torch.nn.functional.mse_loss(BETA * losses.margin(p), gap, reduction="none")


# Ours, its counterpart, and what that is called.
TABLE: dict[str, tuple[Callable[[PairLogprobs], Tensor], Callable[[PairLogprobs], Tensor], str]] = {
    "dpo": (losses.dpo, partial(trl_dpo, "sigmoid"), "sigmoid"),
    "dpo(label_smoothing=0.1)": (
        partial(losses.dpo, label_smoothing=0.1), partial(trl_dpo, "sigmoid", label_smoothing=0.1), "sigmoid, 0.1",
    ),
    "robust_dpo(label_smoothing=0.1)": (
        partial(losses.robust_dpo, label_smoothing=0.1), partial(trl_dpo, "robust", label_smoothing=0.1), "robust, 0.1",
    ),
    "ipo": (losses.ipo, partial(trl_dpo, "ipo", average=True), "ipo"),
    "ipo(average_log_probs=False)": (
        partial(losses.ipo, average_log_probs=False), partial(trl_dpo, "ipo"), "ipo, sums given",
    ),
    "hinge": (losses.hinge, partial(trl_dpo, "hinge"), "hinge"),
    "exo_pair": (losses.exo_pair, partial(trl_dpo, "exo_pair"), "exo_pair"),
    "apo_zero": (losses.apo_zero, partial(trl_dpo, "apo_zero"), "apo_zero"),
    "apo_down": (losses.apo_down, partial(trl_dpo, "apo_down"), "apo_down"),
    "nca_pair": (losses.nca_pair, partial(trl_dpo, "nca_pair"), "nca_pair"),
    "sppo_hard": (losses.sppo_hard, partial(trl_dpo, "sppo_hard"), "sppo_hard"),
    "simpo": (losses.simpo, trl_simpo, "CPO, simpo"),
    "orpo": (losses.orpo, trl_orpo, "ORPO's odds-ratio term + likelihood"),
    "kto(undesirable_weight=1.3)": (partial(our_kto, kl=1.7), partial(trl_kto, kl=1.7), "KTO"),
    "rpo_sq": (losses.rpo_sq, mse, "torch: mse_loss"),
    "rpo_bwd_kl": (losses.rpo_bwd_kl, partial(bernoulli_kl, backward=True), "torch: kl_divergence"),
    "rpo_fwd_kl": (losses.rpo_fwd_kl, partial(bernoulli_kl, backward=False), "torch: kl_divergence"),
}  # fmt: skip


def with_gradient(loss: Callable[[PairLogprobs], Tensor], p: PairLogprobs) -> tuple[Tensor, Tensor]:
    inputs = [p.policy_chosen.clone().requires_grad_(), p.policy_rejected.clone().requires_grad_()]
    found = loss(replace(p, policy_chosen=inputs[0], policy_rejected=inputs[1]))
    return found.detach(), torch.cat(torch.autograd.grad(found.sum(), inputs))


def largest(a: Tensor, b: Tensor) -> float:
    """Largest difference, relative to 1 or to the value, whichever is larger."""
    return float(((a - b).abs() / b.abs().clamp(min=1)).max())


def main() -> None:
    import transformers
    import trl

    pairs, lines, worst = random_pairs(), [], 0.0
    for name, (ours, theirs, called) in TABLE.items():
        (loss, gradient), (other, other_gradient) = with_gradient(ours, pairs), with_gradient(theirs, pairs)
        off = largest(loss, other), largest(gradient, other_gradient)
        worst = max(worst, *off)
        lines.append(f"| `{name}` | {called} | {float(loss.mean()):.6f} | {off[0]:.1e} | {off[1]:.1e} |")
    versions: Any = f"TRL {trl.__version__}, transformers {transformers.__version__}, torch {torch.__version__}"
    page = "\n".join(
        [
            "# Parity: our losses against TRL's",
            "",
            f"{PAIRS:,} random pairs in float64, responses of 1 to 500 tokens; largest difference of the losses and of",
            "their gradients, relative to 1 or to the value, whichever is larger. Written by `make parity`, which",
            f"fails above 1e-9, with {versions}.",
            "",
            "| ours | theirs | mean loss | loss differs by | gradient differs by |",
            "|---|---|---|---|---|",
            *lines,
            "",
        ]
    )
    (ROOT / "docs/parity.md").write_text(page)
    print(page)
    assert worst < 1e-9, f"a loss differs by {worst:.1e}"


if __name__ == "__main__":
    main()
