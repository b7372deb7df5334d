"""Sizes by arithmetic: against published counts and figures, a layer's activations against what torch keeps."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import lightning.pytorch as pl
import nemo_run as run
import pytest
import torch
from nemo.lightning.io.mixin import IOMixin

from aligner import recipes
from aligner.common.errors import ConfigError
from aligner.estimate import memory, parameters, recipe_plan, report_text, step_time

PUBLISHED = {
    "llama2_7b": 6_738_415_616,
    "llama3_8b": 8_030_261_248,
    "llama31_70b": 70_553_706_496,
    "llama31_405b": 405_853_388_800,
    "llama32_1b": 1_235_814_400,
    "mixtral_8x7b": 46_702_792_704,
    "qwen2_500m": 494_032_768,
    "qwen2_7b": 7_615_616_512,
    "qwen3_30b_a3b": 30_532_122_624,
    "qwen3_32b": 32_762_123_264,
    "smollm2_135m": 134_515_008,
}
"""Parameters, as the models' pages on Hugging Face count them."""


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_that_were_published(name: str) -> None:
    assert parameters.model_shape(getattr(recipes, name).model().config).parameters == PUBLISHED[name]


FIGURES = {
    # Megatron Bridge's performance page, 8 or 32 H100 in fp8: tokens a second and GPU -> TFLOP/s.
    "llama3_8b": (14_451, 8192, None, 744),
    "llama3_70b": (1_638, 4096, None, 710),
    "llama31_70b": (2_643, 4096, 32, 735),
}


@pytest.mark.parametrize("name", FIGURES)
def test_flops_of_a_token_are_nvidias(name: str) -> None:
    tokens, length, adapters, published = FIGURES[name]
    model = parameters.model_shape(getattr(recipes, name).model().config)
    plan = memory.Plan(ranks=8, gpus_per_node=8, reference="none", adapter_rank=adapters)
    needed, again = step_time.step_flops(model, plan, length=length, epochs=1)
    if adapters:
        # Theirs counts 4 N and no attention.
        assert tokens * 4 * model.num_active_params / 1e12 == pytest.approx(published, rel=0.01)
        assert tokens * needed / 1e12 == pytest.approx(published, rel=0.06)
    else:
        assert tokens * needed / 1e12 == pytest.approx(published, rel=0.01)
    assert again == 0


def test_references_cost_what_they_are() -> None:
    model = parameters.model_shape(recipes.llama3_8b.model().config)
    forward = model.forward_flops(1000)
    plan = memory.Plan(ranks=8, gpus_per_node=8)
    cost = {
        kind: step_time.step_flops(model, dataclasses.replace(plan, reference=kind), length=1000, epochs=2)[0] / forward
        for kind in ("none", "cached", "frozen")
    }
    assert cost == pytest.approx({"none": 3, "cached": 3.5, "frozen": 4})


def test_weights_gradients_and_optimizer_by_hand() -> None:
    """Llama 3 8B over tensor 2 and data 4: (2 + 4 + 12/4) bytes of each of half the weights."""
    model = parameters.model_shape(recipes.llama3_8b.model().config)
    plan = memory.Plan(ranks=8, gpus_per_node=8, tensor=2, sequence_parallel=True)
    found = memory.stage_memory(model, plan)
    mixed_precision = PUBLISHED["llama3_8b"] / 2
    assert [found[part] for part in ("weights", "gradients", "optimizer")] == pytest.approx(
        [2 * mixed_precision, 4 * mixed_precision, 3 * mixed_precision]
    )
    lora = memory.stage_memory(model, dataclasses.replace(plan, adapter_rank=32))
    assert lora["weights"] < 2.1 * mixed_precision and lora["gradients"] + lora["optimizer"] < 0.4e9


def test_activations_are_those_of_korthikanti_et_al() -> None:
    """34 s b h less the two bytes of dropout masks, for attention of as many keys as queries and an MLP of 4 h."""
    plain = parameters.ModelShape(
        layers=1, hidden=64, heads=4, groups=4, channels=16, ffn=256, gated=False, vocabulary=10, tied=True, experts=0,
        topk=1, shared_ffn=0, num_norm_bias_params=0, last_norm=0,
    )  # fmt: skip
    plan = memory.Plan(ranks=4, gpus_per_node=4, micro_tokens=100)
    assert memory.layer_activations(plain, plan) == 32 * 100 * 64
    divided = dataclasses.replace(plan, tensor=4, sequence_parallel=True)
    assert memory.layer_activations(plain, divided) == 32 * 100 * 64 / 4


