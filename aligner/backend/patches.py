"""Patches of Megatron-Core 0.15 and NeMo 2.7 for machines without CUDA or Transformer Engine.

Only this file changes upstream code. On a machine with both, `apply()` fixes three problems: checkpoints that run code
(`loading`), the leftover process of Megatron's checkpoint writer, and notebooks. Each entry of `PATCHES` is one patch
with the upstream line that needs it; `tests/backend/test_patches.py` checks that upstream still needs the patch.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import time
import types
import warnings
from collections.abc import Callable, Iterator
from multiprocessing.managers import SyncManager
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode

from aligner.backend import checkpoint_writer, loading
from aligner.backend.device import no_cuda, no_transformer_engine
from aligner.common import process_pool

CPU = torch.device("cpu")


class Patch(NamedTuple):
    """One change of upstream code."""

    why: str
    """Upstream file, line or symbol that fails without the patch."""
    needed: Callable[[], bool]
    apply: Callable[[], None]


# ---- without CUDA --------------------------------------------------------------------------------------------


def _is_cuda(device: Any) -> bool:
    return (isinstance(device, str) and device.startswith("cuda")) or (
        isinstance(device, torch.device) and device.type == "cuda"
    )


class CudaAsCpu(TorchFunctionMode):
    """Torch function mode that creates CPU tensors for CUDA requests, in the thread that entered the mode."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is torch.Tensor.cuda or func is torch.Tensor.pin_memory:
            return args[0]
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], CPU, *args[2:])
        elif func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # megatron/core/optimizer/clip_grads.py asserts the string 'torch.cuda.FloatTensor'
            return func(*args).replace("torch.", "torch.cuda.")
        if "device" in kwargs or "pin_memory" in kwargs:
            kwargs = {name: value for name, value in kwargs.items() if name != "pin_memory"}
            if _is_cuda(kwargs.get("device")):
                kwargs["device"] = CPU
        return func(*args, **kwargs)


def without_cuda_as_cpu() -> contextlib.AbstractContextManager[Any]:
    """Bypass `CudaAsCpu`, for time-critical code that requests no CUDA tensors."""
    return torch._C.DisableTorchFunction() if no_cuda() else contextlib.nullcontext()


class _Event:
    """CUDA event on the wall clock; Megatron's inference engine measures time with two events."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.time = 0.0

    def record(self, *_: Any) -> None:
        self.time = time.perf_counter()

    def elapsed_time(self, other: _Event) -> float:
        return (other.time - self.time) * 1e3

    def synchronize(self) -> None: ...

    def wait(self, *_: Any) -> None: ...

    def query(self) -> bool:
        return True


class _Stream(_Event):
    """Stub of a CUDA stream; Megatron's expert dispatcher copies on a second stream."""

    def wait_stream(self, *_: Any) -> None: ...

    def record_event(self) -> _Event:
        return _Event()


def _cuda_functions() -> None:
    cuda: Any = torch.cuda
    cuda.current_device = lambda: CPU
    cuda.synchronize = cuda.empty_cache = lambda *_: None
    cuda.stream = lambda _: contextlib.nullcontext()
    cuda.Event, stream = _Event, _Stream()
    cuda.Stream = cuda.current_stream = lambda *_, **__: stream
    cuda.get_rng_state = lambda *_, **__: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    cuda.manual_seed = torch.manual_seed
    CudaAsCpu().__enter__()


def _rng_tracker() -> None:
    import megatron.core.tensor_parallel.random as random

    module: Any = random
    module._get_cuda_rng_state = lambda *_, **__: torch.get_rng_state()
    module._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    warnings.filterwarnings("ignore", message="CPU RNG state changed within GPU RNG context")


@contextlib.contextmanager
def one_device() -> Iterator[None]:
    """Make torch report one CUDA device, for code that otherwise skips seeding the tracker."""
    cuda: Any = torch.cuda
    device_count, cuda.device_count = cuda.device_count, lambda: 1
    try:
        yield
    finally:
        cuda.device_count = device_count


def _seeding() -> None:
    import nemo.lightning.megatron_init as init

    module: Any = init
    upstream = module._set_random_seed

    @functools.wraps(upstream)
    def seed(*args: Any, **kwargs: Any) -> Any:
        with one_device():
            return upstream(*args, **kwargs)

    module._set_random_seed = seed


def _loading() -> None:
    import nemo.lightning.io.pl as io_pl

    module: Any = io_pl
    module._fix_tensors_device = lambda checkpoint: checkpoint


