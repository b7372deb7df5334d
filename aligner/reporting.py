"""`nemo llm report`: runs as a page. Each run draws its own when it ends."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from aligner import checkpoints, journal, provenance, run_facts, run_page, wandb_run
from aligner.console import say
from aligner.context import AlignContext
from aligner.errors import CheckpointError, ConfigError
from aligner.files import written_whole
from aligner.rows import Text

PAGE = "report.html"
FEW = 10
"""Steps below which a run has no curve to look at when it ends."""

HELP = """Draw one run, or several side by side, as one HTML page that needs nothing beside it.

nemo llm report runs/tiny_dpo

nemo llm report runs/first runs/second output=both.html

nemo llm report runs/first prompts=prompts.jsonl

Curves, what to look at, the recipe (of several: how they differ), where each job came from.

output= [RUN/report.html; of several: report.html here]  the page

prompts=  JSON lines with a prompt each: answered greedily by the model that the run started from and by the one that it
made, kept in RUN/samples.jsonl, shown on the page and, if the run logs there, as a table in Weights & Biases

max_tokens= [128]  of an answer
"""


def report() -> None:
    """Draw runs as a page."""


class ReportContext(AlignContext):
    """Words without `=` are folders of runs."""

    own = ("output", "prompts", "max_tokens")

    def cli_execute(self, fn: Any, args: list[str], entrypoint_type: Any = "task") -> None:
        # NeMo-Run takes a word that begins with `run`, as `runs/tiny_dpo`, for a setting of the executor.
        spelled = [arg if "=" in arg or arg.startswith(("/", ".", "~", "-")) else f"./{arg}" for arg in args]
        super().cli_execute(fn, spelled, entrypoint_type)

    def _execute_task(self, fn: Any, task_args: list[str]) -> None:
        folders = [arg for arg in task_args if "=" not in arg]
        given = dict(arg.split("=", 1) for arg in task_args if "=" in arg)
        unknown = [name for name in given if name not in self.own]
        if unknown:
            raise ConfigError(f"{unknown[0]}: there is no such argument (there are: {', '.join(self.own)})")
        if not folders:
            raise ConfigError("report: name the folder of a run, or several: nemo llm report runs/tiny_dpo")
        tokens = given.get("max_tokens", "128")
        if not tokens.isdigit() or tokens == "0":
            raise ConfigError(f"max_tokens: is {tokens!r}; expected a number of tokens")
        if "prompts" in given:
            for folder in folders:
                sample(Path(folder).expanduser(), given["prompts"], max_tokens=int(tokens))
        print(draw(folders, given.get("output")))


def draw(folders: list[str], output: str | None = None) -> Path:
    """Write the page of some runs.

    Args:
        folders: of the runs.
        output: the page; None: in the run's folder, or of several here.

    Raises:
        CheckpointError: a folder is none of a run.
    """
    runs = [run_facts.read(folder) for folder in folders]
    page = Path(output).expanduser() if output else (runs[0].folder if len(runs) == 1 else Path()) / PAGE
    page.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(page) as partial:
        partial.write_text(run_page.page(runs))
    return page


def at_the_end(folder: Path) -> Path | None:
    """Draw a run that ends, whatever its end; nothing that fails in it may cost the run."""
    try:
        if len(run_facts.read(folder).metrics) < FEW:
            return None
        page = draw([str(folder)])
    except Exception as error:
        say(f"no report of this run: {type(error).__name__}: {error}")
        return None
    say(f"report: {page}")
    return page


def sample(folder: Path, prompts: str, *, max_tokens: int) -> None:
    """Answer prompts by the model that a run started from and by the one that it made.

    Raises:
        CheckpointError: either is not there.
        RowError: a prompt is not as it must be.
    """
    from aligner.generation import generate_responses
    from aligner.inference import Megatron

    run = run_facts.read(folder)
    newest = checkpoints.newest(folder)
    start = next((job["starts from"] for job in run.jobs if job["starts from"]), None)
    if newest is None or start is None or not Path(start).exists():
        missing = "has no checkpoint" if newest is None else f"started from {start or 'random weights'}"
        raise CheckpointError(f"{folder}: {missing}; expected a run with the checkpoint that it made and its start")
    as_chat = bool(run.recipe.get("data", {}).get("as_chat"))
    answers: list[dict[str, Any]] = []
    for side, checkpoint in (("before", start), (f"after-step-{checkpoints.step_of(newest)}", str(newest))):
        engine = Megatron(checkpoint=checkpoint, as_chat=as_chat)
        output = folder / provenance.FOLDER / "samples" / f"{side}-{max_tokens}-{Path(prompts).name}"
        generate_responses(prompts, str(output), engine, samples=1, temperature=0, max_tokens=max_tokens)
        answers.append({row["key"]: row for row in journal.read(output)})
    before, after = answers
    rows = [
        {"prompt": _plain(row["prompt"]), "before": row["response"], "after": after[key]["response"]}
        for key, row in before.items()
    ]
    with written_whole(folder / run_facts.SAMPLES) as partial:
        partial.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    columns = ["prompt", "before", "after"]
    wandb_run.log_samples(folder, run.recipe, columns, [[row[name] for name in columns] for row in rows])


def _plain(text: Text) -> str:
    return text if isinstance(text, str) else "\n".join(f"{m['role']}: {m['content']}" for m in text)