class Kept(pl.Callback, IOMixin):
    """Bytes that autograd keeps in a step of one micro-batch."""

    bytes: ClassVar[list[int]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        model: Any = trainer.strategy.megatron_parallel  # type: ignore[attr-defined]
        weights = {p.untyped_storage().data_ptr() for chunk in model for p in chunk.parameters()}
        self.seen: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                self.seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        self.hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
        self.hooks.__enter__()

    def on_train_batch_end(self, *_: Any) -> None:
        self.hooks.__exit__(None, None, None)
        Kept.bytes.append(sum(self.seen.values()))


def test_activations_are_those_that_torch_keeps(
    tiny: Callable[..., Any], tmp_path: Path, execute: Callable[[Any], Path]
) -> None:
    """Of four layers: a run with eight of them less one with four. Layers are unfused on a CPU."""
    row = {"prompt": "1+1=" * 30, "chosen_response": "2" * 104, "rejected_response": "3" * 104}
    (tmp_path / "rows.jsonl").write_text("\n".join([json.dumps(row)] * 4) + "\n")
    Kept.bytes.clear()
    for layers in (4, 8):
        recipe = tiny(f"layers{layers}", held_out=0)
        recipe.data.train = str(tmp_path / "rows.jsonl")
        config = recipe.model.config
        config.num_layers, config.hidden_size, config.ffn_hidden_size = layers, 128, 384
        config.num_attention_heads, config.num_query_groups = 8, 2
        recipe.data.seq_length, recipe.data.global_batch_size, recipe.data.micro_batch_size = 225, 1, 1
        recipe.trainer.max_steps = recipe.trainer.val_check_interval = 1
        recipe.trainer.callbacks = [run.Config(Kept)]
        execute(recipe)
    predicted = 4 * memory.layer_activations(
        parameters.model_shape(recipe.model.config), recipe_plan.plan_of(recipe, mixed_precision=False)
    )
    assert Kept.bytes[1] - Kept.bytes[0] == pytest.approx(predicted, rel=0.1)


def test_what_does_not_fit_is_told_with_settings_that_do() -> None:
    recipe = recipes.llama3_70b.dpo_recipe(num_nodes=1)
    recipe.trainer.strategy.pipeline_model_parallel_size = 1
    said = report_text.format_estimate(recipe)
    assert "OUT OF MEMORY. What fits" in said
    settings = dict(word.split("=") for line in said.splitlines() if "num_nodes=" in line for word in line.split())
    recipe.trainer.num_nodes = int(settings["trainer.num_nodes"])
    for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size"):
        setattr(recipe.trainer.strategy, name, int(settings[f"trainer.strategy.{name}"]))
    if settings.get("model.config.recompute_granularity"):
        recipe.model.config.recompute_granularity = "full"
    assert "OUT OF MEMORY" not in report_text.format_estimate(recipe)


@pytest.mark.parametrize("name", sorted(set(recipes.MODELS) - {"tiny_llama"}))
@pytest.mark.parametrize("scheme", [None, "lora"])
def test_the_layouts_of_our_recipes_fit(name: str, scheme: str | None) -> None:
    """On 80 GB; how the sizes of docs/models.md came to be."""
    assert "OUT OF MEMORY" not in report_text.format_estimate(getattr(recipes, name).dpo_recipe(peft_scheme=scheme))


def test_hours_follow_from_the_data(tmp_path: Path) -> None:
    rows = [{"prompt": "a" * 400, "chosen_response": "b" * 400, "rejected_response": "c" * 800}] * 512
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = recipes.llama3_8b.dpo_recipe(train=str(tmp_path / "rows.jsonl"))
    said = report_text.format_estimate(recipe)
    assert "250 tokens a sequence (of data.train, at four characters each)" in said and "2 steps" in said
    model, plan = parameters.model_shape(recipe.model.config), recipe_plan.plan_of(recipe, mixed_precision=True)
    # 512 sequences of 250 tokens, 4 forward passes' worth each (one of them the reference's), at 0.5 of eight H100.
    by_hand = 512 * 250 * 4 * (2 * model.num_active_params + 2 * 250 * 4096 * 32) / (8 * 989.4e12 * 0.5)
    found = step_time.step_seconds(model, plan, memory.GPUS["h100"], mfu=0.5, length=250, epochs=1)
    assert found == pytest.approx(by_hand)


def test_rounds_are_sized_while_they_learn_and_while_they_answer() -> None:
    said = report_text.format_estimate(recipes.llama3_8b.self_rewarding_recipe())
    assert "while it writes 16 answers at a time" in said
    # 2 · 32 layers · 1024 · 4096 tokens · 16 answers · 2 bytes, over two ranks.
    assert f"{2 * 32 * 1024 * 4096 * 16 * 2 / 2 / 1e9:.2f}" in said


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"gpu": "v100"}, "gpu: is 'v100'; expected one of a100_40, a100"),
        ({"mfu": "40"}, "mfu: is '40'; expected a number above 0, at most 1"),
        ({"tokens": "few"}, "tokens: is 'few'; expected a number above 1"),
    ],
)
def test_what_is_no_answer_is_refused(given: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        report_text.format_estimate(recipes.llama3_8b.dpo_recipe(), **given)  # type: ignore[arg-type]
    few = recipes.llama3_8b.dpo_recipe(num_gpus_per_node=1)
    with pytest.raises(ConfigError, match="1 ranks cannot be divided into groups of 2"):
        report_text.format_estimate(few)


def test_each_reference_is_priced() -> None:
    """A copy takes memory, a cache takes a forward pass once; a recipe names its reference by class."""
    names = {"cached": "cached", "frozen": "frozen", "base_model": "base_model", "synced": "synced", "none": "none"}
    from aligner.cli.parsing.overrides import override

    for typed, kind in names.items():
        recipe = override(recipes.llama3_8b.dpo_recipe(), [f"reference={typed}"])
        plan = recipe_plan.plan_of(recipe, mixed_precision=True)
        assert plan.reference == kind
        copies = memory.stage_memory(parameters.model_shape(recipe.model.config), plan)["reference"]
        assert (copies > 0) == (kind in ("frozen", "synced"))
    recipe = override(recipes.llama3_8b.dpo_recipe(), ["reference=frozen", "reference.cpu_offload=True"])
    assert recipe_plan.plan_of(recipe, mixed_precision=True).reference == "base_model"
