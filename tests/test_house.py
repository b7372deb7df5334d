"""Laws of the house: which way imports run, what the wheel holds, that recipes can be read and shipped."""

import ast
from pathlib import Path

import pytest
import tomli

ROOT = Path(__file__).parent.parent
ROOMS = {"aligner": ROOT / "aligner", "recipes": ROOT / "recipes", "executors": ROOT / "executors"}
FILES = [path for room in ROOMS.values() for path in sorted(room.glob("*.py"))]

# Module -> modules of the package that it may name; what is not listed may name anything but recipes and executors.
ALLOWED = {
    "aligner.errors": set(),
    "aligner.losses": set(),
    "aligner.logprobs": set(),
    "aligner.rows": {"aligner.errors"},
    "aligner.unpaired": {"aligner.losses"},
    "aligner.tokens": {"aligner.errors", "aligner.rows"},
    "aligner.examples": {"aligner.errors", "aligner.rows", "aligner.tokens"},
    "aligner.packing": {"aligner.errors"},
    "aligner.batch": {"aligner.examples"},
    "aligner.order": set(),
    "aligner.cutting": {"aligner.packing"},
    "aligner.sources": {"aligner.errors", "aligner.rows"},
    "aligner.parallel": {"aligner.errors"},
    "aligner.naming": {"aligner.files"},
    "aligner.metrics": set(),
    "aligner.objective": {"aligner.examples", "aligner.losses", "aligner.metrics", "aligner.unpaired"},
    "aligner.cpu": {"aligner.norms", "aligner.parallel"},
    "aligner.files": set(),
    "aligner.selection": {"aligner.errors"},
    "aligner.sampling": {"aligner.errors"},
    "aligner.verdicts": set(),
    "aligner.ratings": set(),
    "aligner.journal": {"aligner.errors", "aligner.files"},
    "aligner.engines": {"aligner.rows", "aligner.sampling"},
    "aligner.kv_cache": set(),
    "aligner.decoding": {"aligner.cpu", "aligner.kv_cache", "aligner.sampling"},
}
TORCH_ONLY = {f"aligner.{n}" for n in ("losses", "unpaired", "logprobs", "metrics", "objective", "batch")}
TOPS = {"aligner.cli", "aligner.context", "aligner.choices", "aligner"}


def module_name(path: Path) -> str:
    room = path.parent.name
    name = "aligner" if room == "aligner" else f"aligner.{room}"
    return name if path.stem == "__init__" else f"{name}.{path.stem}"


def imported(path: Path) -> set[str]:
    """Names of all modules that a file imports, at its top or inside functions."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = {f"{node.module}.{name.name}" for name in node.names}
            found |= (
                names if node.module in ("aligner", "aligner.recipes", "aligner.executors") else {node.module or ""}
            )
    return found


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_run_one_way(path: Path) -> None:
    name, names = module_name(path), imported(path)
    assert not {n for n in names if n.split(".")[0] in ("recipes", "executors", "tests")}, "name them aligner.*"
    ours = {n for n in names if n.startswith("aligner.")}
    if name in ALLOWED:
        assert ours <= ALLOWED[name]
    if name in TORCH_ONLY:
        assert {n.split(".")[0] for n in names} <= {
            "torch",
            "aligner",
            "__future__",
            "collections",
            "dataclasses",
            "functools",
            "inspect",
            "math",
            "typing",
        }
    if name.startswith("aligner.recipes"):
        assert not {n for n in ours if n.startswith("aligner.executors")}
    elif name.startswith("aligner.executors"):
        theirs = {n for n in ours if not n.startswith(("aligner.executors", "aligner.errors", "aligner.secrets"))}
        assert not theirs, "an executor knows no recipe and no trainer"
    elif name not in TOPS:
        assert not {n for n in ours if n.startswith(("aligner.recipes", "aligner.executors"))}


def test_only_one_file_changes_other_peoples_code() -> None:
    """Nothing but cpu.py assigns to an attribute of something that it imported."""
    for path in FILES:
        if path.name == "cpu.py":
            continue
        tree = ast.parse(path.read_text())
        borrowed = {
            (name.asname or name.name).split(".")[0]
            for node in ast.walk(tree)
            if isinstance(node, ast.Import | ast.ImportFrom)
            for name in node.names
        } - {"sys"}  # whose hooks are there to be set
        for node in ast.walk(tree):
            targets = node.targets if isinstance(node, ast.Assign) else []
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "setattr":
                targets = [ast.Attribute(node.args[0], "")]
            for target in targets:
                if isinstance(target, ast.Attribute) and isinstance(target.value, ast.Name):
                    assert target.value.id not in borrowed, f"{path}:{node.lineno}"  # type: ignore[attr-defined]


def test_rooms_stay_small() -> None:
    for path in FILES:
        lines = path.read_text().splitlines()
        assert len(lines) <= 330, f"{path.name} has {len(lines)} lines"
        for node in ast.walk(ast.parse("\n".join(lines))):
            if isinstance(node, ast.FunctionDef):
                said = (ast.get_docstring(node) or "").count("\n")
                assert (node.end_lineno or 0) - node.lineno - said <= 66, f"{path.name}: {node.name}"


def test_the_wheel_holds_every_room() -> None:
    settings = tomli.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert set(settings["packages"]) == {"aligner", "aligner.recipes", "aligner.executors"}
    assert {name for name, room in ROOMS.items() if (room / "__init__.py").exists()} == set(ROOMS)
    assert "assets/**" in settings["package-data"]["aligner"]
    for name in ("recipes", "executors"):
        link = ROOT / "aligner" / name
        assert link.is_symlink() and link.resolve() == ROOMS[name]


def test_light_modules_load_without_nemo() -> None:
    import subprocess
    import sys

    code = (
        "import sys; import aligner, aligner.rows, aligner.examples, aligner.losses, aligner.api, aligner.errors;"
        "heavy = {'nemo', 'megatron', 'lightning', 'transformers'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
