"""Other losses, references and adapters on two ranks, against one: same weights, same rows, same losses.

Every way to divide a model, for DPO, is in test_parallelism.py, and so is a run that moves between layouts.
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hand import SaveRows, rows_of
from launching import forked

from aligner.common.run_folder import read_metrics

pytestmark = pytest.mark.slow
LAYOUTS = {
    "data": {},
    "tensor": {"tensor_model_parallel_size": 2},
    "pipeline": {"pipeline_model_parallel_size": 2},
}
KINDS = ("kto", "lora")


@pytest.fixture(scope="module")
def curves(tmp_path_factory: pytest.TempPathFactory, tiny_in: Callable[[Path], Callable[..., Any]]) -> Any:
    """Metrics of one rank and of every layout, all from one checkpoint."""
    import fiddle as fdl
    import nemo_run as run
    from nemo.collections import llm
    from nemo.lightning import RestoreConfig

    from aligner.losses import unpaired
    from aligner.model import reference

    folder = tmp_path_factory.mktemp("layouts")
    tiny = tiny_in(folder)
    fdl.build(tiny("start"))()
    start, adapters = str(folder / "runs/start"), str(folder / "runs/lora_start")

    def moved(name: str, ranks: int, steps: int, batching: str, micro_batch_size: int) -> Any:
        """A run over several epochs that notes its rows; stopped and continued it changes how they are cut."""
        recipe = job("dpo", name, ranks, rows=18)
        recipe.data.batching, recipe.data.micro_batch_size = batching, micro_batch_size
        recipe.trainer.max_steps = steps
        recipe.optim.lr_scheduler.min_lr = recipe.optim.config.lr
        recipe.optim.lr_scheduler.warmup_steps = 0
        recipe.trainer.callbacks = [run.Config(SaveRows, path=str(folder / name))]
        return recipe

    def job(kind: str, name: str, ranks: int, rows: int = 16, **layout: int) -> Any:
        recipe = tiny(f"{kind}_{name}", rows=rows, num_gpus_per_node=ranks)
        if kind == "kto":
            # What is looked at before a step must be the same in every layout: the KL, and a copy that follows.
            recipe.loss = run.Partial(unpaired.kto, beta=0.5)
            recipe.reference = run.Config(reference.SyncedReference, mixup_alpha=0.5, sync_steps=1)
            # One learning rate, whatever the length of the run.
            recipe.optim.lr_scheduler.min_lr = recipe.optim.config.lr
            recipe.optim.lr_scheduler.warmup_steps = 0
        if kind == "lora":
            # Continued, since ranks that share a layer draw other random numbers for fresh ones.
            recipe.peft = run.Config(llm.peft.LoRA, dim=4, alpha=8)
            recipe.reference = run.Config(reference.FrozenReference)
        adapted = kind == "lora" and name != "start"
        recipe.resume.restore_config = run.Config(RestoreConfig, path=adapters if adapted else start)
        for field, size in layout.items():
            setattr(recipe.trainer.strategy, field, size)
        return recipe

    fdl.build(job("lora", "start", 1))()
    # One rank makes two steps, two ranks that share each layer the others.
    first = job("kto", "resumed", 1)
    first.trainer.max_steps = 2
    fdl.build(first)()
    for kind in KINDS:
        fdl.build(job(kind, "one", 1))()
    jobs = [job(kind, name, 2, **layout) for kind in KINDS for name, layout in LAYOUTS.items()]
    # Three steps alone, three on two ranks, four alone again, across the ends of epochs of four steps.
    fdl.build(moved("straight", 1, 10, "padded", 2))()
    fdl.build(moved("moved", 1, 3, "padded", 1))()
    jobs += [job("kto", "resumed", 2, **LAYOUTS["tensor"]), moved("moved", 2, 6, "packed", 1)]
    codes, said = forked(folder, [(2, recipe) for recipe in jobs])
    assert codes == [[0, 0]] * len(jobs), said[-4000:]
    fdl.build(moved("moved", 1, 10, "length_grouped", 4))()
    names = [f"{kind}_{name}" for kind in KINDS for name in ("one", *LAYOUTS)]
    names += ["kto_resumed", "dpo_straight", "dpo_moved"]
    curves = {name: read_metrics(folder / f"runs/{name}/metrics.csv") for name in names}
    return Curves(curves, {name: rows_of(folder / name) for name in ("straight", "moved")})


class Curves(dict[str, list[dict[str, float]]]):
    """Metrics by run, and the rows of some of them by step."""

    def __init__(self, curves: dict[str, list[dict[str, float]]], rows: dict[str, dict[int, Counter[int]]]) -> None:
        super().__init__(curves)
        self.rows = rows


RUNS = [(kind, layout) for kind in KINDS for layout in LAYOUTS] + [("kto", "resumed")]


@pytest.mark.parametrize(("kind", "layout"), RUNS)
def test_two_ranks_train_as_one(curves: dict[str, list[dict[str, float]]], kind: str, layout: str) -> None:
    one, two = curves[f"{kind}_one"], curves[f"{kind}_{layout}"]
    assert [row["step"] for row in one] == [row["step"] for row in two]
    for a, b in zip(one, two, strict=True):
        for name in a:
            # At step 0 a pair is a tie or decided by the last bit: one rank's reference, two ranks' policy.
            if not name.endswith(("tokens_per_second", "step_time")) and not (a["step"] == 0 and name.endswith("acc")):
                assert b[name] == pytest.approx(a[name], rel=3e-4, abs=2e-5), (name, a["step"])


def test_a_resume_on_other_ranks_and_micro_batches_sees_every_row_once(curves: Any) -> None:
    """Nothing twice and nothing missed, step by step; and it is trained to the same losses."""
    straight, moved = curves.rows["straight"], curves.rows["moved"]
    assert sorted(straight) == list(range(10)) and all(len(rows) == 4 for rows in straight.values())
    assert moved == straight
    first_epoch = sum((moved[step] for step in range(4)), Counter())
    assert len(first_epoch) == 16 and set(first_epoch.values()) == {1}
    losses = [
        {row["step"]: row["train/loss"] for row in curves[f"dpo_{name}"] if "train/loss" in row}
        for name in ("straight", "moved")
    ]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
