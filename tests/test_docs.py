"""What README and docs/ say can be run is run, or at least is what the program understands."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from launching import NEMO, PYTHON, TIME_LIMIT, nemo_each

from aligner.common.run_folder import read_metrics

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(language: str) -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        for block in re.findall(rf"```{language}\n(.*?)```", page.read_text(), flags=re.DOTALL):
            found.append((page.name, block))
    return found


def commands() -> list[tuple[str, list[str]]]:
    lines = [(page, line) for page, block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
    return [(page, shlex.split(line, comments=True)) for page, line in lines if line.strip()]


@pytest.mark.parametrize(("page", "words"), [(p, w) for p, w in commands() if w[:3] == ["nemo", "llm", "align"]])
def test_every_align_command_in_the_docs_is_understood(
    page: str, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Parsed by the very code of the command line, up to the point where the job would start."""
    import nemo_run as run

    from aligner import executors  # noqa: F401 - registers factories
    from aligner.api import align
    from aligner.cli import commands  # noqa: F401 - registers factories
    from aligner.cli.context import RecipeContext

    monkeypatch.chdir(tmp_path)
    arguments = words[3:]
    context = RecipeContext(name="align")
    if "--factory" in arguments:
        context.factory = arguments[arguments.index("--factory") + 1]
    overrides = [word for word in arguments if re.match(r"[a-z_.]+=", word) and not word.startswith("run.")]
    if "--yaml" in arguments:
        return
    recipe = context.parse_fn(align, overrides)
    assert isinstance(recipe, run.Partial)
    for word in overrides:
        path, value = word.split("=", 1)
        at = recipe
        for name in path.split("."):
            at = getattr(at, name)
        chosen = ("log.wandb", "loss", "reference", "peft", "model.config.attention_backend")
        same = float(value) == at if isinstance(at, float) else str(at) == value or (at is None and value == "none")
        assert same or (path in chosen and isinstance(at, run.Config | run.Partial))


@pytest.mark.parametrize("words", [w for _, w in commands() if w[2:3] == ["self-reward"]], ids=str)
def test_every_self_reward_command_in_the_docs_is_understood(words: list[str]) -> None:
    from aligner.cli import commands  # noqa: F401 - registers factories
    from aligner.cli.stage_contexts import PipelineContext
    from aligner.judge.self_rewarding import self_reward

    context = PipelineContext(name="self-reward", factory=words[words.index("--factory") + 1])
    settings = [word for word in words if re.match(r"[a-z_.0-9\[\]]+=", word) and not word.startswith("run.")]
    assert context.parse_fn(self_reward, settings).iterations


def test_the_site_is_made_without_a_broken_link(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path / "site")]
    env = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIME_LIMIT, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    first = (tmp_path / "site/index.html").read_text()
    assert "report.png" in first
    # Everything that a page loads is the site's own.
    assert not re.findall(r"<(?:script|link rel=\"stylesheet\")[^>]*(?:src|href)=\"https?://", first)
    assert "label_smoothing" in (tmp_path / "site/reference/index.html").read_text()


