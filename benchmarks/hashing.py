"""What hashes of a checkpoint cost: seconds a gigabyte, and the share of a save and of a load.

Four times in turns, in one process: shards are written and hashed, loaded and compared. The bound is the speed at which
one core reads memory: every byte is read once.

    python benchmarks/hashing.py [--gigabytes 1]
"""

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint as dcp


def seconds(work: object, *arguments: object) -> float:
    began = time.perf_counter()
    work(*arguments)  # type: ignore[operator]
    return time.perf_counter() - began


def save(state: dict[str, torch.Tensor], folder: Path) -> None:
    """Write as Megatron does: shards on the disk, flushed."""
    shutil.rmtree(folder, ignore_errors=True)
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder, sync_files=True, thread_count=2), no_dist=True)


def load(state: dict[str, torch.Tensor], folder: Path) -> None:
    dcp.load(state, storage_reader=dcp.FileSystemReader(folder), no_dist=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=1.0)
    given = parser.parse_args()
    from aligner.checkpoint.safety import integrity

    parts = 16
    numbers = int(given.gigabytes * 1e9 / 4 / parts)
    state = {f"layer.{i}": torch.rand(numbers) for i in range(parts)}
    size = sum(tensor.numel() * 4 for tensor in state.values()) / 1e9
    block = np.ones(1 << 25, np.uint8)
    bound = block.nbytes / 1e9 / min(seconds(block.sum) for _ in range(5))
    times: dict[str, list[float]] = {"save": [], "hash": [], "load": [], "compare": []}
    with tempfile.TemporaryDirectory(dir=os.getcwd()) as home:
        folder = Path(home) / "checkpoint"
        for _ in range(4):
            times["save"].append(seconds(save, state, folder))
            times["hash"].append(seconds(integrity.write, folder))
            times["load"].append(seconds(load, state, folder))
            times["compare"].append(seconds(integrity.find_damage, folder))
    middle = {name: statistics.median(values) for name, values in times.items()}
    print(f"{size:.2f} GB, medians of 4: " + ", ".join(f"{name} {value:.2f} s" for name, value in middle.items()))
    for name, of in (("hash", "save"), ("compare", "load")):
        print(f"{name}: {middle[name] / size:.2f} s a GB, {middle[name] / middle[of]:.0%} of a {of}")
    print(f"bound: {1 / bound:.2f} s a GB (one core sums bytes)")


if __name__ == "__main__":
    main()
