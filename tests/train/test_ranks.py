"""Every way to divide a model, with and without packing, against one rank: gradients, losses, rows, validation.

The layouts of plain data, tensor and pipeline parallelism under other losses, references and adapters are in
test_layouts.py.
"""

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import fiddle as fdl
import nemo_run as run
import pytest
from hand import SaveGradients, SaveRows, differ, rows_of
from launching import TIME_LIMIT, forked
from nemo.collections import llm
from nemo.lightning import RestoreConfig

from aligner.common.errors import ConfigError
from aligner.common.run_folder import read_metrics

TENSOR, PIPELINE, CONTEXT = (f"{kind}_parallel_size" for kind in ("tensor_model", "pipeline_model", "context"))
EXPERT = "expert_model_parallel_size"
TWO: dict[str, dict[str, Any]] = {
    "data": {},
    "tensor": {TENSOR: 2},
    "sequence": {TENSOR: 2, "sequence_parallel": True},
    "pipeline": {PIPELINE: 2},
    "interleaved": {PIPELINE: 2, "virtual_pipeline_model_parallel_size": 2},
    "uneven": {PIPELINE: 2, "num_layers_in_first_pipeline_stage": 1},
    "context": {CONTEXT: 2},
    "recomputed": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "experts data": {},
    "experts": {EXPERT: 2},
    "experts tensor": {TENSOR: 2, "sequence_parallel": True, EXPERT: 2, "expert_tensor_parallel_size": 1},
    "experts context": {CONTEXT: 2},
}
FOUR: dict[str, dict[str, Any]] = {
    "tensor pipeline": {TENSOR: 2, PIPELINE: 2},
    "tensor data": {TENSOR: 2},
    "tensor context": {TENSOR: 2, CONTEXT: 2, "sequence_parallel": True},
    "pipeline context": {PIPELINE: 2, CONTEXT: 2},
    "interleaved data": {PIPELINE: 2, "virtual_pipeline_model_parallel_size": 2},
    "experts pipeline": {EXPERT: 2, PIPELINE: 2},
}
CUTS = ("padded", "packed")
STEPS = 10


def kind_of(layout: str) -> str:
    """Which model a layout divides."""
    return "experts" if layout.startswith("experts") else "dense"


