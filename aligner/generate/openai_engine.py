"""Generation by an OpenAI-compatible server: vLLM, SGLang, TensorRT-LLM's `trtllm-serve`, a commercial API."""

import contextlib
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Optional

from aligner.common.errors import ConfigError
from aligner.generate.engine import NO_ROOM, Engine, GenerationRequest, GenerationResult
from aligner.generate.sampling import Sampling

REASONS = {"stop": "stop", "length": "length"}


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
        retries: maximum number of retries of a request, after a timeout or when the server is busy.
        system: system message for every prompt without one.
        chat_template_kwargs: arguments of the server's chat template (vLLM, SGLang), as {"enable_thinking": False}.
    """

    base_url: str
    model: str
    api_key_env: Optional[str] = None
    max_concurrent_requests: int = 32
    timeout: float = 600.0
    retries: int = 5
    system: Optional[str] = None
    chat_template_kwargs: Optional[dict[str, Any]] = None

    response_formats = ("json", "text")

    _client: Any = field(default=None, init=False, repr=False)
    _first: bool = field(default=True, init=False, repr=False)

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
                    max_retries=self.retries,
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
        with ThreadPoolExecutor(self.max_concurrent_requests) as pool:
            futures = [pool.submit(self._complete, request, sampling) for request in questions]
            try:
                for future in as_completed(futures):
                    yield future.result()
            finally:
                pool.shutdown(wait=True, cancel_futures=True)

    def _complete(self, request: GenerationRequest, sampling: Sampling) -> GenerationResult:
        import openai

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
        try:
            completion = self._client.chat.completions.create(
                model=self.model,
                messages=messages,
                temperature=sampling.temperature,
                top_p=sampling.top_p,
                max_tokens=sampling.max_tokens,
                stop=list(sampling.stop) or None,
                seed=request.seed % 2**31,
                extra_body=extra_body,
                **({"tools": tools} if tools else {}),
                **({"response_format": _held_to(request.json_schema)} if request.json_schema else {}),
            )
        except openai.BadRequestError as error:
            message = str(error)
            if "context length" in message or "maximum context" in message or "too long" in message:
                return GenerationResult(key=request.key, text="", num_tokens=0, finish_reason=NO_ROOM)
            hint = "; if it knows no response_format, set judge.response_format=text" if request.json_schema else ""
            raise ConfigError(f"engine: {self.base_url} refuses {request.source}: {message[:500]}{hint}") from None
        except openai.APITimeoutError:
            raise ConfigError(
                f"engine.timeout: {self.base_url} did not answer {request.source} in {self.timeout:g} s, "
                f"{self.retries + 1} times; raise it, or lower engine.max_concurrent_requests. What was answered is "
                "kept"
            ) from None
        except openai.OpenAIError as error:
            raise ConfigError(
                f"engine.base_url: {self.base_url} failed at {request.source} after {self.retries} retries ({error}); "
                "what was answered is kept, run the same again"
            ) from None
        except ValueError as error:
            raise ConfigError(
                f"engine.base_url: {self.base_url} did not answer {request.source} in OpenAI's protocol ({error})"
            ) from None
        if not getattr(completion, "choices", None) or completion.choices[0].message is None:
            raise ConfigError(
                f"engine.base_url: {self.base_url} answered {request.source} without a choice: {str(completion)[:300]}"
            )
        choice, usage = completion.choices[0], completion.usage
        return GenerationResult(
            key=request.key,
            text=choice.message.content or "",
            num_tokens=usage.completion_tokens if usage else 0,
            finish_reason=REASONS.get(choice.finish_reason, str(choice.finish_reason)),
        )
