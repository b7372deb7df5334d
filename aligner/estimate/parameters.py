"""Model size from a GPT config: parameters by part, FLOPs per token.

The config is read as the recipe describes it and never built, so the result is the same on every machine.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import nemo_run as run


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelShape:
    """Dimensions of a GPT model; parameter counts of parts are per layer."""

    layers: int
    hidden: int
    heads: int
    groups: int
    """Number of key heads, equal to the number of value heads."""
    channels: int
    """Width of one head."""
    ffn: int
    """Hidden width of the MLP, or of one expert."""
    gated: bool
    vocabulary: int
    tied: bool
    experts: int
    """0: a dense model."""
    topk: int
    """Experts per token; 1 for a dense model."""
    shared_ffn: int
    """Hidden width of the shared expert; 0: none."""
    num_norm_bias_params: int
    """Bias and norm parameters of a layer."""
    last_norm: int
    """Parameters of the final norm."""

    @property
    def queries(self) -> int:
        """Total width of the query heads."""
        return self.heads * self.channels

    @property
    def keys(self) -> int:
        """Total width of the key heads; the value heads have the same width."""
        return self.groups * self.channels

    @property
    def attention(self) -> int:
        """Parameters of a layer's attention: query, key, value and output projections."""
        return self.hidden * (2 * self.queries + 2 * self.keys)

    @property
    def mlp(self) -> int:
        """Parameters of a layer's MLP, or of one expert."""
        return self.hidden * self.ffn * (3 if self.gated else 2)

    @property
    def routed(self) -> int:
        """Parameters of a layer's routed experts, divided by expert parallelism; 0 for a dense model."""
        return self.experts * self.mlp

    @property
    def num_dense_params(self) -> int:
        """Parameters of a layer without its routed experts."""
        shared = self.hidden * self.shared_ffn * (3 if self.gated else 2)
        router = self.hidden * self.experts
        return self.attention + (0 if self.experts else self.mlp) + shared + router + self.num_norm_bias_params

    @property
    def embedding(self) -> int:
        """Parameters of the embedding; an untied output layer has the same number."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """Total parameters."""
        tables = self.embedding * (1 if self.tied else 2)
        return self.layers * (self.num_dense_params + self.routed) + tables + self.last_norm

    @property
    def num_active_params(self) -> int:
        """Active parameters per token: all except the input embedding and the experts that the token does not visit."""
        visited = self.topk * self.mlp if self.experts else 0
        return self.layers * (self.num_dense_params + visited) + self.embedding

    def forward_flops(self, length: float) -> float:
        """Return the FLOPs per token of the forward pass; the backward pass costs twice as much.

        2 N + 2 s d L: each of the N active parameters multiplies and adds once. Causal attention reads s/2 tokens on
        average, twice (scores, values); d is the width of the query heads.
        Narayanan et al. 2021 (arXiv 2104.04473), appendix, without the non-causal half and with N counted.

        Args:
            length: tokens per sequence.
        """
        return 2 * self.num_active_params + 2 * length * self.queries * self.layers


def model_shape(config: run.Config) -> ModelShape:
    """Return the dimensions of the model that NeMo's GPT config describes.

    Raises:
        KeyError: the config is not a GPT config.
    """
    values = _config_fields(config)
    hidden, heads = values["hidden_size"], values["num_attention_heads"]
    channels = values.get("kv_channels") or hidden // heads
    groups = values.get("num_query_groups") or heads
    ffn = values.get("ffn_hidden_size") or 4 * hidden
    experts = values.get("num_moe_experts") or 0
    gated = bool(values.get("gated_linear_unit"))
    mlp_width = (values.get("moe_ffn_hidden_size") or ffn) if experts else ffn
    per_norm = 2 if values.get("normalization", "LayerNorm") == "LayerNorm" else 1
    norm_bias = 2 * per_norm * hidden
    if values.get("qk_layernorm"):
        norm_bias += 2 * channels
    if values.get("add_qkv_bias") or values.get("add_bias_linear"):
        norm_bias += channels * (heads + 2 * groups)
    if values.get("add_bias_linear"):
        norm_bias += 2 * hidden + mlp_width * (2 if gated else 1)
    return ModelShape(
        layers=values["num_layers"],
        hidden=hidden,
        heads=heads,
        groups=groups,
        channels=channels,
        ffn=mlp_width,
        gated=gated,
        vocabulary=values.get("vocab_size") or 0,
        tied=bool(values.get("share_embeddings_and_output_weights", True)),
        experts=experts,
        topk=values.get("moe_router_topk", 1) if experts else 1,
        shared_ffn=values.get("moe_shared_expert_intermediate_size") or 0,
        num_norm_bias_params=norm_bias,
        last_norm=per_norm * hidden,
    )


def _config_fields(config: run.Config) -> dict[str, Any]:
    """Return the fields of a config: the defaults of its class, overridden by the recipe's values."""
    kind: Any = config.__fn_or_cls__
    fields = {f.name: f.default for f in dataclasses.fields(kind) if f.default is not dataclasses.MISSING}
    return fields | {str(name): value for name, value in config.__arguments__.items()}
