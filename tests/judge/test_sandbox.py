"""Answers that are honest, wrong or hostile, held to their tests: `verifiers.python_tests`."""
# ruff: noqa: E501

import contextlib
import os
import socket
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from aligner.common.errors import ConfigError, RowError
from aligner.judge import verifiers
from aligner.judge.sandbox import run

ADD = "def add(a, b):\n    return a + b\n"
HONEST: dict[str, tuple[str, str]] = {
    "function": (ADD, "assert add(1, 2) == 3 and add('a', 'b') == 'ab'"),
    "blocks": ("First\n```python\nimport math\n```\nthen\n```py\ndef area(r): return math.pi * r * r\n```\n```text\n!\n```", "assert abs(area(1) - 3.14159265) < 1e-6"),
    "check": ("def truncate(x):\n    return x % 1.0", "def check(candidate):\n    assert candidate(3.5) == 0.5\n    assert abs(candidate(1.33) - 0.33) < 1e-6\n\ncheck(truncate)"),
    "mbpp": ("import re\ndef text_match(t):\n    return 'Found' if re.search('ab*', t) else 'No'", "assert text_match('ac')==('Found')\nassert text_match('dc')==('No')"),
    "name_of_a_built_in": ("def divisors(n):\n    return {i for i in range(1, n + 1) if n % i == 0}\ndef sum(a, b):\n    total = 0\n    for d in divisors(a) & divisors(b): total += d\n    return total", "assert sum(10, 15) == 6\nassert sum(100, 150) == 93"),
    "in_place": ("def order(x): x.sort()\ndef put(d, s, m):\n    d['k'] = [1]; s.add(2); m[0][0] = 9; m.append(m[0])", "x = [3, 1, 2]; order(x); assert x == [1, 2, 3]\nd, s, row = {}, set(), [0]; m = [row, [0]]\nput(d, s, m)\nassert d == {'k': [1]} and s == {2} and row == [9] and m[2] is row and m[1] == [0]"),
    "same_object": ("def give(x):\n    x.append(1)\n    return x", "x = []\nassert give(x) is x and x == [1]"),
    "class": ("class Stack:\n    def __init__(self, *items): self.items = list(items)\n    def push(self, x): self.items.append(x); return self\n    def __len__(self): return len(self.items)\n    def __getitem__(self, i): return self.items[i]\n    def __contains__(self, x): return x in self.items\n    def __iter__(self): return iter(self.items)\n    def __repr__(self): return f'Stack({self.items})'",
              "s = Stack(1)\ns.push(2).push(3)\nassert len(s) == 3 and s[1] == 2 and 3 in s and 4 not in s and list(s) == [1, 2, 3]\nassert isinstance(s, Stack) and repr(s) == 'Stack([1, 2, 3])' and s.items == [1, 2, 3]\nassert type(s).__name__ and s.__class__.__name__ == 'Stack' and hasattr(s, 'push') and not hasattr(s, 'pop')\ns.name = 'n'; assert s.name == 'n'\ntry: s[9]\nexcept IndexError: pass\nelse: assert False"),
    "dataclass": ("from dataclasses import dataclass\n@dataclass(frozen=True, order=True)\nclass P:\n    x: int\n    y: int = 0\ndef far(ps): return max(ps)", "assert P(1) == P(1, 0) and P(1) != P(2) and P(1) < P(2) and far([P(1), P(3), P(2)]) == P(3)\nassert {P(1), P(1)} == {P(1)} and far([P(1)]).x == 1 and P(1) != (1, 0)"),
    "operators": ("import math\nclass V:\n    def __init__(s, x, y): s.x, s.y = x, y\n    def __add__(s, o): return V(s.x + o.x, s.y + o.y)\n    def __mul__(s, k): return V(s.x * k, s.y * k)\n    __rmul__ = __mul__\n    def __eq__(s, o): return (s.x, s.y) == (o.x, o.y)\n    def __abs__(s): return math.hypot(s.x, s.y)\n    def __iadd__(s, o): s.x += o.x; return s\n    def __bool__(s): return bool(s.x)",
                  "assert V(1, 2) + V(3, 4) == V(4, 6) and 3 * V(1, 2) == V(1, 2) * 3 == V(3, 6) and abs(V(3, 4)) == 5\nv = w = V(1, 1); v += V(5, 0); assert w.x == 6 and v is w and not V(0, 1)"),
    "generator": ("def count(n):\n    for i in range(n): yield i, {'i': i}", "assert list(count(2)) == [(0, {'i': 0}), (1, {'i': 1})]\nassert next(count(1))[0] == 0 and sum(i for i, _ in count(5)) == 10"),
    "exceptions": ("class Low(ValueError):\n    def __init__(self, n): super().__init__(f'low by {n}'); self.n = n\ndef take(n):\n    if n < 0: raise Low(-n)\n    if n > 9: raise KeyError('much')\n    return 1 / n",
                   "for bad, kind in ((-1, Low), (-1, ValueError), (10, KeyError), (0, ZeroDivisionError)):\n    try: take(bad)\n    except kind as e: pass\n    else: assert False\ntry: take(-3)\nexcept Low as e: assert e.n == 3 and str(e) == 'low by 3'\ntry: take('x')\nexcept TypeError: pass\nelse: assert False"),
    "unittest": (ADD, "import unittest\nclass T(unittest.TestCase):\n    def test_add(self):\n        self.assertEqual(add(1, 2), 3)\n        self.assertAlmostEqual(add(0.1, 0.2), 0.3)\n        with self.assertRaises(TypeError): add(1, 'a')\nunittest.main()"),
    "callbacks": ("def order(items, key): return sorted(items, key=key)\ndef apply(f, *a, **k): return f(*a, **k)\ndef total(it): return sum(it)\ndef twice(f): return lambda x: f(f(x))\ndef each(f, xs): return list(map(f, xs))",
                  "assert order(['bb', 'a'], len) == ['a', 'bb'] and order([1, 2, 3], key=lambda x: -x) == [3, 2, 1]\nassert apply(lambda *a, **k: (a, k), 1, b=2) == ((1,), {'b': 2}) and total(i for i in (1, 2)) == 3\nassert twice(lambda x: x + 1)(5) == 7 and each(str, [1]) == ['1']\ndef bad(): raise LookupError('no')\ntry: apply(bad)\nexcept LookupError as e: assert e.args == ('no',)\nelse: assert False"),
    "imports_of_the_answer": ("import math, os\nfrom collections import Counter, deque, OrderedDict, defaultdict\ndef count(t): return Counter(t)", "assert math.pi > 3 and os.sep == '/' and count('aab') == {'a': 2, 'b': 1} and isinstance(count(''), dict) and Counter('a')['a'] == 1"),
    "numbers": ("def f(x): return x\ndef big(): return 7 ** 9000", "import math\nassert f(math.inf) == math.inf and math.isnan(f(math.nan)) and f(-0.0) == 0 and f(1j) == 1j and big() == 7 ** 9000 and f(True) is True and f(None) is None"),
    "containers": ("def f(x): return x\ndef types(x): return [type(i).__name__ for i in x]", "values = [(1, (2,)), {1, 2}, frozenset({3}), {(1, 2): [b'\\xff', None]}, b'a', bytearray(b'b'), range(3), 'é\\ud83d', {1: {2: {3}}}]\nassert f(values) == values and types(values) == [type(v).__name__ for v in values]\nassert [type(v) for v in f(values)] == [type(v) for v in values]"),
    "standard_types": ("from decimal import Decimal\nfrom fractions import Fraction\nfrom datetime import date, timedelta\ndef half(x): return Fraction(x, 2)\ndef d(x): return Decimal(x)\ndef later(day): return day + timedelta(1)", "from datetime import date\nfrom fractions import Fraction\nassert half(3) == Fraction(3, 2) and str(d('1.10')) == '1.10' and later(date(2024, 2, 28)) == date(2024, 2, 29)"),
    "subclasses": ("from collections import namedtuple\nfrom enum import IntEnum, Enum\nP = namedtuple('P', 'x y')\nclass C(IntEnum):\n    RED = 1\nclass E(Enum):\n    A = 'a'\ndef p(): return P(1, 2)\ndef c(): return C.RED\ndef e(): return E.A", "assert p() == (1, 2) and p().x == 1 and [p()] == [(1, 2)] and c() == 1 and c() + 1 == 2 and c() == C.RED and e() == E.A and e() is E.A and E.A.value == 'a'"),
    "recursion": ("def fib(n): return n if n < 2 else fib(n - 1) + fib(n - 2)\ndef deep(n): return 0 if n == 0 else 1 + deep(n - 1)", "assert fib(15) == 610 and deep(900) == 900"),
    "print": ("def hello(n): print('hello', n)\nprint('top')", "import io, contextlib\nout = io.StringIO()\nwith contextlib.redirect_stdout(out):\n    hello(1)\n    print('mid')\n    hello(2)\nassert out.getvalue() == 'hello 1\\nmid\\nhello 2\\n'"),
    "input": ("def double(): return 2 * int(input('n? '))", "from unittest import mock\nwith mock.patch('builtins.input', return_value='21') as asked:\n    assert double() == 42\nasked.assert_called_with('n? ')"),
    "context": ("from contextlib import contextmanager\nclass R:\n    log = []\n    def __enter__(self): self.log.append('in'); return self\n    def __exit__(self, kind, error, trace): self.log.append(kind.__name__ if kind else 'out'); return kind is KeyError", "with R() as r: assert r.log == ['in']\nwith R(): raise KeyError\nassert R.log == ['in', 'out', 'in', 'KeyError']"),
    "closure": ("def counter():\n    n = 0\n    def step():\n        nonlocal n\n        n += 1\n        return n\n    return step", "a, b = counter(), counter()\nassert (a(), a(), b()) == (1, 2, 1)"),
    "async": ("import asyncio\nasync def f(x):\n    await asyncio.sleep(0)\n    return x + 1", "import asyncio\nassert asyncio.run(f(1)) == 2"),
    "main_block": ("def f(): return 1\nif __name__ == '__main__':\n    print(f())", "assert f() == 1"),
    "tests_as_a_main_program": (ADD, "def test():\n    assert add(1, 1) == 2\nif __name__ == '__main__':\n    test()"),
    "evaluated": (ADD, "for case, wanted in (('add(1, 2)', 3), ('add(2, 2)', 4)):\n    assert eval(case) == wanted"),
    "a_thread": ("import threading\ndef f():\n    out = []\n    ts = [threading.Thread(target=out.append, args=(i,)) for i in range(4)]\n    [t.start() for t in ts]; [t.join() for t in ts]\n    return sorted(out)", "assert f() == [0, 1, 2, 3]"),
    "a_file": ("def f():\n    with open('x.txt', 'w') as file: file.write('hi')\n    return open('x.txt').read()", "assert f() == 'hi'"),
    "a_process": ("import subprocess, sys\ndef f(): return subprocess.run([sys.executable, '-c', 'print(1)'], capture_output=True, text=True).stdout", "assert f() == '1\\n'"),
}  # fmt: skip


