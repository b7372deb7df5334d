"""A million pairs: rows a second of lint and tokenizing, memory of a reading rank, time to a restart's first batch.

    python benchmarks/data.py [ROWS] [FOLDER]

Makes the file (about 1 kB a row: a prompt of 20 to 60 words, answers of 10 to 60) and a byte-level BPE tokenizer of
8,000 words trained on its beginning. Lint and tokenizing use all cores. Memory is what belongs to a reading process
alone (RssAnon); mapped pages of the token file are the kernel's to keep or drop.
"""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

READER = """
import json, sys, threading, time
from pathlib import Path
from transformers import AutoTokenizer
from aligner.data.module import AlignDataModule
rows, tokenizer, folder = sys.argv[1:4]
def anonymous():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) / 1024
before = peak = anonymous()
def watch():
    global peak
    while True:
        peak = max(peak, anonymous())
        time.sleep(0.005)
threading.Thread(target=watch, daemon=True).start()
began = time.perf_counter()
data = AlignDataModule(train=rows, seq_length=1024, global_batch_size=256, batching="packed", cache_dir=folder)
data.tokenize(AutoTokenizer.from_pretrained(tokenizer), kind="pairs", runs=Path(folder))
data.plan(max_steps=1000)
class Trainer:
    global_step = 0
data.trainer = Trainer()
batches = iter(data.train_dataloader())
next(batches)
seconds = time.perf_counter() - began
for _ in range(20):
    next(batches)
for _, _ in zip(range(20), data.scoring_dataloader("train")):
    pass
print(json.dumps({"first_batch": seconds, "peak": peak - before}))
"""


def make(path: Path, count: int) -> None:
    draw = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwypvbgkjqxz"))
    words = ["".join(letters[np.minimum(draw.geometric(0.12, n) - 1, 25)]) for n in draw.integers(1, 11, 30_000)]
    with path.open("w") as file:
        for begin in range(0, count, 10_000):
            spans = zip(*(draw.integers(low, 61, 10_000) for low in (20, 10, 10)), strict=True)
            chosen = np.minimum(draw.zipf(1.3, 2_000_000), len(words)) - 1
            place = 0
            for lengths in list(spans)[: count - begin]:
                texts = []
                for length in lengths:
                    texts.append(" ".join(words[i] for i in chosen[place : place + length]))
                    place += length
                keys = ("prompt", "chosen_response", "rejected_response")
                file.write(json.dumps(dict(zip(keys, texts, strict=True))) + "\n")


def tokenizer(rows: Path, folder: Path) -> str:
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    bpe = ByteLevelBPETokenizer()
    with rows.open() as file:
        bpe.train_from_iterator([next(file) for _ in range(2_000)], vocab_size=8_000, special_tokens=["</s>"])
    PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="</s>", pad_token="</s>").save_pretrained(folder)
    return str(folder)


def read(rows: Path, hf: str, folder: Path) -> dict[str, float]:
    done = subprocess.run([sys.executable, "-c", READER, str(rows), hf, str(folder)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def main(count: int, folder: Path) -> None:
    from transformers import AutoTokenizer

    from aligner.data.token_cache import TokenizationConfig, token_files
    from aligner.lint.linter import Options, lint

    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(folder / "tokens", ignore_errors=True)  # of an earlier run
    sizes = {"a tenth": count // 10, "all": count}
    files = {name: folder / f"rows-{size}.jsonl" for name, size in sizes.items()}
    for name, path in files.items():
        if not path.exists():
            make(path, sizes[name])
    name = tokenizer(files["a tenth"], folder / "tokenizer")
    hf = AutoTokenizer.from_pretrained(name)
    found = {}
    for part, path in files.items():
        began = time.perf_counter()
        token_files([path], hf, TokenizationConfig("pairs", 1024), folder / "tokens")
        seconds = time.perf_counter() - began
        rate = sizes[part] / seconds
        print(f"tokens of {part:<8} {sizes[part]:>10,} rows {seconds:>8.1f} s {rate:>10,.0f} rows a second", flush=True)
        time.sleep(3)  # a file is trusted by its times only when they lie back
        read(path, name, folder / "tokens")
        found[part] = read(path, name, folder / "tokens")
        one = found[part]
        print(
            f"second start, {part:<8} first batch {one['first_batch']:.2f} s after the imports; peak memory of its own "
            f"{one['peak']:.0f} MB above them while it trains and scores",
            flush=True,
        )
    more = found["all"]["peak"] - found["a tenth"]["peak"]
    print(f"{more * 2**20 / (count - count // 10):.0f} bytes a row more for ten times the rows")
    began = time.perf_counter()
    (report,) = lint(str(files["all"]), hf, options=Options(1024))
    seconds = time.perf_counter() - began
    assert report.numbers["rows"] == count
    print(f"lint of all      {count:>10,} rows {seconds:>8.1f} s {count / seconds:>10,.0f} rows a second")


if __name__ == "__main__":
    given = dict(enumerate(sys.argv))
    main(int(given.get(1, 1_000_000)), Path(given.get(2, "runs/benchmark")))
