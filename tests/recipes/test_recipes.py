"""Recipes can be made, read, shipped and written down; their constants are not restated here."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import fiddle as fdl
import nemo_run as run
import pytest
import yaml
from fiddle.experimental import serialization as fiddle_serialization
from nemo.lightning.run import plugins
from nemo_run.core.serialization.zlib_json import ZlibJSONSerializer

from aligner import recipes
from aligner.api import align
from aligner.cli.parsing.yaml_recipe import load_yaml
from aligner.common.errors import ConfigError, RowError
from aligner.recipes import families

MODELS = {
    "tiny": recipes.tiny_llama,
    **{name: getattr(recipes, name) for name in ("smollm2_135m", "llama3_8b", "qwen3_30b_a3b")},
}
METHODS = ("sft", "dpo", "ipo", "rpo", "kto")
FACTORIES: dict[str, Callable[..., Any]] = {
    f"{model}_{method}": getattr(module, f"{method}_recipe") for model, module in MODELS.items() for method in METHODS
}


@pytest.mark.parametrize("make", FACTORIES.values(), ids=FACTORIES)
def test_a_recipe_is_a_partial_of_align_that_users_can_edit(make: Callable[..., Any]) -> None:
    recipe = make(dir="somewhere", name="first", num_nodes=2, num_gpus_per_node=8)
    assert isinstance(recipe, run.Partial)
    assert fdl.get_callable(recipe) is align
    assert (recipe.log.log_dir, recipe.log.name) == ("somewhere", "first")
    assert (recipe.trainer.num_nodes, recipe.trainer.devices) == (2, 8)
    recipe.trainer.strategy.tensor_model_parallel_size = 4
    recipe.optim.config.lr = 1e-7
    if recipe.preference_loss_weight != 0:
        recipe.loss.beta = 0.05
        with pytest.raises(AttributeError, match="No parameter named 'bta'"):
            recipe.loss.bta = 1


@pytest.mark.parametrize("make", FACTORIES.values(), ids=FACTORIES)
def test_a_recipe_can_be_shipped_and_names_no_module_that_a_cluster_would_lack(
    make: Callable[..., Any],
) -> None:
    recipe = make()
    serializer = ZlibJSONSerializer()
    assert serializer.deserialize(serializer.serialize(recipe)) == recipe
    text = fiddle_serialization.dump_json(recipe)
    assert "aligner.recipes" not in text and "__main__" not in text


@pytest.mark.parametrize("make", FACTORIES.values(), ids=FACTORIES)
def test_a_recipe_written_as_yaml_reads_back_the_same(make: Callable[..., Any], tmp_path: Path) -> None:
    from nemo_run.cli.config import ConfigSerializer

    recipe = make()
    path = tmp_path / "recipe.yaml"
    ConfigSerializer().dump(recipe, path)
    assert load_yaml(path) == recipe


def test_yaml_that_is_no_recipe_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    with pytest.raises(ConfigError, match="does not exist"):
        load_yaml(path)
    for text, message in (
        ("a: [", "is not YAML"),
        ("a: 1", "has no _target_"),
        (yaml.safe_dump({"_target_": "aligner.api.nothing"}), "cannot import 'aligner.api.nothing'"),
        (yaml.safe_dump({"_target_": "aligner.losses.dpo", "_partial_": True, "bta": 1}), "bta"),
    ):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            load_yaml(path)


def test_adapters_are_an_argument_of_every_recipe() -> None:
    from nemo.collections.llm import peft

    for make in FACTORIES.values():
        assert make().peft is None
        assert fdl.get_callable(make(peft_scheme="lora").peft) is peft.LoRA
        assert fdl.get_callable(make(peft_scheme="dora").peft) is peft.DoRA
        with pytest.raises(ValueError, match="peft_scheme: is 'qlora'; expected 'lora', 'dora' or None"):
            make(peft_scheme="qlora")


def test_every_method_minimises_what_it_is_called_after() -> None:
    from aligner import losses
    from aligner.losses import unpaired

    for method, loss in (("dpo", losses.dpo), ("ipo", losses.ipo), ("rpo", losses.rpo_bwd_kl), ("kto", unpaired.kto)):
        for model in MODELS:
            assert fdl.get_callable(FACTORIES[f"{model}_{method}"]().loss) is loss
    for model in MODELS:
        sft = FACTORIES[f"{model}_sft"]()
        assert (sft.preference_loss_weight, sft.sft_loss_weight) == (0.0, 1.0)


@pytest.mark.parametrize("name", recipes.MODELS)
def test_a_model_is_what_its_file_is_called_after_and_its_layouts_can_divide_it(name: str) -> None:
    from nemo.lightning import io  # noqa: F401 - what is built is noted down by it

    from aligner.model import parallelism

    module = getattr(recipes, name)
    assert name.endswith(module.NAME) or name == module.NAME
    for scheme in (None, "lora") if name in families.MODELS else ():
        recipe = module.dpo_recipe(peft_scheme=scheme)
        ranks = recipe.trainer.num_nodes * recipe.trainer.devices
        strategy: Any = fdl.build(recipe.trainer.strategy)
        parallelism.check(strategy.parallelism, fdl.build(recipe.model.config), ranks=ranks)
        if not hasattr(module, "meta_rewarding_recipe"):
            continue
        answering = module.meta_rewarding_recipe(peft_scheme=scheme, iterations=1).iterations[0].generate.engine
        layout_ = families.MODELS[name].adapters if scheme else families.MODELS[name].layout
        assert answering.tensor_model_parallel_size == (layout_.generation_tensor or layout_.tensor)
        config: Any = fdl.build(recipe.model.config)
        assert config.num_query_groups % answering.tensor_model_parallel_size == 0
        assert (answering.num_nodes, answering.devices) == (recipe.trainer.num_nodes, recipe.trainer.devices)


def test_factories_of_the_command_line_are_called_model_and_method() -> None:
    import aligner.cli.commands  # noqa: F401
    from aligner.cli.parsing.factories import list_recipes, names
    from aligner.judge.self_rewarding import self_reward

    assert {"llama3_8b_dpo", "mixtral_8x7b_kto", "tiny_rpo"} <= set(names(align))
    assert {"llama31_70b_meta_rewarding", "tiny_spin"} <= set(names(self_reward))
    assert list_recipes(align, "llama3_8b_dop(x=1)").startswith(
        "did you mean 'llama3_8b_dpo'? MODEL_METHOD can be gemma2_2b, "
    )
    assert list_recipes(self_reward).endswith("with self_rewarding, spin, rejection_sampling")


def test_the_page_of_models_is_up_to_date() -> None:
    """Else: python -m aligner.recipes.table > docs/models.md"""
    from aligner.recipes.table import page

    assert (Path(__file__).parent.parent.parent / "docs/models.md").read_text() == page()


def test_an_unknown_model_is_named_with_those_there_are() -> None:
    with pytest.raises(AttributeError, match=r"no recipes for a model 'llama9'; there are: gemma2_2b, .*tiny_llama"):
        getattr(recipes, "llama9")  # noqa: B009


@pytest.mark.parametrize("executor", [run.LocalExecutor(), run.SlurmExecutor(account="a", partition="p")], ids=str)
def test_plugins_of_nemo_apply_to_our_recipes(executor: run.Executor) -> None:
    no_logger: Any = dict
    applied = [
        plugins.PreemptionPlugin(), plugins.PerfEnvPlugin(), plugins.MemoryProfilePlugin(dir="profile"),
        plugins.WandbPlugin(name="x", logger_fn=no_logger), plugins.FaultTolerancePlugin(num_in_job_restarts=1),
        plugins.ConfigValidationPlugin(validate_wandb=False, validate_checkpoint_dir=False),
    ]  # fmt: skip
    recipe = recipes.tiny_llama.dpo_recipe()
    for plugin in applied:
        plugin.setup(recipe, executor)
    kinds = [callback.__fn_or_cls__.__name__ for callback in recipe.trainer.callbacks]
    assert sorted(kinds) == ["FaultToleranceCallback", "MemoryProfileCallback", "PreemptionCallback"]
    other = recipes.tiny_llama.dpo_recipe()
    plugins.NsysPlugin(start_step=1, end_step=2).setup(other, executor)  # which excludes the fault tolerance
    assert [callback.__fn_or_cls__.__name__ for callback in other.trainer.callbacks] == ["NsysCallback"]


def test_meta_rewarding_is_the_papers_or_nvidias() -> None:
    """Judge pairs in the first two rounds, new prompts in each; one argument away, NVIDIA's settings."""
    rounds = recipes.llama3_8b.meta_rewarding_recipe(dir="runs", name="meta").iterations
    assert [one.meta_judge is not None for one in rounds] == [True, True, False, False]
    assert [one.select.judge_pairs is not None for one in rounds] == [True, True, False, False]
    assert [one.select.length_control for one in rounds] == [0.0, 0.0, 0.1, 0.1]
    assert [(one.generate.prompts.number, one.generate.prompts.of) for one in rounds] == [(i, 4) for i in (1, 2, 3, 4)]
    for one in rounds:
        assert one.generate.prompts == one.judge.prompts == one.select.prompts
        assert (one.generate.num_generations, one.judge.judge.num_judgments) == (7, 11)
        for stage in (one.generate, one.judge.judge):
            assert (stage.temperature, stage.top_p) == (0.8, 0.95)
        assert one.select.max_judge_pair_fraction is None
    assert (rounds[0].meta_judge.max_same_score_fraction, rounds[0].meta_judge.temperature) == (1.0, 0.8)
    nvidia = recipes.llama3_8b.meta_rewarding_recipe(variant="nemo_aligner").iterations
    assert all(one.meta_judge is not None and one.generate.prompts == "prompts.jsonl" for one in nvidia)
    assert [one.select.length_control for one in nvidia] == [0.0, 0.0, 0.1]
    assert {(one.generate.num_generations, one.generate.temperature, one.generate.top_p) for one in nvidia} == {
        (4, 1.0, 1.0)
    }
    assert {one.select.max_judge_pair_fraction for one in nvidia} == {0.15}
    own = recipes.llama3_8b.meta_rewarding_recipe(
        iterations=2, num_judgments=5, prompts=["a.jsonl", "b.jsonl"], length_control=0.2
    ).iterations
    assert [one.generate.prompts for one in own] == ["a.jsonl", "b.jsonl"]
    assert {(one.judge.judge.num_judgments, one.select.length_control) for one in own} == {(5, 0.2)}
    with pytest.raises(ConfigError, match=r"variant: there is no 'papers'; there are: paper, nemo_aligner"):
        recipes.llama3_8b.self_rewarding_recipe(variant="papers")
    for none in (0, -1):
        with pytest.raises(ConfigError, match=rf"iterations: must be at least 1, found {none}"):
            recipes.llama3_8b.self_rewarding_recipe(iterations=none)