# ---- without Transformer Engine --------------------------------------------------------------------------------

FUSIONS = (
    "apply_rope_fusion",  # raises without TE
    "bias_activation_fusion",  # JIT-compiles: half a minute on a CPU
    "bias_dropout_fusion",
    "cross_entropy_loss_fusion",
    "gradient_accumulation_fusion",  # an Apex kernel
    "masked_softmax_fusion",  # an Apex kernel
    "moe_grouped_gemm",  # a CUDA extension
    "moe_permute_fusion",  # raises without TE
    "persist_layer_norm",  # an Apex kernel
)


def _fusions() -> None:
    from megatron.core.transformer.transformer_config import TransformerConfig

    upstream: Any = TransformerConfig.__post_init__

    @functools.wraps(upstream)
    def post_init(self: Any) -> None:
        for name in FUSIONS:
            if hasattr(self, name):
                setattr(self, name, False)
        self.use_cpu_initialization = self.use_cpu_initialization or no_cuda()
        upstream(self)

    setattr(TransformerConfig, "__post_init__", post_init)  # noqa: B010 - pyright refuses the plain form


# Transformer Engine fuses a layer norm into the following linear layer; the local layers do not.
LOCAL_NAMES = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.linear_qkv.layer_norm_bias": "input_layernorm.bias",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
    "mlp.linear_fc1.layer_norm_bias": "pre_mlp_layernorm.bias",
    # Grouped experts (one matrix) need a CUDA extension.
    "mlp.experts.linear_fc1.weight*": "mlp.experts.local_experts.*.linear_fc1.weight",
    "mlp.experts.linear_fc2.weight*": "mlp.experts.local_experts.*.linear_fc2.weight",
}


OUTPUT_LAYER = "output_layer.weight"
"""What a model with tied embeddings has none of."""


def _local_name(name: Any) -> Any:
    if isinstance(name, tuple | list):
        return type(name)(map(_local_name, name))
    for fused, local in LOCAL_NAMES.items():
        if isinstance(name, str) and name.startswith(("decoder.", "**.")) and name.endswith(fused):
            return name.removesuffix(fused) + local
    return name


def _connectors() -> None:
    import nemo.lightning.io as io

    module: Any = io
    upstream = module.apply_transforms

    @functools.wraps(upstream)
    def apply_transforms(source: Any, target: Any, mapping: dict[str, str], *args: Any, **kwargs: Any) -> Any:
        local_mapping = {_local_name(theirs): _local_name(ours) for theirs, ours in mapping.items()}
        for transform in kwargs.get("transforms") or (args[0] if args else ()):
            transform.source_key, transform.target_key = map(_local_name, (transform.source_key, transform.target_key))
        for model in (source, target):
            # Local norms are always float32; upstream asserts that no dtype changes.
            if dtype := getattr(model.config, "params_dtype", None):
                model.to(dtype)
        return upstream(source, target, local_mapping, *args, **kwargs)

    module.apply_transforms = apply_transforms


def _tied_embeddings() -> None:
    import nemo.lightning.io as io

    module: Any = io
    upstream = module.apply_transforms

    @functools.wraps(upstream)
    def apply_transforms(source: Any, target: Any, mapping: dict[str, str], *args: Any, **kwargs: Any) -> Any:
        shared = any(getattr(model.config, "share_embeddings_and_output_weights", False) for model in (source, target))
        if not shared:
            return upstream(source, target, mapping, *args, **kwargs)
        mapping = {theirs: ours for theirs, ours in mapping.items() if OUTPUT_LAYER not in (theirs, ours)}
        transforms = kwargs.pop("transforms", None) or (args[0] if args else [])
        own = [t for t in transforms if OUTPUT_LAYER not in (t.source_key, t.target_key)]
        return upstream(source, target, mapping, own, *args[1:], **kwargs)

    module.apply_transforms = apply_transforms


def _norms() -> None:
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    from aligner.backend.norms import zero_centered_norm

    norm: Any = WrappedTorchNorm
    upstream = norm.__new__

    def new(cls: Any, config: Any, hidden_size: int, eps: float = 1e-5, **kwargs: Any) -> Any:
        if config.layernorm_zero_centered_gamma:
            return zero_centered_norm(config, hidden_size, eps)
        return upstream(cls, config, hidden_size, eps, **kwargs)

    norm.__new__ = new