@pytest.mark.parametrize("name", HONEST)
def test_an_honest_answer_passes(name: str) -> None:
    code, tests = HONEST[name]
    assert verifiers.python_tests({"tests": tests}, code) == 1


@pytest.mark.parametrize(
    ("code", "tests"),
    [
        (ADD, "assert add(1, 2) == 4"), (ADD, "assert sub(1, 2) == 1"), (ADD, "add(1, 'a')"), (ADD, "import sys; sys.exit(1)"),
        (ADD, "this is not Python"), ("this is not Python", "assert True"), ("raise ValueError", "assert True"),
        (ADD, "import os; os._exit(0)"), ("def f(): return True", "assert f() == 2"), ("def f(x): return [x]", "assert f(1) == (1,)"),
        (ADD, "import unittest\nclass T(unittest.TestCase):\n    def test_add(self): self.assertEqual(add(1, 2), 4)\nunittest.main()"),
        ("def f(x): x.append(1)", "x = []; f(x); assert x == []"), ("x='\ud83d'", ""), ("x='\\ud83d'", "assert x == 1"),
    ],
)  # fmt: skip
def test_a_wrong_answer_fails(code: str, tests: str) -> None:
    assert verifiers.python_tests({"tests": tests}, code) == 0


def test_tests_in_a_list_and_tests_that_are_none() -> None:
    assert verifiers.python_tests({"list": ["assert add(1, 2) == 3", "assert add(0, 0) == 0"]}, ADD, field="list") == 1
    assert verifiers.python_tests({"list": ["assert add(1, 2) == 3", "assert add(0, 0) == 1"]}, ADD, field="list") == 0
    with pytest.raises(RowError, match="tests: must be Python code, found 5"):
        verifiers.python_tests({"tests": 5}, ADD)


