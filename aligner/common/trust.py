"""Names that a checkpoint or a recipe in YAML may have imported and called.

Both are files that others write and send. What they name is called while they are read, so a name is looked up here
first. A class is allowed by its package, a function by its module or name, since some functions start programs. What is
found must be what was named: a module also holds what it imported, and `transformers.os.system` is `os.system`.
NEMO_ALIGN_TRUST adds packages and names of the user's own.
"""

from __future__ import annotations

import enum
import importlib
import os
import types
from collections.abc import Iterable
from typing import Any

from aligner.common.errors import UntrustedError

ENV = "NEMO_ALIGN_TRUST"
"""Environment variable: packages and names, separated by commas, that may be imported and called, too."""
REMOTE_CODE = "trust_remote_code"
"""Argument of transformers that runs Python files beside a model or tokenizer."""

IMPORTED = (
    "aligner", "nemo.collections.llm", "nemo.collections.common.tokenizers", "nemo.lightning", "megatron.core",
    "lightning.pytorch", "transformers", "fiddle", "torch", "torch.nn", "torch.optim", "torch._C", "builtins",
    "collections", "datetime", "nemo_run.config", "pathlib",
)  # fmt: skip
"""Modules that may be imported; of torch these alone, of the others with all that is in them."""
WHOLE = tuple(name for name in IMPORTED if name != "torch")

CLASSES = {
    *(f"builtins.{name}" for name in ("dict", "list", "tuple", "set", "frozenset", "bytes", "str", "int", "float")),
    "builtins.bool", "builtins.complex", "builtins.slice", "collections.OrderedDict", "collections.defaultdict",
    "datetime.timedelta",
    "pathlib.Path", "pathlib.PosixPath",
    "fiddle._src.config.Config", "fiddle._src.config.BuildableTraverserMetadata", "fiddle._src.config.NoValue",
    "fiddle._src.partial.Partial", "fiddle._src.partial.ArgFactory",
    *(f"fiddle._src.history.{name}" for name in ("History", "HistoryEntry", "ChangeKind", "Location")),
    "nemo_run.config.Config", "nemo_run.config.Partial",
    "nemo.collections.common.tokenizers.bytelevel_tokenizers.ByteLevelTokenizer",
    "nemo.collections.common.tokenizers.huggingface.auto_tokenizer.AutoTokenizer",
    "nemo.collections.common.tokenizers.sentencepiece_tokenizer.SentencePieceTokenizer",
    "nemo.collections.common.tokenizers.tiktoken_tokenizer.TiktokenTokenizer",
    "nemo.lightning.io.pl.TrainerContext", "nemo.lightning.nemo_logger.NeMoLogger", "nemo.lightning.resume.AutoResume",
    "transformers.generation.configuration_utils.GenerationConfig",
    "transformers.models.llama.tokenization_llama.LlamaTokenizer",
    "transformers.models.llama.tokenization_llama_fast.LlamaTokenizerFast",
    "megatron.core.distributed.distributed_data_parallel_config.DistributedDataParallelConfig",
    "megatron.core.enums.ModelType", "megatron.core.model_parallel_config.ModelParallelConfig",
    "torch.dtype",
}  # fmt: skip
"""Classes. Not NeMo's TabularTokenizer, which unpickles a file, nor Megatron's ModuleSpec, which imports by name."""
CLASS_PACKAGES = (
    "aligner.callbacks", "aligner.checkpoint.resume", "aligner.data", "aligner.generate", "aligner.judge",
    "aligner.losses", "aligner.model", "aligner.train",
    "lightning.pytorch.callbacks", "lightning.pytorch.loggers", "lightning.pytorch.plugins",
    "lightning.pytorch.profilers",
    "megatron.core.optimizer.optimizer_config", "megatron.core.transformer.enums",
    "megatron.core.transformer.transformer_config",
    "nemo.collections.llm.gpt.model", "nemo.collections.llm.peft", "nemo.lightning.io.artifact",
    "nemo.lightning.pytorch",
    "torch.nn.modules", "torch.optim",
)  # fmt: skip
"""Packages whose classes are allowed: making one of them keeps its arguments."""
CALLED = (
    "aligner.backend.hardware", "aligner.common.yaml_values", "aligner.demo.toy", "aligner.losses",
    "megatron.core.activations", "megatron.core.models.gpt.gpt_layer_specs", "nemo.collections.llm.fn.activation",
    "nemo.collections.llm.gpt.model.base", "nemo.lightning.io.artifact.hf_auto",
    "torch.nn.functional", "torch.nn.init", "torch._C._nn",
)  # fmt: skip
"""Modules whose functions may be called while a file is read."""
NAMED = (*CALLED, "aligner.api", "aligner.data.prompts", "aligner.generate", "aligner.judge")
"""Modules whose functions a recipe may hold, to be called once it runs."""

