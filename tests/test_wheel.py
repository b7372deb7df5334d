"""A wheel built from the tree works without the tree."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TIME_LIMIT = 900
DATA_FILES = """
from aligner.common import html_pages
from aligner.cli import shell_completion
from aligner.demo import toy
from aligner.executors import sacct_shim
from aligner.judge import templates
from aligner.lint import page
from aligner.report import run_page
import aligner
print(aligner.__file__)
assert page.page([]).startswith("<!doctype html>") and run_page.TEMPLATE.is_file()
assert templates.template("additive", "x", needed={"prompt", "response"}, known={"min_score", "max_score"})
assert "@CASES@" in shell_completion.SCRIPT.read_text() and (sacct_shim.SHIM / "sacct").is_file()
assert toy.tokenizer().text_to_ids("1+1=")
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment with the wheel; dependencies are those of this environment, without the tree."""
    folder = tmp_path_factory.mktemp("wheel")
    tree = folder / "tree"
    # Only what git has, and not in place: a build leaves files behind.
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, listed.split("\0")):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, tree / name, follow_symlinks=False)
    build = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder)]
    done = subprocess.run([*build, str(tree)], capture_output=True, text=True, timeout=TIME_LIMIT)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "would be ignored" not in done.stdout + done.stderr
    venv.create(folder / "env", with_pip=False)
    python = folder / "env/bin/python"
    (packages,) = (folder / "env/lib").glob("python*/site-packages")
    # A folder that a .pth file names is searched, but its own .pth files, which lead to the tree, are not read.
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    (wheel,) = folder.glob("*.whl")
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    done = subprocess.run(install, capture_output=True, text=True, timeout=TIME_LIMIT)
    assert done.returncode == 0, done.stderr[-3000:]
    return python


def run(python: Path, code: str, *words: str, folder: Path) -> str:
    done = subprocess.run(
        [str(python), "-c", code, *words], cwd=folder, capture_output=True, text=True, timeout=TIME_LIMIT,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_data_files_are_in_the_wheel(python: Path, tmp_path: Path) -> None:
    place = run(python, DATA_FILES, folder=tmp_path).splitlines()[0]
    assert Path(place).is_relative_to(python.parents[1])


@pytest.mark.slow
def test_the_demo_runs_from_the_wheel(python: Path, tmp_path: Path) -> None:
    """Shortened: the command itself is tested from the tree."""
    nemo = "import sys; from nemo_run.__main__ import app; sys.argv[0] = 'nemo'; sys.exit(app())"
    short = ["trainer.max_steps=4", "resume.init_stage.trainer.max_steps=4"]
    shown = run(python, nemo, "llm", "align", "--factory", "tiny_dpo", "-y", *short, folder=tmp_path)
    assert "checkpoints  runs/tiny_dpo/checkpoints" in shown
