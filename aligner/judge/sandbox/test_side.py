"""The tests' side: runs them with proxies of the answer's names.

What comes from the answer's side is read as data. The answer's code does not run here, and cannot reach this process
but by messages. A message that is none ends the process, which is a failed test.
"""

from __future__ import annotations

import ast
import builtins
import contextlib
import importlib
import os
import re
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

from aligner.judge.sandbox.operations import BINARY, COMPARISONS, NUMERIC, OTHERS
from aligner.judge.sandbox.protocol import Peer, ProtocolError, Values

PASSED = b"passed\n"
BUILT_IN = set(vars(builtins))
"""Names that tests use in their own sense, unless they use no other name of the answer."""
STANDARD_MODULES = set(sys.stdlib_module_names) - {"antigravity", "this"}


class AnswerExit(SystemExit):
    """SystemExit that the answer raised: the tests did not come to their end."""


class Tests(Peer):
    """Asks for the answer's objects; lets the answer call functions that it was given, and nothing else."""

    def __init__(self, reading: int, writing: int) -> None:
        super().__init__(reading, writing)
        self._proxies: dict[int, Any] = {}
        self.number(lambda prompt="": builtins.input(prompt))

    def request(
        self, operation: str, number: int, args: Iterable[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        try:
            return super().request(operation, number, args, kwargs)
        except ProtocolError:
            # Not an exception, which tests could expect.
            os._exit(1)
        except SystemExit as error:
            raise AnswerExit(*error.args) from None
        except StopIteration:
            if operation == "next":
                raise
            # It would end a loop of the tests that calls a function, as `all(map(f, cases))`.
            raise RuntimeError("the answer raised StopIteration") from None

    def perform(self, operation: str, number: int, args: list[Any], kwargs: dict[str, Any]) -> Any:
        if operation != "call":
            raise ProtocolError("only functions can be used")
        return self.objects[number](*args, **kwargs)

    def refer(self, value: Any, values: Values) -> list[Any]:
        if type(value) is Proxy:
            return ["yours", value._proxy_.number]
        if isinstance(value, types.BuiltinFunctionType) and vars(builtins).get(value.__name__) is value:
            return ["builtin", value.__name__]
        try:
            return super().refer(value, values)
        except TypeError:
            if (following := getattr(value, "__next__", None)) is not None:
                return ["iterator", self.number(following)]
            if callable(value):
                return ["function", self.number(value)]
            raise TypeError(
                f"{type(value).__name__}: a test can pass plain data, functions and the answer's own objects"
            ) from None

    def refer_error_class(self, kind: type[BaseException], values: Values) -> list[Any]:
        if kind is AnswerExit:
            return ["builtin", "SystemExit"]
        if "_of_answer" in vars(kind):
            return ["yours", kind._of_answer]  # type: ignore[attr-defined]
        return super().refer_error_class(kind, values)

    def dereference(self, kind: str, parts: list[Any], values: Values) -> Any:
        if kind == "yours":
            return self.objects[parts[0]]
        if kind == "module":
            return _standard_module(parts[0])
        if kind not in ("object", "coroutine", "error class"):
            return super().dereference(kind, parts, values)
        number = parts[0]
        if type(number) is not int:
            raise ProtocolError("a number is none")
        if kind == "coroutine":
            return _coroutine(self, number)
        if number not in self._proxies:
            make = self._error_class if kind == "error class" else Proxy
            self._proxies[number] = make(Reference(self, number, *map(values.decode, parts[1:])))
        return self._proxies[number]

    @staticmethod
    def _error_class(reference: Reference) -> type:
        """Return a class of this side for an exception class of the answer, which `except` needs."""
        if not all(issubclass(base, BaseException) for base in reference.bases):
            raise ProtocolError("an exception class is none")
        body = {"_of_answer": reference.number, "__str__": lambda self: vars(self).get("_text") or str(self.args)}
        return type(str(reference.plain), reference.bases, body)

    def show(self, text: str) -> None:
        sys.stdout.write(text)


class Reference:
    """An object of the answer."""

    def __init__(self, peer: Tests, number: int, plain: Any = False, *bases: Any) -> None:
        self.peer, self.number, self.plain, self.bases = peer, number, plain, bases
        self.told = False

    def ask(self, operation: str, /, *args: Any, **kwargs: Any) -> Any:
        return self.peer.request(operation, self.number, args, kwargs)


def _ask(operation: str) -> Callable[..., Any]:
    def method(self: Any, /, *args: Any, **kwargs: Any) -> Any:
        return self._proxy_.ask(operation, *args, **kwargs)

    return method


def _compare(operation: str) -> Callable[..., Any]:
    def method(self: Any, other: Any) -> Any:
        if type(other) is Proxy:
            return self._proxy_.ask(operation, other)
        if self._proxy_.plain:
            return COMPARISONS[operation](self._proxy_.ask("plain"), other)
        # The answer's own operator could say that anything equals what the tests expect.
        return NotImplemented

    return method


def _combine(operation: str) -> Callable[..., Any]:
    def method(self: Any, other: Any, *more: Any) -> Any:
        reference = self._proxy_
        if type(other) is not Proxy and reference.plain:
            return BINARY[operation](reference.ask("plain"), other, *more)
        result = reference.ask(operation, other, *more)
        told = reference.told or type(other) is not Proxy or other._proxy_.told
        return _only_objects(result, operation) if told else result

    return method


def _convert(operation: str) -> Callable[..., Any]:
    def method(self: Any, *args: Any) -> Any:
        result = self._proxy_.ask(operation, *args)
        return _only_objects(result, operation) if self._proxy_.told else result

    return method


def _only_objects(result: Any, operation: str) -> Any:
    """Return an object of the answer that has seen a number of the tests.

    In `abs(f(2) - 4) < 1e-6` an operator of the answer that is given the 4 could return 0.
    """
    if type(result) is not Proxy:
        raise TypeError(f"{operation}: an object of the answer and a value of the tests give no value")
    result._proxy_.told = True
    return result


def _methods() -> dict[str, Any]:
    methods: dict[str, Any] = {f"__{name}__": _ask(name) for name in OTHERS if "attr" not in name}
    methods |= {f"__{name}__": _compare(name) for name in COMPARISONS}
    methods |= {f"__{name}__": _combine(name) for name in BINARY}
    methods |= {f"__{name}__": _convert(name) for name in NUMERIC}
    return methods


def _make_proxy(self: Any, reference: Reference) -> None:
    object.__setattr__(self, "_proxy_", reference)


Proxy: Any = type(
    "Proxy",
    (),
    {
        "__slots__": ("_proxy_",),
        "__init__": _make_proxy,
        "__getattr__": _ask("getattr"),
        "__setattr__": _ask("setattr"),
        "__delattr__": _ask("delattr"),
        "__class__": property(lambda self: self._proxy_.ask("getattr", "__class__")),
        "__doc__": property(lambda self: self._proxy_.ask("getattr", "__doc__")),
        **_methods(),
        # A traceback does not leave its process.
        "__exit__": lambda self, kind, error, _: self._proxy_.ask("exit", kind, error),
    },
)
"""Stands for an object of the answer: what is done with it is done there."""


async def _coroutine(peer: Tests, number: int) -> Any:
    return peer.request("await", number)


def _standard_module(name: Any) -> types.ModuleType:
    if name not in STANDARD_MODULES:
        raise ProtocolError("a module is not of the standard library")
    return importlib.import_module(name)


def _used_names(code: types.CodeType) -> Iterator[str]:
    """Yield the global names and attributes in the code, and the words that it may evaluate."""
    yield from code.co_names
    if {"eval", "exec", "globals", "doctest"} & set(code.co_names):
        yield from re.findall(r"[^\W\d]\w*", repr(code.co_consts))
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _used_names(constant)


def _names(peer: Tests, tests: str, code: types.CodeType) -> dict[str, Any]:
    """Return the names of the answer that the tests use."""
    used = set(_used_names(code))
    offered = [name for name in peer.request("names", 0) if isinstance(name, str) and name in used]
    # `math` of `math.isclose(...)` is the module that the answer imported, not something that it calls so.
    bases = {node.value for node in ast.walk(ast.parse(tests)) if isinstance(node, ast.Attribute)}
    modules = {base.id for base in bases if isinstance(base, ast.Name)} & STANDARD_MODULES
    own = [name for name in offered if name not in BUILT_IN | modules]
    found = {name: peer.request("name", 0, [name]) for name in own or offered}
    return found | {name: importlib.import_module(name) for name in modules & set(offered)}


def run(tests: str, reading: int, writing: int, status: int) -> NoReturn:
    """Run the tests, and write to `status` if they come to their end."""
    module = types.ModuleType("__main__")
    passed = False
    with contextlib.suppress(BaseException):
        code = compile(tests, "tests.py", "exec")
        vars(module).update(_names(Tests(reading, writing), tests, code))
        sys.modules["__main__"], sys.argv = module, ["tests.py"]
        try:
            exec(code, vars(module))
            passed = True
        except SystemExit as error:
            # As `unittest.main()` ends.
            passed = type(error) is SystemExit and error.code in (None, 0)
    if passed:
        os.write(status, PASSED)
    os._exit(not passed)
