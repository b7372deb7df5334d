"""The training objective, preference loss plus weighted SFT loss, and its metrics.

Dimensions: P examples of a micro-batch, K responses per example.
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
    """Micro-batch with log-probabilities from the forward pass."""

    logp_PK: Tensor
    """Log-probability of each response, nats."""
    reference_PK: Tensor
    """Reference log-probability of each response, nats; zeros without a reference."""
    length_PK: Tensor
    """Scored tokens of each response."""
    reward_P2: Tensor
    """Rewards of chosen and rejected response."""
    rated: bool = False
    """Whether the rewards are those of the rows; else they stand for none."""
    desirable_P: Tensor
    valid_P: Tensor
    tokens_P: Tensor
    """Unpadded tokens of an example's sequences, including prompts."""
    kl: float = 0.0
    """KTO's KL estimate over the global batch, nats; nats per token if the loss has `average_log_probs`."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """Per-example objective: preference_loss_weight · loss + sft_loss_weight · (-log π(y_w|x) / |y_w|).

    The SFT term covers the chosen response of a pair, or a desirable single response.
    """

    loss: Loss
    preference_loss_weight: float = 1.0
    sft_loss_weight: float = 0.0

    # ---- required data ----------------------------------------------------------------------------------------

    @functools.cached_property
    def kind(self) -> Kind:
        """Kind of training examples."""
        if not self.preference_loss_weight:
            return "demonstrations"
        return "unpaired" if _input_type(self.loss) is ResponseLogprobs else "pairs"

    @functools.cached_property
    def needs_reference(self) -> bool:
        return bool(self.preference_loss_weight) and any(name.startswith("reference") for name in self.required_fields)

    @functools.cached_property
    def required_fields(self) -> set[str]:
        """Input fields that the loss reads, recorded in a call on two examples.

        Raises:
            ValueError: the loss fails on these examples, or returns no tensor of shape [P].
        """
        kind, read = _input_type(self.loss), set()
        try:
            result = self.loss(_recording_examples(kind, read))
        except ValueError:
            raise
        except Exception as error:
            raise ValueError(f"fails on two examples of {kind.__name__}: {type(error).__name__}: {error}") from None
        if not isinstance(result, Tensor) or result.shape != (2,):
            shape = tuple(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise ValueError(f"must return one number for each example, [P]; of two examples it returned {shape}")
        return read

    @functools.cached_property
    def beta(self) -> float:
        """β of the loss, by default 1; rewards are β times a log-ratio."""
        return float(_argument(self.loss, "beta", 1.0))

    @functools.cached_property
    def average_log_probs(self) -> bool:
        """Whether the loss divides log-probabilities by lengths; rewards are then divided too."""
        return bool(_argument(self.loss, "average_log_probs", False))

    @functools.cached_property
    def reward_scale(self) -> float:
        return float(_argument(self.loss, "reward_scale", 1.0))

    # ---- loss and metrics -------------------------------------------------------------------------------------

    def __call__(self, scored: Scored) -> tuple[Tensor, Tensor, Tensor]:
        """Compute total, preference and SFT loss, each `[P]`; the preference loss is 0 without weight."""
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
        """Compute log π - log π_ref of each response, `[P, K]`; per token with `average_log_probs`."""
        ratio = scored.logp_PK - scored.reference_PK
        return ratio / scored.length_PK if self.average_log_probs else ratio

    @torch.no_grad()
    def compute_metrics(
        self, scored: Scored, total: Tensor, preference: Tensor, sft: Tensor
    ) -> dict[str, WeightedValue]:
        """Compute a micro-batch's metrics as values and weights of its examples."""
        valid = scored.valid_P
        values = {"loss": WeightedValue(total, valid), "tokens": WeightedValue(scored.tokens_P, valid)}
        if self.kind == "demonstrations":
            chosen_weight, rejected_weight = valid, 0 * valid
        elif self.kind == "unpaired":
            chosen_weight, rejected_weight = valid * scored.desirable_P, valid * (1 - scored.desirable_P)
        else:
            chosen_weight, rejected_weight = valid, valid
        last = scored.logp_PK.shape[1] - 1
        sides = {"chosen": (0, chosen_weight), "rejected": (last, rejected_weight)}
        for side, (k, weight) in sides.items():
            values[f"logps_{side}_mean"] = WeightedValue(scored.logp_PK[:, k], weight)
            values[f"{side}_lengths"] = WeightedValue(scored.length_PK[:, k], weight)
        values["sft_loss"] = WeightedValue(sft, chosen_weight)
        if self.kind == "demonstrations":
            return values
        values["preference_loss"] = WeightedValue(preference, valid)
        reward = self.beta * self.log_ratio(scored)
        for side, (k, weight) in sides.items():
            values[f"rewards_{side}_mean"] = WeightedValue(reward[:, k], weight)
            values[f"rewards_{side}_square"] = WeightedValue(reward[:, k] ** 2, weight)
        if self.kind == "pairs":
            chosen, rejected = reward[:, 0], reward[:, 1]
            # A tie counts half; otherwise step 0 would have accuracy 0.
            values["acc"] = WeightedValue((chosen > rejected).float() + 0.5 * (chosen == rejected).float(), valid)
            if scored.rated:
                for i, side in enumerate(sides):
                    values[f"{side}_generated_rewards"] = WeightedValue(scored.reward_P2[:, i], valid)
        else:
            values["kl"] = WeightedValue(torch.full_like(valid, scored.kl), valid)
        if self.needs_reference:
            equal = replace(scored, logp_PK=scored.reference_PK, kl=0.0)
            error = ((scored.logp_PK - scored.reference_PK).abs() / scored.length_PK).amax(dim=1)
            values["step0_loss"] = WeightedValue(self(equal)[1], valid)
            values["step0_error"] = WeightedValue(error, valid)
        return values


def _recording_examples(kind: Any, read: set[str]) -> Any:
    """Create two examples that record in `read` the fields that a loss reads."""

    def record(self: Any, name: str) -> Any:
        if name in kind.__dataclass_fields__:
            read.add(name)
        return object.__getattribute__(self, name)

    # Negative log-probabilities, positive lengths, one desirable and one undesirable example.
    numbers = {"desirable": [1.0, 0.0]} | {name: [3.0, 2.0] for name in ("length", "chosen_length", "rejected_length")}
    values = {name: torch.tensor(numbers.get(name, [-3.0, -2.0])) for name in kind.__dataclass_fields__}
    return type(kind.__name__, (kind,), {"__getattribute__": record})(**values)


def _input_type(loss: Any) -> Any:
    """Return the annotated type of a loss's first parameter; `PairLogprobs` without annotation."""
    function = _unwrap_partial(loss)
    try:
        first = next(iter(inspect.signature(function).parameters))
        hints = typing.get_type_hints(function if inspect.isfunction(function) else type(function).__call__)
    except (TypeError, NameError, ValueError, StopIteration):
        return PairLogprobs
    return ResponseLogprobs if hints.get(first) is ResponseLogprobs else PairLogprobs


def _unwrap_partial(loss: Any) -> Any:
    while isinstance(loss, functools.partial):
        loss = loss.func
    return loss


def _argument(loss: Any, name: str, default: Any) -> Any:
    """Return the value of a loss's argument; of a mix, the value of its first loss."""
    parameters = inspect.signature(loss).parameters
    if (
        name not in parameters
        and "losses" in parameters
        and parameters["losses"].default is not inspect.Parameter.empty
    ):
        return _argument(parameters["losses"].default[0], name, default)
    value = parameters[name].default if name in parameters else inspect.Parameter.empty
    return default if value is inspect.Parameter.empty else value
