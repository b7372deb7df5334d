"""What an answer and its tests say to each other: JSON lines of plain data and of numbered references.

A value is None, a bool, an int, a float or a str as JSON has it, or an array that begins with its kind:
`["tuple", 1, 2]`, `["dict", key, value]`, `["bytes", "latin-1"]`. Nothing that is read can run code of the other side:
a subclass of a built-in type, a class, a function or an instance comes as a number, and what is done with it is asked
for by that number. A list, dict or set keeps one number in a request and its reply, so that both sides see its changes.
"""

from __future__ import annotations

import builtins
import collections
import json
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any

LINE_LIMIT = 16 << 20
"""Bytes of the longest message."""
BATCH = 1 << 16
SMALL = 1 << 63
ATOMS = {type(None), bool, int, float, str}
"""What JSON has; an int that is not `SMALL` has too many digits."""
CONTAINERS: dict[str, type] = {
    kind.__name__: kind
    for kind in (
        list, dict, set, bytearray, collections.deque, collections.OrderedDict, collections.Counter,
        collections.defaultdict,
    )
}  # fmt: skip
VALUES: dict[str, tuple[Callable[[Any], Iterable[Any]], Callable[..., Any]]] = {
    "int": (lambda x: [hex(x)], lambda text: int(text, 16)),
    "bytes": (lambda x: [x.decode("latin-1")], lambda text: text.encode("latin-1")),
    "tuple": (lambda x: x, lambda *items: items),
    "frozenset": (lambda x: x, lambda *items: frozenset(items)),
    "complex": (lambda x: [x.real, x.imag], complex),
    "range": (lambda x: [x.start, x.stop, x.step], range),
    "slice": (lambda x: [x.start, x.stop, x.step], slice),
}
"""Kind -> its parts, and the value of these."""
STANDARD: dict[str, tuple[Callable[[Any], Iterable[Any]], str | None]] = {
    "decimal.Decimal": (lambda x: [str(x)], None),
    "fractions.Fraction": (lambda x: [x.numerator, x.denominator], None),
    "datetime.timedelta": (lambda x: [x.days, x.seconds, x.microseconds], None),
    "datetime.date": (lambda x: [x.isoformat()], "fromisoformat"),
    "datetime.time": (lambda x: [x.isoformat()], "fromisoformat"),
    "datetime.datetime": (lambda x: [x.isoformat()], "fromisoformat"),
}
"""Class of the standard library -> parts of an instance, and what makes an instance of these, if not the class."""
VALUE_TYPES: dict[type, str] = {getattr(builtins, name): name for name in VALUES}


class ProtocolError(Exception):
    """A message that is none; or the other side is gone."""


