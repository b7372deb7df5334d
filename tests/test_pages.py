"""Every command of README, docs and `--help` as a user types it: in a shell, through the installed `nemo`.

`pytest -m slow -v tests/test_pages.py` is a table of them. What this machine lacks (GPUs, a cluster, a hub) is refused
in one line that says so, and the same command as a dry run is not.
"""

import gzip
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import warm
from launching import NEMO, TIME_LIMIT

from aligner.cli import commands

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "notebooks/README.md"]
NOT_OURS = {
    "make ": "the Makefile's, which CI runs",
    "python -u ": "NeMo-Aligner's, beside which ours stand",
    "nemo experiment ": "NeMo-Run's, of an experiment of the reader's",
    "python -m aligner.demo.smollm2": "downloads a model; a small one is in its place",
}


NO_SLURM = "this machine has no sbatch|Slurm does not answer"


class Typed(NamedTuple):
    """A command of a page."""

    page: str
    line: str

    @property
    def refused(self) -> str | None:
        """What a machine without GPUs, cluster and network says; None: nothing is missing."""
        words = self.line
        if "--dryrun" not in words and re.search(r"(align|self-reward) .*(llama3_8b|llama3_70b)", words):
            if "run.executor=slurm" in words:
                return NO_SLURM
            return "8 GPUs are needed, and this machine has 0"
        for needed, message in (
            ("run.executor=slurm", NO_SLURM),
            ("run.executor=docker", "Docker does not answer"),
            ("base_url=http://localhost:8000", "cannot be reached"),
            ("tokenizer=meta-llama/", "meta-llama/Meta-Llama-3-8B-Instruct"),
        ):
            if needed in words:
                return message
        return None


def lines_of_pages() -> list[Typed]:
    found = []
    for page in PAGES:
        for block in re.findall(r"^```bash\n(.*?)^```", page.read_text(), flags=re.DOTALL | re.MULTILINE):
            joined = re.sub(r"\\\n\s*", " ", block)
            found += [Typed(page.name, line.strip()) for line in joined.splitlines() if line.strip()]
    return found


def lines_of_help() -> list[Typed]:
    """Whole lines of help texts that begin with `nemo llm` and have no gap to fill."""
    found = []
    for name, command in commands.COMMANDS.items():
        text = commands._load(command.help) if command.help else ""
        for line in text.splitlines():
            if re.match(r"nemo llm [a-z-]+ (?!.* shows every part)", line) and "..." not in line:
                found.append(Typed(f"{name} --help", line))
    return found


LINES = list({
    one.line: one for one in [*lines_of_help(), *lines_of_pages()][::-1] if not one.line.startswith(tuple(NOT_OURS))
}.values())[::-1]  # fmt: skip
"""Each line once, on the first page that has it."""


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The README's first command, and the files that pages name."""
    folder = tmp_path_factory.mktemp("demo")
    code, _, errors = in_a_shell("nemo llm align --factory tiny_dpo -y", folder, tmp_path_factory.mktemp("bin"))
    assert code == 0, errors
    data = folder / "runs/data"
    rows = next(data.glob("arithmetic-train-*.jsonl")).read_text().splitlines()
    held_out = next(data.glob("arithmetic-validation-*.jsonl")).read_text().splitlines()
    demonstrations = next(data.glob("arithmetic-demonstrations-*.jsonl")).read_text()
    for name, lines in (
        ("train", rows[:512]), ("valid", held_out), ("hhh_train", rows[:128]), ("hhh_valid", held_out[:32]),
        ("a", rows[:128]), ("b", rows[128:256]), ("easy", held_out[:64]), ("hard", held_out[64:128]),
    ):  # fmt: skip
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "demonstrations.jsonl").write_text(demonstrations)
    (folder / "prompts.jsonl").write_text("".join(f'{{"prompt": "{i}+{i}="}}\n' for i in range(1, 5)))
    (folder / "rated.jsonl").write_text('{"prompt": "1+1=", "response": "2", "score": 5}\n')
    (folder / "pairs.jsonl.gz").write_bytes(gzip.compress((folder / "train.jsonl").read_bytes()))
    as_parquet(rows[:128], folder / "b.parquet")
    (folder / "data").mkdir()
    for i in range(2):
        as_parquet(rows[128 * i : 128 * (i + 1)], folder / f"data/part-{i}.parquet")
    for name in ("smollm2", "sft"):
        small_model(folder / "models" / name)
    for name in ("first", "second", "sft", "dpo", "rpo", "ipo", "llama_dpo"):
        shutil.copytree(folder / "runs/tiny_dpo", folder / "runs" / name, symlinks=True)
    return folder


def as_parquet(rows: list[str], path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist([json.loads(row) for row in rows]), path)


def small_model(folder: Path) -> None:
    """A Hugging Face model of two layers with a chat template, where SmolLM2 would be."""
    import transformers

    from aligner.demo import toy

    hf = transformers.AutoTokenizer.from_pretrained(toy.TOKENIZER)
    hf.chat_template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    config = transformers.LlamaConfig(
        vocab_size=len(hf), hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, eos_token_id=hf.eos_token_id, tie_word_embeddings=True,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    hf.save_pretrained(folder)


def in_a_shell(line: str, folder: Path, programs: Path) -> tuple[int, str, str]:
    """Exit code, output and errors of a line that bash reads; `nemo` is the installed one, in a warm Python."""
    nemo = programs / "nemo"
    if not nemo.exists():
        nemo.write_text(f'#!/bin/sh\nexec "{warm.programs()}/python" "{NEMO}" "$@"\n')
        nemo.chmod(0o755)
    env = os.environ | {
        "PATH": f"{programs}:{warm.programs()}:{os.environ['PATH']}",
        "COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb", "NEMORUN_HOME": f"{programs.parent}/nemorun",
    }  # fmt: skip
    done = subprocess.run(
        ["bash", "-c", line], cwd=folder, env=env, capture_output=True, text=True, timeout=TIME_LIMIT,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def shell(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str, str], Any]]:
    """Runs a line of a page, in a folder of that page, after the lines before it."""
    programs, folders = tmp_path_factory.mktemp("programs"), tmp_path_factory.mktemp("pages")

    def run(page: str, line: str) -> tuple[int, str, str]:
        folder = folders / re.sub(r"\W+", "-", page)
        if not folder.exists():
            shutil.copytree(demo, folder, symlinks=True)
        return in_a_shell(line, folder, programs)

    yield run


@pytest.mark.parametrize("typed", LINES, ids=[f"{one.page}: {one.line}"[:150] for one in LINES])
def test_a_command_does_what_its_page_says(typed: Typed, shell: Callable[[str, str], Any]) -> None:
    line = typed.line
    # Eight ranks of an 8B model on a machine without GPUs are only shown.
    if "run.executor=local" in line and "llama3" in line:
        line = f"{line.partition('#')[0]} --dryrun"
        refused = None
    else:
        refused = typed.refused
    code, said, errors = shell(typed.page, line)
    told = [text for text in errors.splitlines() if "pynvml" not in text]
    assert "Traceback" not in errors, errors[-3000:]
    if refused is None:
        assert code == 0, (said[-1500:], errors[-1500:])
    else:
        assert code == 1 and re.search(refused, told[-1]), errors[-1500:]


def test_every_command_of_ours_is_on_a_page() -> None:
    run = {words.split()[2] for _, words in LINES if words.startswith("nemo llm ")}
    assert run >= commands.COMMANDS.keys() - {"import-hf", "meta-judge"}
