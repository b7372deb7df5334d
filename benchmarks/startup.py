"""Seconds that a command takes before it does anything: ours beside NeMo's own `finetune`, turn by turn.

python benchmarks/startup.py [--turns 3]
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

COMMANDS = {
    "nemo llm finetune --help": ["finetune", "--help"],
    "nemo llm align --help": ["align", "--help"],
    "nemo llm finetune --factory llama32_1b --dryrun": ["finetune", "--factory", "llama32_1b", "--dryrun"],
    "nemo llm align --factory llama32_1b_sft --dryrun": [
        "align",
        "--factory",
        "llama32_1b_sft(num_gpus_per_node=1)",
        "--dryrun",
    ],
    "nemo llm size --factory llama32_1b_sft": ["size", "--factory", "llama32_1b_sft"],
    "nemo llm align, a refused override": ["align", "--factory", "llama32_1b_sft", "--dryrun", "loss.bta=1"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=3)
    turns = parser.parse_args().turns
    found: dict[str, list[float]] = {name: [] for name in COMMANDS}
    nemo = str(Path(sys.executable).parent / "nemo")
    codes: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        # A run of the recipe would look at its rows; a dry run only that they are there.
        Path(folder, "train.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
        for _ in range(turns):
            for name, words in COMMANDS.items():
                began = time.perf_counter()
                done = subprocess.run(
                    [nemo, "llm", *words], cwd=folder, capture_output=True, env=os.environ | {"COLUMNS": "100"}
                )
                found[name].append(time.perf_counter() - began)
                codes[name] = done.returncode
    for name, seconds in found.items():
        print(f"{name:<52} {statistics.median(seconds):6.1f} s   exit code {codes[name]}")
    for what in ("--help", "--dryrun"):
        theirs, ours = (
            statistics.median(seconds)
            for name, seconds in found.items()
            if name.endswith(what) and "refused" not in name
        )
        print(f"{what}: ours takes {ours / theirs:.2f} times NeMo's")


if __name__ == "__main__":
    main()
