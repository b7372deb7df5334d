"""Where answers come from: the one door that generating and judging go through.

Megatron    a checkpoint on this machine's ranks (`aligner.inference`); the default
Server      anything that speaks OpenAI's protocol: vLLM, SGLang, TensorRT-LLM's `trtllm-serve` (`aligner.servers`)
VLLM        vLLM in this process, from a Hugging Face export (`aligner.vllm_engine`)
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aligner.rows import Text
from aligner.sampling import Sampling


@dataclass(frozen=True, kw_only=True)
class Question:
    """A prompt that is to be answered."""

    key: str
    """What its answer is known by."""
    prompt: Text
    seed: int
    source: str
    """`file:line`, for messages."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What became of a question."""

    key: str
    text: str
    tokens: int
    """Of the answer, its end token among them."""
    finish: str
    """`stop` if it ended properly; `length`, `special` and what servers say otherwise."""
    logp: float | None = None
    """Log-probability of the answer under the policy (temperature 1), nats; None where the engine has none."""


class Engine(abc.ABC):
    """Answers questions while it is `opened`."""

    @abc.abstractmethod
    def identity(self) -> dict[str, Any]:
        """Whose answers these are; a file that is continued must be continued by the same."""

    @abc.abstractmethod
    def opened(self, cache: Path) -> contextlib.AbstractContextManager[None]:
        """Ready to answer; `cache` keeps what is made once, as an imported model.

        Raises:
            UserError: it cannot be.
        """

    @property
    @abc.abstractmethod
    def share(self) -> tuple[int, int] | None:
        """Which part of the questions is this process's, of how many: `questions[part::parts]`; None: it has none."""

    @property
    def speaks(self) -> bool:
        """Whether this process is the one of its part that writes answers down."""
        return True

    def barrier(self) -> None:  # noqa: B027 - there is but one, as a rule
        """Wait for all processes."""

    @abc.abstractmethod
    def too_long(self, questions: Sequence[Question], sampling: Sampling) -> list[tuple[Question, str]]:
        """Those that there is no room for, and why."""

    @abc.abstractmethod
    def answers(self, questions: Sequence[Question], sampling: Sampling) -> Iterator[Answer]:
        """An answer to each, in the order in which they are finished."""
