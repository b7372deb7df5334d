"""`nemo llm report`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from aligner.cli.context import RecipeContext
from aligner.common.errors import ConfigError
from aligner.report import run_page, samples

HELP = """Write a self-contained HTML page of one run, or of several runs side by side.

nemo llm report runs/tiny_dpo

nemo llm report runs/first runs/second output=both.html

nemo llm report runs/first prompts=prompts.jsonl

The page shows curves, findings, the recipe (of several runs: the differences) and the provenance of each job.

output= [RUN/report.html; of several runs: ./report.html]  path of the page

prompts=  JSON lines with one prompt each. The run's initial model and its latest checkpoint generate greedy responses.
They are stored in RUN/samples.jsonl, shown on the page and, if the run logs there, as a table in Weights & Biases.

max_tokens= [128, or half of a shorter context length]  most tokens of a response
"""


def report() -> None:
    """Write the report of runs."""


class ReportContext(RecipeContext):
    """Context in which words without `=` are folders of runs."""

    own = ("output", "prompts", "max_tokens")

    def cli_execute(self, fn: Any, args: list[str], entrypoint_type: Any = "task") -> None:
        # NeMo-Run parses a word that begins with `run`, as `runs/tiny_dpo`, as a setting of the executor.
        args = [arg if "=" in arg or arg.startswith(("/", ".", "~", "-")) else f"./{arg}" for arg in args]
        super().cli_execute(fn, args, entrypoint_type)

    def _execute_task(self, fn: Any, task_args: list[str]) -> None:
        folders = [arg for arg in task_args if "=" not in arg]
        options = dict(arg.split("=", 1) for arg in task_args if "=" in arg)
        unknown = [name for name in options if name not in self.own]
        if unknown:
            raise ConfigError(f"{unknown[0]}: there is no such argument (there are: {', '.join(self.own)})")
        if not folders:
            raise ConfigError("report: name the folder of a run, or several: nemo llm report runs/tiny_dpo")
        tokens = options.get("max_tokens")
        if tokens is not None and (not tokens.isdigit() or tokens == "0"):
            raise ConfigError(f"max_tokens: is {tokens!r}; expected a number of tokens")
        if "prompts" in options:
            for folder in folders:
                samples.write_samples(
                    Path(folder).expanduser(), options["prompts"], max_tokens=int(tokens) if tokens else None
                )
        print(run_page.write_report(folders, options.get("output")))
