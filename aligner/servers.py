"""Answers of anything that speaks OpenAI's protocol: vLLM, SGLang, TensorRT-LLM's `trtllm-serve`, a company's own."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from aligner.engines import Answer, Engine, Question
from aligner.errors import ConfigError
from aligner.sampling import Sampling

REASONS = {"stop": "stop", "length": "length"}


@dataclass
class Server(Engine):
    """A server, asked by the first rank alone.

    Args:
        url: up to and with `/v1`, as `http://localhost:8000/v1`.
        model: its name there.
        key: name of the environment variable that holds the key, if it wants one; never the key itself.
        parallel: questions that are asked at the same time.
        timeout: seconds until a question is asked again.
        retries: how often a question is, and a server that says that it is busy.
        system: a system message before every prompt that has none.
    """

    url: str
    model: str
    key: Optional[str] = None
    parallel: int = 32
    timeout: float = 600.0
    retries: int = 5
    system: Optional[str] = None

    _client: Any = field(default=None, init=False, repr=False)
    _first: bool = field(default=True, init=False, repr=False)

    def identity(self) -> dict[str, Any]:
        return {"url": self.url, "model": self.model, "system": self.system}

    @property
    def share(self) -> tuple[int, int] | None:
        return (0, 1) if self._first else None

    @contextlib.contextmanager
    def opened(self, cache: Path) -> Iterator[None]:
        import openai

        if self.key is not None and not os.environ.get(self.key):
            raise ConfigError(f"engine.key: the environment has no {self.key}; export it where the job starts")
        from aligner.process import together

        with together() as self._first:
            if self._first:
                self._client = openai.OpenAI(
                    base_url=self.url,
                    api_key=os.environ[self.key] if self.key else "none",
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
            raise ConfigError(f"engine.key: {self.url} does not accept the key ({error.status_code})") from None
        except openai.OpenAIError as error:
            raise ConfigError(f"engine.url: {self.url} cannot be reached ({error}); is the server up?") from None
        except (ValueError, AttributeError) as error:
            raise ConfigError(f"engine.url: {self.url} does not answer in OpenAI's protocol ({error})") from None
        if self.model not in known:
            raise ConfigError(f"engine.model: {self.url} has no {self.model!r}; it has: {', '.join(known) or 'none'}")

    def too_long(self, questions: Sequence[Question], sampling: Sampling) -> list[tuple[Question, str]]:
        """None are known: only the server has its tokenizer, and says so of each."""
        return []

    def answers(self, questions: Sequence[Question], sampling: Sampling) -> Iterator[Answer]:
        with ThreadPoolExecutor(self.parallel) as pool:
            asked = [pool.submit(self._ask, question, sampling) for question in questions]
            try:
                for done in as_completed(asked):
                    yield done.result()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _ask(self, question: Question, sampling: Sampling) -> Answer:
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
                return Answer(key=question.key, text="", tokens=0, finish="no_room")
            raise ConfigError(f"engine: {self.url} refuses {question.source}: {said[:500]}") from None
        except openai.APITimeoutError:
            raise ConfigError(
                f"engine.timeout: {self.url} did not answer {question.source} in {self.timeout:g} s, "
                f"{self.retries + 1} times; raise it, or lower engine.parallel. What was answered is kept"
            ) from None
        except openai.OpenAIError as error:
            raise ConfigError(
                f"engine.url: {self.url} failed at {question.source} after {self.retries} retries ({error}); what was "
                "answered is kept, run the same again"
            ) from None
        except ValueError as error:
            raise ConfigError(
                f"engine.url: {self.url} did not answer {question.source} in OpenAI's protocol ({error})"
            ) from None
        if not getattr(found, "choices", None) or found.choices[0].message is None:
            raise ConfigError(f"engine.url: {self.url} answered {question.source} without a choice: {str(found)[:300]}")
        choice, usage = found.choices[0], found.usage
        return Answer(
            key=question.key,
            text=choice.message.content or "",
            tokens=usage.completion_tokens if usage else 0,
            finish=REASONS.get(choice.finish_reason, str(choice.finish_reason)),
        )
