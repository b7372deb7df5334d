"""A run killed by SIGKILL and run again ends where one that was not killed does, to the last bit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import fiddle as fdl
import nemo_run as run
import pytest
from launching import TIME_LIMIT, forked
from nemo.collections import llm
from nemo.lightning import RestoreConfig

from aligner.callbacks import step_trace
from aligner.checkpoint import checkpoint_diff, folders
from aligner.common.run_folder import read_metrics
from aligner.model import reference

STEPS, KILLED = 20, 8
"""Of twenty steps seven are saved; the kill comes one later."""

KINDS = ("full", "lora", "packed", "synced")


@pytest.fixture(scope="module")
def make(tmp_path_factory: pytest.TempPathFactory, tiny_in: Callable[[Path], Callable[..., Any]]) -> Callable[..., Any]:
    folder = tmp_path_factory.mktemp("resume")
    tiny = tiny_in(folder)
    start = tiny("start")
    start.trainer.max_steps = 1
    fdl.build(start)()

    def job(kind: str, name: str, ranks: int, dropout: float, kill: bool = False) -> Any:
        recipe = tiny(f"{kind}_{ranks}_{dropout}_{name}", rows=18, num_gpus_per_node=ranks)
        recipe.resume.restore_config = run.Config(RestoreConfig, path=str(folder / "runs/start"))
        recipe.trainer.max_steps, recipe.trainer.val_check_interval = STEPS, 6
        recipe.log.ckpt.every_n_train_steps = KILLED - 1
        recipe.model.config.hidden_dropout = recipe.model.config.attention_dropout = dropout
        recipe.optim.lr_scheduler.warmup_steps = 4
        if kind == "lora":
            recipe.peft = run.Config(llm.peft.LoRA, dim=4, alpha=8, dropout=dropout)
            recipe.reference = run.Config(reference.BaseModelReference)
        if kind == "packed":
            recipe.data.batching, recipe.data.packed_sequence_size = "packed", 130
        if kind == "synced":
            recipe.reference = run.Config(reference.SyncedReference, mixup_alpha=0.5, sync_steps=3)
        path = str(folder / recipe.log.name)
        kill_after = KILLED if kill else None
        recipe.trainer.callbacks = [run.Config(step_trace.StepTrace, path=path, kill_after=kill_after)]
        return recipe

    job.folder = folder  # type: ignore[attr-defined]
    return job


def difference(folder: Path, one: str, other: str, ranks: int) -> str | None:
    for rank in range(ranks):
        a, b = (step_trace.read(folder / name, rank) for name in (one, other))
        assert sorted(a) == list(range(STEPS))
        for step in a:
            assert b[step] == a[step], (rank, step)
    found = [folders.latest_checkpoint(folder / "runs" / name) for name in (one, other)]
    states = [checkpoint_diff.read(path) for path in found if path is not None]
    assert len(states[0]) > 40
    assert any(name.startswith("optimizer.state.exp_avg_sq") for name in states[0])
    return checkpoint_diff.first_difference(states[0], states[1])


CASES = [(1, "full", 0.2), (2, "packed", 0.2)]
MORE = [(r, kind, p) for r in (1, 2) for kind in KINDS for p in (0.0, 0.2) if (r, kind, p) not in CASES]


@pytest.fixture(scope="module")
def runs(make: Any) -> Callable[[list[tuple[int, str, float]]], None]:
    """Does the runs of some cases, each straight, killed, and again."""
    done: set[tuple[int, str, float]] = set()

    def do(cases: list[tuple[int, str, float]]) -> None:
        todo = [case for case in cases if case not in done]
        done.update(todo)
        jobs = []
        for ranks, kind, dropout in todo:
            names = {"straight": False, "resumed": True}
            jobs += [(ranks, make(kind, name, ranks, dropout, kill)) for name, kill in names.items()]
            jobs.append((ranks, make(kind, "resumed", ranks, dropout)))
        codes, said = forked(make.folder, jobs, limit=TIME_LIMIT + 60 * len(todo))
        wanted = [[code] * ranks for ranks, _, _ in todo for code in (0, -9, 0)]
        assert codes == wanted, (codes, said[-4000:])

    return do


@pytest.mark.parametrize(("ranks", "kind", "dropout"), CASES)
def test_a_killed_run_ends_as_a_straight_one(make: Any, runs: Any, ranks: int, kind: str, dropout: float) -> None:
    runs(CASES)
    name = f"{kind}_{ranks}_{dropout}"
    assert difference(make.folder, f"{name}_straight", f"{name}_resumed", ranks) is None


@pytest.mark.slow
@pytest.mark.parametrize(("ranks", "kind", "dropout"), MORE)
def test_so_do_all_kinds_on_one_and_two_ranks_with_dropout_and_without(
    make: Any, runs: Any, ranks: int, kind: str, dropout: float
) -> None:
    runs(MORE)
    name = f"{kind}_{ranks}_{dropout}"
    assert difference(make.folder, f"{name}_straight", f"{name}_resumed", ranks) is None


def test_random_states_differ_from_step_to_step_and_from_rank_to_rank(make: Any, runs: Any) -> None:
    runs(CASES)
    two = [step_trace.read(make.folder / "packed_2_0.2_straight", rank) for rank in (0, 1)]
    assert len({note["random states"] for note in two[0].values()}) == STEPS
    assert two[0][5]["random states"] != two[1][5]["random states"], "data-parallel ranks draw numbers of their own"


def test_metrics_of_a_resumed_run_are_those_of_a_straight_one(make: Any, runs: Any) -> None:
    """Each step once, each validation where it belongs."""
    runs(CASES)
    files = [make.folder / f"runs/packed_2_0.2_{name}/metrics.csv" for name in ("straight", "resumed")]
    known, found = (
        [{k: v for k, v in row.items() if "per_second" not in k and "time" not in k} for row in read_metrics(f)]
        for f in files
    )
    assert found == known
    assert [row["step"] for row in known if "val/loss" in row] == [0, 6, 12, 18, 20]
