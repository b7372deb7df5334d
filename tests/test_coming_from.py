"""The pages for who comes from NeMo-Aligner or TRL: every option has its row, every place can be set.

The names of NeMo-Aligner's options stand in tests/data, of 0.7.0's gpt_dpo.yaml and of the last and earlier states of
gpt_self_rewarding.yaml (its pull request 321).
"""

import dataclasses
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

DOCS, DATA = Path(__file__).parent.parent / "docs", Path(__file__).parent / "data"
BEFORE = {
    "loss.reward_scale": "loss=rpo_bwd_kl",
    "loss.desirable_weight": "loss=kto",
    "loss.undesirable_weight": "loss=kto",
    "log.wandb.": "log.wandb=wandb",
    "peft.": "peft=lora",
    "reference.": "reference=synced",
}
"""What must be set for a path to be there."""
FILES = {
    "gpt_dpo.yaml": ("gpt_dpo",),
    "gpt_self_rewarding.yaml": ("gpt_self_rewarding", "gpt_self_rewarding.earlier"),
}


def tables(page: str) -> dict[str, list[list[str]]]:
    """Rows of three cells by the heading above them."""
    found: dict[str, list[list[str]]] = {}
    heading = ""
    for line in (DOCS / page).read_text().splitlines():
        if line.startswith("#"):
            heading = line.lstrip("# ")
        elif line.startswith("| `"):
            found.setdefault(heading, []).append([cell.strip() for cell in line.strip("|").split(" | ")])
    return found


def named(cell: str) -> list[str]:
    return re.findall(r"`([^`]+)`", cell)


@pytest.mark.parametrize("heading", FILES)
def test_every_option_of_nemo_aligner_stands_in_one_row(heading: str) -> None:
    rows = tables("from_nemo_aligner.md")[heading]
    told = [option for row in rows for option in named(row[0])]
    wanted = {name for file in FILES[heading] for name in (DATA / f"{file}.options").read_text().split()}
    assert len(told) == len(set(told)) and set(told) == wanted
    for option, here, *why in rows:
        assert named(here) or (here.startswith("—") and why and why[0].strip()), f"{option}: no place and no reason"


def test_every_metric_of_self_rewarding_has_a_name_here() -> None:
    from aligner.judge.iteration_report import IterationReport
    from aligner.judge.selection import Candidate
    from aligner.losses import metrics

    rows = tables("from_nemo_aligner.md")["Metrics of self-rewarding"]
    assert {name for row in rows for name in named(row[0])} == {
        "chosen_lengths", "reject_lengths", "chosen_generated_rewards", "rejected_generated_rewards",
        "bad_samples_per_GBS", "bad_ends_per_GBS",
    }  # fmt: skip
    report = IterationReport()
    report.add_response({"finish_reason": "stop", "num_tokens": 1})
    report.count("pair")
    pair = [Candidate(key=str(i), text=str(i), length=1, scores=(float(i),)) for i in (1, 0)]
    report._pairs.append((pair[0], pair[1]))
    known = {*(f"train/{name}" for name in metrics.LOGGED), *(f"iteration/{name}" for name in report.metrics())}
    places = [place for row in rows for cell in row[1:] for place in named(cell) if "/" in place]
    assert len(places) >= len(rows) and set(places) <= known


def walk(at: Any, path: str) -> None:
    """The last name is an argument of what holds it."""
    from megatron.core.optimizer import OptimizerConfig

    *parents, last = path.split(".")
    for name in parents:
        at = getattr(at, name)
    target = at.__fn_or_cls__
    known = set(inspect.signature(target).parameters)
    if "config" in parents[-1:] and target.__name__ == "optimizer_config":
        known |= {field.name for field in dataclasses.fields(OptimizerConfig)}
    assert last in known, f"{path}: no argument of {target}"


def prepared(recipe: Any, path: str) -> Any:
    """The recipe once that is set without which there is no such path."""
    from aligner.cli.parsing.overrides import override

    return override(recipe, [setting for start, setting in BEFORE.items() if path.startswith(start)])


@pytest.mark.parametrize("page", ["from_nemo_aligner.md", "from_trl.md"])
def test_every_place_in_align_can_be_set(page: str) -> None:
    from aligner import recipes
    from aligner.cli import commands  # noqa: F401 - registers what losses and adapters are called
    from aligner.cli.parsing.overrides import override

    rows = [row for heading, rows in tables(page).items() if heading != "gpt_self_rewarding.yaml" for row in rows]
    places = {place for row in rows if len(row) > 1 for place in named(row[1])}
    paths = {place for place in places if re.fullmatch(r"[a-z][\w.]*(=\w+)?", place)}
    paths = {
        path
        for path in paths
        if path.split("=")[0].split(".")[0]
        in inspect.signature(recipes.llama3_8b.dpo_recipe().__fn_or_cls__).parameters
    }
    assert len(paths) > 30
    for path in sorted(paths):
        recipe: Any = recipes.llama3_8b.dpo_recipe()
        if "=" in path:
            override(recipe, [path])
        elif "." in path:
            walk(prepared(recipe, path), path)


def test_every_place_in_self_reward_can_be_set() -> None:
    from aligner import recipes
    from aligner.cli import commands  # noqa: F401 - as above
    from aligner.cli.stage_contexts import STAGES

    rows = tables("from_nemo_aligner.md")["gpt_self_rewarding.yaml"]
    places = {place for row in rows for place in named(row[1])}
    meta = recipes.llama3_8b.meta_rewarding_recipe()
    arguments = inspect.signature(recipes.llama3_8b.self_rewarding_recipe).parameters
    counted = 0
    for place in sorted(places):
        if argument := re.fullmatch(r"\((\w+)=\)", place):
            assert argument[1] in arguments
            continue
        path = re.sub(r"^iterations\[\d\]\.", "", place)
        stage, _, rest = path.partition(".")
        if stage not in STAGES:
            assert place == "--factory llama3_8b_meta_rewarding"
            continue
        part: Any = getattr(meta.iterations[0], stage)
        part = part.judge if stage == "judge" else part
        walk(prepared(part, rest) if stage == "align" else part, rest)
        counted += 1
    assert counted > 50
