"""Memory estimate by arithmetic, before a job is queued.

The estimate is the memory of the fullest GPU, by part. Each formula is in a docstring with its source;
docs/performance.md compares the estimates with published and measured figures.

Sources: Rajbhandari et al. 2020 (ZeRO, arXiv 1910.02054) for weights, gradients and optimizer; Korthikanti et al. 2022
(arXiv 2205.05198), section 4, for activations, with grouped-query attention, gated MLPs and attention that stores no
scores.
"""

from __future__ import annotations

import dataclasses
import math

from aligner.estimate.parameters import ModelShape
from aligner.model.head import CHUNK_SIZE


@dataclasses.dataclass(frozen=True)
class GPU:
    """GPU model: memory in bytes, and peak FLOP/s in dense bfloat16 from its data sheet."""

    name: str
    memory: float
    peak: float


GPUS = {
    gpu.name: gpu
    for gpu in (
        GPU("a100_40", 40e9, 312e12),
        GPU("a100", 80e9, 312e12),
        GPU("h100", 80e9, 989.4e12),
        GPU("h200", 141e9, 989.4e12),
        GPU("b200", 180e9, 2250e12),
    )
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """Properties of a run that determine its memory and time."""

    ranks: int
    gpus_per_node: int
    tensor: int = 1
    pipeline: int = 1
    virtual: int = 1
    context: int = 1
    expert: int = 1
    expert_tensor: int = 1
    sequence_parallel: bool = False
    mixed_precision: bool = True
    """bfloat16 with float32 master weights and gradients; False: float32 only, without fused kernels, as on a CPU."""
    distributed_optimizer: bool = True
    recompute_all: bool = False
    """Whether the backward pass recomputes the activations of each layer."""
    adapter_rank: int | None = None
    """Rank of LoRA or DoRA; None: all weights are trained."""
    reference: str = "cached"
    """cached, frozen, synced, base_model or none."""
    micro_tokens: int = 4096
    """Positions of a micro-batch."""
    longest: int = 4096
    """Tokens of the longest sequence."""
    sequences: int = 512
    """Responses per optimizer step: two per pair."""
    sequences_per_micro: float = 2
    kv_sequences: int = 0
    """Responses that a rank generates concurrently, in recipes with generation."""
    kv_tensor: int = 1

    @property
    def data(self) -> int:
        """Data-parallel ranks."""
        return self.ranks // (self.tensor * self.pipeline * self.context)

    @property
    def micro_batches(self) -> int:
        """Micro-batches per rank and step."""
        return max(1, math.ceil(self.sequences / self.data / self.sequences_per_micro))

    def __str__(self) -> str:
        sizes = {
            "tensor": self.tensor, "pipeline": self.pipeline, "virtual": self.virtual, "context": self.context,
            "expert": self.expert, "data": self.data,
        }  # fmt: skip
        nodes = -(-self.ranks // self.gpus_per_node)
        nodes_text = f"{nodes} node{'s' * (nodes > 1)} of {min(self.ranks, self.gpus_per_node)}"
        parts = [f"{name} {size}" for name, size in sizes.items() if size > 1 or name == "data"]
        return f"{nodes_text}: {', '.join(parts)}{', recomputed activations' * self.recompute_all}"


# ---- memory -------------------------------------------------------------------------------------------------------


def stage_memory(model: ModelShape, plan: Plan) -> dict[str, float]:
    """Return bytes by part on the fullest GPU, which is in the first or the last pipeline stage."""
    stages = [_stage(model, plan, first=True, last=plan.pipeline == 1)]
    if plan.pipeline > 1:
        stages.append(_stage(model, plan, first=False, last=True))
    return max(stages, key=lambda parts: sum(parts.values()))


def _stage(model: ModelShape, plan: Plan, *, first: bool, last: bool) -> dict[str, float]:
    layers = math.ceil(model.layers / plan.pipeline)
    tables = (first + last if not model.tied else 1) * model.embedding / plan.tensor
    num_dense_params = layers * model.num_dense_params / plan.tensor + tables
    routed = layers * model.routed / (plan.expert * plan.expert_tensor)
    if plan.adapter_rank is None:
        learned, learned_routed = num_dense_params, routed
    else:
        learned, learned_routed = layers * _adapter_parameters(model, plan.adapter_rank) / plan.tensor, 0.0
    per_weight = 2 if plan.mixed_precision else 4
    copy_bytes = {"frozen": per_weight, "synced": 4}.get(plan.reference, 0)
    parts = {
        "weights": per_weight * (num_dense_params + routed) + (4 * learned if plan.adapter_rank is not None else 0),
        "gradients": 4 * (learned + learned_routed),
        "optimizer": _optimizer_memory(plan, learned, learned_routed),
        "activations": _stage_activations(model, plan, layers, first=first),
        "logits": _logits_memory(model, plan) if last else 0.0,
        "reference": copy_bytes * (learned + learned_routed),
    }
    return _with_overhead(plan, parts)


def generation_memory(model: ModelShape, plan: Plan) -> dict[str, float]:
    """Return bytes by part during generation: weights, and the KV cache of all concurrent responses.

    The cache takes 2 · layers · key width elements per token.
    """
    per_weight = 2 if plan.mixed_precision else 4
    cache = plan.kv_sequences * plan.longest * 2 * model.layers * model.keys * per_weight
    parts = {"weights": per_weight * model.parameters / plan.kv_tensor, "KV cache": cache / plan.kv_tensor}
    return _with_overhead(plan, parts)


def _with_overhead(plan: Plan, parts: dict[str, float]) -> dict[str, float]:
    if plan.mixed_precision:
        # A guess for the CUDA context, NCCL buffers, workspaces and allocator fragmentation.
        parts["CUDA, NCCL, gaps"] = 2.5e9 + 0.05 * sum(parts.values())
    return parts


def _adapter_parameters(model: ModelShape, rank: int) -> float:
    """Return adapter parameters of a layer's linear layers; experts have no adapters."""
    inner = model.ffn * (2 if model.gated else 1)
    mlp = 0 if model.experts else (model.hidden + inner) + (model.ffn + model.hidden)
    return rank * ((2 * model.hidden + 2 * model.queries + 2 * model.keys) + mlp)


def _optimizer_memory(plan: Plan, learned: float, routed: float) -> float:
    """Return bytes of Adam, sharded over data ranks: two moments and (mixed precision) master weights, 4 bytes each."""
    per_weight = 12 if plan.mixed_precision else 8
    if not plan.distributed_optimizer:
        return per_weight * (learned + routed)
    expert_data = max(1, plan.ranks // (plan.expert * plan.expert_tensor * plan.pipeline))
    return per_weight * (learned / (plan.data * plan.context) + routed / expert_data)


def layer_activations(model: ModelShape, plan: Plan) -> float:
    """Return the bytes that a layer stores for its backward pass.

    Elements per position: 4 h for the inputs of both norms and of the layers after them, divided by sequence
    parallelism only. Divided by tensor parallelism: queries, keys, values, attention output, and the tensors between
    the two matrices of the MLP (3 f if gated, else 2 f). For a plain transformer, this is the 34 s b h of Korthikanti
    et al. without dropout masks; no recipe here uses dropout. Without fused kernels, as on a CPU, norms store 2 h and
    activation functions 2 f more.
    """
    positions = plan.micro_tokens / plan.context
    bytes_each = 2 if plan.mixed_precision else 4
    unfused = 0 if plan.mixed_precision else 2
    undivided, divided = (4 + unfused) * model.hidden, 2 * model.queries + 2 * model.keys
    inside = (3 if model.gated else 2) + unfused
    if model.experts:
        # Each of a token's experts gets a copy of the token; its output is stored for the weighted sum.
        visited = model.topk * (2 * model.hidden + inside * model.ffn)
        divided += inside * model.shared_ffn
        experts = visited / plan.tensor
    else:
        divided, experts = divided + inside * model.ffn, 0.0
    sequence_shards = plan.tensor if plan.sequence_parallel else 1
    return bytes_each * positions * (undivided / sequence_shards + divided / plan.tensor + experts)


def _stage_activations(model: ModelShape, plan: Plan, layers: int, *, first: bool) -> float:
    """Return bytes of a stage: the first stores one micro-batch per pipeline stage, more if interleaved; others one."""
    per_layer = layer_activations(model, plan)
    in_flight = min(plan.pipeline, plan.micro_batches) if first else 1
    if plan.virtual > 1 and plan.pipeline > 1:
        in_flight *= 1 + (plan.pipeline - 1) / (plan.pipeline * plan.virtual)
    if not plan.recompute_all:
        return per_layer * layers * in_flight
    sequence_shards = plan.tensor if plan.sequence_parallel else 1
    inputs = (2 if plan.mixed_precision else 4) * plan.micro_tokens / plan.context * model.hidden / sequence_shards
    return inputs * layers * in_flight + per_layer


def _logits_memory(model: ModelShape, plan: Plan) -> float:
    """Return bytes of `aligner.model.head`'s chunks: logits, and the output layer's gradient (its sum and one chunk's).

    Both are in float32 and in the precision of the weights.
    """
    rows = min(CHUNK_SIZE, plan.micro_tokens / plan.context)
    per_element = 4 + (2 if plan.mixed_precision else 4)
    learned = per_element * model.embedding / plan.tensor if plan.adapter_rank is None else 0.0
    return rows * per_element * model.vocabulary / plan.tensor + learned


# ---- parallel sizes that fit --------------------------------------------------------------------------------------


def proposal(model: ModelShape, plan: Plan, gpu: GPU) -> Plan | None:
    """Return the plan of least model parallelism that fits `gpu`, on the plan's ranks if possible, else on more."""
    for ranks in (plan.ranks * 2**n for n in range(8)):
        fitting = [other for other in _candidates(model, plan, ranks) if total(model, other) <= gpu.memory]
        if fitting:
            return min(fitting, key=lambda p: (p.recompute_all, p.pipeline, p.tensor, p.expert))
    return None


def total(model: ModelShape, plan: Plan) -> float:
    """Return bytes on the fullest GPU."""
    return sum(stage_memory(model, plan).values())


def _candidates(model: ModelShape, plan: Plan, ranks: int) -> list[Plan]:
    plans = []
    for tensor in (1, 2, 4, 8):
        for pipeline in (n for n in range(1, model.layers + 1) if model.layers % n == 0):
            for expert in (n for n in (1, 2, 4, 8, 16, 32, 64) if n == 1 or (model.experts and model.experts % n == 0)):
                model_parallel = tensor * pipeline * plan.context
                divides = not (model.heads % tensor or model.groups % tensor or model.ffn % tensor)
                if not divides or tensor > plan.gpus_per_node or ranks % model_parallel or ranks % (expert * pipeline):
                    continue
                if plan.sequences % (ranks // model_parallel * plan.sequences_per_micro):
                    continue
                for recompute in (False, True):
                    plans.append(
                        dataclasses.replace(
                            plan, ranks=ranks, tensor=tensor, pipeline=pipeline, virtual=1, expert=expert,
                            expert_tensor=1, sequence_parallel=tensor > 1, recompute_all=recompute,
                        )
                    )  # fmt: skip
    return plans