WANTED = "assert f(3) == 9"
SAY = "import os, sys, gc, json\npeer = next(o for o in gc.get_objects() if type(o).__name__ == 'Answer')\nw = peer._writing\n"
HOSTILE: dict[str, tuple[str, str]] = {
    "exit_at_once": ("import os; os._exit(0)", WANTED),
    "sys_exit": ("import sys; sys.exit(0)", WANTED),
    "exit_in_a_call": ("import os\ndef f(x): os._exit(0)", WANTED),
    "raise_exit_in_a_call": ("def f(x): raise SystemExit(0)", WANTED),
    "subclass_of_exit": ("class E(SystemExit): pass\ndef f(x): raise E(0)", WANTED),
    "exit_by_its_module": (SAY + "class E: pass\ndef f(x):\n    os.write(w, json.dumps({'back': [], 'error': ['exception', ['standard error', 'builtins', 'SystemExit', 'SystemExit'], ['tuple', 0], ['dict'], ''], 'printed': ''}).encode() + b'\\n')", WANTED),
    "interrupt": ("def f(x): raise KeyboardInterrupt", WANTED),
    "base_exception": ("class B(BaseException): pass\ndef f(x): raise B", WANTED),
    "stop_iteration_by_a_message": (SAY + "def f(x): os.write(w, json.dumps({'back': [], 'error': ['exception', ['builtin', 'StopIteration'], ['tuple'], ['dict'], ''], 'printed': ''}).encode() + b'\\n')", "assert all(map(lambda x: f(x) == 9, [3]))"),
    "class_that_is_no_error": (SAY + "def f(x): os.write(w, json.dumps({'back': [], 'value': ['error class', 7, 'f', ['builtin', 'int']], 'printed': ''}).encode() + b'\\n')", "assert f(3)(9) == 9"),
    "stop_iteration": ("def f(x): raise StopIteration", "assert all(map(lambda x: f(x) == 9, [3]))"),
    "generator_exit": ("def f(x): raise GeneratorExit", "assert all(f(x) == 9 for x in [3])"),
    "assertion_error": ("def f(x): raise AssertionError", WANTED),
    "find_the_marker": ("import re, os, sys\nfor n in os.listdir('.') + sys.argv: open(n, 'w').close()\nopen('passed', 'w').write('passed')\ndef f(x): os._exit(0)", WANTED),
    "write_the_verdict_everywhere": ("import os\ndef f(x):\n    for fd in range(256):\n        try: os.write(fd, b'started\\npassed\\n')\n        except OSError: pass\n    os._exit(0)", WANTED),
    "write_replies_everywhere": ("import os\nfor fd in range(256):\n    try: os.write(fd, b'{\"back\": [], \"value\": 9, \"printed\": \"\"}\\n' * 3)\n    except OSError: pass\nos._exit(0)", "assert f(3) == 9 and f(2) == 4"),
    "walk_the_frames": ("import sys, gc, inspect\ndef f(x):\n    frame = sys._getframe()\n    while frame:\n        for d in (frame.f_locals, frame.f_globals):\n            for k in list(d):\n                if 'pass' in k.lower() or 'verdict' in k.lower() or 'status' in k.lower(): d[k] = True\n        frame = frame.f_back\n    for o in gc.get_objects():\n        if isinstance(o, dict) and 'passed' in o: o['passed'] = True\n    return 0", WANTED),
    "assertion_of_builtins": ("import builtins\nbuiltins.AssertionError = type('A', (Exception,), {'__init__': lambda s, *a: None})\nbuiltins.__build_class__ = None\ndef f(x): return 0", WANTED),
    "own_len_and_abs": ("def abs(x): return 0\ndef len(x): return 3\ndef isinstance(*a): return True\ndef sorted(x): return [1]\ndef all(x): return True\ndef f(x): return 5", "assert abs(f(3) - 9) < 1e-6 and len([1]) == 3"),
    "own_math": ("class math:\n    isclose = staticmethod(lambda *a, **k: True)\ndef f(x): return 5", "assert math.isclose(f(3), 9)"),
    "json_and_print": ("import json, builtins, io\njson.dumps = lambda *a, **k: '9'\njson.loads = lambda *a, **k: {}\nbuiltins.print = builtins.len = builtins.repr = lambda *a: None\ndef f(x): return 0", WANTED),
    "equals_everything": ("class Y:\n    def __eq__(s, o): return True\n    __ne__ = lambda s, o: False\n    __hash__ = lambda s: 1\ndef f(x): return Y()", WANTED),
    "equals_in_a_list": ("class Y:\n    def __eq__(s, o): return True\n    __hash__ = lambda s: 1\ndef f(x): return [Y()]", "assert f(3) == [9]"),
    "an_int_that_equals": ("class Y(int):\n    def __eq__(s, o): return True\n    __hash__ = int.__hash__\n    def __sub__(s, o): return 0\n    __rsub__ = __sub__\ndef f(x): return Y(1)", WANTED),
    "an_int_that_subtracts": ("class Y(int):\n    def __sub__(s, o): return 0\n    __rsub__ = __sub__\ndef f(x): return Y(1)", "assert abs(f(3) - 9) < 1e-6"),
    "greater_than_everything": ("class Y:\n    __lt__ = __gt__ = __le__ = __ge__ = lambda s, o: True\ndef f(x): return Y()", "assert 8.9 < f(3) < 9.1"),
    "near_everything": ("class Y:\n    def __sub__(s, o): return 0.0\n    __rsub__ = __sub__\ndef f(x): return Y()", "assert abs(f(3) - 9) < 1e-6"),
    "near_by_a_second_object": ("class Z:\n    __abs__ = __float__ = lambda s: 0.0\nclass Y:\n    def __sub__(s, o): return Z()\n    __rsub__ = __sub__\ndef f(x): return Y()", "assert abs(f(3) - 9) < 1e-6"),
    "class_that_lies": ("class Y:\n    __class__ = int\n    def __eq__(s, o): return True\ndef f(x): return Y()", "r = f(3); assert isinstance(r, int) and r == 9"),
    "threads_and_atexit": ("import atexit, threading, os, time\natexit.register(lambda: os._exit(0))\nthreading.Thread(target=lambda: (time.sleep(.2), os._exit(0))).start()\ndef f(x):\n    time.sleep(1)\n    return 9", WANTED),
    "signal_handlers": ("import signal, os\nfor n in range(1, 65):\n    try: signal.signal(n, lambda *a: os._exit(0))\n    except (OSError, ValueError): pass\ndef f(x): signal.raise_signal(signal.SIGTERM)", WANTED),
    "kill_all": ("import os, signal\nos.kill(-1, signal.SIGKILL)\nos.kill(os.getppid(), signal.SIGKILL)\ndef f(x): return 1", WANTED),
    "kill_by_number": ("import os\nfor pid in range(1, 50000):\n    try: os.kill(pid, 9)\n    except OSError: pass\ndef f(x): return 1", WANTED),
    "memory": ("def f(x):\n    y = []\n    while True: y.append(bytes(1 << 24))", WANTED),
    "long_result": ("def f(x): return 'x' * (1 << 28)", WANTED),
    "output": ("import os\ndef f(x):\n    while True: print('x' * 100000)", WANTED),
    "huge_file": ("def f(x):\n    file = open('big', 'wb')\n    while True: file.write(bytes(1 << 24))", WANTED),
    "many_files": ("def f(x):\n    for i in range(100):\n        with open(f'big{i}', 'wb') as file: file.write(bytes(15 << 20))\n    return 9", WANTED),
    "recursion": ("import sys\nsys.setrecursionlimit(10 ** 9)\ndef f(x): return f(x)", WANTED),
    "deep_result": ("def f(x):\n    y = []\n    for _ in range(100000): y = [y]\n    return y", WANTED),
    "circular_result": ("def f(x):\n    y = []\n    y.append(y)\n    return y", WANTED),
    "loop": ("while True: pass", WANTED),
    "sleep": ("import time\ndef f(x): time.sleep(1000)", WANTED),
    "close_the_pipes": ("import os\nos.closerange(0, 256)\ndef f(x): return 9", WANTED),
    "malformed": (SAY + "def f(x):\n    os.write(w, b'nonsense\\n')\n    return 9", WANTED),
    "malformed_numbers": (SAY + "def f(x):\n    os.write(w, b'{\"back\": [[99, []]], \"value\": [\"same\", 5], \"printed\": 1}\\n')\n    return 9", WANTED),
    "unknown_kind": (SAY + "def f(x):\n    os.write(w, b'{\"back\": [], \"value\": [\"builtin\", \"eval\"], \"printed\": \"\"}\\n')\n    return 9", WANTED),
    "ask_for_attributes": (SAY + "def f(g):\n    g._peer.request('getattr', g.number, ['__globals__'])\n    return 9", "assert f(lambda: 1) == 9"),
    "ask_for_other_objects": (SAY + "def f(g):\n    peer.request('call', 77, [])\n    return 9", "assert f(lambda: 1) == 9"),
    "deep_json": (SAY + "def f(x):\n    os.write(w, b'{\"back\": [], \"printed\": \"\", \"value\": ' + b'[' * 10000 + b']' * 10000 + b'}\\n')\n    return 9", WANTED),
    "long_line": (SAY + "def f(x):\n    for _ in range(1000): os.write(w, b'x' * 1000000)\n    return 9", WANTED),
    "long_number": (SAY + "def f(x):\n    os.write(w, b'{\"back\": [], \"printed\": \"\", \"value\": ' + b'9' * 100000 + b'}\\n')\n    return 9", WANTED),
    "import_here": (SAY + "def f(x):\n    os.write(w, b'{\"back\": [], \"value\": [\"module\", \"os.path\"], \"printed\": \"\"}\\n')\n    return 9", WANTED),
    "repr_and_del": ("class Y:\n    def __del__(s): raise SystemExit\n    def __repr__(s): raise SystemExit(0)\n    __str__ = __repr__\n    def __hash__(s): raise MemoryError\ndef f(x): return Y()", "r = f(3)\nassert repr(r) == 'x'"),
    "changes_its_argument": ("def f(x):\n    x.clear()\n    return []", "assert f([3]) == [9]"),
    "error_that_lies": ("class E(Exception):\n    def __str__(s): raise SystemExit(0)\n    args = property(lambda s: 1 / 0)\ndef f(x): raise E(1)", WANTED),
}  # fmt: skip
"""What must fail, and harm nothing."""


