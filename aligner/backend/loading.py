"""What torch, Megatron and NeMo read checkpoints with, restricted to what checkpoints have.

A pickle names functions to call and so can run anything. `.metadata` is read by an unpickler that knows the classes of
torch's distributed checkpoints alone, `common.pt` and every object among the weights by torch's own restricted one.
`io.json`, which NeMo builds model, tokenizer and trainer from, is looked through before NeMo opens it. `patches` puts
these functions in the place of upstream's, so that they hold wherever a checkpoint is opened.
"""

from __future__ import annotations

import contextlib
import io
import json
import pickle
import re
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch.distributed.checkpoint.api import CheckpointException

from aligner.common import trust
from aligner.common.errors import CheckpointError, UntrustedError

CHECKPOINT = "checkpoint of NeMo"
DCP, MEGATRON = "torch.distributed.checkpoint", "megatron.core.dist_checkpointing"
METADATA = {
    *(
        f"{DCP}.metadata.{name}"
        for name in (
            "Metadata", "TensorStorageMetadata", "TensorProperties", "ChunkStorageMetadata", "BytesStorageMetadata",
            "MetadataIndex", "StorageMeta", "_MEM_FORMAT_ENCODING",
        )
    ),
    *(f"{DCP}.planner.{name}" for name in ("SavePlan", "WriteItem", "WriteItemType", "TensorWriteData")),
    f"{DCP}.filesystem._StorageInfo", f"{DCP}.filesystem._StoragePrefix",
    f"{MEGATRON}.strategies.torch.MCoreMetadata", f"{MEGATRON}.strategies.torch.MCoreSavePlan",
    f"{MEGATRON}.dict_utils.MCoreMetadata",
    "torch.Size", "torch.device", "torch.serialization._get_layout", "collections.OrderedDict", "pathlib.PosixPath",
}  # fmt: skip
"""What the `.metadata` of a distributed checkpoint names, beside data types."""
EXTRA_STATE = {
    "_io.BytesIO", "collections.OrderedDict", "torch.Size", "torch.device", "torch._utils._rebuild_tensor_v2",
    "torch.storage._load_from_bytes",
}  # fmt: skip
"""What Transformer Engine pickles as a tensor of bytes, beside its recipes; itself it unpickles anything."""
RECIPES = "transformer_engine.common.recipe."

T = TypeVar("T")


class _Unpickler(pickle.Unpickler):
    """Unpickler of a set of names and of data types."""

    allowed: set[str] = METADATA
    where = ""

    def find_class(self, module: str, name: str) -> Any:
        full = f"{module}.{name}"
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        if full not in self.allowed and not trust.is_trusted(full):
            raise trust.refusal(self.where, full, CHECKPOINT)
        return super().find_class(module, name)


class _ExtraStateUnpickler(_Unpickler):
    allowed = EXTRA_STATE

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" == "torch.storage._load_from_bytes":
            return lambda data: weights_only(lambda: torch.load(io.BytesIO(data), weights_only=True), self.where)
        if f"{module}.".startswith(RECIPES) and "." not in name:
            return pickle.Unpickler.find_class(self, module, name)
        return super().find_class(module, name)


# Written in Python, so that one opcode can be another.
_InPython: Any = vars(pickle)["_Unpickler"]


class _ContextUnpickler(_InPython):
    """Unpickler of a part of `io.json` that NeMo pickled, by the rules of `io.json`."""

    where = ""

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" in ("copyreg._reconstructor", "builtins.object"):
            return super().find_class(module, name)
        return trust.lookup(module, name, self.where, CHECKPOINT)

    def load_build(self) -> None:
        if isinstance(self.stack[-2], type | types.FunctionType | types.BuiltinFunctionType | types.ModuleType):
            # It would change a class or function of ours.
            raise trust.refusal(self.where, f"attributes of {self.stack[-2]!r}", CHECKPOINT)
        _InPython.load_build(self)

    dispatch = _InPython.dispatch | {pickle.BUILD[0]: load_build}


def unpickle(file: Any, kind: Any = _Unpickler) -> Any:
    """Unpickle an open file of a checkpoint.

    Raises:
        UntrustedError: it names what no checkpoint has.
    """
    unpickler = kind(file)
    unpickler.where = str(getattr(file, "name", "a checkpoint"))
    return unpickler.load()


