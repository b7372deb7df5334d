"""Files of any kind, tokenized once: what is read, what is refused, what is never taken for whole."""

import contextlib
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pytest
from launching import TIME_LIMIT
from making import write_rows
from reading import read_rows
from tokenizing import PAIRS, byte_level, token_file
from transformers import AutoTokenizer

from aligner.common import containers, hashing
from aligner.common.errors import ConfigError, RowError
from aligner.data import dataset, sources, token_cache
from aligner.data.dataset import TokenizedDataset, other_prompts
from aligner.data.examples import examples
from aligner.data.token_cache import TokenizationConfig
from aligner.data.tokenization import ResponseTokenizer
from aligner.demo import toy


def plain(path: Path, hf: Any, settings: TokenizationConfig = PAIRS) -> list[Any]:
    """The examples as they are made row by row, without files in between."""
    return examples(read_rows(path), ResponseTokenizer(hf), kind=settings.kind, seq_length=settings.seq_length)[0]


# ---- what is read -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["pairs", "unpaired", "demonstrations"])
def test_what_is_read_back_is_what_was_tokenised(rows: Path, tmp_path: Path, hf: Any, kind: Any) -> None:
    settings = TokenizationConfig(kind, 64)
    found = token_file(rows, hf, settings, tmp_path / "tokens")
    assert list(found) == plain(rows, hf, settings)
    assert found.lengths.tolist() == [[len(e.prompt), *map(len, e.responses)] for e in found]
    again = token_file(rows, hf, settings, tmp_path / "tokens")
    assert again.folder == found.folder and again.report == found.report and again[7] == found[7]


def test_chunks_and_processes_change_nothing(
    rows: Path, tmp_path: Path, hf: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = token_file(rows, hf, PAIRS, tmp_path / "one")
    monkeypatch.setattr(sources, "CHUNK", 200)
    monkeypatch.setattr(token_cache, "CHUNK", 200)
    monkeypatch.setattr(token_cache.process_pool, "cores", lambda: 2)
    cut = token_file(rows, hf, PAIRS, tmp_path / "many")
    assert len(cut._batches) > 5
    assert list(cut) == list(whole)
    assert cut.report == whole.report


def test_other_tools_read_the_tokens(rows: Path, tmp_path: Path, hf: Any) -> None:
    found = token_file(rows, hf, PAIRS, tmp_path / "tokens")
    theirs = datasets.Dataset.from_file(str(found.folder / "tokens.arrow"))
    assert theirs[3]["prompt"] == found[3].prompt and len(theirs) == 40


def zstandard(content: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(content)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("compress", [gzip.compress, zstandard])
def test_compressed_files_are_read_as_they_are(rows: Path, tmp_path: Path, hf: Any, compress: Any) -> None:
    content = rows.read_bytes()
    packed = tmp_path / "rows.jsonl.z"
    # In two pieces end to end, as parallel compressors write them.
    packed.write_bytes(compress(content[:999]) + compress(content[999:]))
    found = token_file(packed, hf, PAIRS, tmp_path / "tokens")
    assert [e.prompt for e in found] == [e.prompt for e in plain(rows, hf)]
    assert found[0].source == f"{packed}:1"
    packed.write_bytes(compress(content)[:-20])
    with pytest.raises(RowError, match=r"rows.jsonl.z:\d+: the compressed file breaks off or is damaged here"):
        token_file(packed, hf, PAIRS, tmp_path / "tokens")


def test_folders_lists_and_blends(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    a, b = write_rows(folder / "a.jsonl", 3), write_rows(folder / "b.jsonl", 5)
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(b.read_bytes()))
    (folder / "notes.txt").write_text("not rows")
    assert [part.path.name for part in sources.resolve_files(str(folder), "data.train")] == [
        "a.jsonl",
        "b.jsonl",
        "c.jsonl.gz",
    ]
    assert [part.path for part in sources.resolve_files([str(b), str(a)], "data.train")] == [b, a]
    blend = sources.resolve_files([3, str(a), 1, str(folder)], "data.train")
    assert blend[0] == sources.DataFile(a, 3.0) and sum(part.weight or 0 for part in blend) == pytest.approx(4)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("gone.jsonl", "gone.jsonl: no such file"),
        ([], "data.train: expected a file, a folder"),
        ([0.5, "rows.jsonl", 0.5], "data.train: weights and files must alternate"),
        ([-1, "rows.jsonl"], "data.train: weights and files must alternate, weights above 0"),
        (["rows.jsonl", 0.5], "data.train: expected a file, a folder"),
        ("empty", "empty: the folder holds no file of rows"),
    ],
)
def test_what_names_no_files_is_refused(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: Any, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    with pytest.raises((ConfigError, RowError), match=message):
        sources.resolve_files(source, "data.train")


def test_odd_lines_are_read_or_named(tmp_path: Path, hf: Any) -> None:
    """A line of ten megabytes is a row like any other; one that is longer than any row is a foreign file."""
    row = {"prompt": "1+1=", "chosen_response": "2", "rejected_response": "3"}
    path = tmp_path / "rows.jsonl"
    huge = json.dumps(row | {"note": "x" * 10_000_000})
    path.write_bytes(b"\xef\xbb\xbf" + "\r\n".join([json.dumps(row), "", huge, json.dumps(row)]).encode())
    assert [e.source.rpartition(":")[2] for e in token_file(path, hf, PAIRS, tmp_path / "tokens")] == ["1", "3", "4"]
    path.write_text(json.dumps(row), encoding="utf-16")
    with pytest.raises(RowError, match=r"rows.jsonl:1: is not UTF-8"):
        token_file(path, hf, PAIRS, tmp_path / "tokens")


def test_a_file_without_lines_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "weights.bin").write_bytes(b"\0" * 5000)
    monkeypatch.setattr(containers, "LONGEST", 1000)
    with pytest.raises(RowError, match=r"weights.bin:1: is longer than .* is this a file of JSON lines"):
        list(sources.chunks(tmp_path / "weights.bin"))


