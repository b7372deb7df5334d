"""Answers of anything that speaks OpenAI's protocol: vLLM, SGLang, TensorRT-LLM's `trtllm-serve`, a company's own."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from aligner.common.errors import ConfigError
from aligner.generate.engine import Engine, GenerationRequest, GenerationResult
from aligner.generate.sampling import Sampling

REASONS = {"stop": "stop", "length": "length"}


@dataclass
class OpenAIEngine(Engine):
    """A server, asked by the first rank alone.

    Args:
        base_url: up to and with `/v1`, as `http://localhost:8000/v1`.
        model: its name there.
        api_key_env: name of the environment variable that holds the key, if it wants one; never the key itself.
        max_concurrent_requests: questions that are asked at the same time.
        timeout: seconds until a question is asked again.
        retries: how often a question is, and a server that says that it is busy.
        system: a system message before every prompt that has none.
    """

    base_url: str
    model: str
    api_key_env: Optional[str] = None
    max_concurrent_requests: int = 32
    timeout: float = 600.0
    retries: int = 5
    system: Optional[str] = None

    _client: Any = field(default=None, init=False, repr=False)
    _first: bool = field(default=True, init=False, repr=False)

    def describe(self) -> dict[str, Any]:
        return {"base_url": self.base_url, "model": self.model, "system": self.system}

    @property
    def shard(self) -> tuple[int, int] | None:
        return (0, 1) if self._first else None

    @contextlib.contextmanager
    def session(self, cache: Path) -> Iterator[None]:
        import openai

        if self.api_key_env is not None and not os.environ.get(self.api_key_env):
            raise ConfigError(
                f"engine.api_key_env: the environment has no {self.api_key_env}; export it where the job starts"
            )
        from aligner.backend.distributed import rank_zero_first

        with rank_zero_first() as self._first:
            if self._first:
                self._client = openai.OpenAI(
                    base_url=self.base_url,
                    api_key=os.environ[self.api_key_env] if self.api_key_env else "none",
                    timeout=self.timeout,
                    max_retries=self.retries,
                )
                self._greet()
            try:
                yield
            finally:
                if self._client is not None:
                    self._client.close()
                    self._client = None

    def _greet(self) -> None:
        """See that it is there and has the model, before a thousand questions fail."""
        import openai

        try:
            known = [model.id for model in self._client.with_options(timeout=20.0, max_retries=1).models.list()]
        except openai.NotFoundError:
            return  # not every server lists them
        except openai.AuthenticationError as error:
            raise ConfigError(
                f"engine.api_key_env: {self.base_url} does not accept the key ({error.status_code})"
            ) from None
        except openai.OpenAIError as error:
            raise ConfigError(
                f"engine.base_url: {self.base_url} cannot be reached ({error}); is the server up?"
            ) from None
        except (ValueError, AttributeError) as error:
            raise ConfigError(
                f"engine.base_url: {self.base_url} does not answer in OpenAI's protocol ({error})"
            ) from None
        if self.model not in known:
            raise ConfigError(
                f"engine.model: {self.base_url} has no {self.model!r}; it has: {', '.join(known) or 'none'}"
            )

    def too_long(
        self, questions: Sequence[GenerationRequest], sampling: Sampling
    ) -> list[tuple[GenerationRequest, str]]:
        """None are known: only the server has its tokenizer, and says so of each."""
        return []

    def generate(self, questions: Sequence[GenerationRequest], sampling: Sampling) -> Iterator[GenerationResult]:
        with ThreadPoolExecutor(self.max_concurrent_requests) as pool:
            asked = [pool.submit(self._ask, question, sampling) for question in questions]
            try:
                for done in as_completed(asked):
                    yield done.result()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _ask(self, question: GenerationRequest, sampling: Sampling) -> GenerationResult:
        import openai

        prompt = question.prompt
        messages: list[Any] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if self.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        more = {"top_k": sampling.top_k} if sampling.top_k else {}
        try:
            found = self._client.chat.completions.create(
                model=self.model,
                messages=messages,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=sampling.max_tokens,
                stop=list(sampling.stop) or None,
                seed=question.seed % 2**31,
                extra_body=more,
            )
        except openai.BadRequestError as error:
            said = str(error)
            if "context length" in said or "maximum context" in said or "too long" in said:
                return GenerationResult(key=question.key, text="", num_tokens=0, finish_reason="no_room")
            raise ConfigError(f"engine: {self.base_url} refuses {question.source}: {said[:500]}") from None
        except openai.APITimeoutError:
            raise ConfigError(
                f"engine.timeout: {self.base_url} did not answer {question.source} in {self.timeout:g} s, "
                f"{self.retries + 1} times; raise it, or lower engine.max_concurrent_requests. What was answered is kept"
            ) from None
        except openai.OpenAIError as error:
            raise ConfigError(
                f"engine.base_url: {self.base_url} failed at {question.source} after {self.retries} retries ({error}); what was "
                "answered is kept, run the same again"
            ) from None
        except ValueError as error:
            raise ConfigError(
                f"engine.base_url: {self.base_url} did not answer {question.source} in OpenAI's protocol ({error})"
            ) from None
        if not getattr(found, "choices", None) or found.choices[0].message is None:
            raise ConfigError(
                f"engine.base_url: {self.base_url} answered {question.source} without a choice: {str(found)[:300]}"
            )
        choice, usage = found.choices[0], found.usage
        return GenerationResult(
            key=question.key,
            text=choice.message.content or "",
            num_tokens=usage.completion_tokens if usage else 0,
            finish_reason=REASONS.get(choice.finish_reason, str(choice.finish_reason)),
        )
