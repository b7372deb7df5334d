"""Generation by vLLM in this process, from the Hugging Face export of a checkpoint. vLLM must be installed.

This project's tests do not run this engine: their machines have neither vLLM nor a GPU. `OpenAIEngine` connects to a
separate vLLM server.
"""

import contextlib
import importlib.util
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from aligner.checkpoint import folders, huggingface
from aligner.common.errors import ConfigError
from aligner.common.hashing import short_hash
from aligner.data.tokenization import ResponseTokenizer
from aligner.generate.engine import Engine, GenerationRequest, GenerationResult
from aligner.generate.sampling import Sampling

CHUNK = 512
"""Number of requests per call of vLLM; results are written after each call."""


@dataclass
class VLLMEngine(Engine):
    """A checkpoint in vLLM. Only the first rank runs vLLM, which uses the GPUs of this node.

    Args:
        checkpoint: NeMo checkpoint or run folder, exported once; or Hugging Face folder or `hf://name`.
        apply_chat_template: treat a string prompt as a user message, as `data.apply_chat_template` does.
        tensor_parallel_size: number of GPUs.
        options: further arguments of `vllm.LLM`.
    """

    checkpoint: str
    apply_chat_template: bool = False
    tensor_parallel_size: int = 1
    options: dict[str, Any] = field(default_factory=dict)

    response_formats = ("json", "text")

    _llm: Any = field(default=None, init=False, repr=False)
    _encode: Any = field(default=None, init=False, repr=False)
    _first: bool = field(default=True, init=False, repr=False)

    def describe(self) -> dict[str, Any]:
        return {
            **huggingface.source_identity(self.checkpoint),
            "vllm": True,
            "apply_chat_template": self.apply_chat_template,
            "options": self.options,
        }

    @property
    def shard(self) -> tuple[int, int] | None:
        return (0, 1) if self._first else None

    @contextlib.contextmanager
    def session(self, cache: Path) -> Iterator[None]:
        if importlib.util.find_spec("vllm") is None:
            raise ConfigError("engine: vLLM is not installed here; install it, or use MegatronEngine or OpenAIEngine")
        from aligner.backend.distributed import rank_zero_first

        with rank_zero_first() as self._first:
            if self._first:
                from vllm import LLM  # type: ignore[import-not-found]

                self._llm = LLM(
                    model=self._exported(cache), tensor_parallel_size=self.tensor_parallel_size, **self.options
                )
                self._encode = ResponseTokenizer(
                    self._llm.get_tokenizer(), apply_chat_template=self.apply_chat_template
                )
            try:
                yield
            finally:
                self._llm = self._encode = None

    def _exported(self, cache: Path) -> str:
        if huggingface.is_importable(self.checkpoint):
            return self.checkpoint.removeprefix("hf://")
        checkpoint = folders.resolve_checkpoint(Path(self.checkpoint).expanduser(), "checkpoint")
        target = cache / f"vllm-{short_hash(f'{checkpoint.resolve()} {folders.mtime_ns(checkpoint)}'.encode()):x}"
        if not target.exists():
            huggingface.export_hf(str(checkpoint), str(target))
        return str(target)

    def too_long(
        self, questions: Sequence[GenerationRequest], sampling: Sampling
    ) -> list[tuple[GenerationRequest, str]]:
        room = self._llm.llm_engine.model_config.max_model_len - sampling.max_tokens
        lengths = [len(self._encode.encode_prompt(q.source, q.prompt, q.template)) for q in questions]
        return [
            (q, f"{length} tokens, and there is room for {room}")
            for q, length in zip(questions, lengths, strict=True)
            if length > room
        ]

    def generate(self, questions: Sequence[GenerationRequest], sampling: Sampling) -> Iterator[GenerationResult]:
        from vllm import SamplingParams, TokensPrompt  # type: ignore[import-not-found]
        from vllm.sampling_params import StructuredOutputsParams  # type: ignore[import-not-found]

        stop_token_ids = sorted(self._encode.stop_token_ids)
        for begin in range(0, len(questions), CHUNK):
            chunk = questions[begin : begin + CHUNK]
            prompts = [
                TokensPrompt(prompt_token_ids=self._encode.encode_prompt(q.source, q.prompt, q.template)) for q in chunk
            ]
            params = [
                SamplingParams(
                    temperature=sampling.temperature,
                    top_p=sampling.top_p,
                    top_k=sampling.top_k or -1,
                    max_tokens=sampling.max_tokens,
                    stop=list(sampling.stop),
                    stop_token_ids=stop_token_ids,
                    seed=q.seed % 2**31,
                    structured_outputs=StructuredOutputsParams(json=q.json_schema) if q.json_schema else None,
                )
                for q in chunk
            ]
            for request, result in zip(chunk, self._llm.generate(prompts, params), strict=True):
                response = result.outputs[0]
                yield GenerationResult(
                    key=request.key,
                    text=response.text,
                    num_tokens=len(response.token_ids),
                    finish_reason=response.finish_reason or "length",
                )