# ---- when it is made again ----------------------------------------------------------------------------------------


def test_content_tokenizer_template_and_settings_name_the_folder(rows: Path, tmp_path: Path) -> None:
    folder = tmp_path / "tokens"

    def key(settings: TokenizationConfig = PAIRS, **changes: Any) -> str:
        hf = AutoTokenizer.from_pretrained(toy.TOKENIZER)
        for name, value in changes.items():
            setattr(hf, name, value)
        return token_file(rows, hf, settings, folder).folder.name

    first = key()
    template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
    others = [
        key(TokenizationConfig("demonstrations", 64)),
        key(TokenizationConfig("pairs", 63)),
        key(TokenizationConfig("pairs", 64, apply_chat_template=False, overlong="truncate")),
        key(chat_template=template),
        key(eos_token="<unk>"),
    ]
    assert len({first, *others}) == 6
    copy = rows.with_name("copy.jsonl")
    copy.write_bytes(rows.read_bytes())
    rows = copy
    assert key() == first
    rows.write_text(rows.read_text().replace("1", "7"))
    assert key() != first


def test_a_file_that_is_written_anew_is_seen_though_its_hash_was_remembered(rows: Path, tmp_path: Path) -> None:
    old = time.time() - 100
    os.utime(rows, (old, old))
    time.sleep(2.1)  # its change time must lie back as well, before a hash is remembered
    first = hashing.content_hash(rows, tmp_path)
    assert list((tmp_path / "files").iterdir())
    assert hashing.content_hash(rows, tmp_path) == first
    rows.write_text(rows.read_text().replace("1", "7"))
    os.utime(rows, (old, old))
    assert hashing.content_hash(rows, tmp_path) != first


@pytest.mark.parametrize("damage", ["cut", "no meta", "empty meta"])
def test_a_damaged_folder_is_made_again(rows: Path, tmp_path: Path, hf: Any, damage: str) -> None:
    found = token_file(rows, hf, PAIRS, tmp_path / "tokens")
    if damage == "cut":
        os.truncate(found.folder / "tokens.arrow", 1000)
    elif damage == "no meta":
        (found.folder / "meta.json").unlink()
    else:
        (found.folder / "meta.json").write_text("")
    said: list[str] = []
    assert list(token_file(rows, hf, PAIRS, tmp_path / "tokens", log=said.append)) == plain(rows, hf)
    assert "is damaged" in said[0]