def test_rounds_learn_at_the_rate_of_their_source() -> None:
    def sizes(name: str) -> tuple[float, float, int]:
        align = getattr(recipes, name).self_rewarding_recipe().iterations[0].align
        return align.optim.config.lr, align.optim.lr_scheduler.min_lr, align.data.global_batch_size

    assert sizes("llama3_8b") == (3e-7, 3e-7, 64) and sizes("llama3_70b") == (3e-7, 3e-7, 128)
    assert sizes("nemotron4_15b") == (9e-7, 9e-7, 64), "a base model"
    lora = recipes.llama3_8b.self_rewarding_recipe(peft_scheme="lora").iterations[0].align
    assert lora.optim.config.lr == pytest.approx(3e-6)


def test_held_out_answers_of_all_rounds_have_one_judge() -> None:
    rounds = recipes.tiny_llama.self_rewarding_recipe(iterations=3).iterations
    assert len({id(one.evaluate.judge) for one in rounds}) == 3, "a setting of one is not one of all"
    judged = recipes.llama3_8b.self_rewarding_recipe(held_out="held_out.jsonl", init_from="start").iterations
    assert [one.evaluate.judge.engine.checkpoint for one in judged] == ["start"] * 3
    assert [one.evaluate.engine.checkpoint for one in judged] == [f"{one.align.log.log_dir}/policy" for one in judged]
    assert [one.judge.judge.engine.checkpoint for one in judged] == [
        "start",
        *(f"{one.align.log.log_dir}/policy" for one in judged[:2]),
    ]


def test_what_is_typed_for_all_rounds_reaches_those_that_have_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from aligner.cli import commands, dryrun  # noqa: F401 - registers factories
    from aligner.cli.stage_contexts import PipelineContext
    from aligner.judge.self_rewarding import self_reward

    context = PipelineContext(name="self-reward", factory="smollm2_135m_meta_rewarding(num_gpus_per_node=1)")
    typed = ["meta_judge.show_scores=True", "generate.prompts=p.jsonl", "judge.temperature=0.5"]
    recipe: Any = context.parse_fn(self_reward, typed)
    assert [one.meta_judge is not None for one in recipe.iterations] == [True, True, False, False]
    for one in recipe.iterations:
        stages = [one.generate, one.judge, one.select, *filter(None, [one.meta_judge])]
        assert {stage.prompts for stage in stages} == {"p.jsonl"} and one.judge.judge.temperature == 0.5
    assert recipe.iterations[1].meta_judge.show_scores and recipe.iterations[1].meta_judge.judge.temperature == 0.5
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    with pytest.raises(RowError, match=r"prompts.jsonl: holds 2 different prompts for 4 iterations"):
        dryrun._check_pipeline(context.parse_fn(self_reward, []), None)
