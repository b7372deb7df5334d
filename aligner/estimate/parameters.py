"""What a GPT config weighs and costs: parameters by part, FLOPs of a token.

Read from the config as a recipe describes it, without building it, so that it is the same on every machine.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import nemo_run as run


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelShape:
    """A GPT model in numbers; those of a layer are of one layer."""

    layers: int
    hidden: int
    heads: int
    groups: int
    """Heads of keys, and of values."""
    channels: int
    """Width of a head."""
    ffn: int
    """Width inside the MLP, or inside one expert."""
    gated: bool
    vocabulary: int
    tied: bool
    experts: int
    """0: a dense model."""
    topk: int
    """Experts that a token visits; 1 of a dense model."""
    shared_ffn: int
    """Width of the expert that every token visits; 0: there is none."""
    num_norm_bias_params: int
    """Elements of biases and norms of a layer."""
    last_norm: int
    """Elements of the norm behind the last layer."""

    @property
    def queries(self) -> int:
        """Width of all query heads together."""
        return self.heads * self.channels

    @property
    def keys(self) -> int:
        """Width of all key heads together; values have as much."""
        return self.groups * self.channels

    @property
    def attention(self) -> int:
        """Parameters of a layer's attention: queries, keys, values, projection."""
        return self.hidden * (2 * self.queries + 2 * self.keys)

    @property
    def mlp(self) -> int:
        """Parameters of a layer's MLP, or of one expert."""
        return self.hidden * self.ffn * (3 if self.gated else 2)

    @property
    def routed(self) -> int:
        """Parameters of a layer's experts, which expert parallelism divides; 0 of a dense model."""
        return self.experts * self.mlp

    @property
    def num_dense_params(self) -> int:
        """All other parameters of a layer."""
        shared = self.hidden * self.shared_ffn * (3 if self.gated else 2)
        router = self.hidden * self.experts
        return self.attention + (0 if self.experts else self.mlp) + shared + router + self.num_norm_bias_params

    @property
    def embedding(self) -> int:
        """Parameters of the embedding, and as many of an output layer of its own."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """All of them."""
        tables = self.embedding * (1 if self.tied else 2)
        return self.layers * (self.num_dense_params + self.routed) + tables + self.last_norm

    @property
    def num_active_params(self) -> int:
        """Parameters that multiply a token: all but the input embedding, and of experts those that it visits."""
        visited = self.topk * self.mlp if self.experts else 0
        return self.layers * (self.num_dense_params + visited) + self.embedding

    def forward_flops(self, length: float) -> float:
        """FLOPs of a token in the forward pass.

        2 N + 2 s d L: each active parameter multiplies and adds once; causal attention looks at s/2 tokens on
        average, twice (scores, values), with d = width of the query heads. The backward pass costs twice as much.
        Narayanan et al. 2021 (arXiv 2104.04473), appendix, with the causal half left out and N counted.

        Args:
            length: tokens of a sequence.
        """
        return 2 * self.num_active_params + 2 * length * self.queries * self.layers


def model_shape(config: run.Config) -> ModelShape:
    """The anatomy of NeMo's GPT config.

    Raises:
        KeyError: it is no GPT config.
    """
    given = _values(config)
    hidden, heads = given["hidden_size"], given["num_attention_heads"]
    channels = given.get("kv_channels") or hidden // heads
    groups = given.get("num_query_groups") or heads
    ffn = given.get("ffn_hidden_size") or 4 * hidden
    experts = given.get("num_moe_experts") or 0
    gated = bool(given.get("gated_linear_unit"))
    inside = (given.get("moe_ffn_hidden_size") or ffn) if experts else ffn
    per_norm = 2 if given.get("normalization", "LayerNorm") == "LayerNorm" else 1
    small = 2 * per_norm * hidden
    if given.get("qk_layernorm"):
        small += 2 * channels
    if given.get("add_qkv_bias") or given.get("add_bias_linear"):
        small += channels * (heads + 2 * groups)
    if given.get("add_bias_linear"):
        small += 2 * hidden + inside * (2 if gated else 1)
    return ModelShape(
        layers=given["num_layers"],
        hidden=hidden,
        heads=heads,
        groups=groups,
        channels=channels,
        ffn=inside,
        gated=gated,
        vocabulary=given.get("vocab_size") or 0,
        tied=bool(given.get("share_embeddings_and_output_weights", True)),
        experts=experts,
        topk=given.get("moe_router_topk", 1) if experts else 1,
        shared_ffn=given.get("moe_shared_expert_intermediate_size") or 0,
        num_norm_bias_params=small,
        last_norm=per_norm * hidden,
    )


def _values(config: run.Config) -> dict[str, Any]:
    """Fields of a config: defaults of its class, and what the recipe sets."""
    kind: Any = config.__fn_or_cls__
    fields = {f.name: f.default for f in dataclasses.fields(kind) if f.default is not dataclasses.MISSING}
    return fields | {str(name): value for name, value in config.__arguments__.items()}
