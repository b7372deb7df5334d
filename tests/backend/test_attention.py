"""The attention of machines without Transformer Engine: Megatron's where that can, each sequence alone where not."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig

from aligner.backend import attention, patches
from aligner.backend.attention import ScaledDotProductAttention


class Groups:
    """As much of Megatron's process groups as one rank needs."""

    class tp:
        @staticmethod
        def size() -> int:
            return 1


@pytest.fixture(autouse=True)
def megatron() -> Iterator[None]:
    """Its patches for this machine, and the buffer that its attention works in."""
    patches.apply()
    tracker: Any = tensor_parallel.get_cuda_rng_tracker()
    had = parallel_state._GLOBAL_MEMORY_BUFFER is not None
    if not had:
        parallel_state._set_global_memory_buffer()
    states = tracker.get_states()
    tracker.reset()
    with patches.one_device():
        tracker.add("model-parallel-rng", 1)
    yield
    tracker.set_states(states)
    if not had:
        parallel_state.destroy_global_memory_buffer()


def layers(groups: int, **options: Any) -> tuple[Any, Any]:
    config = TransformerConfig(
        num_layers=1, hidden_size=32, num_attention_heads=4, num_query_groups=groups, attention_dropout=0.0, **options
    )
    made = [
        kind(config, layer_number=1, attn_mask_type=AttnMaskType.causal, attention_type="self", pg_collection=Groups)  # type: ignore[arg-type]
        for kind in (ScaledDotProductAttention, DotProductAttention)
    ]
    return made[0], made[1]


def inputs(tokens: int, batch: int, groups: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    heads = (4, groups, groups)
    return [torch.randn(tokens, batch, h, 8, generator=generator, requires_grad=True) for h in heads]


@pytest.mark.parametrize("groups", [4, 2, 1])
def test_padded_it_is_megatrons_own(groups: int) -> None:
    ours, theirs = layers(groups)
    found = []
    for layer in (ours, theirs):
        qkv = inputs(17, 3, groups)
        out = layer(*qkv, None)
        out.sin().sum().backward()
        found.append([out, *(x.grad for x in qkv)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("groups", [4, 2, 1])
def test_packed_each_sequence_is_as_if_alone(groups: int) -> None:
    ours, _ = layers(groups)
    bounds = [0, 5, 6, 17]
    qkv = inputs(17, 1, groups)
    packed = PackedSeqParams("thd", torch.tensor(bounds, dtype=torch.int32))
    out = ours(*(x[:, 0] for x in qkv), None, packed_seq_params=packed)
    out.sin().sum().backward()
    grads = [x.grad.clone() for x in qkv]  # type: ignore[union-attr]
    alone = inputs(17, 1, groups)
    for begin, end in itertools.pairwise(bounds):
        one = ours(*(x[begin:end] for x in alone), None)
        one.sin().sum().backward()
        torch.testing.assert_close(out[begin:end].reshape(end - begin, 1, -1), one)
    for a, b in zip(grads, alone, strict=True):
        torch.testing.assert_close(a, b.grad)


def test_what_torch_cannot_do_is_left_to_megatron(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key-value cache (fewer queries than keys), a window, logits scaled by the layer's number."""
    asked: list[Any] = []
    monkeypatch.setattr(DotProductAttention, "forward", lambda *args: asked.append(args))
    ours, _ = layers(4)
    query, key, value = inputs(9, 1, 4)
    ours(query[-1:], key, value, None)
    windowed, _ = layers(4, window_size=(4, 0))
    windowed(query, key, value, None)
    scaled, _ = layers(4, apply_query_key_layer_scaling=True)
    scaled(query, key, value, None)
    assert len(asked) == 3


def test_a_layer_spec_that_someone_else_made_is_left_as_it_is() -> None:
    """`replace_attention` changes the config that it is given, not the spec that other models share."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.transformer.transformer_block import TransformerBlockSubmodules

    shared = get_gpt_layer_local_spec()

    class Config:
        @staticmethod
        def transformer_layer_spec(config: Any) -> Any:
            return TransformerBlockSubmodules(layer_specs=[shared])

    config: Any = Config()
    attention.replace_attention(config)
    [made] = config.transformer_layer_spec(config).layer_specs
    assert made.submodules.self_attention.submodules.core_attention is ScaledDotProductAttention
    assert shared.submodules.self_attention.submodules.core_attention is DotProductAttention
