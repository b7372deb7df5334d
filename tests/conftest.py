"""What tests share: a tiny run that takes seconds, on the real engine."""

import gc
import os
import signal
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import warm
from making import make_tiny, write_rows
from serving import serving

# Tests run two at a time on as many cores. Threads of a second process would wait for each other in a busy loop, which
# doubles the time; read by torch when it is first imported, here and in every process that a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# A shell has what runs in its background ignore it, and so would every process of a test.
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# NeMo-Run looks once, when it is imported.
os.environ["NEMORUN_HOME"] = tempfile.mkdtemp(prefix="nemorun-")
# Workers inherit it, so that there is one for all.
if warm.PLACE not in os.environ:
    warm.prepare()


LONGEST = (
    "docs",
    "notebooks",
    "ranks",
    "slurm",
    "architectures",
    "docker",
    "checkpointing",
    "training_run",
    "adapters",
    "generation",
    "resume",
    "token_cache",
    "nemo1",
    "stopping",
    "live_references",
    "wheel",
    "launch",
    "commands",
    "huggingface",
    "packed",
    "reference",
    "judges",
    "weights",
    "patches",
    "self_rewarding",
    "layouts",
    "kill",
    "verify_resume",
    "accounts",
)
"""Files of tests by the time that they take, those of minutes first, so that two workers end together."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    names = [f"test_{name}" for name in LONGEST]
    items.sort(key=lambda item: names.index(item.path.stem) if item.path.stem in names else len(names))


def pytest_collection_finish() -> None:
    """All that is imported by now stays: a run ends with a collection, which need not look through it each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _() -> None:
    """Imports of models have NeMo imported already."""
    from aligner.checkpoint import huggingface

    huggingface.PYTHON = f"{warm.programs()}/python"


@pytest.fixture(scope="session")
def hf() -> Any:
    """The demo's tokenizer, which splits numbers into digits."""
    from transformers import AutoTokenizer

    from aligner.demo import toy

    return AutoTokenizer.from_pretrained(toy.TOKENIZER)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A file of forty pairs."""
    return write_rows(tmp_path / "rows.jsonl", 40)


@pytest.fixture
def tiny(tmp_path: Path) -> Callable[..., Any]:
    """See `make_tiny`."""
    return make_tiny(tmp_path)


@pytest.fixture(scope="session")
def tiny_in() -> Callable[[Path], Callable[..., Any]]:
    """`make_tiny` itself, for fixtures that choose their folder."""
    return make_tiny


@pytest.fixture
def execute() -> Callable[[Any], Path]:
    """Run a recipe in this process."""

    def run(recipe: Any) -> Path:
        import fiddle as fdl

        return fdl.build(recipe)()

    return run


@pytest.fixture
def serve() -> Iterator[Callable[[Any], str]]:
    """A function that starts a server of OpenAI's protocol with replies of the test's; see serving.py."""
    with serving() as start:
        yield start
