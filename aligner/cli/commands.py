"""All commands of `nemo llm` that this package adds, in one table, and their registration with NeMo-Run.

NeMo-Run imports this module for the word `llm`. It reduces an error in such a module to one line and drops the
commands, so this module prints the full error.
"""

from __future__ import annotations

import copy
import inspect
import sys
import traceback
from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

import docstring_parser

ALIGN_HELP = """Train a policy on preference pairs. If the run folder holds a checkpoint, training resumes from it.

A recipe is named by --factory (listed below) or read by --yaml; any part of it is set by its path:

nemo llm align --factory tiny_dpo -y log.name=short loss.beta=0.05 trainer.max_steps=100

nemo llm align --factory tiny_dpo -y log.name=mine data.train=train.jsonl data.validation=valid.jsonl

nemo llm align --factory tiny_dpo -y log.name=lora loss=ipo loss.beta=0.2 reference=frozen peft=lora sft_loss_weight=0.1

nemo llm align --factory tiny_dpo --dryrun shows every part: model, data, trainer, loss, preference_loss_weight,
sft_loss_weight, reference, peft, log, optim, resume, limits. run.executor=local run.executor.ntasks_per_node=2 starts
two processes on this machine.
"""


class Command(NamedTuple):
    """One command."""

    function: str
    """`module:function` below `aligner`; its docstring is the help, unless `help` names another text."""
    context: str | None = None
    """`module:class` that parses the command line; None: NeMo-Run's own, for commands that run in this process."""
    help: str | None = None
    """`module:TEXT`."""
    takes_recipe: bool = False
    """Whether `--factory` names a recipe of this function; its help then lists the recipes."""


COMMANDS = {
    "align": Command("api:align", "cli.context:RecipeContext", "cli.commands:ALIGN_HELP", takes_recipe=True),
    "self-reward": Command("judge.self_rewarding:self_reward", "cli.stage_contexts:PipelineContext", takes_recipe=True),
    "generate-responses": Command("generate.generation:generate_responses", "cli.stage_contexts:StageContext"),
    "judge-responses": Command("judge.judges:judge_responses", "cli.stage_contexts:StageContext"),
    "meta-judge": Command("judge.meta_judge:meta_judge", "cli.stage_contexts:StageContext"),
    "judge-demonstrations": Command("judge.demonstrations:judge_demonstrations"),
    "verify-resume": Command(
        "cli.verify_resume:verify_resume", "cli.verify_resume:VerifyContext", "cli.verify_resume:HELP"
    ),
    "size": Command("cli.size:size", "cli.size:SizeContext", "cli.size:HELP"),
    "evaluate": Command("report.evaluate:evaluate"),
    "report": Command("cli.report:report", "cli.report:ReportContext", "cli.report:HELP"),
    "import-hf": Command("checkpoint.huggingface:import_hf"),
    "export-hf": Command("checkpoint.huggingface:export_hf"),
    "verify-checkpoint": Command("checkpoint.verify:verify_checkpoint"),
    "merge-lora": Command("checkpoint.merge_lora:merge_lora"),
    "lint-preferences": Command("cli.lint_preferences:lint_preferences"),
    "convert-preferences": Command("data.forms.convert:convert_preferences"),
    "forms": Command("data.forms.convert:forms"),
    "pack-preferences": Command("cli.pack_preferences:pack_preferences"),
    "diff-runs": Command("cli.diff_runs:diff_runs"),
    "completion": Command("cli.shell_completion:completion"),
}


def _load(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(import_module(f"aligner.{module}"), name)


def _help(name: str, function: Callable[..., Any]) -> str:
    """Return a docstring with its arguments as a user types them; NeMo-Run shows the first half of a docstring only."""
    doc, parameters = docstring_parser.parse(function.__doc__ or ""), inspect.signature(function).parameters
    lines = [doc.short_description or "", doc.long_description or ""]
    for argument in doc.params:
        default = parameters[argument.arg_name].default
        shown = "" if default is inspect.Parameter.empty else f" [{default}]"
        lines.append(f"{argument.arg_name}={shown}  {' '.join((argument.description or '').split())}")
    required = [f"{p.name}=..." for p in parameters.values() if p.default is inspect.Parameter.empty]
    return "\n\n".join([*lines, f"nemo llm {name} -y {' '.join(required)}"])


def _register_commands() -> None:
    import nemo_run as run

    from aligner.cli.parsing.entrypoint import CommandEntrypoint
    from aligner.cli.parsing.factories import RecipesEntrypoint

    for name, command in COMMANDS.items():
        function = _load(command.function)
        options: dict[str, Any] = {"help": _load(command.help) if command.help else _help(name, function)}
        options["entrypoint_cls"] = RecipesEntrypoint if command.takes_recipe else CommandEntrypoint
        if command.context:
            options["run_ctx_cls"] = _load(command.context)
        else:
            options["enable_executor"] = False
        run.cli.entrypoint(function, name=name, namespace="llm", **options)


def _register_executors() -> None:
    """Register names of `run.executor=...`: the kinds of executors, and this site's profiles."""
    import nemo_run as run

    from aligner.executors.profiles import KINDS, profiles

    def factory(config: Any) -> Callable[[], Any]:
        def make() -> run.Config[run.Executor]:
            return copy.deepcopy(config)

        # NeMo-Run reads the type of a factory's result from its annotation.
        make.__annotations__["return"] = run.Config[run.Executor]
        return make

    for name, config in {**{kind: run.Config(make) for kind, make in KINDS.items()}, **profiles()}.items():
        run.cli.factory(factory(config), target=run.Executor, name=name)


def _register_parts() -> None:
    """Register names of `engine=...`, `judge=...` and `log.wandb=...`."""
    import nemo_run as run
    from lightning.pytorch.loggers import WandbLogger

    from aligner.generate.engine import Engine
    from aligner.generate.openai_engine import OpenAIEngine
    from aligner.judge.judges import Judge, ModelJudge, Verifier

    def megatron() -> run.Config[Engine]:
        from aligner.generate.megatron_engine import MegatronEngine

        return run.Config(MegatronEngine)

    def vllm() -> run.Config[Engine]:
        from aligner.generate.vllm_engine import VLLMEngine

        return run.Config(VLLMEngine)

    def server() -> run.Config[Engine]:
        return run.Config(OpenAIEngine)

    def model() -> run.Config[Judge]:
        return run.Config(ModelJudge)

    def self_judge() -> run.Config[ModelJudge]:
        return run.Config(ModelJudge)

    def verifier() -> run.Config[Judge]:
        return run.Config(Verifier)

    def wandb() -> run.Config[WandbLogger]:
        return run.Config(WandbLogger, project="nemo-align")

    for make in (megatron, vllm, server):
        run.cli.factory(make, target=Engine, name=make.__name__)
    for make in (model, verifier):
        run.cli.factory(make, target=Judge, name=make.__name__)
    run.cli.factory(self_judge, target=ModelJudge, name="model")
    run.cli.factory(wandb, target=WandbLogger, name="wandb")


def _register() -> None:
    from aligner import recipes
    from aligner.cli.parsing import entrypoint
    from aligner.common import console

    console.silence_nemo()
    entrypoint.silence_nemo_run()
    _register_commands()
    _register_executors()
    _register_parts()
    for model in recipes.MODELS:  # their import registers the factories
        getattr(recipes, model)


try:
    _register()
except Exception:
    traceback.print_exc()
    print("nemo-align could not register its commands; the error stands above", file=sys.stderr)
    if sys.argv[1:2] == ["llm"] and sys.argv[2:3] and sys.argv[2] in COMMANDS:
        sys.exit(1)
    raise
