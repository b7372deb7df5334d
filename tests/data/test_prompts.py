"""Shares of a file of prompts: every prompt once, whatever the number."""

import json
from pathlib import Path

import pytest

from aligner.common.errors import RowError
from aligner.data.prompts import read_prompts, share


def test_shares_have_every_prompt_once(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i}?", "answer": i, **({"id": f"p{i}"} if i % 2 else {})} for i in range(11)]
    source = tmp_path / "prompts.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in [*rows, rows[0]]))
    files = [share(str(source), i, 3, str(tmp_path / f"iteration-{i}/prompts.jsonl")) for i in (1, 2, 3)]
    parts = [read_prompts(file) for file in files]
    assert [len(part) for part in parts] == [4, 4, 3]
    assert sorted(p.id for part in parts for p in part) == sorted(p.id for p in read_prompts(str(source)))
    assert [p.row for p in parts[1]] == rows[1::3], "with their other keys"
    before = Path(files[0]).read_bytes()
    assert share(str(source), 1, 3, files[0]) == files[0] and Path(files[0]).read_bytes() == before
    with pytest.raises(
        RowError, match=r"iteration-1/prompts\.jsonl: holds other prompts than share 1 of 4 of .*Remove it"
    ):
        share(str(source), 1, 4, files[0])
    assert Path(files[0]).read_bytes() == before, "what is there stays"
    with pytest.raises(RowError, match=r"prompts\.jsonl: holds 11 different prompts for 12 iterations with new ones"):
        share(str(source), 1, 12, files[0])