_own: set[str] = set()


def know(objects: Iterable[Any]) -> None:
    """Allow the classes of objects that this process was given by its user, as the model of the recipe that runs."""
    _own.update(f"{type(thing).__module__}.{type(thing).__qualname__}" for thing in objects)


def is_trusted(name: str) -> bool:
    """Return whether the user has named something, or a package of it, in NEMO_ALIGN_TRUST."""
    words = [word.strip() for word in os.environ.get(ENV, "").split(",")]
    return any(_is_under(name, word) for word in words if word)


def refusal(where: str, name: str, kind: str) -> UntrustedError:
    """Return the error about a name in a file.

    Args:
        where: the file, and the place in it.
        name: what it names.
        kind: what the file claims to be, as "checkpoint of NeMo".
    """
    return UntrustedError(
        f"{where}: names {name}, which no {kind} has; it was not loaded. If this is your own code, or you know what it "
        f"runs, set {ENV}={name} (or a package of it; several with commas)"
    )


def lookup(module: str, symbol: str, where: str, kind: str, *, called: bool = True) -> Any:
    """Import something by its module and name, if it is allowed.

    Args:
        module: module that is imported, if that is allowed.
        symbol: name in the module; of a member of a class with a dot.
        where: the file that names it, and the place in it.
        kind: what the file claims to be.
        called: whether it is called while the file is read; otherwise functions that a run calls are allowed, too.

    Raises:
        UntrustedError: it is not allowed.
        ImportError, AttributeError: it does not exist.
    """
    name = f"{module}.{symbol}"
    trusted = is_trusted(name) or name in _own
    if not trusted and module not in IMPORTED and not any(_is_under(module, package) for package in WHOLE):
        raise refusal(where, name, kind)
    first, *inner = symbol.split(".")
    found: Any = getattr(importlib.import_module(module), first)
    for part in inner:
        # Below a class are its members; below a function are the names of its whole module.
        if not trusted and not isinstance(found, type):
            raise refusal(where, name, kind)
        found = getattr(found, part)
    if not trusted and not _is_allowed(found, called=called):
        raise refusal(where, name, kind)
    return found


def _is_allowed(found: Any, *, called: bool) -> bool:
    is_function = isinstance(found, types.FunctionType | types.BuiltinFunctionType)
    if not isinstance(found, type) and not is_function:
        # A member of an enumeration, or a data type of torch.
        if not isinstance(found, enum.Enum) and f"{type(found).__module__}.{type(found).__qualname__}" != "torch.dtype":
            return False
        found = type(found)
    # None for a method of an object, as `dict.get` of a module's names.
    module = found.__module__ or ""
    name = f"{module}.{found.__qualname__}"
    if is_trusted(name) or name in _own:
        return True
    if is_function:
        return any(_is_under(module, package) for package in (CALLED if called else NAMED))
    return name in CLASSES or any(_is_under(module, package) for package in CLASS_PACKAGES)


def _is_under(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")