def weights_only(load: Callable[[], T], where: str) -> T:
    """Call a function that loads by torch's restricted unpickler, with the names of NEMO_ALIGN_TRUST added.

    Raises:
        UntrustedError: it names what no checkpoint has.
    """
    added: list[Any] = []
    while True:
        try:
            with torch.serialization.safe_globals(added):
                return load()
        except pickle.UnpicklingError as error:
            named = re.search(r"GLOBAL ([\w.]+)", str(error))
            if named is None:
                why = str(error).partition("WeightsUnpickler error: ")[2] or str(error)
                raise CheckpointError(f"{where}: is damaged, or not from NeMo ({why.splitlines()[0][:200]})") from None
            name = named[1] if "." in named[1] else f"builtins.{named[1]}"  # as torch writes those
            if not trust.is_trusted(name) or any(name == known for _, known in added):
                raise trust.refusal(where, name, CHECKPOINT) from None
            module, _, symbol = name.rpartition(".")
            added.append((trust.lookup(module, symbol, where, CHECKPOINT), name))


def check_object(name: str, data: io.BytesIO) -> None:
    """Check an object among the weights, as an extra state of Transformer Engine.

    Raises:
        UntrustedError: it names what no checkpoint has.
    """
    where = f"{name} (among the weights)"
    loaded = weights_only(lambda: torch.load(data, weights_only=True, map_location="cpu"), where)
    data.seek(0)
    if "_extra_state" not in name:
        return
    for tensor in loaded if isinstance(loaded, list | tuple) else [loaded]:
        if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.uint8 and tensor.numel():
            inner: Any = io.BytesIO(tensor.numpy().tobytes())
            inner.name = where
            unpickle(inner, _ExtraStateUnpickler)


@contextlib.contextmanager
def unwrapped() -> Iterator[None]:
    """Raise a refusal by itself, which torch wraps with those of all ranks and their stacks.

    Raises:
        UntrustedError: an object among the weights names what no checkpoint has.
    """
    try:
        yield
    except CheckpointException as error:
        for failure, _ in error.failures.values():
            if isinstance(failure, UntrustedError):
                raise failure from None
        raise


def check_zarr(weights: Path) -> None:
    """Refuse arrays of zarr that hold objects or pass a filter: one of its filters unpickles.

    Raises:
        UntrustedError: there is such an array.
    """
    for file in weights.glob("*/.zarray"):
        described = json.loads(file.read_text())
        if described.get("filters") or "O" in str(described.get("dtype")):
            raise trust.refusal(str(file), f"the filters {described.get('filters')}", CHECKPOINT)


# ---- io.json ------------------------------------------------------------------------------------------------------


def check_context(path: Path, subpath: str | None = None) -> None:
    """Check what NeMo will import and call of `io.json`: all of it, or the part at `subpath`.

    Raises:
        UntrustedError: it names what no checkpoint has.
        CheckpointError: it is damaged.
    """
    file = path / "io.json" if path.is_dir() else path
    if not file.is_file():
        return
    try:
        _check_document(json.loads(file.read_bytes()), file, subpath)
    except UntrustedError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(f"{file}: is damaged ({type(error).__name__}: {error})") from None


def _check_document(document: dict[str, Any], file: Path, subpath: str | None) -> None:
    objects: dict[str, Any] = document.get("objects", {})
    for node in objects.values():
        # NeMo imports the type of every object of the part, used or not.
        if subpath is None or any(f"<root>.{subpath}" in place for place in node.get("paths", (f"<root>.{subpath}",))):
            _import(node["type"], str(file))
    root = document.get("root")
    if subpath is not None:
        root = next((node for node in objects.values() if f"<root>.{subpath}" in node.get("paths", ())), root)
    nodes = list(_reached(root, objects))
    for node in nodes:
        if "module" in node or "name" in node:
            _import(node, str(file))
    if not trust.is_trusted(trust.REMOTE_CODE) and _runs_remote_code(nodes, objects):
        raise trust.refusal(str(file), trust.REMOTE_CODE, CHECKPOINT)


def _import(named: Any, where: str) -> None:
    # Whatever is not there, NeMo will complain about.
    with contextlib.suppress(ImportError, AttributeError):
        trust.lookup(str(named.get("module")), str(named.get("name")), where, CHECKPOINT)