class Peer:
    """One side: asks the other to do something with its objects, and does what it is asked with its own."""

    def __init__(self, reading: int, writing: int) -> None:
        self._reading, self._writing, self._buffer = reading, writing, bytearray()
        self.objects: list[Any] = []
        """Objects that the other side knows by their numbers."""
        self._numbers: dict[int, int] = {}

    def request(
        self, operation: str, number: int, args: Iterable[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Have the other side do something with its object, and return or raise what came of it."""
        values = Values(self)
        self._send(
            {
                "do": operation,
                "on": number,
                "args": [values.encode(value) for value in args],
                "kwargs": {name: values.encode(value) for name, value in (kwargs or {}).items()},
            }
        )
        try:
            while "do" in (reply := self.receive()):
                self.serve(reply)
            for held, contents in reply["back"]:
                values.refill(values.held[held], contents)
            failed = "error" in reply
            result = values.decode(reply["error" if failed else "value"])
        except ProtocolError:
            raise
        except Exception as error:
            raise ProtocolError(f"a message cannot be read ({type(error).__name__})") from None
        if not failed:
            return result
        if not isinstance(result, BaseException):
            raise ProtocolError("an error is no exception")
        raise result

    def serve(self, message: dict[str, Any]) -> None:
        """Do what a message asks for, and reply."""
        values = Values(self)
        args = [values.decode(value) for value in message["args"]]
        kwargs = {name: values.decode(value) for name, value in message["kwargs"].items()}
        before = [repr(values.contents(held)) for held in values.held]
        reply: dict[str, Any] = {}
        try:
            result, failed = self.perform(message["do"], message["on"], args, kwargs), False
        except ProtocolError:
            raise
        except BaseException as error:
            result, failed = error, True
        try:
            after = ((i, values.contents(values.held[i])) for i in range(len(before)))
            reply["back"] = [[i, contents] for i, contents in after if repr(contents) != before[i]]
            reply["error" if failed else "value"] = values.encode(result)
        except ProtocolError:
            raise
        except Exception as error:
            told = TypeError(f"the result cannot be passed on: {type(error).__name__}")
            reply = {"back": [], "error": Values(self).encode(told)}
        self._send(reply)

    def number(self, value: Any) -> int:
        """Return the number by which the other side knows an object of this side."""
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self.objects)
            self.objects.append(value)
        return self._numbers[id(value)]

    def perform(self, operation: str, number: int, args: list[Any], kwargs: dict[str, Any]) -> Any:
        """Do what the other side asks for."""
        raise NotImplementedError

    def refer(self, value: Any, values: Values) -> list[Any]:
        """Return the array of an object that is no plain data."""
        if isinstance(value, type) and vars(builtins).get(value.__name__) is value:
            return ["builtin", value.__name__]
        if isinstance(value, type) and issubclass(value, BaseException):
            return self.refer_error_class(value, values)
        if isinstance(value, BaseException):
            kept = {name: part for name, part in vars(value).items() if not name.startswith("__")}
            return ["exception", values.encode(type(value)), *map(values.encode, (value.args, kept, _text(value)))]
        raise TypeError(f"{type(value).__name__} cannot be passed on")

    def refer_error_class(self, kind: type[BaseException], values: Values) -> list[Any]:
        """Return the array of an exception class that is not built in: of its first base that is."""
        module = sys.modules.get(kind.__module__)
        if kind.__module__ in sys.stdlib_module_names and getattr(module, kind.__name__, None) is kind:
            base = next(base for base in kind.__mro__ if vars(builtins).get(base.__name__) is base)
            return ["standard error", kind.__module__, kind.__name__, base.__name__]
        return values.encode(next(base for base in kind.__mro__ if vars(builtins).get(base.__name__) is base))

    def dereference(self, kind: str, parts: list[Any], values: Values) -> Any:
        """Return the object of an array of `refer` on the other side."""
        if kind == "builtin":
            return _error_or_type(vars(builtins)[parts[0]])
        if kind == "standard error":
            # Of modules that are loaded: the other side must not choose what is imported here.
            module, name, base = parts
            found = getattr(sys.modules.get(module), name, None) if module in sys.stdlib_module_names else None
            is_error = isinstance(found, type) and issubclass(found, BaseException)
            return found if is_error else _error_or_type(vars(builtins)[base])
        if kind == "exception":
            made, args, kept, text = map(values.decode, parts)
            return make_error(made, args, kept, text)
        raise ProtocolError("a value is of no known kind")

    def printed(self) -> str:
        """Return the text that was printed since the last message."""
        return ""

    def show(self, text: str) -> None:
        """Take the text that the other side printed."""

    def _send(self, message: dict[str, Any]) -> None:
        data = memoryview(json.dumps({**message, "printed": self.printed()}).encode() + b"\n")
        try:
            while data:
                data = data[os.write(self._writing, data[:BATCH]) :]
        except OSError as error:
            raise ProtocolError(f"the other side is gone ({error})") from None

    def receive(self) -> dict[str, Any]:
        """Read a message.

        Raises:
            ProtocolError: it is none, or there are no more.
        """
        searched = 0
        while (end := self._buffer.find(b"\n", searched)) < 0:
            searched = len(self._buffer)
            more = os.read(self._reading, BATCH)
            if not more or searched > LINE_LIMIT:
                raise ProtocolError("the other side is gone" if not more else "a message is too long")
            self._buffer += more
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        try:
            message = json.loads(line)
            printed = message["printed"]
        except (ValueError, RecursionError, TypeError, KeyError, IndexError) as error:
            raise ProtocolError(f"a message is none ({type(error).__name__})") from None
        if not isinstance(message, dict) or not isinstance(printed, str):
            raise ProtocolError("a message is no object with printed text")
        if printed:
            self.show(printed)
        return message


def make_error(kind: Any, args: Any, kept: Any, text: Any) -> BaseException:
    """Return an exception of a class with the arguments, attributes and text of the other side's."""
    if not (isinstance(kind, type) and issubclass(kind, BaseException) and isinstance(args, tuple)):
        raise ProtocolError("an exception is none")
    try:
        error = kind(*args)
    except Exception:
        error = kind.__new__(kind)
    error.args = args
    vars(error).update({**kept, "_text": str(text)})
    return error


def _error_or_type(value: Any) -> type:
    if not isinstance(value, type):
        raise ProtocolError("a built-in type is none")
    return value


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except Exception:
        return ""


class Values:
    """The values of a request and of its reply."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer
        self.held: list[Any] = []
        """Containers that can change, in the order in which both sides meet them."""
        self._numbers: dict[int, int] = {}

    def encode(self, value: Any) -> Any:
        kind = type(value)
        if kind in ATOMS and (kind is not int or -SMALL < value < SMALL):
            return value
        if id(value) in self._numbers:
            return ["same", self._numbers[id(value)]]
        if CONTAINERS.get(kind.__name__) is kind:
            self._hold(value)
            return [kind.__name__, *self.contents(value)]
        if kind in VALUE_TYPES:
            name = VALUE_TYPES[kind]
            parts = VALUES[name][0](value)
            return [name, *(parts if name in ("int", "bytes") else map(self.encode, parts))]
        name = f"{kind.__module__}.{kind.__qualname__}"
        if name in STANDARD and getattr(sys.modules.get(kind.__module__), kind.__name__, None) is kind:
            return [name, *map(self.encode, STANDARD[name][0](value))]
        return self._peer.refer(value, self)

    def decode(self, data: Any) -> Any:
        if not isinstance(data, list):
            if isinstance(data, dict):
                raise ProtocolError("an object stands where a value is expected")
            return data
        kind, *parts = data
        if kind == "same":
            return self.held[parts[0]]
        if kind in CONTAINERS:
            value = CONTAINERS[kind]()
            self._hold(value)
            self.refill(value, parts)
            return value
        if kind in VALUES:
            return VALUES[kind][1](*(parts if kind in ("int", "bytes") else map(self.decode, parts)))
        if kind in STANDARD:
            module, _, name = kind.partition(".")
            make = getattr(__import__(module), name)
            method = STANDARD[kind][1]
            return (getattr(make, method) if method else make)(*map(self.decode, parts))
        return self._peer.dereference(kind, parts, self)

    def contents(self, container: Any) -> list[Any]:
        """Return the encoded items of a container; of a dict, keys and values by turns."""
        if isinstance(container, dict):
            return [self.encode(part) for item in container.items() for part in item]
        return [self.encode(item) for item in container]

    def refill(self, container: Any, contents: list[Any]) -> None:
        """Set the items of a container to those that `contents` returned on the other side."""
        items = [part if type(part) in ATOMS else self.decode(part) for part in contents]
        container.clear()
        if isinstance(container, dict):
            for key, value in zip(items[::2], items[1::2], strict=True):
                container[key] = value
        elif isinstance(container, set):
            container.update(items)
        else:
            container.extend(items)

    def _hold(self, container: Any) -> None:
        self._numbers[id(container)] = len(self.held)
        self.held.append(container)
