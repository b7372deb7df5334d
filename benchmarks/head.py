"""Log-probabilities of responses: our last layer against Megatron's, which makes all logits. One step forward and back.

    python benchmarks/head.py [--hidden 576] [--vocabulary 49152] [--tokens 2048] [--scored 0.5] [--times 5]

Each side runs in a process of its own, turn by turn; prints the medians of time and of memory beyond the inputs.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from types import SimpleNamespace
from typing import Any

import torch

from aligner.model import head


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=576)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--tokens", type=int, default=2048, help="positions of a micro-batch")
    parser.add_argument("--scored", type=float, default=0.5, help="share of them that belongs to responses")
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--side", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.side:
        print(json.dumps(measure(asked)))
        return
    found: dict[str, list[Any]] = {"ours": [], "theirs": []}
    for _ in range(asked.times):
        for side, results in found.items():
            done = subprocess.run(
                [sys.executable, *sys.argv, "--side", side], capture_output=True, text=True, check=True
            )
            results.append(json.loads(done.stdout.splitlines()[-1]))
    for what, unit in (("seconds", "s"), ("megabytes", "MB")):
        ours, theirs = (statistics.median(one[what] for one in results) for results in found.values())
        print(f"{what:<10} ours {ours:10.3f} {unit}   Megatron's {theirs:10.3f} {unit}   ratio {theirs / ours:.2f}")
    print(f"largest distance of a gradient, relative: {distance(found['ours'][0], found['theirs'][0]):.1e}")


def distance(one: dict[str, Any], other: dict[str, Any]) -> float:
    """Of the two norms that each side reports."""
    return max(abs(a - b) / b for a, b in zip(one["norms"], other["norms"], strict=True))


def measure(asked: argparse.Namespace) -> dict[str, Any]:
    """One side in this process."""
    import os

    from megatron.core import parallel_state, tensor_parallel

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo", store=store, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    torch.manual_seed(0)
    placed = {"dtype": torch.bfloat16 if device == "cuda" else torch.float32, "device": device}
    hidden = torch.randn(asked.tokens, 1, asked.hidden, **placed).requires_grad_()
    weight = (torch.randn(asked.vocabulary, asked.hidden, **placed) / asked.hidden**0.5).requires_grad_()
    labels = torch.randint(asked.vocabulary, (1, asked.tokens), device=device)
    labels[:, int(asked.scored * asked.tokens) :] = head.IGNORE_INDEX
    layer: Any = SimpleNamespace(sequence_parallel=False, tp_group=parallel_state.get_tensor_model_parallel_group())

    def step() -> None:
        hidden.grad = weight.grad = None
        if asked.side == "ours":
            nll = head._scored(layer, hidden, weight, labels)
        else:
            logits = torch.nn.functional.linear(hidden, weight)
            nll = tensor_parallel.vocab_parallel_cross_entropy(logits, labels.clamp(min=0).T.contiguous()).T
        (nll * (labels != head.IGNORE_INDEX)).sum().backward()

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    step()
    if device == "cuda":
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    peak = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
    assert hidden.grad is not None and weight.grad is not None
    norms = [float(hidden.grad.norm()), float(weight.grad.norm())]
    return {"seconds": seconds, "megabytes": peak, "norms": norms}


if __name__ == "__main__":
    main()
