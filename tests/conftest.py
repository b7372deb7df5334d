"""What tests share: a tiny run that takes seconds, on the real engine."""

import gc
import json
import os
import random
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import warm
from serving import serving

# Tests run two at a time on as many cores. Threads of a second process would wait for each other in a busy loop, which
# doubles the time; read by torch when it is first imported, here and in every process that a test starts.
os.environ.setdefault("OMP_NUM_THREADS", "1")
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


def write_rows(path: Path, count: int, seed: int = 0, longest: int = 6) -> Path:
    """Sums with answers of very unequal length; some are one character, some differ at their first token."""
    draw = random.Random(seed)
    lines = []
    for _ in range(count):
        a, b = draw.randint(0, 99), draw.randint(0, 99)
        wrong = draw.choice(["?", "no idea", "it is " + "so " * draw.randint(1, longest) + str(a * b)])
        lines.append(json.dumps({"prompt": f"{a}+{b}=", "chosen_response": str(a + b), "rejected_response": wrong}))
    path.write_text("\n".join(lines) + "\n")
    return path


def make_tiny(tmp_path: Path) -> Callable[..., Any]:
    """A function that makes a `dpo_recipe` of a model of two layers, on 16 + 6 rows, without an SFT stage."""

    def recipe(name: str = "run", rows: int = 16, held_out: int = 6, **options: Any) -> Any:
        from aligner.recipes import tiny_llama

        train = write_rows(tmp_path / f"train{rows}.jsonl", rows)
        valid = write_rows(tmp_path / f"valid{held_out}.jsonl", held_out, seed=1) if held_out else None
        made = tiny_llama.dpo_recipe(
            dir=str(tmp_path / "runs"),
            name=name,
            train=str(train),
            validation=str(valid) if valid else None,
            **options,
        )
        made.resume.init_stage = None
        made.model.config.num_layers = 2
        made.model.config.hidden_size = 64
        made.model.config.ffn_hidden_size = 96
        made.data.global_batch_size, made.data.micro_batch_size = 4, 2
        made.trainer.max_steps = 4
        made.trainer.val_check_interval = 2
        made.log.ckpt.every_n_train_steps = 2
        return made

    return recipe


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
