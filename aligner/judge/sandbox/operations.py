"""What one side can ask of an object of the other: the operations of Python, by name."""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable
from typing import Any

NUMERIC: dict[str, Callable[..., Any]] = {
    "neg": operator.neg,
    "pos": operator.pos,
    "abs": abs,
    "invert": operator.invert,
    "int": int,
    "float": float,
    "complex": complex,
    "index": operator.index,
    "round": round,
    "trunc": math.trunc,
    "floor": math.floor,
    "ceil": math.ceil,
}
"""Operators that make a number of an object."""
_BINARY: dict[str, Callable[..., Any]] = {
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "truediv": operator.truediv,
    "floordiv": operator.floordiv,
    "mod": operator.mod,
    "divmod": divmod,
    "pow": pow,
    "matmul": operator.matmul,
    "and": operator.and_,
    "or": operator.or_,
    "xor": operator.xor,
    "lshift": operator.lshift,
    "rshift": operator.rshift,
}


def _reflected(operation: Callable[..., Any]) -> Callable[[Any, Any], Any]:
    return lambda right, left: operation(left, right)


BINARY: dict[str, Callable[..., Any]] = {
    **_BINARY,
    **{f"r{name}": _reflected(operation) for name, operation in _BINARY.items()},
    **{f"i{name}": getattr(operator, f"i{name.rstrip('_')}") for name in _BINARY if name != "divmod"},
}
COMPARISONS: dict[str, Callable[..., Any]] = {
    name: getattr(operator, name) for name in ("eq", "ne", "lt", "le", "gt", "ge")
}
OTHERS: dict[str, Callable[..., Any]] = {
    "call": lambda value, /, *args, **kwargs: value(*args, **kwargs),
    "getattr": getattr,
    "setattr": setattr,
    "delattr": delattr,
    "len": len,
    "iter": iter,
    "next": next,
    "reversed": reversed,
    "getitem": operator.getitem,
    "setitem": operator.setitem,
    "delitem": operator.delitem,
    "contains": operator.contains,
    "bool": bool,
    "str": str,
    "repr": repr,
    "format": format,
    "hash": hash,
    "copy": copy.copy,
    "deepcopy": lambda value, _: copy.deepcopy(value),
    "enter": lambda value: type(value).__enter__(value),
    "exit": lambda value, kind, error: type(value).__exit__(value, kind, error, None),
    "instancecheck": lambda kind, value: isinstance(value, kind),
    "subclasscheck": lambda kind, value: issubclass(value, kind),
}
"""Operations whose method is `__name__` with the same arguments."""
OPERATIONS = {**NUMERIC, **BINARY, **COMPARISONS, **OTHERS}
