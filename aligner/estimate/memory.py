"""Memory and time of a run by arithmetic, before a job is queued.

Memory is that of the fullest GPU, part by part; time follows from the FLOPs of a token and the share of the peak that
a GPU is taken to reach. Everything is a formula that a docstring names with its source; docs/performance.md compares
them with published figures and with what was measured.

Sources: Rajbhandari et al. 2020 (ZeRO, arXiv 1910.02054) for weights, gradients and optimizer; Korthikanti et al. 2022
(arXiv 2205.05198) for activations, section 4, with grouped queries, gated MLPs and attention that stores no scores;
Narayanan et al. 2021 (arXiv 2104.04473) for FLOPs and the pipeline's bubble.
"""

from __future__ import annotations

import dataclasses
import math

from aligner.estimate.parameters import ModelShape
from aligner.model.head import CHUNK_SIZE


@dataclasses.dataclass(frozen=True)
class GPU:
    """A card: memory in bytes, peak in dense bfloat16 FLOP/s as its data sheet has it."""

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
    """What of a run its size depends on."""

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
    """bfloat16 with float32 master weights and gradients; else float32 alone, unfused, as on a CPU."""
    distributed_optimizer: bool = True
    recompute_all: bool = False
    """Whether the backward pass makes each layer's activations again."""
    adapter_rank: int | None = None
    """Of LoRA or DoRA; None trains all weights."""
    reference: str = "cached"
    """cached, frozen, moving, base_model or none."""
    micro_tokens: int = 4096
    """Positions of a micro-batch."""
    longest: int = 4096
    """Tokens of the longest sequence."""
    sequences: int = 512
    """Responses of an optimizer step: two a pair."""
    sequences_per_micro: float = 2
    kv_sequences: int = 0
    """Answers that a rank writes at the same time, in runs that answer."""
    kv_tensor: int = 1

    @property
    def data(self) -> int:
        """Data-parallel ranks."""
        return self.ranks // (self.tensor * self.pipeline * self.context)

    @property
    def micro_batches(self) -> int:
        """Of a step on a rank."""
        return max(1, math.ceil(self.sequences / self.data / self.sequences_per_micro))

    def __str__(self) -> str:
        named = {
            "tensor": self.tensor, "pipeline": self.pipeline, "virtual": self.virtual, "context": self.context,
            "expert": self.expert, "data": self.data,
        }  # fmt: skip
        nodes = -(-self.ranks // self.gpus_per_node)
        at = f"{nodes} node{'s' * (nodes > 1)} of {min(self.ranks, self.gpus_per_node)}"
        parts = [f"{name} {size}" for name, size in named.items() if size > 1 or name == "data"]
        return f"{at}: {', '.join(parts)}{', recomputed activations' * self.recompute_all}"


# ---- memory -------------------------------------------------------------------------------------------------------


def stage_memory(model: ModelShape, plan: Plan) -> dict[str, float]:
    """Bytes by part on the fullest GPU, which is one of the first pipeline stage or of the last."""
    ends = [_stage(model, plan, first=True, last=plan.pipeline == 1)]
    if plan.pipeline > 1:
        ends.append(_stage(model, plan, first=False, last=True))
    return max(ends, key=lambda parts: sum(parts.values()))


def _stage(model: ModelShape, plan: Plan, *, first: bool, last: bool) -> dict[str, float]:
    layers = math.ceil(model.layers / plan.pipeline)
    tables = (first + last if not model.tied else 1) * model.embedding / plan.tensor
    num_dense_params = layers * model.num_dense_params / plan.tensor + tables
    routed = layers * model.routed / (plan.expert * plan.expert_tensor)
    if plan.adapter_rank is None:
        learned, learned_routed = num_dense_params, routed
    else:
        learned, learned_routed = layers * _adapter(model, plan.adapter_rank) / plan.tensor, 0.0
    per_weight = 2 if plan.mixed_precision else 4
    copied = {"frozen": per_weight, "synced": 4}.get(plan.reference, 0)
    parts = {
        "weights": per_weight * (num_dense_params + routed) + (4 * learned if plan.adapter_rank is not None else 0),
        "gradients": 4 * (learned + learned_routed),
        "optimizer": _optimizer(plan, learned, learned_routed),
        "activations": _activations(model, plan, layers, first=first),
        "logits": _logits(model, plan) if last else 0.0,
        "reference": copied * (learned + learned_routed),
    }
    return _with_overhead(plan, parts)


def generation_memory(model: ModelShape, plan: Plan) -> dict[str, float]:
    """Bytes by part while the policy answers: its weights, and keys and values of all answers that are being written.

    The cache takes 2 · layers · width of the keys for each token.
    """
    per_weight = 2 if plan.mixed_precision else 4
    cache = plan.kv_sequences * plan.longest * 2 * model.layers * model.keys * per_weight
    parts = {"weights": per_weight * model.parameters / plan.kv_tensor, "KV cache": cache / plan.kv_tensor}
    return _with_overhead(plan, parts)


def _with_overhead(plan: Plan, parts: dict[str, float]) -> dict[str, float]:
    if plan.mixed_precision:
        # CUDA's context, NCCL's buffers and workspaces, and what allocation leaves unused: a guess.
        parts["CUDA, NCCL, gaps"] = 2.5e9 + 0.05 * sum(parts.values())
    return parts


def _adapter(model: ModelShape, rank: int) -> float:
    """Parameters of adapters on the linear layers of a layer; those of experts have none."""
    inner = model.ffn * (2 if model.gated else 1)
    mlp = 0 if model.experts else (model.hidden + inner) + (model.ffn + model.hidden)
    return rank * ((2 * model.hidden + 2 * model.queries + 2 * model.keys) + mlp)


def _optimizer(plan: Plan, learned: float, routed: float) -> float:
    """Adam: two moments and, in half precision, master weights, 4 bytes each; divided over data-parallel ranks."""
    each = 12 if plan.mixed_precision else 8
    if not plan.distributed_optimizer:
        return each * (learned + routed)
    of_experts = max(1, plan.ranks // (plan.expert * plan.expert_tensor * plan.pipeline))
    return each * (learned / (plan.data * plan.context) + routed / of_experts)


def layer_activations(model: ModelShape, plan: Plan) -> float:
    """Bytes that a layer keeps for its backward pass.

    Of each position: inputs of both norms and of what follows them (4 h, divided by sequence parallelism alone), and,
    divided by tensor parallelism, queries, keys, values, the attention's output and what is between the two matrices of
    the MLP (3 f if it is gated, else 2 f). Of a plain transformer that is the 34 s b h of Korthikanti et al. without
    masks of dropout, which none of our recipes has. Unfused, as on a CPU, norms keep 2 h and activations 2 f more.
    """
    positions = plan.micro_tokens / plan.context
    bytes_each = 2 if plan.mixed_precision else 4
    unfused = 0 if plan.mixed_precision else 2
    whole, divided = (4 + unfused) * model.hidden, 2 * model.queries + 2 * model.keys
    inside = (3 if model.gated else 2) + unfused
    if model.experts:
        # A token is copied to each expert that it visits, and what they say is kept to be weighed.
        visited = model.topk * (2 * model.hidden + inside * model.ffn)
        divided += inside * model.shared_ffn
        experts = visited / plan.tensor
    else:
        divided, experts = divided + inside * model.ffn, 0.0
    spread = plan.tensor if plan.sequence_parallel else 1
    return bytes_each * positions * (whole / spread + divided / plan.tensor + experts)


def _activations(model: ModelShape, plan: Plan, layers: int, *, first: bool) -> float:
    """The first stage keeps those of as many micro-batches as there are stages; interleaved ones some more."""
    each = layer_activations(model, plan)
    held = min(plan.pipeline, plan.micro_batches) if first else 1
    if plan.virtual > 1 and plan.pipeline > 1:
        held *= 1 + (plan.pipeline - 1) / (plan.pipeline * plan.virtual)
    if not plan.recompute_all:
        return each * layers * held
    spread = plan.tensor if plan.sequence_parallel else 1
    inputs = (2 if plan.mixed_precision else 4) * plan.micro_tokens / plan.context * model.hidden / spread
    return inputs * layers * held + each


def _logits(model: ModelShape, plan: Plan) -> float:
    """Pieces of `aligner.model.head`: in float32 and in the weights' precision; of the layer's gradient a sum and a part."""
    rows = min(CHUNK_SIZE, plan.micro_tokens / plan.context)
    each = 4 + (2 if plan.mixed_precision else 4)
    learned = each * model.embedding / plan.tensor if plan.adapter_rank is None else 0.0
    return rows * each * model.vocabulary / plan.tensor + learned


# ---- what would fit -----------------------------------------------------------------------------------------------


def proposal(model: ModelShape, plan: Plan, gpu: GPU) -> Plan | None:
    """The layout with the least model parallelism that fits `gpu`; on the ranks there are if one does, else on more."""
    for ranks in (plan.ranks * 2**n for n in range(8)):
        fitting = [other for other in _layouts(model, plan, ranks) if total(model, other) <= gpu.memory]
        if fitting:
            return min(fitting, key=lambda p: (p.recompute_all, p.pipeline, p.tensor, p.expert))
    return None


def total(model: ModelShape, plan: Plan) -> float:
    """Bytes on the fullest GPU."""
    return sum(stage_memory(model, plan).values())


def _layouts(model: ModelShape, plan: Plan, ranks: int) -> list[Plan]:
    found = []
    for tensor in (1, 2, 4, 8):
        for pipeline in (n for n in range(1, model.layers + 1) if model.layers % n == 0):
            for expert in (n for n in (1, 2, 4, 8, 16, 32, 64) if n == 1 or (model.experts and model.experts % n == 0)):
                within = tensor * pipeline * plan.context
                divides = not (model.heads % tensor or model.groups % tensor or model.ffn % tensor)
                if not divides or tensor > plan.gpus_per_node or ranks % within or ranks % (expert * pipeline):
                    continue
                if plan.sequences % (ranks // within * plan.sequences_per_micro):
                    continue
                for recompute in (False, True):
                    found.append(
                        dataclasses.replace(
                            plan, ranks=ranks, tensor=tensor, pipeline=pipeline, virtual=1, expert=expert,
                            expert_tensor=1, sequence_parallel=tensor > 1, recompute_all=recompute,
                        )
                    )  # fmt: skip
    return found
