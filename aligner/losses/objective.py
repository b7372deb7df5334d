"""What is minimized: a loss of pairs or of single responses, a likelihood, or both; and what is measured with it.

Dimensions: P examples of a micro-batch, K responses of each.
"""

from __future__ import annotations

import functools
import inspect
import typing
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from aligner.data.examples import Kind
from aligner.losses.metrics import WeightedValue
from aligner.losses.pairs import PairLogprobs
from aligner.losses.unpaired import ResponseLogprobs

Loss = Callable[[PairLogprobs], Tensor] | Callable[[ResponseLogprobs], Tensor]


@dataclass(frozen=True, kw_only=True)
class Scored:
    """A micro-batch that has been through the model."""

    logp_PK: Tensor
    """Log-probability of each response, nats."""
    reference_PK: Tensor
    """The reference's; zeros where there is none."""
    length_PK: Tensor
    """Scored tokens of each response."""
    reward_P2: Tensor
    desirable_P: Tensor
    valid_P: Tensor
    tokens_P: Tensor
    """Unpadded tokens of an example's sequences, prompts included."""
    kl: float = 0.0
    """KTO's estimate over the global batch, nats."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """preference_loss_weight · loss + sft_loss_weight · (-log π(y_w|x) / |y_w|), per example.

    The likelihood is that of the chosen response, or of a single response that is wanted.
    """

    loss: Loss
    preference_loss_weight: float = 1.0
    sft_loss_weight: float = 0.0

    # ---- what it asks for -------------------------------------------------------------------------------------

    @functools.cached_property
    def kind(self) -> Kind:
        """Which examples it learns from."""
        if not self.preference_loss_weight:
            return "demonstrations"
        return "unpaired" if _input_of(self.loss) is ResponseLogprobs else "pairs"

    @functools.cached_property
    def needs_reference(self) -> bool:
        return bool(self.preference_loss_weight) and any(name.startswith("reference") for name in self.required_fields)

    @functools.cached_property
    def required_fields(self) -> set[str]:
        """The fields of its input that the loss looks at, found out by showing it two examples.

        Raises:
            ValueError: it fails on them, or does not return one number an example.
        """
        kind, read = _input_of(self.loss), set()
        try:
            found = self.loss(_two_examples(kind, read))
        except ValueError:
            raise
        except Exception as error:
            raise ValueError(f"fails on two examples of {kind.__name__}: {type(error).__name__}: {error}") from None
        if not isinstance(found, Tensor) or found.shape != (2,):
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise ValueError(f"must return one number for each example, [P]; of two examples it returned {shape}")
        return read

    @functools.cached_property
    def beta(self) -> float:
        """The loss's own β, 1 if it has none; rewards are β times a log-ratio."""
        return float(_argument(self.loss, "beta", 1.0))

    @functools.cached_property
    def average_log_probs(self) -> bool:
        """Whether the loss divides log-probabilities by lengths; then rewards are so divided, too."""
        return bool(_argument(self.loss, "average_log_probs", False))

    @functools.cached_property
    def reward_scale(self) -> float:
        return float(_argument(self.loss, "reward_scale", 1.0))

    # ---- what it says -----------------------------------------------------------------------------------------

    def __call__(self, scored: Scored) -> tuple[Tensor, Tensor, Tensor]:
        """Total, preference and SFT term, each `[P]`; a loss without weight is not computed."""
        preference = torch.zeros_like(scored.logp_PK[:, 0])
        if self.preference_loss_weight:
            preference = self.loss(self._input(scored))  # type: ignore[arg-type]
        sft = -scored.logp_PK[:, 0] / scored.length_PK[:, 0] * scored.desirable_P
        return self.preference_loss_weight * preference + self.sft_loss_weight * sft, preference, sft

    def _input(self, scored: Scored) -> PairLogprobs | ResponseLogprobs:
        logp, reference, length = scored.logp_PK, scored.reference_PK, scored.length_PK
        if self.kind == "unpaired":
            return ResponseLogprobs(
                policy=logp[:, 0],
                reference=reference[:, 0],
                length=length[:, 0],
                desirable=scored.desirable_P,
                kl=torch.full_like(logp[:, 0], scored.kl),
            )
        return PairLogprobs(
            policy_chosen=logp[:, 0],
            policy_rejected=logp[:, 1],
            reference_chosen=reference[:, 0],
            reference_rejected=reference[:, 1],
            chosen_length=length[:, 0],
            rejected_length=length[:, 1],
            chosen_reward=scored.reward_P2[:, 0],
            rejected_reward=scored.reward_P2[:, 1],
        )

    def log_ratio(self, scored: Scored) -> Tensor:
        """log π - log π_ref of each response, `[P, K]`; a token's mean if the loss takes it so."""
        ratio = scored.logp_PK - scored.reference_PK
        return ratio / scored.length_PK if self.average_log_probs else ratio

    @torch.no_grad()
    def compute_metrics(
        self, scored: Scored, total: Tensor, preference: Tensor, sft: Tensor
    ) -> dict[str, WeightedValue]:
        """The metrics of a micro-batch, as values of examples and what each of them weighs."""
        valid = scored.valid_P
        found = {"loss": WeightedValue(total, valid), "tokens": WeightedValue(scored.tokens_P, valid)}
        if self.kind == "demonstrations":
            wanted, unwanted = valid, 0 * valid
        elif self.kind == "unpaired":
            wanted, unwanted = valid * scored.desirable_P, valid * (1 - scored.desirable_P)
        else:
            wanted, unwanted = valid, valid
        last = scored.logp_PK.shape[1] - 1
        sides = {"chosen": (0, wanted), "rejected": (last, unwanted)}
        for side, (k, weight) in sides.items():
            found[f"logps_{side}_mean"] = WeightedValue(scored.logp_PK[:, k], weight)
            found[f"{side}_lengths"] = WeightedValue(scored.length_PK[:, k], weight)
        found["sft_loss"] = WeightedValue(sft, wanted)
        if self.kind == "demonstrations":
            return found
        found["preference_loss"] = WeightedValue(preference, valid)
        reward = self.beta * self.log_ratio(scored)
        for side, (k, weight) in sides.items():
            found[f"rewards_{side}_mean"] = WeightedValue(reward[:, k], weight)
            found[f"rewards_{side}_square"] = WeightedValue(reward[:, k] ** 2, weight)
        if self.kind == "pairs":
            chosen, rejected = reward[:, 0], reward[:, 1]
            # Half for a tie, or step 0 would read as wrong on every pair.
            found["acc"] = WeightedValue((chosen > rejected).float() + 0.5 * (chosen == rejected).float(), valid)
        else:
            found["kl"] = WeightedValue(torch.full_like(valid, scored.kl), valid)
        if self.needs_reference:
            equal = replace(scored, logp_PK=scored.reference_PK, kl=0.0)
            error = ((scored.logp_PK - scored.reference_PK).abs() / scored.length_PK).amax(dim=1)
            found["step0_loss"] = WeightedValue(self(equal)[1], valid)
            found["step0_error"] = WeightedValue(error, valid)
        return found