class Bench:
    """Makes, runs and reads jobs that start from the same weights."""

    def __init__(self, folder: Path, tiny: Callable[..., Any]) -> None:
        self.folder, self.tiny = folder, tiny
        for kind in ("dense", "experts"):
            fdl.build(self.job("start", kind, "padded", 1, {}))()
        self.done: set[str] = set()

    def alone(self, cuts: Sequence[str]) -> None:
        """What all layouts are compared with."""
        for cut in set(cuts) - self.done:
            self.done.add(cut)
            for kind in ("dense", "experts"):
                fdl.build(self.job(f"one {kind}", kind, cut, 1, {}))()

    def job(self, name: str, kind: str, cut: str, ranks: int, layout: dict[str, Any]) -> Any:
        # Rows for three epochs that leave two over.
        recipe = self.tiny(f"{name} {cut}".replace(" ", "_"), rows=18, num_gpus_per_node=ranks)
        recipe.model.config.num_layers = 4
        if kind == "experts":
            given = {k: v for k, v in recipe.model.config.__arguments__.items() if k != "num_layers"}
            recipe.model = run.Config(
                llm.MixtralModel,
                config=run.Config(llm.MixtralConfig, **given, num_layers=2, num_moe_experts=4, bf16=False),
                tokenizer=recipe.model.tokenizer,
            )
            # Of a micro-batch with all that is padded, so it depends on how a batch is cut.
            recipe.model.config.moe_aux_loss_coeff = 0.0
        recipe.trainer.max_steps, recipe.trainer.val_check_interval = (1, 1) if name == "start" else (STEPS, 4)
        recipe.log.ckpt.every_n_train_steps = STEPS
        # The same whether a run ends early or not.
        recipe.optim.lr_scheduler.warmup_steps, recipe.optim.lr_scheduler.min_lr = 0, recipe.optim.config.lr
        recipe.data.batching, recipe.data.packed_sequence_size = cut, 130 if cut == "packed" else None
        if name != "start":
            start = str(self.folder / f"runs/start_padded_{kind}")
            recipe.resume.restore_config = run.Config(RestoreConfig, path=start)
            path = str(self.folder / recipe.log.name)
            recipe.trainer.callbacks = [
                run.Config(SaveGradients, path=path),
                run.Config(SaveRows, path=f"{path}.rows"),
            ]
        else:
            recipe.log.name = f"start_padded_{kind}"
        for field, size in layout.items():
            setattr(recipe.model.config if field.startswith("recompute") else recipe.trainer.strategy, field, size)
        return recipe

    def run(self, layouts: dict[str, dict[str, Any]], ranks: int, cuts: Sequence[str] = CUTS) -> None:
        self.alone(cuts)
        jobs = [(ranks, self.job(n, kind_of(n), cut, ranks, layout)) for n, layout in layouts.items() for cut in cuts]
        scored = set((self.folder / "runs/reference").iterdir())
        codes, said = forked(self.folder, jobs, limit=TIME_LIMIT + 60 * ranks * len(layouts))
        assert codes == [[0] * ranks] * len(jobs), said[-4000:]
        # One rank has scored the reference; one fingerprint names the weights in every layout.
        assert set((self.folder / "runs/reference").iterdir()) == scored

    def move(self, layouts: Sequence[str]) -> None:
        """Half of the steps in a layout, the others on one rank; and the other way round."""
        self.alone(["packed"])
        jobs = []
        for layout in layouts:
            there, back = (f"{layout} {way}" for way in ("there", "back"))
            for name, ranks, steps in ((there, 2, 5), (there, 1, STEPS), (back, 1, 5), (back, 2, STEPS)):
                recipe = self.job(name, kind_of(layout), "packed", ranks, TWO[layout] if ranks == 2 else {})
                recipe.trainer.max_steps = steps
                recipe.trainer.callbacks = []
                jobs.append((ranks, recipe))
        codes, said = forked(self.folder, jobs)
        assert codes == [[0] * ranks for ranks, _ in jobs], said[-4000:]

    def losses(self, name: str) -> list[float]:
        path = self.folder / f"runs/{name} packed/metrics.csv".replace(" ", "_")
        return [row["train/loss"] for row in read_metrics(path) if "train/loss" in row]

    def compare(self, layout: str, cut: str) -> None:
        one, other = (f"{name} {cut}".replace(" ", "_") for name in (f"one {kind_of(layout)}", layout))
        known, found = (read_metrics(self.folder / f"runs/{name}/metrics.csv") for name in (one, other))
        assert [row["step"] for row in known] == [row["step"] for row in found] and len(known) == STEPS + 4
        for a, b in zip(known, found, strict=True):
            for name in ("train/loss", "val/loss", "train/grad_norm", "val/logps_chosen_mean"):
                if name in a:
                    assert b[name] == pytest.approx(a[name], rel=1e-4), (name, a["step"])
        assert found[0]["val/loss"] == pytest.approx(0.6931471806, abs=1e-6)
        # Ranks that share a model are given the same rows, the others each its own.
        shared = math.prod((TWO | FOUR)[layout].get(size, 1) for size in (TENSOR, PIPELINE, CONTEXT))
        rows = rows_of(self.folder / f"{one}.rows").items()
        assert rows_of(self.folder / f"{other}.rows") == {
            step: Counter({row: n * shared for row, n in counts.items()}) for step, counts in rows
        }
        assert differ(self.folder / one, self.folder / other) < 1e-4


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, tiny_in: Callable[[Path], Callable[..., Any]]) -> Bench:
    folder = tmp_path_factory.mktemp("parallelism")
    return Bench(folder, tiny_in(folder))