def test_a_bad_row_leaves_nothing_behind(rows: Path, tmp_path: Path, hf: Any) -> None:
    with rows.open("a") as file:
        file.write('{"prompt": "1"}\n')
    with pytest.raises(RowError, match=r"rows.jsonl:41: has no 'chosen_response'"):
        token_file(rows, hf, PAIRS, tmp_path / "tokens")
    assert [p.suffix for p in (tmp_path / "tokens").iterdir() if p.is_dir()] in ([], [""])
    assert not list((tmp_path / "tokens").glob("*/tokens.arrow"))


@pytest.mark.parametrize("workers", [1, 2])
def test_what_a_worker_cannot_begin_is_said_as_always(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    """A tokenizer without an end; not a broken pool."""
    hf = byte_level()
    hf.eos_token = None  # type: ignore[assignment]
    monkeypatch.setattr(token_cache, "CHUNK", 200)
    monkeypatch.setattr(token_cache.process_pool, "cores", lambda: workers)
    with pytest.raises(ConfigError, match="no end-of-sequence token"):
        token_file(rows, hf, PAIRS, tmp_path / "tokens")


ORPHANS = """
import sys, time
from aligner.common import process_pool
def make():
    return time.sleep
if __name__ == "__main__":
    print("begun", flush=True)
    list(process_pool.ordered_map(make, [600] * 9, workers=2))
"""


def test_workers_end_with_the_process_that_was_killed(tmp_path: Path) -> None:
    (tmp_path / "orphans.py").write_text("import time\ndef make():\n    return time.sleep\n")
    code = ORPHANS.replace("def make():\n    return time.sleep", "from orphans import make")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment)
    assert process.stdout is not None and process.stdout.readline() == "begun\n"

    def children() -> set[int]:
        found = set()
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError):
                parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
                if parent == process.pid and b"spawn_main" in (folder / "cmdline").read_bytes():
                    found.add(int(folder.name))
        return found

    waited = time.time() + 60
    while len(children()) < 2 and time.time() < waited:
        time.sleep(0.2)
    workers = children()
    assert len(workers) == 2
    time.sleep(5)  # they are importing; a worker that watches is one that has begun
    process.kill()
    process.wait()
    while any(Path(f"/proc/{pid}").exists() for pid in workers) and time.time() < waited:
        time.sleep(0.2)
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