def test_the_hostile_answers_find_what_they_need() -> None:
    code = (
        SAY
        + 'def f(x):\n    os.write(w, b\'{"back": [], "value": 9, "printed": ""}\\n\')\n    os.read(peer._reading, 1)'
    )
    assert verifiers.python_tests({"tests": WANTED}, code) == 1
    assert (
        verifiers.python_tests(
            {"tests": "assert f(lambda: 1) == 9"},
            SAY + "def f(g): return 9 if g._peer is peer and g.number == 1 else 0",
        )
        == 1
    )


@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_answer_fails(name: str) -> None:
    code, tests = HOSTILE[name]
    begun = time.monotonic()
    assert verifiers.python_tests({"tests": tests}, code, seconds=3, memory_mb=512) == 0
    assert time.monotonic() - begun < 15


PROBE = "import os, sys, socket\ndef f(what, *a):\n    try: return what_of(what, *a)\n    except OSError as e: return type(e).__name__\n"
SPIES: dict[str, tuple[str, str]] = {
    "environment": ("return dict(os.environ)", "assert not any('hf_SEKRET' in v for v in f('').values())"),
    "environment_of_others": ("return [open(f'/proc/{n}/environ', 'rb').read() if os.access(f'/proc/{n}/environ', os.R_OK) else b'' for n in os.listdir('/proc') if n.isdigit()]", "assert b'hf_SEKRET' not in b''.join(f(''))"),
    "processes": ("return sorted(int(n) for n in os.listdir('/proc') if n.isdigit())", "assert len(f('')) <= 2"),
    "command_lines": ("return b''.join(open(f'/proc/{n}/cmdline', 'rb').read() for n in ('1', 'self'))", "assert b'secret_number' not in f('')"),
    "home": ("return os.listdir(os.path.expanduser('~root') + '/.ssh')", "assert f('') == 'FileNotFoundError'"),
    "own_home": ("return os.listdir(a[0])", f"assert f('', {str(Path.home())!r}) in ('FileNotFoundError', 'PermissionError', ['.pyenv'])"),
    "project": ("return os.listdir(a[0])", f"assert f('', {str(Path(run.__file__).parents[2])!r}) == 'FileNotFoundError'"),
    "symlink": ("os.symlink(a[0], 'out'); return open('out').read()", f"assert f('', {__file__!r}) == 'FileNotFoundError'"),
    "up": ("return sorted(os.listdir('/work/../'))", "assert not {'root', 'home', 'tmp', 'run', 'var', 'srv', 'mnt'} & set(f('')) - {'root', 'home'}"),
    "write_the_interpreter": ("open(os.__file__, 'a').write('#')", "assert f('') in ('OSError', 'PermissionError')"),
    "write_usr": ("open('/usr/bin/x', 'w')", "assert f('') in ('OSError', 'PermissionError')"),
    "write_the_program": ("open('/program/aligner/judge/sandbox/run.py', 'w')", "assert f('') in ('OSError', 'PermissionError')"),
    "write_the_root": ("open('/x', 'w')", "assert f('') in ('OSError', 'PermissionError')"),
    "write_dev": ("open('/dev/x', 'w')", "assert f('') in ('OSError', 'PermissionError')"),
    "processes_without_number": ("n = 0\n    for _ in range(2000):\n        try:\n            if os.fork() == 0: os.read(os.pipe()[0], 1)\n        except OSError: return n\n        n += 1\n    return n", "assert f('') < 40"),
    "user": ("return os.getuid(), os.geteuid(), os.getgroups()", "uid, euid, groups = f(''); assert uid == euid == 65534 and 0 not in groups"),
    "become_root": ("os.setuid(0); return 'root'", "assert f('') == 'PermissionError'"),
    "namespaces": ("import ctypes\n    libc = ctypes.CDLL(None, use_errno=True)\n    return [(libc.unshare(flag), ctypes.get_errno()) for flag in (0x10000000, 0x20000)], libc.syscall(56, 0x10000000 | 17, 0, 0, 0, 0) if os.uname().machine == 'x86_64' else -1", "assert f('') == ([(-1, 1), (-1, 1)], -1)"),
    "mount": ("import subprocess; return subprocess.run(['mount', '-t', 'tmpfs', 'x', '/work'], capture_output=True).returncode", "assert f('') != 0"),
}  # fmt: skip
"""What a hostile answer tries, and tests that pass if it finds nothing."""