@pytest.fixture(scope="module")
def two(bench: Bench) -> Bench:
    """Packed, which asks for all that padding does, and more."""
    bench.run(TWO, 2, cuts=("packed",))
    return bench


@pytest.fixture(scope="module")
def two_padded(bench: Bench) -> Bench:
    bench.run(TWO, 2, cuts=("padded",))
    return bench


@pytest.fixture(scope="module")
def four(bench: Bench) -> Bench:
    bench.run(FOUR, 4)
    return bench


@pytest.mark.parametrize("layout", TWO)
def test_two_ranks_are_one(two: Bench, layout: str) -> None:
    two.compare(layout, "packed")


@pytest.mark.slow
@pytest.mark.parametrize("layout", TWO)
def test_two_ranks_are_one_without_packing(two_padded: Bench, layout: str) -> None:
    two_padded.compare(layout, "padded")


@pytest.mark.slow
@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("layout", FOUR)
def test_four_ranks_are_one(four: Bench, layout: str, cut: str) -> None:
    four.compare(layout, cut)


@pytest.mark.slow
def test_auxiliary_losses_of_experts_weigh_the_same_in_every_layout(bench: Bench) -> None:
    """On rows of one length, so that nothing is padded and every layout has the same micro-batches."""
    # 12 tokens of input, which context parallelism cuts into four pieces.
    answers = {"chosen_response": "000007", "rejected_response": "123456"}
    rows = [{"prompt": f"{a}+{a + 1}=", **answers} for a in range(10, 28)]
    file = bench.folder / "even.jsonl"
    file.write_text("\n".join(map(json.dumps, rows)))
    jobs, ranks = [], {"experts": 2, "experts tensor": 2, "experts context": 2}
    for name, layout in {"one": {}, **{name: TWO[name] for name in ranks}}.items():
        recipe = bench.job(f"auxiliary {name}", "experts", "padded", ranks.get(name, 1), layout)
        recipe.model.config.moe_aux_loss_coeff = recipe.model.config.moe_z_loss_coeff = 0.3
        recipe.data.train, recipe.data.validation, recipe.trainer.max_steps = str(file), None, 1
        jobs.append((ranks.get(name, 1), recipe))
    codes, said = forked(bench.folder, jobs)
    assert codes == [[0] * ranks for ranks, _ in jobs], said[-4000:]
    for name in ranks:
        one, other = (bench.folder / f"auxiliary_{n}_padded".replace(" ", "_") for n in ("one", name))
        assert differ(one, other) < 1e-4, name


MOVED, MOVED_TOO = ("interleaved",), ("sequence", "pipeline", "context", "experts context")


@pytest.fixture(scope="module")
def moved(bench: Bench) -> Bench:
    bench.move(MOVED)
    return bench


@pytest.fixture(scope="module")
def moved_too(bench: Bench) -> Bench:
    bench.move(MOVED_TOO)
    return bench


def check_moved(bench: Bench, layout: str) -> None:
    known = bench.losses(f"one {kind_of(layout)}")
    for way in ("there", "back"):
        assert bench.losses(f"{layout} {way}") == pytest.approx(known, rel=1e-4), way


@pytest.mark.parametrize("layout", MOVED)
def test_a_run_moves_to_another_layout_and_back(moved: Bench, layout: str) -> None:
    check_moved(moved, layout)


@pytest.mark.slow
@pytest.mark.parametrize("layout", MOVED_TOO)
def test_so_it_does_in_the_other_layouts(moved_too: Bench, layout: str) -> None:
    check_moved(moved_too, layout)


def test_what_megatron_cannot_load_again_is_refused(two: Bench) -> None:
    """Its optimizer of a mixture of experts is another one when experts are divided."""
    recipe = two.job("experts", "experts", "packed", 1, {})
    recipe.trainer.max_steps = STEPS + 1
    with pytest.raises(ConfigError, match=r"expert_model_parallel_size: was 2, is 1; .*restore_config.path"):
        fdl.build(recipe)()
