"""LoRA and DoRA: what is trained, saved, continued, merged and exported."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import nemo_run as run
import peft as hf_peft
import pytest
import torch
from hand import save_llama
from nemo.collections import llm
from nemo.lightning import RestoreConfig
from reading import tensors
from transformers import AutoModelForCausalLM

from aligner.checkpoint import folders
from aligner.checkpoint.huggingface import export_hf, import_hf
from aligner.checkpoint.merge_lora import merge_lora
from aligner.common.errors import CheckpointError, ConfigError
from aligner.common.run_folder import read_metrics
from aligner.model.adapters import base_of
from aligner.model.reference import BaseModelReference, CachedReference, FrozenReference, SyncedReference

Tiny = Callable[..., Any]
Execute = Callable[[Any], Path]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face Llama, so that adapters can be compared with `peft`'s."""
    path = tmp_path_factory.mktemp("hf") / "llama"
    save_llama(path, rms_norm_eps=1e-5)
    return path


@pytest.fixture(scope="module")
def base(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same Llama as a NeMo checkpoint."""
    return import_hf(str(source), str(tmp_path_factory.mktemp("nemo") / "llama"))


@pytest.fixture
def adapted(tiny: Tiny, base: Path) -> Callable[..., Any]:
    """Recipes of adapters on that Llama."""

    def make(name: str = "lora", kind: Any = llm.peft.LoRA, start: Path = base, **options: Any) -> Any:
        recipe = tiny(name, **options)
        recipe.model.tokenizer = None
        recipe.peft = run.Config(kind, dim=4, alpha=8)
        recipe.resume.restore_config = run.Config(RestoreConfig, path=str(start))
        recipe.optim.config.lr = 1e-2
        recipe.optim.lr_scheduler.warmup_steps = 0
        return recipe

    return make


def saved(folder: Path) -> dict[str, torch.Tensor]:
    newest = folders.latest_checkpoint(folder)
    assert newest is not None
    return tensors(newest)


def measured(folder: Path) -> list[tuple[float, ...]]:
    names = ("loss", "rewards_chosen_mean", "rewards_rejected_mean", "acc", "grad_norm")
    rows = read_metrics(folder / "metrics.csv")
    return [tuple(v for k, v in row.items() if k.split("/")[-1] in names) for row in rows]


@pytest.mark.parametrize("kind", [llm.peft.LoRA, llm.peft.DoRA])
def test_adapters_alone_are_trained_and_saved_and_the_run_goes_on(
    adapted: Callable[..., Any], execute: Execute, kind: Any
) -> None:
    folder = execute(adapted("run", kind))
    rows = read_metrics(folder / "metrics.csv")
    assert rows[0]["val/loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert rows[-1]["val/loss"] < rows[0]["val/loss"]
    newest = folders.latest_checkpoint(folder)
    assert newest is not None
    weights = {n: t for n, t in saved(folder).items() if not n.startswith("optimizer.")}
    assert weights and all(".adapter." in name for name in saved(folder))
    # Adapters and Adam's two moments of them, in float32, and what torch writes around each tensor.
    elements = sum(t.numel() for t in weights.values())
    size = sum(f.stat().st_size for f in (newest / "weights").glob("*.distcp"))
    pieces = 2 * len(saved(folder))  # one a layer
    assert 12 * elements < size < 12 * elements + 3000 * pieces
    longer = adapted("run", kind)
    longer.trainer.max_steps = 6
    execute(longer)
    assert folders.step_of(folders.latest_checkpoint(folder)) == 6  # type: ignore[arg-type]
    other = adapted("run", kind)
    other.trainer.max_steps, other.peft.dim = 8, 2
    with pytest.raises(ConfigError, match=r"peft.dim: is 2, but the adapters of .* were made with 4"):
        execute(other)
    other.peft = None
    with pytest.raises(ConfigError, match=r"peft: is None, but the run has trained adapters so far"):
        execute(other)


def test_a_full_run_does_not_become_one_of_adapters(adapted: Callable[..., Any], execute: Execute) -> None:
    """It would take its own checkpoint for the base, and then delete it."""
    full = adapted("run")
    full.peft, full.trainer.max_steps = None, 2
    folder = execute(full)
    before = folders.latest_checkpoint(folder)
    with pytest.raises(ConfigError, match="peft: is LoRA, but the run has trained all weights so far"):
        execute(adapted("run"))
    assert folders.latest_checkpoint(folder) == before


def test_adapters_with_a_copy_of_them_resume_and_hold_no_second_base(
    adapted: Callable[..., Any], execute: Execute
) -> None:
    def recipe(name: str, steps: int) -> Any:
        made = adapted(name)
        made.reference = run.Config(SyncedReference, mixup_alpha=0.5, sync_steps=1)
        made.optim.lr_scheduler.min_lr = 1e-2
        made.trainer.max_steps = steps
        return made

    whole = execute(recipe("whole", 4))
    execute(recipe("stopped", 2))
    stopped = execute(recipe("stopped", 4))
    rows, again = (
        {row["step"]: row["train/loss"] for row in read_metrics(f / "metrics.csv") if "train/loss" in row}
        for f in (whole, stopped)
    )
    assert rows == again
    copied = [name for name in saved(stopped) if name.startswith("reference.")]
    assert copied and all(".adapter." in name for name in copied)
    assert {name.removeprefix("reference.") for name in copied} <= set(saved(stopped))


def test_the_base_stays_bit_identical(adapted: Callable[..., Any], execute: Execute, tmp_path: Path) -> None:
    import lightning.pytorch as pl

    class Base(pl.Callback):
        seen: ClassVar[list[dict[str, torch.Tensor]]] = []

        def _look(self, module: Any) -> None:
            found = {n: p.detach().clone() for n, p in module.named_parameters() if "adapter" not in n}
            Base.seen.append(found)

        def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, *_: Any) -> None:
            self._look(pl_module)

        def on_train_end(self, trainer: pl.Trainer, pl_module: Any) -> None:
            self._look(pl_module)

    recipe = adapted()
    import fiddle as fdl

    built: Any = fdl.build(recipe)
    built.keywords["trainer"].callbacks.append(Base())
    built()
    assert len(Base.seen) == 5 and len(Base.seen[0]) > 10
    for name, before in Base.seen[0].items():
        assert torch.equal(before, Base.seen[-1][name]), name


@pytest.mark.parametrize("kind", [llm.peft.LoRA, llm.peft.DoRA])
def test_all_references_agree_with_fresh_adapters(adapted: Callable[..., Any], execute: Execute, kind: Any) -> None:
    found = {}
    for name, reference in (("cached", CachedReference), ("frozen", FrozenReference), ("off", BaseModelReference)):
        recipe = adapted(name, kind)
        recipe.reference = run.Config(reference)
        found[name] = measured(execute(recipe))
    assert found["cached"] == found["frozen"] == found["off"]
    assert len({row[0] for row in found["off"]}) > 4


def test_continued_adapters_are_part_of_the_reference(adapted: Callable[..., Any], execute: Execute) -> None:
    """LLaMA-Factory#8459: DPO after SFT in one adapter was held to the base from before SFT."""
    first = adapted("sft")
    first.preference_loss_weight, first.sft_loss_weight, first.reference = 0.0, 1.0, None
    sft = execute(first)
    before = {n: t for n, t in saved(sft).items() if not n.startswith("optimizer.")}
    assert any(float(t.abs().max()) > 1e-4 for n, t in before.items() if "linear_out" in n)

    found = {}
    for name, reference in (("cached", CachedReference), ("frozen", FrozenReference)):
        recipe = adapted(name, start=sft)
        recipe.reference = run.Config(reference)
        folder = execute(recipe)
        found[name] = measured(folder)
        rows = read_metrics(folder / "metrics.csv")
        assert rows[0]["val/loss"] == pytest.approx(math.log(2), abs=1e-6)
        assert rows[0]["val/rewards_chosen_mean"] == 0.0
        # The policy that DPO starts from is the one that SFT ended with.
        ended = read_metrics(sft / "metrics.csv")[-1]
        assert rows[0]["val/logps_chosen_mean"] == pytest.approx(ended["val/logps_chosen_mean"], rel=1e-6)
        assert base_of(folders.latest_checkpoint(folder)) == base_of(folders.latest_checkpoint(sft))  # type: ignore[arg-type]
    assert found["cached"] == found["frozen"]
    # It learns, anew: another schedule, and adapters that move away from where they were.
    assert not torch.equal(saved(folder)[next(iter(before))], before[next(iter(before))])

    recipe = adapted("off", start=sft)
    recipe.reference = run.Config(BaseModelReference)
    with pytest.raises(ConfigError, match=r"reference: BaseModelReference, but the adapters of .* are continued"):
        execute(recipe)
    recipe = adapted("other", start=sft)
    recipe.peft.dim = 8
    with pytest.raises(ConfigError, match=r"peft.dim: is 8, but the adapters of .* were made with 4"):
        execute(recipe)
    recipe = adapted("dora", llm.peft.DoRA, start=sft)
    with pytest.raises(ConfigError, match=r"peft: is DoRA, but .* holds LoRA adapters"):
        execute(recipe)
    recipe = adapted("none", start=sft)
    recipe.peft = None
    with pytest.raises(ConfigError, match=r"peft: is None, but .* holds adapters alone; .*nemo llm merge-lora"):
        execute(recipe)


def test_a_continued_run_resumes(adapted: Callable[..., Any], execute: Execute) -> None:
    sft = execute(adapted("sft"))
    straight = measured(execute(adapted("straight", start=sft)))
    first = adapted("stopped", start=sft)
    first.trainer.max_steps = 2
    first.optim.lr_scheduler.min_lr = 1e-2
    execute(first)
    again = adapted("stopped", start=sft)
    again.optim.lr_scheduler.min_lr = 1e-2
    whole = adapted("whole", start=sft)
    whole.optim.lr_scheduler.min_lr = 1e-2
    assert measured(execute(again)) == measured(execute(whole))
    assert straight[0] == measured(execute(whole))[0]


def test_adapters_of_a_random_base_are_refused(tiny: Tiny, execute: Execute) -> None:
    recipe = tiny()
    recipe.peft = run.Config(llm.peft.LoRA, dim=4, alpha=8)
    with pytest.raises(ConfigError, match="peft: adapters are saved without their base, which would be random here"):
        execute(recipe)


def logits(model: Any) -> torch.Tensor:
    torch.manual_seed(1)
    with torch.no_grad():
        return model(torch.randint(3, 80, (3, 17))).logits


@pytest.mark.parametrize("kind", [llm.peft.LoRA, llm.peft.DoRA])
def test_merged_equals_exported_on_top_of_the_base(
    adapted: Callable[..., Any], execute: Execute, source: Path, tmp_path: Path, kind: Any
) -> None:
    folder = execute(adapted("run", kind))
    theirs = AutoModelForCausalLM.from_pretrained(source)
    plain = logits(theirs)

    merged = merge_lora(str(folder), str(tmp_path / "merged"))
    whole = AutoModelForCausalLM.from_pretrained(export_hf(str(merged), str(tmp_path / "whole")))
    assert float((logits(whole) - plain).abs().max()) > 1e-2
    # The same policy goes into training: validation of a run that starts from the merged checkpoint.
    after = adapted("after", start=merged)
    after.peft = None
    rows = read_metrics(execute(after) / "metrics.csv")
    ended = read_metrics(folder / "metrics.csv")[-1]
    assert rows[0]["val/logps_chosen_mean"] == pytest.approx(ended["val/logps_chosen_mean"], rel=1e-5)

    exported = export_hf(str(folder), str(tmp_path / "adapter"))
    assert {p.name for p in exported.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    assert exported.joinpath("adapter_model.safetensors").stat().st_mode & 0o777 == 0o644
    loaded = hf_peft.PeftModel.from_pretrained(theirs, str(exported))
    torch.testing.assert_close(logits(loaded), logits(whole), rtol=1e-4, atol=1e-4)
    # It names its base, and is found by its own name alone.
    alone = hf_peft.AutoPeftModelForCausalLM.from_pretrained(str(exported))
    torch.testing.assert_close(logits(alone), logits(whole), rtol=1e-4, atol=1e-4)


def test_what_cannot_be_merged_is_refused(tiny: Tiny, execute: Execute, tmp_path: Path) -> None:
    folder = execute(tiny())
    with pytest.raises(CheckpointError, match="holds no adapters; it is whole by itself"):
        merge_lora(str(folder), str(tmp_path / "merged"))
    with pytest.raises(CheckpointError, match="does not exist"):
        merge_lora(str(tmp_path / "nothing"), str(tmp_path / "merged"))
