"""Repository layout: which way imports run, how large packages and files are, what the wheel holds."""

import ast
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import tomli

ROOT = Path(__file__).parent.parent
PACKAGES: dict[str, str] = {
    "common": "errors, files, hashes, processes: what knows nothing of models",
    "backend": "device, kernels, patches: what the machine decides",
    "data": "lines on a disk -> batches of a step",
    "losses": "what is minimized and measured",
    "model": "a Megatron model as a policy and as a reference",
    "checkpoint": "weights on a disk, in and out",
    "callbacks": "what happens around each step",
    "train": "one run, from its arguments to its folder",
    "generate": "prompts -> responses",
    "judge": "responses -> scores -> rows, and iterations of these",
    "report": "pages about runs",
    "lint": "findings about rows",
    "estimate": "memory and time of a run, by arithmetic",
    "demo": "small data and models to try",
    "api": "align()",
    "recipes": "combinations by name",
    "executors": "where a recipe runs",
    "cli": "what is typed",
}
"""A package imports only packages above it, executors and recipes each other not at all."""
MAY_IMPORT = {
    "executors": {"common"},
    "recipes": {name for name in PACKAGES if name not in ("executors", "cli")},
}
TORCH_ONLY = ("pairs", "unpaired", "logprobs", "metrics")
STANDARD_LIBRARY = {"collections", "dataclasses", "math", "typing", "__future__"}
PATCHES = "aligner/backend/patches.py"
NEMO_FILES = 32
"""Files that import NeMo: as few as can be, since the engine may have to be replaced one day."""


def source_files() -> list[Path]:
    # The package's own folder holds links to recipes/ and executors/.
    ours = [path for path in sorted((ROOT / "aligner").glob("**/*.py")) if package_of(path) not in MAY_IMPORT]
    return ours + [path for name in MAY_IMPORT for path in sorted((ROOT / name).glob("*.py"))]


def package_of(path: Path) -> str:
    """`data` of aligner/data/rows.py; a file at the top of the package is a package of its own."""
    parts = path.relative_to(ROOT).parts
    return parts[0] if parts[0] != "aligner" else parts[1].removesuffix(".py")


FILES = source_files()


