"""Packs made ahead of time: what they hold, and of which run."""

import json
import os
from pathlib import Path
from typing import Any

import pytest
from tokenizing import PAIRS, byte_level, token_file

from aligner.cli import pack_preferences
from aligner.common.errors import ConfigError
from aligner.data import prepacked
from aligner.data.dataset import TokenizedDataset
from aligner.data.token_cache import TokenizationConfig
from aligner.demo import toy


@pytest.fixture
def packs(rows: Path, tmp_path: Path) -> Path:
    """Of the same file twice."""
    assets = str(toy.TOKENIZER)
    return pack_preferences.pack_preferences(
        [str(rows), str(rows)], assets, str(tmp_path / "packs"), seq_length=64, packed_sequence_size=200
    )


def test_packs_hold_every_row_once_and_fit(packs: Path, hf: Any, capsys: pytest.CaptureFixture[str]) -> None:
    files, found = prepacked.load(packs, hf, PAIRS, "data.train")
    corpus = TokenizedDataset(files)
    assert sorted(int(row) for pack in found for row in pack) == list(range(80)) == list(range(len(corpus)))
    assert max(corpus.packed_tokens()[pack].sum() for pack in found) <= 200


def test_packs_of_another_run_are_refused(packs: Path, hf: Any) -> None:
    with pytest.raises(ConfigError, match=r"data.train: .* was packed with seq_length=64, and this run has 63"):
        prepacked.load(packs, hf, TokenizationConfig("pairs", 63), "data.train")
    other = byte_level()
    with pytest.raises(ConfigError, match="was packed with another tokenizer or chat template"):
        prepacked.load(packs, other, PAIRS, "data.train")


@pytest.mark.parametrize("name", ["packs.arrow", "meta.json", "part-001/tokens.arrow", "part-000/meta.json"])
@pytest.mark.parametrize("how", ["cut", "gone"])
def test_damaged_packs_are_named(packs: Path, hf: Any, name: str, how: str) -> None:
    if how == "gone":
        (packs / name).unlink()
    else:
        os.truncate(packs / name, 100)
    with pytest.raises(ConfigError, match=r"data.train: .*packs is damaged .* run nemo llm pack-preferences again"):
        prepacked.load(packs, hf, PAIRS, "data.train")


def test_a_pack_has_room_for_what_kto_compares_with(rows: Path, tmp_path: Path, hf: Any) -> None:
    """A mismatched response may be longer than the one in whose place it lies; and another length cuts it elsewhere."""
    lines = [("a", "b" * 40), ("c", "d")]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": p, "response": r, "preference": True}) for p, r in lines))
    corpora = [
        TokenizedDataset(
            [token_file(path, hf, TokenizationConfig("unpaired", n), tmp_path / "tokens")], mismatched_within=n
        )
        for n in (64, 50)
    ]
    assert corpora[0].packed_tokens().tolist() == [41, 41, 2, 41]
    assert corpora[0].fingerprint != corpora[1].fingerprint