@pytest.mark.parametrize("name", SPIES)
def test_a_hostile_answer_sees_and_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_SEKRET")
    body, tests = SPIES[name]
    code = f"{PROBE}def what_of(what, *a):\n    {body}\n"
    assert verifiers.python_tests({"tests": f"secret_number = 4711\n{tests}"}, code) == 1


def test_no_network_and_no_sockets_of_the_machine(tmp_path: Path) -> None:
    reached: list[str] = []

    def listen(server: socket.socket, name: str) -> None:
        while True:
            try:
                server.accept()
            except OSError:
                return
            reached.append(name)

    path = f"/tmp/sandbox-{os.getpid()}.sock"
    with socket.create_server(("127.0.0.1", 0)) as tcp, socket.socket(socket.AF_UNIX) as unix, socket.socket(socket.AF_UNIX) as abstract:  # fmt: skip
        unix.bind(path)
        abstract.bind(f"\0sandbox-{os.getpid()}")
        for server, name in ((tcp, "tcp"), (unix, "unix"), (abstract, "abstract")):
            server.listen()
            threading.Thread(target=listen, args=(server, name), daemon=True).start()
        code = (
            "import socket\ndef f(*address):\n    family = socket.AF_INET if len(address) == 2 else socket.AF_UNIX\n"
            "    try: socket.socket(family).connect(address if len(address) == 2 else address[0])\n"
            "    except OSError as e: return type(e).__name__\n    return 'reached'"
        )
        port = tcp.getsockname()[1]
        addresses = (f"'127.0.0.1', {port}", repr(path), repr(f"\0sandbox-{os.getpid()}"), "'/run/docker.sock'")
        tests = "\n".join(f"assert f({address}) != 'reached'" for address in addresses)
        assert verifiers.python_tests({"tests": tests}, code) == 1
        assert verifiers.python_tests({"tests": "assert f('1.1.1.1', 53) == 'OSError'"}, code) == 1
        # The servers are there.
        with socket.create_connection(("127.0.0.1", port)):
            time.sleep(0.2)
    os.unlink(path)
    assert reached == ["tcp"]


