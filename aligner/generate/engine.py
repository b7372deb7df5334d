"""Where answers come from: the one door that generating and judging go through.

Megatron    a checkpoint on this machine's ranks (`aligner.generate.megatron_engine`); the default
Server      anything that speaks OpenAI's protocol: vLLM, SGLang, TensorRT-LLM's `trtllm-serve` (`aligner.generate.openai_engine`)
VLLM        vLLM in this process, from a Hugging Face export (`aligner.generate.vllm_engine`)
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aligner.data.rows import TextOrMessages
from aligner.generate.sampling import Sampling


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """A prompt that is to be answered."""

    key: str
    """What its answer is known by."""
    prompt: TextOrMessages
    seed: int
    source: str
    """`file:line`, for messages."""


@dataclass(frozen=True, kw_only=True)
class GenerationResult:
    """What became of a question."""

    key: str
    text: str
    num_tokens: int
    """Of the answer, its end token among them."""
    finish_reason: str
    """`stop` if it ended properly; `length`, `special` and what servers say otherwise."""
    logp: float | None = None
    """Log-probability of the answer under the policy (temperature 1), nats; None where the engine has none."""


class Engine(abc.ABC):
    """Answers questions while it is `session`."""

    @abc.abstractmethod
    def describe(self) -> dict[str, Any]:
        """Whose answers these are; a file that is continued must be continued by the same."""

    @abc.abstractmethod
    def session(self, cache: Path) -> contextlib.AbstractContextManager[None]:
        """Ready to answer; `cache` keeps what is made once, as an imported model.

        Raises:
            UserError: it cannot be.
        """

    @property
    @abc.abstractmethod
    def shard(self) -> tuple[int, int] | None:
        """Which part of the questions is this process's, of how many: `questions[part::parts]`; None: it has none."""

    @property
    def is_writer(self) -> bool:
        """Whether this process is the one of its part that writes answers down."""
        return True

    def barrier(self) -> None:  # noqa: B027 - there is but one, as a rule
        """Wait for all processes."""

    @abc.abstractmethod
    def too_long(
        self, questions: Sequence[GenerationRequest], sampling: Sampling
    ) -> list[tuple[GenerationRequest, str]]:
        """Those that there is no room for, and why."""

    @abc.abstractmethod
    def generate(self, questions: Sequence[GenerationRequest], sampling: Sampling) -> Iterator[GenerationResult]:
        """An answer to each, in the order in which they are finished."""