def test_a_folder_that_cannot_be_written_to_serves_what_it_holds(
    rows: Path, tmp_path: Path, hf: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = token_file(rows, hf, PAIRS, tmp_path / "tokens")

    def refuse(path: Path) -> Any:
        raise PermissionError(path)

    monkeypatch.setattr(hashing, "atomic_write", refuse)
    old = time.time() - 100
    monkeypatch.setattr(hashing.time, "time_ns", lambda: int((old + 1000) * 1e9))
    assert token_file(rows, hf, PAIRS, tmp_path / "tokens").folder == made.folder


SLOW = """
import sys, time
from pathlib import Path
from transformers import AutoTokenizer
from aligner.data import token_cache
from aligner.demo import toy
from aligner.data.token_cache import TokenizationConfig, token_files
made = token_cache._make
def slow(*args):
    print("begun", flush=True)
    made(*args)
    time.sleep(float(sys.argv[3]))
token_cache._make = slow
hf = AutoTokenizer.from_pretrained(toy.TOKENIZER)
print(len(token_files([Path(sys.argv[1])], hf, TokenizationConfig("pairs", 64), Path(sys.argv[2]))[0]), flush=True)
"""


def start(rows: Path, folder: Path, seconds: float) -> Any:
    command = [sys.executable, "-c", SLOW, str(rows), str(folder), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_a_killed_process_leaves_nothing_that_is_taken_for_whole(rows: Path, tmp_path: Path, hf: Any) -> None:
    process = start(rows, tmp_path / "tokens", 600)
    assert process.stdout.readline() == "begun\n"
    time.sleep(0.5)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list((tmp_path / "tokens").glob("*.partial"))
    assert list(token_file(rows, hf, PAIRS, tmp_path / "tokens")) == plain(rows, hf)
    assert not list((tmp_path / "tokens").glob("*.partial"))


def test_of_two_that_start_together_one_does_the_work(rows: Path, tmp_path: Path) -> None:
    # So long that the second one has begun on a busy machine, too.
    both = [start(rows, tmp_path / "tokens", 9) for _ in range(2)]
    said = "".join(process.communicate(timeout=TIME_LIMIT)[0] for process in both)
    assert (said.count("begun") == 1 and said.count("\n40\n") == 2) or said.count("40\n") == 2
    assert said.count("another process is tokenizing it") == 1


# ---- several files ------------------------------------------------------------------------------------------------


def test_files_lie_end_to_end_and_must_go_together(rows: Path, tmp_path: Path, hf: Any) -> None:
    other = write_rows(tmp_path / "other.jsonl", 5, seed=3)
    corpus = TokenizedDataset([token_file(path, hf, PAIRS, tmp_path / "tokens") for path in (rows, other)])
    assert list(corpus) == plain(rows, hf) + plain(other, hf)
    assert corpus.report.rows == 45 and len(corpus.positions()) == 45
    rated = tmp_path / "rated.jsonl"
    row = {"prompt": "1", "chosen_response": "2", "rejected_response": "3"}
    rated.write_text(json.dumps(row | {"chosen_reward": 1, "rejected_reward": 0}))
    with pytest.raises(RowError, match=r"rows.jsonl: its rows have no chosen_reward .*rated.jsonl have;"):
        TokenizedDataset([token_file(path, hf, PAIRS, tmp_path / "tokens") for path in (rows, rated)])


def test_mismatched_responses_are_of_other_prompts(tmp_path: Path, hf: Any) -> None:
    lines = [("1", "55"), ("1", "66"), ("22", "777"), ("1", "8")]
    keys = ("prompt", "response")
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(dict(zip(keys, x, strict=True)) | {"preference": True}) for x in lines))
    corpus = TokenizedDataset(
        [token_file(path, hf, TokenizationConfig("unpaired", 64), tmp_path / "tokens")], mismatched_within=4
    )
    assert (corpus.num_examples, len(corpus)) == (4, 8)
    made = [(hf.decode(e.prompt), hf.decode(e.responses[0])) for e in (corpus[i] for i in range(4, 8))]
    # Cut to four tokens with the prompt; the last row looks around to the first that has another prompt.
    assert made == [("1", "777"), ("1", "777"), ("22", "8<eos>"), ("1", "777")]
    assert [len(corpus[i].responses[0]) for i in range(4, 8)] == corpus.lengths[4:, 1].tolist()
    assert (corpus.mismatched(2), corpus.mismatched(6)) == (6, None)


def test_pairs_give_mismatched_responses_of_both_sides(rows: Path, tmp_path: Path, hf: Any) -> None:
    file = token_file(rows, hf, TokenizationConfig("unpaired", 64), tmp_path / "tokens")
    corpus = TokenizedDataset([file], mismatched_within=64)
    assert corpus.num_examples == 80
    said: dict[bool, set[tuple[int, ...]]] = {True: set(), False: set()}
    for i in range(80):
        said[bool(corpus[i].desirable)].add(tuple(corpus[i].responses[0]))
    for i in range(80):
        assert tuple(corpus[80 + i].responses[0]) in said[i % 2 == 0]


def test_the_fingerprint_has_the_choice_of_mismatched_responses(
    rows: Path, tmp_path: Path, hf: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores of the reference are kept by it."""
    file = token_file(rows, hf, TokenizationConfig("unpaired", 64), tmp_path / "tokens")
    now = TokenizedDataset([file], mismatched_within=64).fingerprint
    assert TokenizedDataset([file], mismatched_within=63).fingerprint != now
    monkeypatch.setattr(dataset, "other_prompts", lambda prompts: (np.arange(len(prompts)) + 3) % len(prompts))
    assert TokenizedDataset([file], mismatched_within=64).fingerprint != now


def test_the_place_in_the_next_run_of_equal_prompts() -> None:
    def others(*prompts: int) -> list[int]:
        return other_prompts(np.array(prompts)).tolist()

    assert others(5, 5, 5) == [1, 2, 0], "all are equal: the next"
    assert others(1, 1, 2, 2, 3, 3) == [2, 3, 4, 5, 0, 1]
    assert others(1, 1, 1, 2, 3, 3) == [3, 3, 3, 4, 0, 1]
    assert others(1, 1, 2, 2, 1) == [3, 2, 4, 0, 2], "a run that goes on at the beginning"
    assert others(1, 2) == [1, 0] and others(7) == [0]
