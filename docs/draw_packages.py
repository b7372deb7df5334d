"""Draw docs/packages.svg, the packages and their imports: `python docs/draw_packages.py`.

Read from the code: a box for each package, with the first sentence of its docstring; an arrow for each import that does
not follow from others. A package stands above all that it imports, right below the lowest one that imports it.
"""

from __future__ import annotations

import ast
import html
import textwrap
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parent.parent
OUTSIDE = ("recipes", "executors")
"""Packages that stand at the top of the repository and import as `aligner.<name>`."""
WIDTH, BOX_WIDTH, BOX_HEIGHT, GAP, LEVEL = 680, 178, 70, 16, 104
STYLE = """
  .box { fill: #f4f6f8; stroke: #2f6f9f; } .name { font-weight: 600; font-size: 14px; fill: #1d4d73; }
  .text { fill: #444; font-size: 10.5px; } .arrow { stroke: #2f6f9f; fill: none; opacity: .55; marker-end: url(#end); }
"""


def files_by_package() -> dict[str, list[Path]]:
    files: dict[str, list[Path]] = defaultdict(list)
    for path in sorted((ROOT / "aligner").glob("**/*.py")):
        first = path.relative_to(ROOT / "aligner").parts[0].removesuffix(".py")
        if first not in (*OUTSIDE, "__init__"):
            files[first].append(path)
    for name in OUTSIDE:
        files[name] = sorted((ROOT / name).glob("*.py"))
    return dict(files)


def imported_packages(path: Path, packages: set[str]) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    parts = [name.split(".") for name in names]
    return {part[1] for part in parts if part[0] == "aligner" and len(part) > 1} & packages


def reduced(imports: dict[str, set[str]]) -> dict[str, set[str]]:
    """Imports that no path through others implies."""

    def reachable(package: str) -> set[str]:
        below = set(imports[package])
        return below.union(*(reachable(other) for other in imports[package]))

    return {name: others - set().union(*(reachable(other) for other in others)) for name, others in imports.items()}


def depth(name: str, imports: dict[str, set[str]]) -> int:
    """Rows above a package: one more than the deepest package that imports it."""
    return 1 + max((depth(other, imports) for other, others in imports.items() if name in others), default=-1)


def draw() -> str:
    """The picture as SVG."""
    files = files_by_package()
    imports = {
        name: set().union(*(imported_packages(path, set(files)) for path in paths)) - {name}
        for name, paths in files.items()
    }
    rows: dict[int, list[str]] = defaultdict(list)
    for name in sorted(files):
        rows[depth(name, imports)].append(name)
    corners = {}
    for number, names in rows.items():
        left = (WIDTH - len(names) * BOX_WIDTH - (len(names) - 1) * GAP) / 2
        for i, name in enumerate(names):
            corners[name] = (left + i * (BOX_WIDTH + GAP), 20 + number * LEVEL)
    lines, margins = [], {-1: 0, 1: 0}
    for name, others in sorted(reduced(imports).items()):
        for other in sorted(others):
            (x, y), (to_x, to_y) = corners[name], corners[other]
            if to_y - y <= LEVEL:
                lines.append(arrow(x, y, to_x, to_y))
                continue
            # Around the boxes between them.
            side = -1 if x + BOX_WIDTH / 2 <= WIDTH / 2 else 1
            margins[side] += 1
            lines.append(detour(x, y, to_x, to_y, side, margins[side]))
    for name, (x, y) in sorted(corners.items()):
        lines += box(name, files[name], x, y)
    height = 40 + max(rows) * LEVEL + BOX_HEIGHT
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="system-ui, sans-serif">'
    )
    marker = (
        '<marker id="end" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M0 0 8 4 0 8z" fill="#2f6f9f"/></marker>'
    )
    return "\n".join(
        [
            head,
            f"<style>{STYLE}</style>",
            f"<defs>{marker}</defs>",
            f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
            *lines,
            "</svg>\n",
        ]
    )


def box(name: str, paths: list[Path], x: float, y: float) -> list[str]:
    first = next((path for path in paths if path.stem == "__init__"), paths[0])
    doc = " ".join((ast.get_docstring(ast.parse(first.read_text())) or "").split("\n\n")[0].split())
    sentence = doc.split(". ")[0].rstrip(".").replace("`", "")
    lines = [
        f'<rect class="box" x="{x:g}" y="{y:g}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="6"/>',
        f'<text class="name" x="{x + 10:g}" y="{y + 19:g}">{name}</text>',
    ]
    wrapped = textwrap.wrap(sentence, 30)
    shown = (
        wrapped[:3]
        if len(wrapped) <= 3
        else [*wrapped[:2], textwrap.shorten(" ".join(wrapped[2:]), 28, placeholder=" …")]
    )
    for i, line in enumerate(shown):
        lines.append(f'<text class="text" x="{x + 10:g}" y="{y + 35 + 13 * i:g}">{html.escape(line)}</text>')
    return lines


def arrow(x: float, y: float, to_x: float, to_y: float) -> str:
    x, y, to_x = x + BOX_WIDTH / 2, y + BOX_HEIGHT, to_x + BOX_WIDTH / 2
    bend = (to_y - y) / 2
    return f'<path class="arrow" d="M{x:g} {y:g}C{x:g} {y + bend:g} {to_x:g} {to_y - bend:g} {to_x:g} {to_y:g}"/>'


def detour(x: float, y: float, to_x: float, to_y: float, side: int, number: int) -> str:
    out = WIDTH / 2 + side * (1.5 * BOX_WIDTH + GAP + 10 * number)
    x, to_x = (x + BOX_WIDTH, to_x + BOX_WIDTH) if side > 0 else (x, to_x)
    y, to_y = y + BOX_HEIGHT / 2, to_y + BOX_HEIGHT / 2 + 4 * number
    return f'<path class="arrow" d="M{x:g} {y:g}H{out:g}V{to_y:g}H{to_x:g}"/>'


if __name__ == "__main__":
    (ROOT / "docs/packages.svg").write_text(draw())