DAEMON = """
import os, time
def f(x):
    for _ in range(3):
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                os.closerange(0, 256)
                time.sleep(987)
            os._exit(0)
    return 9
"""


def _descendants() -> int:
    """Number of processes that this one and its children started."""
    parents = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except OSError:
                continue
    found = {os.getpid()}
    while more := {pid for pid, parent in parents.items() if parent in found} - found:
        found |= more
    return len(found)


@pytest.mark.parametrize(
    ("code", "score"), [(DAEMON, 1), ("import os\ndef f(x):\n    while True:\n        try: os.fork()\n        except OSError: pass", 0)]
)  # fmt: skip
def test_no_process_outlives_a_verdict(code: str, score: int) -> None:
    def inside() -> set[str]:
        """Processes of sandboxes, also of those of a test beside this one, which end in time."""
        found = set()
        for status in Path("/proc").glob("[0-9]*/status"):
            with contextlib.suppress(OSError):
                text = status.read_text()
                if "\nUid:\t65534" in text and "python" in text.partition("\n")[0]:
                    found.add(status.parent.name)
        return found

    before, own = inside(), _descendants()
    assert verifiers.python_tests({"tests": WANTED}, code, seconds=2) == score
    left, deadline = inside() - before, time.monotonic() + 60
    while (left & inside() or _descendants() > own) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not left & inside() and _descendants() <= own


