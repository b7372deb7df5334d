"""Generation by an OpenAI-compatible server: vLLM, SGLang, TensorRT-LLM's `trtllm-serve`, a commercial API."""

import contextlib
import os
import random
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from email.utils import parsedate_to_datetime
from pathlib import Path
from typing import Any, Optional

from aligner.common.errors import ConfigError
from aligner.generate.engine import FAILED, NO_ROOM, Engine, GenerationRequest, GenerationResult
from aligner.generate.sampling import Sampling

REASONS = {"stop": "stop", "length": "length"}
LONGEST_WAIT_S = 600.0
"""Seconds between two tries of a request, at most; a server's Retry-After is heeded up to here."""
TOO_LONG = ("context length", "maximum context", "too long")
"""Parts of messages of servers about a prompt that exceeds the context."""


class _BadReply(Exception):
    """A reply that arrived and is no answer; the text says why."""


class _Stopped(Exception):
    """The stage ends, so a request is not tried again."""


def _held_to(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "strict": True, "schema": schema}}


@dataclass
class OpenAIEngine(Engine):
    """An OpenAI-compatible chat server. Only the first rank sends requests.

    Args:
        base_url: URL of the server including `/v1`, as `http://localhost:8000/v1`.
        model: model name on the server.
        api_key_env: name of the environment variable with the API key, if the server needs one; never the key itself.
        max_concurrent_requests: number of requests in flight.
        timeout: seconds until a request is retried.
        retries: maximum number of retries of a request, after a timeout, an error of the server or a reply that is no
            answer. Waits double from half a second, unless the server says how long (`Retry-After`).
        max_failure_rate: share of requests that may stay without an answer; they get `finish_reason` `failed` and the
            reason. Above it the stage ends, what was answered is kept, and the same command asks the rest again.
        system: system message for every prompt without one.
        chat_template_kwargs: arguments of the server's chat template (vLLM, SGLang), as {"enable_thinking": False}.
    """

    base_url: str
    model: str
    api_key_env: Optional[str] = None
    max_concurrent_requests: int = 32
    timeout: float = 600.0
    retries: int = 5
    max_failure_rate: float = 0.05
    system: Optional[str] = None
    chat_template_kwargs: Optional[dict[str, Any]] = None

    response_formats = ("json", "text")

    _client: Any = field(default=None, init=False, repr=False)
    _first: bool = field(default=True, init=False, repr=False)
    _stop: threading.Event = field(default_factory=threading.Event, init=False, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.max_failure_rate <= 1:
            raise ConfigError(f"engine.max_failure_rate: must be from 0 to 1, found {self.max_failure_rate}")

    def describe(self) -> dict[str, Any]:
        more = {"chat_template_kwargs": self.chat_template_kwargs} if self.chat_template_kwargs else {}
        return {"base_url": self.base_url, "model": self.model, "system": self.system, **more}

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
                    max_retries=0,  # `_try` retries, also after replies that the client takes for answers
                )
                self._check_server()
            try:
                yield
            finally:
                if self._client is not None:
                    self._client.close()
                    self._client = None

    def _check_server(self) -> None:
        """Check that the server responds and has the model, before any request is sent."""
        import openai

        try:
            models = [model.id for model in self._client.with_options(timeout=20.0, max_retries=1).models.list()]
        except openai.NotFoundError:
            return  # not every server lists its models
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
        if self.model not in models:
            raise ConfigError(
                f"engine.model: {self.base_url} has no {self.model!r}; it has: {', '.join(models) or 'none'}"
            )

    def too_long(
        self, questions: Sequence[GenerationRequest], sampling: Sampling
    ) -> list[tuple[GenerationRequest, str]]:
        """Return no request: only the server has the tokenizer. It rejects a request that is too long."""
        return []

    def generate(self, questions: Sequence[GenerationRequest], sampling: Sampling) -> Iterator[GenerationResult]:
        """Yield the answers as they arrive, then the requests that failed.

        Raises:
            ConfigError: more than `max_failure_rate` of the requests failed, or the server refuses all; after all
                answers have been yielded.
        """
        total = max(self.total_requests, len(questions))
        failed: list[tuple[GenerationRequest, GenerationResult]] = []
        refusal: ConfigError | None = None
        self._stop.clear()
        with ThreadPoolExecutor(self.max_concurrent_requests) as pool:
            futures: dict[Future[GenerationResult], GenerationRequest] = {}
            for request in questions:
                futures[pool.submit(self._answer, request, sampling)] = request
            try:
                for future in as_completed(futures):
                    if future.cancelled():
                        continue
                    try:
                        result = future.result()
                    except _Stopped:
                        continue
                    except ConfigError as error:
                        refusal = refusal or error
                        self._end(futures)
                        continue
                    if result.finish_reason != FAILED:
                        yield result
                        continue
                    failed.append((futures[future], result))
                    if len(failed) > self.max_failure_rate * total:
                        self._end(futures)
            finally:
                self._end(futures)
        if refusal is not None:
            raise refusal
        if len(failed) > self.max_failure_rate * total:
            raise self._too_many(failed, total)
        yield from (result for _, result in failed)

    def _end(self, futures: Iterable[Future[GenerationResult]]) -> None:
        """Begin no further request; those in flight come to their end, and their answers are kept."""
        self._stop.set()
        for future in futures:
            future.cancel()

    def _too_many(self, failed: list[tuple[GenerationRequest, GenerationResult]], count: int) -> ConfigError:
        request, result = failed[0]
        hint = ""
        if request.json_schema and "400" in str(result.error):
            hint = "; if it knows no response_format, set judge.response_format=text"
        return ConfigError(
            f"engine: {self.base_url} left {len(failed)} of {count} requests without an answer, more than "
            f"engine.max_failure_rate={self.max_failure_rate:g}; first {request.source}: {result.error}{hint}. What "
            "was answered is kept; run the same again"
        )

    # ---- one request ------------------------------------------------------------------------------------------

    def _answer(self, request: GenerationRequest, sampling: Sampling) -> GenerationResult:
        """Ask until there is an answer, at most `retries` times more; return a failed result where there is none.

        Raises:
            ConfigError: the server refuses every request.
        """
        import openai

        arguments, reason = self._arguments(request, sampling), ""
        for attempt in range(self.retries + 1):
            try:
                return _result(request, self._client.chat.completions.create(**arguments))
            except (openai.AuthenticationError, openai.NotFoundError) as error:
                raise ConfigError(
                    f"engine: {self.base_url} refuses {request.source}: {_line(error)}; what was answered is kept, run "
                    "the same again"
                ) from None
            except (openai.BadRequestError, openai.PermissionDeniedError) as error:
                if any(part in str(error) for part in TOO_LONG):
                    return GenerationResult(key=request.key, text="", num_tokens=0, finish_reason=NO_ROOM)
                reason = _line(error)
                break  # the same request would be refused again
            except openai.APITimeoutError:
                reason = f"no answer within engine.timeout={self.timeout:g} s"
                wait = _seconds_until(None, attempt)
            except (openai.OpenAIError, _BadReply, ValueError) as error:
                reason = _line(error)
                wait = _seconds_until(getattr(error, "response", None), attempt)
            if attempt < self.retries and self._stop.wait(wait):
                raise _Stopped
        return GenerationResult(key=request.key, text="", num_tokens=0, finish_reason=FAILED, error=reason)

    def _arguments(self, request: GenerationRequest, sampling: Sampling) -> dict[str, Any]:
        prompt = request.prompt
        messages: list[Any] = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        if self.system is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self.system}, *messages]
        extra_body: dict[str, Any] = {"top_k": sampling.top_k} if sampling.top_k else {}
        template = {**(self.chat_template_kwargs or {}), **request.template}
        tools = template.pop("tools", None)
        if template:
            extra_body["chat_template_kwargs"] = template
        if messages[-1]["role"] == "assistant":
            # vLLM's and SGLang's names; the model goes on with the message instead of beginning another.
            extra_body |= {"continue_final_message": True, "add_generation_prompt": False}
        return {
            "model": self.model,
            "messages": messages,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "max_tokens": sampling.max_tokens,
            "stop": list(sampling.stop) or None,
            "seed": request.seed % 2**31,
            "extra_body": extra_body,
            **({"tools": tools} if tools else {}),
            **({"response_format": _held_to(request.json_schema)} if request.json_schema else {}),
        }


