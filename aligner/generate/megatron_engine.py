"""Generation by Megatron from a NeMo checkpoint: each tensor-parallel group of ranks takes a part of the requests."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any, Optional

import torch
from megatron.core import parallel_state
from megatron.core.transformer.attention import SelfAttention

from aligner.backend import attention, cpu_linear, device, distributed, kernels, patches
from aligner.checkpoint import huggingface
from aligner.common import console
from aligner.common.errors import ConfigError, RowError
from aligner.data.tokenization import ResponseTokenizer
from aligner.generate import restore
from aligner.generate.decoding import DecodedSequence, DecodeRequest, Vocabulary, decode
from aligner.generate.engine import Choice, Engine, GenerationRequest, GenerationResult
from aligner.generate.kv_cache import CachedAttention
from aligner.generate.sampling import Sampling
from aligner.model import parallelism

console.silence_nemo()
patches.apply()

ANCHOR = 4
"""Number of prompt tokens that are detokenized with a response; a tokenizer may decode its first word differently
without them."""


@dataclass
class MegatronEngine(Engine):
    """A checkpoint that generates `batch_size` responses at a time on each data-parallel rank.

    Args:
        checkpoint: NeMo checkpoint, run folder, adapters, Hugging Face folder or `hf://name`.
        batch_size: sequences that a rank decodes at the same time.
        apply_chat_template: treat a string prompt as a user message, as `data.apply_chat_template` does.
        chat_template_kwargs: arguments of the chat template; None: those that the checkpoint was trained with.
        date: day that the chat template writes, as 2026-11-30; None: the one that the checkpoint was trained with.
        devices: ranks per node.
        num_nodes: number of nodes.
        tensor_model_parallel_size: ranks that share the weights; these groups divide the requests.
    """

    checkpoint: str
    batch_size: int = 8
    apply_chat_template: bool = False
    chat_template_kwargs: Optional[dict[str, Any]] = None
    date: Optional[str] = None
    devices: int = 1
    num_nodes: int = 1
    tensor_model_parallel_size: int = 1

    response_formats = ("choice", "text")

    _encode: Any = field(default=None, init=False, repr=False)
    _model: Any = field(default=None, init=False, repr=False)
    _all: Any = field(default=None, init=False, repr=False)

    def describe(self) -> dict[str, Any]:
        more = {"chat_template_kwargs": self.chat_template_kwargs, "date": self.date}
        return {
            **huggingface.source_identity(self.checkpoint),
            "apply_chat_template": self.apply_chat_template,
            **{name: value for name, value in more.items() if value is not None},
        }

    @contextlib.contextmanager
    def session(self, cache: Path) -> Iterator[None]:
        self._check()
        with distributed.preserved_environment():
            try:
                self._load(cache)
                yield
            finally:
                self._model = self._encode = None
                distributed.destroy_distributed()

    def _check(self) -> None:
        for name in ("batch_size", "devices", "num_nodes", "tensor_model_parallel_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"engine.{name}: must be at least 1, found {getattr(self, name)}")
        ranks = self.devices * self.num_nodes
        started = distributed.started_ranks()
        if ranks != started:
            raise ConfigError(
                f"engine.devices, engine.num_nodes: {self.devices} x {self.num_nodes} = {ranks} ranks, but {started} "
                f"were started; launch with an executor of as many, or by torchrun --nproc-per-node={self.devices}"
            )
        if ranks % self.tensor_model_parallel_size:
            raise ConfigError(
                f"engine.tensor_model_parallel_size: {self.tensor_model_parallel_size} does not divide {ranks} ranks"
            )

    def _load(self, cache: Path) -> None:
        restored = restore.restore(
            restore.find(self.checkpoint, cache),
            self._prepare,
            devices=self.devices,
            num_nodes=self.num_nodes,
            tensor_model_parallel_size=self.tensor_model_parallel_size,
        )
        self._all = torch.distributed.new_group(backend="gloo", timeout=timedelta(days=7))
        if device.no_cuda() and torch.backends.mkldnn.is_available():
            cpu_linear.replace_linear(restored.core)
        self._model, self._ends = restored.core, restored.ends
        self._encode = ResponseTokenizer(
            restored.tokenizer,
            apply_chat_template=self.apply_chat_template,
            template=restored.template(self.chat_template_kwargs, self.date),
        )
        self._longest, self._rows = int(restored.config.seq_length), int(restored.config.vocab_size)

    def _prepare(self, config: Any) -> None:
        """Replace training settings of the checkpoint by those for generation."""
        unsupported = parallelism.special_attention(config)
        if unsupported:
            raise ConfigError(
                f"engine: Megatron answers without {', '.join(unsupported)}, which {self.checkpoint} has; serve it "
                "by vLLM, and use OpenAIEngine"
            )
        layers = {SelfAttention: CachedAttention}
        attention.replace_attention(config, attention.REPLACED | layers if device.no_transformer_engine() else layers)
        kernels.choose_attention(config)

    @property
    def shard(self) -> tuple[int, int]:
        return parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()

    @property
    def is_writer(self) -> bool:
        return parallel_state.get_tensor_model_parallel_rank() == 0

    def barrier(self) -> None:
        # Not NCCL's, which times out after ten minutes; ranks finish hours apart.
        torch.distributed.barrier(group=self._all)

    def too_long(
        self, questions: Sequence[GenerationRequest], sampling: Sampling
    ) -> list[tuple[GenerationRequest, str]]:
        self._check_vocabulary(questions)
        long = []
        for q in questions:
            count = len(self._encode.encode_prompt(q.source, q.prompt, q.template))
            last_line = max(map(len, self._endings(q.choice)), default=0)
            room = self._longest - sampling.max_tokens - last_line
            if count > room:
                less = f"max_tokens={sampling.max_tokens}" + (f" and a last line of {last_line}" if last_line else "")
                long.append((q, f"{count} tokens, and {self._longest} less {less} leave {room}"))
        return long

    def _endings(self, choice: Choice | None) -> tuple[tuple[int, ...], ...]:
        """Return the tokens of a last line, one sequence for each option."""
        if choice is None:
            return ()
        stop, hf = min(self._encode.stop_token_ids | self._ends), self._encode.hf
        texts = [choice.before + option for option in choice.options]
        return tuple((*hf.encode(text, add_special_tokens=False), stop) for text in texts)

    def _check_vocabulary(self, questions: Sequence[GenerationRequest]) -> None:
        rows, hf = self._rows, self._encode.hf
        for q in questions if len(hf) > rows else ():
            outside = [token for token in self._encode.encode_prompt(q.source, q.prompt, q.template) if token >= rows]
            if outside:
                raise RowError(
                    f"{q.source}: holds the token {hf.convert_ids_to_tokens(outside[0])!r} of id {outside[0]}, but the "
                    f"embedding of {self.checkpoint} has {rows} rows"
                )

    def generate(self, questions: Sequence[GenerationRequest], sampling: Sampling) -> Iterator[GenerationResult]:
        prompt_tokens = {q.key: self._encode.encode_prompt(q.source, q.prompt, q.template) for q in questions}
        prompts = [self._decode_request(q, prompt_tokens[q.key]) for q in questions]
        if not prompts:
            return
        hf, stop_token_ids = self._encode.hf, frozenset(self._encode.stop_token_ids | self._ends)
        vocabulary = Vocabulary(
            size=min(len(hf), self._rows),
            stop_token_ids=stop_token_ids,
            special=frozenset(self._encode.special | self._ends),
            decode=lambda ids: _detokenize(hf, ids),
        )
        longest = max(len(prompt.tokens) + max(map(len, prompt.endings), default=0) for prompt in prompts)
        sequences = decode(
            self._model, prompts, vocabulary, sampling, slots=self.batch_size, length=longest + sampling.max_tokens
        )
        for sequence in sequences:
            yield _result(sequence, hf, stop_token_ids)

    def _decode_request(self, q: GenerationRequest, tokens: list[int]) -> DecodeRequest:
        if q.choice is None:
            return DecodeRequest(key=q.key, tokens=tokens, seed=q.seed)
        lacking, hf = q.choice.lacking, self._encode.hf
        return DecodeRequest(
            key=q.key,
            tokens=tokens,
            seed=q.seed,
            endings=self._endings(q.choice),
            lacking=lambda response: lacking(_response_text(hf, tokens, response)),
        )


def _response_text(hf: Any, prompt: list[int], response: list[int]) -> str:
    anchor = _detokenize(hf, prompt[-ANCHOR:])
    return _detokenize(hf, prompt[-ANCHOR:] + response).removeprefix(anchor)


def _result(sequence: DecodedSequence, hf: Any, stop_token_ids: frozenset[int]) -> GenerationResult:
    assert sequence.finish_reason is not None
    tokens = sequence.tokens
    has_end_token = sequence.finish_reason == "special" or tokens[-1] in stop_token_ids
    text = _response_text(hf, sequence.request.tokens, tokens[: len(tokens) - has_end_token])
    if sequence.stop_text is not None:
        text = text[: text.index(sequence.stop_text)]
    return GenerationResult(
        key=sequence.request.key,
        text=text,
        num_tokens=len(tokens),
        finish_reason=sequence.finish_reason,
        logp=sequence.logp,
        by_choice=sequence.ending_begin is not None,
    )


def _detokenize(hf: Any, ids: list[int]) -> str:
    return hf.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