def _two_examples(kind: Any, read: set[str]) -> Any:
    """Something for a loss to look at, which notes in `read` what it looks at."""

    def noting(self: Any, name: str) -> Any:
        if name in kind.__dataclass_fields__:
            read.add(name)
        return object.__getattribute__(self, name)

    # Log-probabilities below 0, lengths above, one example wanted and one not.
    numbers = {"desirable": [1.0, 0.0]} | {name: [3.0, 2.0] for name in ("length", "chosen_length", "rejected_length")}
    values = {name: torch.tensor(numbers.get(name, [-3.0, -2.0])) for name in kind.__dataclass_fields__}
    return type(kind.__name__, (kind,), {"__getattribute__": noting})(**values)


def _input_of(loss: Any) -> Any:
    """What a loss takes, by the annotation of its first parameter; pairs if it does not say."""
    function = _innermost(loss)
    try:
        first = next(iter(inspect.signature(function).parameters))
        hints = typing.get_type_hints(function if inspect.isfunction(function) else type(function).__call__)
    except (TypeError, NameError, ValueError, StopIteration):
        return PairLogprobs
    return ResponseLogprobs if hints.get(first) is ResponseLogprobs else PairLogprobs


def _innermost(loss: Any) -> Any:
    while isinstance(loss, functools.partial):
        loss = loss.func
    return loss


def _argument(loss: Any, name: str, default: Any) -> Any:
    """The value that an argument of a loss has; of a mix, that of its first loss."""
    parameters = inspect.signature(loss).parameters
    if (
        name not in parameters
        and "losses" in parameters
        and parameters["losses"].default is not inspect.Parameter.empty
    ):
        return _argument(parameters["losses"].default[0], name, default)
    value = parameters[name].default if name in parameters else inspect.Parameter.empty
    return default if value is inspect.Parameter.empty else value