def _reached(root: Any, objects: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield all dictionaries in a node and in the objects that it refers to."""
    waiting, seen = [root], set()
    while waiting:
        node = waiting.pop()
        if isinstance(node, list):
            waiting.extend(node)
        elif isinstance(node, dict):
            yield node
            waiting.extend(node.values())
            key = node.get("key")
            if isinstance(key, str) and key in objects and key not in seen:
                seen.add(key)
                waiting.append(objects[key])


def _runs_remote_code(nodes: list[dict[str, Any]], objects: dict[str, Any]) -> bool:
    """Return whether `trust_remote_code` is anything but False or None; where that is unclear, it is."""

    def followed(node: Any) -> Any:
        while isinstance(node, dict) and isinstance(node.get("key"), str) and node["key"] in objects:
            node = objects[node["key"]]
        return node["value"] if isinstance(node, dict) and "value" in node else node

    def items(node: Any) -> list[Any]:
        node = followed(node)
        return [followed(item[1]) for item in node.get("items", ())] if isinstance(node, dict) else []

    harmless = set()
    for node in nodes:
        # Names of arguments are a tuple in the metadata of a configuration, those of a dictionary are its metadata.
        meta = followed(node.get("metadata"))
        for names in [meta, *items(meta)]:
            pairs = list(zip(items(names), items(node), strict=False))
            values = [value for name, value in pairs if name == trust.REMOTE_CODE]
            if values and all(value is None or value is False for value in values):
                harmless.add(id(names))
            elif values:
                return True
    return any(id(followed(node)) not in harmless for node in nodes if trust.REMOTE_CODE in items(node))


# ---- in the place of upstream's ------------------------------------------------------------------------------------


def replacements() -> list[tuple[Any, str, Any]]:
    """Return what is replaced: an upstream module or class, a name in it, and the value that takes its place."""
    import modelopt.torch.opt.plugins as modelopt
    import nemo.lightning.io as nemo_io
    import nemo.lightning.io.api as api
    import nemo.lightning.io.mixin as mixin
    import torch.distributed.checkpoint.filesystem as filesystem
    from megatron.core.dist_checkpointing.strategies.common import TorchCommonLoadStrategy
    from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
    from torch.distributed.checkpoint import DefaultLoadPlanner

    sharded = TorchDistLoadShardedStrategy.load
    common, objects = TorchCommonLoadStrategy.load_common, TorchCommonLoadStrategy.load_sharded_objects
    quantizers = modelopt.restore_sharded_modelopt_state
    load_bytes, load = DefaultLoadPlanner.load_bytes, mixin.load

    def safe_common(self: Any, checkpoint_dir: Any) -> Any:
        check_zarr(Path(checkpoint_dir))
        return weights_only(lambda: common(self, checkpoint_dir), f"{checkpoint_dir}/common.pt")

    def safe_objects(self: Any, state: Any, checkpoint_dir: Any) -> Any:
        return weights_only(lambda: objects(self, state, checkpoint_dir), str(checkpoint_dir))

    @unwrapped()
    def safe_sharded(self: Any, *args: Any, **kwargs: Any) -> Any:
        return sharded(self, *args, **kwargs)

    def safe_bytes(self: Any, read_item: Any, value: io.BytesIO) -> None:
        check_object(read_item.dest_index.fqn, value)
        load_bytes(self, read_item, value)

    def safe_load(path: Any, output_type: Any = Any, subpath: str | None = None, build: bool = True) -> Any:
        check_context(Path(path), subpath)
        return load(path, output_type=output_type, subpath=subpath, build=build)

    def safe_quantizers(model: Any, checkpoint_name: Any, prefix: str = "") -> None:
        file = Path(checkpoint_name) / "modelopt_state/common.pt"
        if file.is_file():
            weights_only(lambda: torch.load(file, weights_only=True, map_location="cpu"), str(file))
        quantizers(model, checkpoint_name, prefix)

    safe_pickle = types.SimpleNamespace(**vars(pickle) | {"load": unpickle})
    return [
        (filesystem, "pickle", safe_pickle),
        (DefaultLoadPlanner, "load_bytes", safe_bytes),
        # Model Optimizer's own, of quantized models; NeMo looks for it in every checkpoint.
        (modelopt, "restore_sharded_modelopt_state", safe_quantizers),
        (TorchDistLoadShardedStrategy, "load", safe_sharded),
        (TorchCommonLoadStrategy, "load_common", safe_common),
        (TorchCommonLoadStrategy, "load_sharded_objects", safe_objects),
        *((module, "load", safe_load) for module in (nemo_io, api, mixin)),
        (mixin, "_safe_pickle_load", lambda file: unpickle(file, _ContextUnpickler)),
    ]
