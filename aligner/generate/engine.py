"""The interface of generation engines, for generating and judging.

MegatronEngine  a checkpoint on the ranks of this job (`aligner.generate.megatron_engine`); the default
OpenAIEngine    an OpenAI-compatible server, as vLLM, SGLang or `trtllm-serve` (`aligner.generate.openai_engine`)
VLLMEngine      vLLM in this process, from a Hugging Face export (`aligner.generate.vllm_engine`)
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from aligner.data.rows import TextOrMessages
from aligner.generate.sampling import Sampling

ResponseFormat = Literal["text", "json", "choice"]
NO_ROOM = "no_room"
"""`finish_reason` of a request that exceeds the engine's context length; its response is empty."""
FAILED = "failed"
"""`finish_reason` of a request that the engine could not answer; its response is empty, its `error` says why."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A last line for responses that lack one: the likeliest of some continuations."""

    before: str
    """Text before the choice, as a line feed and `Score: `."""
    options: tuple[str, ...]
    lacking: Callable[[str], bool]
    """Whether a complete response lacks the line."""


@dataclass(frozen=True, kw_only=True)
class GenerationRequest:
    """A prompt with its seed."""

    key: str
    """Identifier of the request and of its result."""
    prompt: TextOrMessages
    seed: int
    source: str
    """`file:line` of the prompt, for messages."""
    template: dict[str, Any] = field(default_factory=dict)
    """What the chat template gets beside the messages: `tools`, and the prompt's `chat_template_kwargs`."""
    json_schema: dict[str, Any] | None = None
    """Schema that the response is held to, by an engine with the response format `json`."""
    choice: Choice | None = None
    """Last line of the response, by an engine with the response format `choice`."""


@dataclass(frozen=True, kw_only=True)
class GenerationResult:
    """The response to a request."""

    key: str
    text: str
    num_tokens: int
    """Generated tokens, including the end token."""
    finish_reason: str
    """`stop` for a complete response; else `length`, `special`, `no_room`, `failed`, or what a server returned."""
    logp: float | None = None
    """Log-probability of the response under the policy (temperature 1), nats; None if the engine has none."""
    by_choice: bool = False
    """Whether the engine wrote the last line, as the request's `choice` asks."""
    error: str | None = None
    """Why there is no response, if `finish_reason` is `failed`."""


class Engine(abc.ABC):
    """A generation backend. `too_long` and `generate` work within `session`."""

    total_requests = 0
    """Requests of the stage, also those that earlier jobs answered."""
    response_formats: tuple[ResponseFormat, ...] = ("text",)
    """What responses can be held to, the strictest first; `text` is nothing."""

    @abc.abstractmethod
    def describe(self) -> dict[str, Any]:
        """Settings that identify the model. A file can only be continued with the same ones."""

    @abc.abstractmethod
    def session(self, cache: Path) -> contextlib.AbstractContextManager[None]:
        """Load the model; release it on exit. `cache` is a folder for what is made once, as an imported model.

        Raises:
            UserError: the engine cannot start.
        """

    @property
    @abc.abstractmethod
    def shard(self) -> tuple[int, int] | None:
        """(part, parts): this process takes the requests `questions[part::parts]`. None: it takes none."""

    @property
    def is_writer(self) -> bool:
        """Whether this process writes the results of its part."""
        return True

    def barrier(self) -> None:  # noqa: B027 - most engines run in one process
        """Wait for all processes."""

    @abc.abstractmethod
    def too_long(
        self, questions: Sequence[GenerationRequest], sampling: Sampling
    ) -> list[tuple[GenerationRequest, str]]:
        """Requests that exceed the context length, each with the reason."""

    @abc.abstractmethod
    def generate(self, questions: Sequence[GenerationRequest], sampling: Sampling) -> Iterator[GenerationResult]:
        """Yield a result for each request, in the order in which they finish."""
