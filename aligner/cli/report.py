"""`nemo llm report`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from aligner.cli.context import RecipeContext
from aligner.common.errors import ConfigError
from aligner.report import run_page, samples

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
    """Write the report of runs."""


class ReportContext(RecipeContext):
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
                samples.write_samples(Path(folder).expanduser(), given["prompts"], max_tokens=int(tokens))
        print(run_page.write_report(folders, given.get("output")))