def _adapters() -> None:
    import nemo.collections.llm.peft.lora as lora
    import nemo.collections.llm.peft.utils as utils

    module: Any = lora
    module.te = types.SimpleNamespace(
        Linear=type("NoLinear", (), {}), LayerNormLinear=type("NoLayerNormLinear", (), {})
    )
    setattr(utils, "HAVE_TE", False)  # noqa: B010


def _router() -> None:
    import megatron.core.transformer.moe.moe_utils as moe_utils

    module: Any = moe_utils
    module.te_general_gemm = None


def _dispatcher() -> None:
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher

    def move(tensor: Any, as_numpy: bool = False, **_: Any) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    module: Any = token_dispatcher
    module.maybe_move_tensor_to_cpu = move


def _writer() -> None:
    import megatron.core.dist_checkpointing.strategies.filesystem_async as filesystem_async

    module: Any = filesystem_async

    def results_queue() -> Any:
        if module._results_queue is None:
            manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
            manager.start(process_pool.end_with_parent)
            module._results_queue = checkpoint_writer.PickledQueue(manager.Queue())
        return module._results_queue

    module._get_write_results_queue = results_queue
    real = module.mp
    module.mp = types.SimpleNamespace(
        get_context=lambda kind: checkpoint_writer.WatchedContext() if kind == "fork" else real.get_context(kind)
    )


def _notebook() -> None:
    import lightning.pytorch.trainer.connectors.accelerator_connector as connector

    # With several ranks, only launched ones get here: `aligner.train.config_checks.check_world_size` refuses others.
    setattr(connector, "_IS_INTERACTIVE", False)  # noqa: B010


def _restricted_reading() -> None:
    for owner, name, safe in loading.replacements():
        setattr(owner, name, safe)


PATCHES = (
    Patch(
        "torch, Megatron and NeMo run what a checkpoint's .metadata, objects and io.json name",
        lambda: True,
        _restricted_reading,
    ),
    Patch("lightning/.../accelerator_connector.py:579 refuses notebooks, for one rank, too", lambda: True, _notebook),
    Patch(
        "megatron/core/dist_checkpointing: a killed rank leaves a process of 200 MB behind, a killed writer hangs it",
        lambda: True,
        _writer,
    ),
    Patch("nemo/collections/llm/gpt/model/qwen2.py maps an output layer, tied or not", lambda: True, _tied_embeddings),
    Patch("torch.cuda.* and device='cuda', written out in a dozen places of both", no_cuda, _cuda_functions),
    Patch("megatron/core/tensor_parallel/random.py: _get/_set_cuda_rng_state", no_cuda, _rng_tracker),
    Patch("nemo/lightning/megatron_init.py: _set_random_seed skips machines without GPUs", no_cuda, _seeding),
    Patch("nemo/lightning/io/pl.py: _fix_tensors_device asserts that CUDA is initialized", no_cuda, _loading),
    Patch("megatron/core/transformer/moe/token_dispatcher.py: splits stay tensors unless CUDA's", no_cuda, _dispatcher),
    Patch("TransformerConfig.__post_init__ refuses fusions without TE", no_transformer_engine, _fusions),
    Patch("NeMo's Hugging Face connectors name TE's fused norms only", no_transformer_engine, _connectors),
    Patch("megatron/core/transformer/torch_norm.py refuses zero-centered weights", no_transformer_engine, _norms),
    Patch("megatron/core/transformer/moe/moe_utils.py: te_general_gemm is not defined", no_transformer_engine, _router),
    Patch("nemo/collections/llm/peft: HAVE_TE is true without TE, te.Linear", no_transformer_engine, _adapters),
)

_applied = False


def forget_process_groups() -> None:
    """Drop the groups that Megatron's destroy_model_parallel forgets; each keeps threads and a store alive."""
    from megatron.core import parallel_state
    from megatron.core.models.common.embeddings import rotary_pos_embedding

    for name, value in list(vars(parallel_state).items()):
        if type(value) is torch.distributed.ProcessGroup:
            setattr(parallel_state, name, None)
    # Its caches hold modules, and these their groups.
    for kind in (kind for kind in vars(rotary_pos_embedding).values() if isinstance(kind, type)):
        for method in vars(kind).values():
            if hasattr(method, "cache_clear"):
                method.cache_clear()


def apply() -> None:
    """Apply the patches that this machine needs, once per process."""
    global _applied
    if _applied:
        return
    _applied = True
    for patch in PATCHES:
        if patch.needed():
            patch.apply()
