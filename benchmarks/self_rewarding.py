"""Self-rewarding where the truth is known: held-out sums that come out right before and after each round, by seed.

A model that mostly forgets the carry answers sums, a calculator judges, DPO learns
(`recipes.tiny_llama.self_rewarding_recipe`).
Each seed is another start and other answers.

    python benchmarks/self_rewarding.py [--seeds 3] [--iterations 3]
"""

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any


def scores(folder: Path, seed: int, iterations: int) -> tuple[list[float], float]:
    """Shares of held-out sums that come out right, of the start and of each round; seconds of all of it."""
    import copy

    import fiddle as fdl

    from aligner import recipes
    from aligner.judge import self_rewarding

    recipe: Any = recipes.tiny_llama.self_rewarding_recipe(dir=str(folder), name=f"seed-{seed}", iterations=iterations)
    recipe.start.data.seed = seed
    recipe.start.data.train.seed = seed
    for one in recipe.iterations:
        one.generate.seed += 1000 * seed
        one.align.data.seed = seed
        one.generate.prompts.seed = one.judge.prompts.seed = one.select.prompts.seed = one.evaluate.prompts.seed = seed
    before = copy.deepcopy(recipe.iterations[0].evaluate)
    before.engine.checkpoint = f"{folder}/seed-{seed}/start"
    before.output = f"{folder}/seed-{seed}/before.json"
    began = time.perf_counter()
    fdl.build(recipe)()
    seconds = time.perf_counter() - began
    path = fdl.build(before)()
    return [json.loads(path.read_text())["score"], *self_rewarding.scores(folder / f"seed-{seed}")], seconds


def main() -> None:
    """Print a line for each seed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--iterations", type=int, default=3)
    asked = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="self-rewarding-"))
    found = [scores(folder, seed, asked.iterations) for seed in range(1, asked.seeds + 1)]
    print(f"\nheld-out sums right      before{''.join(f'   round {i}' for i in range(1, asked.iterations + 1))}")
    for seed, (shares, seconds) in enumerate(found, start=1):
        print(f"seed {seed}  ({seconds:4.0f} s)          {'   '.join(f'{share:7.1%}' for share in shares)}")


if __name__ == "__main__":
    main()