def imported_modules(path: Path) -> set[str]:
    """Full names of what a file imports, at its top, inside functions and under TYPE_CHECKING."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {name.name for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names |= {f"{node.module}.{name.name}" for name in node.names}
    return names


def imported_packages(path: Path) -> dict[str, str]:
    """Packages of ours that a file imports -> one of the names."""
    found = {}
    for name in imported_modules(path):
        parts = name.split(".")
        if parts[0] == "aligner" and len(parts) > 1:
            found["api" if parts[1] == "align" else parts[1]] = name
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_run_one_way(path: Path) -> None:
    package, order = package_of(path), list(PACKAGES)
    if package == "__init__":
        return
    allowed = MAY_IMPORT.get(package, set(order[: order.index(package)])) | {package}
    for other, name in imported_packages(path).items():
        assert other in allowed, f"{path.relative_to(ROOT)} imports {name}: {package} stands below {other}"
    tops = {name.split(".")[0] for name in imported_modules(path)}
    assert not tops & {"recipes", "executors", "tests"}, "write aligner.recipes, aligner.executors"


def test_files_of_a_package_form_no_circle() -> None:
    edges: dict[str, set[str]] = defaultdict(set)
    modules = {f"aligner.{package_of(path)}.{path.stem}" for path in FILES}
    for path in FILES:
        if path.stem != "__init__":
            here = f"aligner.{package_of(path)}.{path.stem}"
            found = imported_modules(path)
            edges[here] = {m for m in modules if m in found or any(name.startswith(f"{m}.") for name in found)} - {here}
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join([*above[above.index(module) :], module])
        if module not in done:
            for other in sorted(edges[module]):
                visit(other, (*above, module))
            done.add(module)

    for module in sorted(edges):
        visit(module, ())


def test_losses_import_torch_alone() -> None:
    for name in TORCH_ONLY:
        tops = {module.split(".")[0] for module in imported_modules(ROOT / f"aligner/losses/{name}.py")}
        assert tops <= {"torch", "aligner"} | STANDARD_LIBRARY


def test_few_files_import_nemo() -> None:
    using = [path for path in FILES if "nemo" in {name.split(".")[0] for name in imported_modules(path)}]
    assert len([path for path in using if package_of(path) not in MAY_IMPORT]) <= NEMO_FILES


def test_only_one_file_changes_other_peoples_code() -> None:
    """No other file assigns to an attribute of something that it imported."""
    for path in FILES:
        if str(path.relative_to(ROOT)) == PATCHES:
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


def test_packages_and_files_stay_small() -> None:
    sizes: dict[str, int] = defaultdict(int)
    for path in FILES:
        sizes[str(path.parent.relative_to(ROOT)).removeprefix("aligner/")] += 1
        lines = path.read_text().splitlines()
        assert len(lines) <= 400, f"{path.name} has {len(lines)} lines"
        for node in ast.walk(ast.parse("\n".join(lines))):
            if isinstance(node, ast.FunctionDef):
                doc = (ast.get_docstring(node) or "").count("\n")
                assert (node.end_lineno or 0) - node.lineno - doc <= 66, f"{path.name}: {node.name}"
    for package, count in sizes.items():
        if package not in ("aligner", "recipes"):  # recipes has a file for each model
            assert 3 <= count <= 16, f"{package} has {count} files"


@pytest.mark.parametrize("package", [name for name in PACKAGES if name != "api"])
def test_a_package_says_what_it_is(package: str) -> None:
    folder = ROOT / package if package in MAY_IMPORT else ROOT / "aligner" / package
    doc = ast.get_docstring(ast.parse((folder / "__init__.py").read_text()))
    assert doc and 1 <= len(doc.splitlines()) <= 12, "what it is, and which file to read first"
    named = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    assert any(f"`{stem}`" in doc or f"`{stem}." in doc for stem in named), f"{package}: name the file to read first"


def test_the_wheel_lists_every_package_and_data_file() -> None:
    settings = tomli.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    packages = {
        "aligner",
        "aligner.checkpoint.imports",
        "aligner.checkpoint.safety",
        "aligner.cli.parsing",
        "aligner.data.forms",
        "aligner.judge.sandbox",
        *(f"aligner.{name}" for name in PACKAGES if name != "api"),
    }
    assert set(settings["packages"]) == packages
    folders = {name: ROOT / name.removeprefix("aligner.") for name in packages}
    folders |= {name: ROOT / name.replace(".", "/") for name in packages if name[8:] not in MAY_IMPORT}
    folders["aligner"] = ROOT / "aligner"
    for name, folder in folders.items():
        listed = {file for pattern in settings["package-data"].get(name, ()) for file in folder.glob(pattern)}
        held = {file for file in folder.iterdir() if file.is_file() and file.suffix != ".py"}
        held |= {file for inner in folder.glob("*-*") for file in inner.iterdir()}
        assert listed == held
    for name in MAY_IMPORT:
        link = ROOT / "aligner" / name
        assert link.is_symlink() and link.resolve() == ROOT / name


def test_light_modules_load_without_nemo() -> None:
    code = (
        "import sys; import aligner, aligner.data.rows, aligner.data.examples, aligner.losses, aligner.api;"
        "import aligner.common.errors, aligner.report.run_page, aligner.lint.linter;"
        "heavy = {'nemo', 'megatron', 'lightning', 'transformers'} & set(sys.modules); assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_readme_lists_every_package() -> None:
    (layout,) = re.findall(r"## Repository layout\n+```\n(.*?)```", (ROOT / "README.md").read_text(), flags=re.DOTALL)
    assert len(layout.splitlines()) <= 16
    named = re.findall(r"^(?:aligner/)?(.*?)  ", layout, flags=re.MULTILINE)
    listed = [part.strip("/").removesuffix(".py") for names in named for part in names.split()]
    assert sorted(listed) == sorted(PACKAGES)


def test_the_picture_of_the_packages_is_that_of_the_code() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import draw_packages; print(draw_packages.draw(), end='')"],
        cwd=ROOT / "docs", capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == (ROOT / "docs/packages.svg").read_text(), "python docs/draw_packages.py draws it anew"