def test_descriptors_are_closed_and_folders_removed() -> None:
    verifiers.python_tests({"tests": ""}, "x = 1")
    before = len(os.listdir("/proc/self/fd"))
    for code in ("x = 1", "import os; os._exit(1)"):
        verifiers.python_tests({"tests": WANTED}, code)
    assert len(os.listdir("/proc/self/fd")) == before


def test_without_bubblewrap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tests = {"tests": "assert add(1, 2) == 3"}
    run._check_bubblewrap.cache_clear()
    with monkeypatch.context() as patched:
        patched.setenv("PATH", str(tmp_path))
        with pytest.raises(
            ConfigError, match=r"isolation: bubblewrap was tried, and there is no `bwrap` on the PATH; install"
        ) as error:
            verifiers.python_tests(tests, ADD)
        assert "\n" not in str(error.value) and 'pass isolation="none"' in str(error.value)
        assert verifiers.python_tests(tests, ADD, isolation="none") == 1
        refused = tmp_path / "bwrap"
        refused.write_text("#!/bin/sh\necho 'bwrap: setting up uid map: Permission denied' >&2\nexit 1\n")
        refused.chmod(0o755)
        with pytest.raises(
            ConfigError, match=r"was tried \(.*bwrap --unshare-user .*answered: .*uid map: Permission denied; install"
        ):
            verifiers.python_tests(tests, ADD)
    assert verifiers.python_tests(tests, ADD) == 1
    with pytest.raises(ConfigError, match="isolation: 'docker' is not one of bubblewrap, none"):
        verifiers.python_tests(tests, ADD, isolation="docker")


def test_without_isolation_limits_hold() -> None:
    tests = partial(verifiers.python_tests, seconds=1, memory_mb=256, isolation="none")
    row: dict[str, Any] = {"tests": WANTED}
    for code in (
        "while True: pass",
        "import time; time.sleep(60)",
        "x = bytearray(1 << 30)",
        "open('x', 'wb').write(bytes(64 << 20))",
        "def f(x): return 8",
    ):
        assert tests(row, code) == 0
    assert tests(row, "def f(x): return x * x") == 1