def execute(block: str, folder: Path) -> None:
    script = folder / "script.py"
    script.write_text(block)
    env = os.environ | {"NEMORUN_HOME": str(folder.parent / "home")}  # which may have no space in it
    done = subprocess.run(
        [*PYTHON, str(script)], capture_output=True, text=True, timeout=TIME_LIMIT, cwd=folder, env=env
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_two_commands_train_both_stages_and_adapters_on_them(tmp_path: Path) -> None:
    """The README's own lines, shortened to 10 steps."""
    lines = [words for _, words in commands() if any("sums_" in word for word in words)]
    assert [words[2] for words in lines] == ["align", "align", "align", "merge-lora", "export-hf"]
    short = [[*words[1:], *(["trainer.max_steps=10"] if words[2] == "align" else [])] for words in lines]
    for words, (code, _, errors) in zip(lines, nemo_each(short, tmp_path), strict=True):
        assert code == 0, (words, errors[-3000:])
    sft, dpo, lora = (read_metrics(tmp_path / f"runs/sums_{stage}/metrics.csv") for stage in ("sft", "dpo", "lora"))
    assert sft[-1]["train/loss"] < sft[0]["train/loss"]
    for rows in (dpo, lora):
        assert rows[0]["val/loss"] == pytest.approx(0.6931471806, abs=1e-6)
        assert rows[0]["val/logps_chosen_mean"] == pytest.approx(dpo[0]["val/logps_chosen_mean"])
    assert (tmp_path / "merged/weights/.metadata").is_file()
    assert (tmp_path / "adapter/adapter_model.safetensors").is_file()


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The README's first command, in a folder that its further lines go on in, and what it said."""
    folder = tmp_path_factory.mktemp("a path with spaces")
    command = [NEMO, "llm", "align", "--factory", "tiny_dpo", "-y"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=TIME_LIMIT)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder, done.stdout


def test_the_demo_aligns_a_model(demo: tuple[Path, str]) -> None:
    folder, said = demo
    for words in ("held-out pairs", "accuracy", "margin", "checkpoints  runs/tiny_dpo/checkpoints"):
        assert words in said
    measured = [row for row in read_metrics(folder / "runs/tiny_dpo/metrics.csv") if "val/acc" in row]
    assert measured[0]["val/acc"] == 0.5
    assert measured[-1]["val/acc"] >= 0.9


@pytest.mark.parametrize(("page", "block"), [(p, b) for p, b in blocks("python") if "run.run(" in b])
def test_the_python_of_the_docs_runs(page: str, block: str, demo: tuple[Path, str]) -> None:
    folder, _ = demo
    execute(block, folder)
    (metrics,) = folder.glob("runs/from_python/metrics.csv")
    trained = [line["step"] for line in read_metrics(metrics) if "train/loss" in line]
    assert trained == list(range(20))


@pytest.mark.slow
@pytest.mark.parametrize("block", [b for _, b in blocks("python") if "__main__" in b and "executors.launch(" in b])
def test_stages_of_the_docs_follow_each_other(block: str, demo: tuple[Path, str]) -> None:
    folder, _ = demo
    execute(block, folder)
    sft, dpo = (read_metrics(folder / f"runs/short_{stage}/metrics.csv") for stage in ("sft", "dpo"))
    assert sft[-1]["train/loss"] < sft[0]["train/loss"]
    assert dpo[0]["val/loss"] == pytest.approx(0.6931471806, abs=1e-6)


def test_rounds_of_the_docs_are_understood(demo: tuple[Path, str]) -> None:
    """Generating is done as it is written, on the demo's run; pipelines are shown; a server is not there."""
    folder, _ = demo
    (folder / "prompts.jsonl").write_text('{"prompt": "1+1="}\n{"prompt": "2+2="}\n')
    asked = [words for _, words in commands() if words[2:3] in (["generate-responses"], ["judge-responses"])]
    iterations = [
        [*words, "--dryrun"] for _, words in commands() if words[2:3] == ["self-reward"] and "tiny_" in " ".join(words)
    ]
    assert len(asked) == 2 and iterations
    (made, *_), (judged, *_), *shown = nemo_each([words[1:] for words in [*asked, *iterations]], folder)
    assert made == 0 and len((folder / "candidates.jsonl").read_text().splitlines()) == 8
    assert judged == 1
    for code, said, errors in shown:
        assert code == 0, errors[-3000:]
        assert "iterations" in said
    (block,) = [b for page, b in blocks("python") if page == "self_rewarding.md"]
    held: dict[str, object] = {}
    exec(block, held)
    assert "recipe" in held


def test_packs_of_the_docs_are_made_as_their_run_wants_them() -> None:
    from aligner.recipes import smollm2_135m

    (words,) = [w for page, w in commands() if page == "data.md" and w[2] == "pack-preferences"]
    given = dict(word.split("=", 1) for word in words[4:])
    data = smollm2_135m.dpo_recipe().data
    assert (given["apply_chat_template"], given["seq_length"]) == (str(data.apply_chat_template), str(data.seq_length))


def test_files_that_the_docs_link_to_are_there() -> None:
    for page in PAGES:
        assert not re.search(r"^[A-Z]{5,}$", page.read_text(), flags=re.MULTILINE), f"{page.name}: a gap to be filled"
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_promises_name_tests_that_exist() -> None:
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "docs/trust.md").read_text())
    assert len(named) > 20
    for file, test in named:
        assert f"def {test}(" in (ROOT / file).read_text(), f"{file}::{test}"
