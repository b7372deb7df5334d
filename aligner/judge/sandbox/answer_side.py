"""The answer's side: runs its code, and does with its objects what the tests ask for.

The code can do here what the sandbox lets it do, and say to the tests what it likes. The tests take it for data.
"""

from __future__ import annotations

import builtins
import io
import os
import sys
import types
from collections.abc import Iterator
from typing import Any

from aligner.judge.sandbox.operations import OPERATIONS
from aligner.judge.sandbox.protocol import Peer, ProtocolError, Values

PRINTED_LIMIT = 1 << 20
"""Bytes of printed text that one message holds; the rest is left out."""
PLAIN: tuple[Any, ...] = (bool, int, float, complex, str, bytes, list, tuple, dict, set, frozenset)


class Printed(io.BytesIO):
    def write(self, data: Any) -> int:
        return super().write(data) if self.tell() < PRINTED_LIMIT else len(data)


class Answer(Peer):
    """Serves the names of a module, in which the answer's code ran."""

    def __init__(self, reading: int, writing: int) -> None:
        super().__init__(reading, writing)
        self._printed = Printed()
        self._stdout = io.TextIOWrapper(self._printed, encoding="utf-8", errors="replace", write_through=True)

    def run(self, code: str) -> None:
        """Run the code, then serve until the tests are done."""
        module = types.ModuleType("__main__")
        sys.modules["__main__"] = module
        sys.argv, sys.stdout = ["answer.py"], self._stdout
        self._names, self._failure = vars(module), None
        known = self._names["__builtins__"] = types.ModuleType("builtins")
        # The tests may have replaced `input` on their side.
        vars(known).update({**vars(builtins), "input": lambda prompt="": self.request("call", 0, [prompt])})
        try:
            exec(compile(code, "answer.py", "exec"), self._names)
        except BaseException as error:
            self._failure = error
        while True:
            self.serve(self.receive())

    def perform(self, operation: str, number: int, args: list[Any], kwargs: dict[str, Any]) -> Any:
        if operation == "names":
            if self._failure is not None:
                raise self._failure
            return [name for name in self._names if not name.startswith("__")]
        if operation == "name":
            return self._names[args[0]]
        if operation == "plain":
            value = self.objects[number]
            return next(kind for kind in PLAIN if isinstance(value, kind))(value)
        if operation == "await":
            import asyncio

            return asyncio.run(self.objects[number])
        return OPERATIONS[operation](self.objects[number], *args, **kwargs)

    def refer(self, value: Any, values: Values) -> list[Any]:
        if isinstance(value, Callback):
            return ["yours", value.number]
        if isinstance(value, types.ModuleType) and value.__name__ in sys.stdlib_module_names:
            return ["module", value.__name__]
        try:
            return super().refer(value, values)
        except TypeError:
            kind = "coroutine" if isinstance(value, types.CoroutineType) else "object"
            return [kind, self.number(value), not isinstance(value, type) and isinstance(value, PLAIN)]

    def refer_error_class(self, kind: type[BaseException], values: Values) -> list[Any]:
        if kind.__module__ in sys.stdlib_module_names and kind.__module__ != "__main__":
            return super().refer_error_class(kind, values)
        return ["error class", self.number(kind), kind.__name__, *map(values.encode, kind.__bases__)]

    def dereference(self, kind: str, parts: list[Any], values: Values) -> Any:
        if kind == "yours":
            return self.objects[parts[0]]
        if kind == "function":
            return Callback(self, parts[0])
        if kind == "iterator":
            return Callback(self, parts[0]).items()
        if kind == "builtin":
            return vars(builtins)[parts[0]]
        return super().dereference(kind, parts, values)

    def printed(self) -> str:
        self._stdout.flush()
        text = self._printed.getvalue().decode("utf-8", "replace")
        self._printed.seek(0)
        self._printed.truncate()
        return text


class Callback:
    """A function of the tests."""

    def __init__(self, peer: Peer, number: int) -> None:
        self._peer, self.number = peer, number

    def __call__(self, /, *args: Any, **kwargs: Any) -> Any:
        return self._peer.request("call", self.number, args, kwargs)

    def items(self) -> Iterator[Any]:
        while True:
            try:
                item = self()
            except StopIteration:
                return
            yield item


def run(code: str, reading: int, writing: int) -> None:
    # For the frames of this file: the code gets as deep as in a script.
    sys.setrecursionlimit(sys.getrecursionlimit() + 20)
    try:
        Answer(reading, writing).run(code)
    except ProtocolError:
        # The tests are done.
        os._exit(0)
