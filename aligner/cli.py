"""What `nemo llm` loads: registers `align` and the factories beside nemo-toolkit's own commands.

NeMo-Run swallows an error in such a module in one line, and with it the commands; here it is shown whole.
"""

from __future__ import annotations

import copy
import inspect
import sys
import traceback
from collections.abc import Callable
from typing import Any

import docstring_parser

HELP = """Train a policy on preference pairs; run the same command again and it goes on where it was.

A recipe is named by --factory (listed below) or read by --yaml; any part of it is set by its path:

nemo llm align --factory tiny_dpo -y loss.beta=0.05 trainer.max_steps=100

nemo llm align --factory tiny_dpo -y data.train=train.jsonl data.validation=valid.jsonl log.name=mine

nemo llm align --factory tiny_dpo -y loss=ipo loss.beta=0.2 reference=frozen peft=lora sft_weight=0.1

nemo llm align --factory tiny_dpo --dryrun shows every part: model, data, trainer, loss, preference_weight, sft_weight,
reference, peft, log, optim, resume. run.executor=local run.executor.ranks=2 says where it runs.
"""

OURS = (
    "align",
    "self-reward",
    "generate-responses",
    "judge-responses",
    "meta-judge",
    "verify-resume",
    "size",
    "report",
    "import-hf",
    "export-hf",
    "merge",
    "lint-preferences",
    "pack-preferences",
    "diff-runs",
    "completion",
)


def _help(name: str, command: Callable[..., Any]) -> str:
    """What a command does, and its arguments as one writes them; NeMo-Run shows the first half of a docstring only."""
    said, defaults = docstring_parser.parse(command.__doc__ or ""), inspect.signature(command).parameters
    lines = [said.short_description or "", said.long_description or ""]
    for argument in said.params:
        default = defaults[argument.arg_name].default
        shown = "" if default is inspect.Parameter.empty else f" [{default}]"
        lines.append(f"{argument.arg_name}={shown}  {' '.join((argument.description or '').split())}")
    required = [f"{p.name}=..." for p in defaults.values() if p.default is inspect.Parameter.empty]
    return "\n\n".join([*lines, f"nemo llm {name} -y {' '.join(required)}"])


def _executor(config: Any) -> Callable[[], Any]:
    import nemo_run as run

    def made() -> run.Config[run.Executor]:
        return copy.deepcopy(config)

    # NeMo-Run looks for what a factory makes in its annotation.
    made.__annotations__["return"] = run.Config[run.Executor]
    return made


def _register() -> None:
    import nemo_run as run

    from aligner import (
        console,
        generation,
        judge,
        meta_judge,
        pipeline,
        recipes,
        reporting,
        size,
        verify,
    )
    from aligner.api import align
    from aligner.context import AlignContext
    from aligner.executors.profiles import KINDS, profiles
    from aligner.factories import RecipesEntrypoint
    from aligner.rounds_context import RoundsContext, StageContext

    console.hush()
    with_recipes = {"namespace": "llm", "entrypoint_cls": RecipesEntrypoint}
    run.cli.entrypoint(align, help=HELP, run_ctx_cls=AlignContext, **with_recipes)
    run.cli.entrypoint(
        verify.verify_resume, name="verify-resume", namespace="llm", help=verify.HELP, run_ctx_cls=verify.VerifyContext
    )
    run.cli.entrypoint(reporting.report, namespace="llm", help=reporting.HELP, run_ctx_cls=reporting.ReportContext)
    run.cli.entrypoint(size.size, namespace="llm", help=size.HELP, run_ctx_cls=size.SizeContext)
    run.cli.entrypoint(
        pipeline.self_reward,
        name="self-reward",
        help=_help("self-reward", pipeline.self_reward),
        run_ctx_cls=RoundsContext,
        **with_recipes,
    )
    for name, stage in {
        "generate-responses": generation.generate_responses,
        "judge-responses": judge.judge_responses,
        "meta-judge": meta_judge.meta_judge,
    }.items():
        run.cli.entrypoint(stage, name=name, namespace="llm", help=_help(name, stage), run_ctx_cls=StageContext)
    from lightning.pytorch.loggers import WandbLogger

    def wandb() -> run.Config[WandbLogger]:
        return run.Config(WandbLogger, project="nemo-align")

    for name, config in {**{kind: run.Config(make) for kind, make in KINDS.items()}, **profiles()}.items():
        run.cli.factory(_executor(config), target=run.Executor, name=name)
    run.cli.factory(wandb, target=WandbLogger, name="wandb")
    _register_tools()
    _register_parts()
    for model in recipes.__all__:  # their import registers the factories
        getattr(recipes, model)


def _register_tools() -> None:
    """Commands that run here and now."""
    import nemo_run as run

    from aligner import completion, huggingface, lint, merging, prepacked, provenance

    for name, command in {
        "import-hf": huggingface.import_hf,
        "export-hf": huggingface.export_hf,
        "merge": merging.merge,
        "lint-preferences": lint.lint_preferences,
        "pack-preferences": prepacked.pack_preferences,
        "diff-runs": provenance.diff_runs,
        "completion": completion.completion,
    }.items():
        run.cli.entrypoint(command, name=name, namespace="llm", enable_executor=False, help=_help(name, command))


def _register_parts() -> None:
    """What `engine=...` and `judge=...` may be called."""
    import nemo_run as run

    from aligner.engines import Engine
    from aligner.judge import Judge, ModelJudge, Verifier
    from aligner.servers import Server

    def megatron() -> run.Config[Engine]:
        from aligner.inference import Megatron

        return run.Config(Megatron)

    def vllm() -> run.Config[Engine]:
        from aligner.vllm_engine import VLLM

        return run.Config(VLLM)

    def server() -> run.Config[Engine]:
        return run.Config(Server)

    def model() -> run.Config[Judge]:
        return run.Config(ModelJudge)

    def self_judge() -> run.Config[ModelJudge]:
        return run.Config(ModelJudge)

    def verifier() -> run.Config[Judge]:
        return run.Config(Verifier)

    for make in (megatron, vllm, server):
        run.cli.factory(make, target=Engine, name=make.__name__)
    for make in (model, verifier):
        run.cli.factory(make, target=Judge, name=make.__name__)
    run.cli.factory(self_judge, target=ModelJudge, name="model")


try:
    _register()
except Exception:
    traceback.print_exc()
    print("nemo-align could not register its commands; the error stands above", file=sys.stderr)
    if sys.argv[1:2] == ["llm"] and sys.argv[2:3] and sys.argv[2] in OURS:
        sys.exit(1)
    raise
