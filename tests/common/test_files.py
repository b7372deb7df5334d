"""Atomic writes, and what killed ones leave."""

import subprocess
import sys
from pathlib import Path

from aligner.common.files import atomic_write


def test_the_leavings_of_a_killed_write_go_with_the_next(tmp_path: Path) -> None:
    code = (
        "import os, sys; from pathlib import Path; from aligner.common.files import atomic_write\n"
        "with atomic_write(Path(sys.argv[1])) as partial:\n"
        "    partial.mkdir(); (partial / 'half').write_text('x'); os.kill(os.getpid(), 9)"
    )
    target = tmp_path / "page"
    for _ in range(2):
        subprocess.run([sys.executable, "-c", code, str(target)])
    (left,) = tmp_path.iterdir()
    for name in (f"{target.name}.partial", f"{target.name}.mine.partial", f"other{left.name[4:]}"):
        (tmp_path / name).mkdir()
    with atomic_write(target) as partial, atomic_write(target) as other:
        partial.write_text("one")
        other.write_text("two")
    assert {path.name for path in tmp_path.iterdir()} == {
        "page", "page.partial", "page.mine.partial", f"other{left.name[4:]}"
    }  # fmt: skip
