"""The same rows out of every container, and a word for what is none."""

import bz2
import gzip
import json
import lzma
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
from reading import read_rows

from aligner.common.errors import RowError
from aligner.data import sources

ROWS: list[dict[str, Any]] = [
    {
        "prompt": "0 + 1?",
        "chosen": [{"role": "assistant", "content": "1"}],
        "rejected": [{"role": "assistant", "content": "no\u2028idea"}],
        "score_chosen": 2.5,
        "score_rejected": 1.0,
        "note": None,
    }
]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def compressed(pack: Callable[[bytes], bytes]) -> Callable[[Path], Any]:
    return lambda path: path.write_bytes(pack(LINES.encode()))


def as_arrow_file(path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def as_arrow_stream(path: Path) -> None:
    table = pa.Table.from_pylist(ROWS)
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
        writer.write_table(table)


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as out:
        out.write(data)
    return sink.getvalue().to_pybytes()


CONTAINERS: dict[str, Callable[[Path], Any]] = {
    "rows.jsonl": lambda path: path.write_text(LINES),
    "rows.jsonl.gz": compressed(gzip.compress),
    "rows.jsonl.bz2": compressed(bz2.compress),
    "rows.jsonl.xz": compressed(lzma.compress),
    "rows.jsonl.zst": compressed(zstd),
    "pretty.json": lambda path: path.write_text("\ufeff" + json.dumps(ROWS, indent=1), encoding="utf-8"),
    "short.json": lambda path: path.write_text(json.dumps(ROWS)),
    "array.json.gz": lambda path: path.write_bytes(gzip.compress(json.dumps(ROWS).encode())),
    "rows.parquet": lambda path: pyarrow.parquet.write_table(pa.Table.from_pylist(ROWS), path),
    "file.arrow": as_arrow_file,
    "stream.arrow": as_arrow_stream,
    "saved": lambda path: datasets.Dataset.from_list(ROWS).save_to_disk(path),
    "splits": lambda path: datasets.DatasetDict({"train": datasets.Dataset.from_list(ROWS)}).save_to_disk(path),
    "any name": lambda path: path.write_text(LINES),
}


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_container_has_the_same_rows(name: str, tmp_path: Path) -> None:
    CONTAINERS["rows.jsonl"](tmp_path / "plain.jsonl")
    CONTAINERS[name](tmp_path / name)
    expected = [(row.prompt, row.chosen_response, row.chosen_reward) for row in read_rows(tmp_path / "plain.jsonl")]
    rows = read_rows(tmp_path / name)
    assert [(row.prompt, row.chosen_response, row.chosen_reward) for row in rows] == expected
    assert rows[0].source.endswith(":1")


def test_a_table_in_csv(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(
        '\ufeffprompt,completion,label,note\r\n"two\nlines",42,True,\r\nb,"c, d",false,x\r\n', encoding="utf-8"
    )
    rows = read_rows(path)
    assert [(row.prompt, row.response, row.desirable) for row in rows] == [
        ("two\nlines", "42", True),
        ("b", "c, d", False),
    ]
    rated = tmp_path / "rated.tsv"
    rated.write_text("prompt\tchosen\trejected\tscore_chosen\tscore_rejected\na\tb\tc\t4\t1.5\n")
    (pair,) = read_rows(rated)
    assert (pair.chosen_reward, pair.rejected_reward) == (4.0, 1.5)
    messages = tmp_path / "messages.csv"
    messages.write_text(
        'messages\n"[{""role"": ""user"", ""content"": ""a""}, {""role"": ""assistant"", ""content"": ""b""}]"\n'
    )
    assert read_rows(messages)[0].response == [{"role": "assistant", "content": "b"}]
    path.write_text("prompt,chosen,rejected\na,b\n")
    with pytest.raises(RowError, match=r"rows.csv:1: row 1 has fewer cells than the header \(prompt, chosen"):
        read_rows(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("rows.zip", b"PK\x03\x04....", "is a zip archive; unpack it, or save its rows as JSON lines"),
        ("cut.json", b'[\n {"prompt": "a"', "begins as a JSON array and is none"),
        ("cut.parquet", b"PAR1....", "the table breaks off or is damaged"),
        ("cut.jsonl.bz2", bz2.compress(b"x" * 9999)[:40], "the compressed file breaks off or is damaged"),
        ("cut.jsonl.xz", lzma.compress(b"x" * 9999)[:40], "the compressed file breaks off or is damaged"),
        ("numbers.json", b"[1, 2]", r"numbers.json:1: expected a JSON object, found \[1, 2\]"),
    ],
)
def test_what_is_none_is_told(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RowError, match=message):
        read_rows(tmp_path / name)


def test_folders_globs_and_splits(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.parquet", "._a.jsonl", "dataset_infos.json", "notes.txt"):
        CONTAINERS["rows.parquet" if name == "a.parquet" else "rows.jsonl"](tmp_path / name)

    def names(source: str) -> list[str]:
        return [part.path.name for part in sources.resolve_files(source, "data.train")]

    assert names(str(tmp_path)) == ["a.parquet", "b.jsonl"]
    assert names(str(tmp_path / "*.jsonl")) == ["b.jsonl"]
    with pytest.raises(RowError, match=r"none-\*: no such file"):
        names(str(tmp_path / "none-*"))
    table = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": table, "test": table}).save_to_disk(tmp_path / "both")
    with pytest.raises(RowError, match=r"both: holds several splits; give one of .*both/train, .*both/test"):
        names(str(tmp_path / "both"))
    assert read_rows(tmp_path / "both/test")
    with pytest.raises(RowError, match="is an address, and data are files"):
        names("https://example.org/rows.jsonl")
    with pytest.raises(RowError, match="expected hf://datasets/NAME"):
        names("hf://NAME")


def test_a_data_set_of_the_hub_is_that_of_datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There is no network here: what is asked of `datasets`, and what is made of its answers."""
    asked: list[Any] = []

    def load(name: str, config: str | None, *, split: str) -> Any:
        asked.append((name, config, split))
        if name == "none/there":
            raise ConnectionError("Couldn't reach the Hub\nmore")
        datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "cache")
        return datasets.load_from_disk(str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", load)
    (part,) = sources.resolve_files("hf://datasets/org/name", "data.train")
    assert read_rows(part.path)[0].prompt == "0 + 1?"
    sources.resolve_files("hf://datasets/org/name:test", "data.train")
    sources.resolve_files("hf://datasets/org/name:default:test", "data.train")
    assert asked == [("org/name", None, "train"), ("org/name", None, "test"), ("org/name", "default", "test")]
    with pytest.raises(RowError, match=r"expected the name of one split"):
        sources.resolve_files("hf://datasets/org/name:test[:10%]", "data.train")
    with pytest.raises(
        RowError, match=r"cannot be had from the hub \(ConnectionError: Couldn't reach the Hub\); without"
    ):
        sources.resolve_files("hf://datasets/none/there", "data.train")


def test_nulls_that_a_table_fills_in_are_no_values(tmp_path: Path) -> None:
    """Structures of a table all have the same keys; two calls with different arguments would get each other's."""
    calls = [{"function": {"name": name, "arguments": {name: "1"}}} for name in ("f", "g")]
    talk = [{"role": "user", "content": "a"}, {"role": "assistant", "content": None, "tool_calls": calls}]
    pyarrow.parquet.write_table(pa.Table.from_pylist([{"messages": talk}]), tmp_path / "rows.parquet")
    (row,) = read_rows(tmp_path / "rows.parquet")
    assert [call["function"]["arguments"] for call in row.response[0]["tool_calls"]] == [{"f": "1"}, {"g": "1"}]


def test_damage_in_the_middle_of_a_table_is_told(tmp_path: Path) -> None:
    rows = [{"prompt": f"{i} " * 50, "chosen": "b", "rejected": "c"} for i in range(5000)]
    path = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    data = bytearray(path.read_bytes())
    data[400:600] = b"\xff" * 200
    path.write_bytes(data)
    with pytest.raises(RowError, match=r"rows.parquet: the table breaks off or is damaged"):
        read_rows(path)


def test_csv_of_an_arena_and_of_answers_in_json(tmp_path: Path) -> None:
    path = tmp_path / "arena.csv"
    path.write_text(
        "id,prompt,response_a,response_b,winner_model_a,winner_model_b,winner_tie\n"
        '1,"[""hi""]","[""a""]","[""b""]",0,1,0\n2,"[""hi""]","[""a""]","[null]",1,0,0\n'
    )
    (pair,) = read_rows(path)
    assert pair.chosen_response[0]["content"] == "b"
    path = tmp_path / "json.csv"
    path.write_text('prompt,chosen,rejected\nq,"{""a"": 1}",{}\n')
    assert read_rows(path)[0].chosen_response == '{"a": 1}'
    path = tmp_path / "train.csv.jsonl"
    path.write_text(LINES)
    assert read_rows(path)
    (tmp_path / "late.json").write_text("\n\n" + json.dumps(ROWS, indent=1))
    assert read_rows(tmp_path / "late.json")