def _result(request: GenerationRequest, completion: Any) -> GenerationResult:
    """Return the answer of a reply.

    Raises:
        _BadReply: the reply has none, or one that no file can hold.
    """
    try:
        choice = completion.choices[0]
        text, reason = choice.message.content or "", choice.finish_reason or "stop"
        text.encode()
        num_tokens = int(getattr(completion.usage, "completion_tokens", None) or 0)
    except UnicodeEncodeError:
        raise _BadReply("a text with half a character (a surrogate without its other half)") from None
    except (AttributeError, LookupError, TypeError, ValueError):
        raise _BadReply(f"a reply without a choice: {str(completion)[:200]}") from None
    if reason == "content_filter":
        raise _BadReply("stopped by the server's content filter")
    return GenerationResult(
        key=request.key, text=text, num_tokens=num_tokens, finish_reason=REASONS.get(reason, str(reason))
    )


def _seconds_until(response: Any, attempt: int) -> float:
    """Return the seconds until the next try: as the server says, or doubling from half a second."""
    said = response.headers.get("retry-after") if response is not None else None
    if said:
        with contextlib.suppress(ValueError):
            seconds = float(said) if said.strip().isdigit() else parsedate_to_datetime(said).timestamp() - time.time()
            return min(LONGEST_WAIT_S, max(0.0, seconds))
    # Not all at once, or the server would be as busy as before.
    return min(30.0, 0.5 * 2**attempt) * random.uniform(0.75, 1.25)


def _line(error: BaseException) -> str:
    return " ".join(f"{type(error).__name__.lstrip('_')}: {error}".split())[:300]
