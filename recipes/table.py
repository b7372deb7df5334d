"""Generator of docs/models.md: `python -m aligner.recipes.table > docs/models.md`."""

from typing import Any

import fiddle as fdl

from aligner import recipes
from aligner.estimate import memory, parameters, recipe_plan, step_time
from aligner.recipes import families

HEAD = """# Models

A page made from the recipes by `python -m aligner.recipes.table`. Each model has the recipes `sft`, `dpo`, `ipo`,
`rpo` and `kto`, and most `self_rewarding` and `meta_rewarding` (not Gemma, whose attention our Megatron engine does not
know, nor the three that are too large for it): `recipes.llama3_8b.dpo_recipe()`, and on the command line
`nemo llm align --factory llama3_8b_dpo`. A recipe starts from the Hugging Face weights named here unless `init_from` \
names
others, and takes over sizes from them, so that it serves other models of its architecture, too.

"Checked" is what our tests do on a CPU with a small random model of the architecture: imported, its log-probabilities
are those of transformers; the recipe trains it; exported, it is the same again (GPT-2B has no Hugging Face form to be
exported to; it is imported from a `.nemo` archive). No model of this size was trained by
us, and layouts have not been tried on GPUs: where NVIDIA's fine-tuning recipes for NeMo 2 have one that fits, it is
that, else our guess. GB is the estimated memory of the fullest GPU for DPO with `data.seq_length` of the recipe, one
pair a micro-batch; s is the estimated time of a step of 256 pairs whose sequences have 1,024 tokens, on H100 at 40 % of
their peak, both by `nemo llm size` ([performance](performance.md) says what that is worth).

| model | NeMo's config | starts from | checked | layout, all weights | GB | s | layout, adapters | GB | s |
|---|---|---|---|---|---|---|---|---|---|
"""
UNCHECKED = {"Gemma2Model": "no: NeMo's layers need Transformer Engine"}


def page() -> str:
    """Return the page, in Markdown."""
    lines = []
    for name in recipes.MODELS:
        getattr(recipes, name)
    for name, entry in sorted(families.MODELS.items()):
        model = entry.model()
        kind, config = fdl.get_callable(model).__name__, fdl.get_callable(model.config).__name__
        checked = UNCHECKED.get(kind, "yes")
        source = entry.source.removeprefix("hf://")
        sizes = " | ".join(
            f"{layout} | {_size(getattr(recipes, name).dpo_recipe(peft_scheme=scheme))}"
            for layout, scheme in ((entry.layout, None), (entry.adapters, "lora"))
        )
        lines.append(f"| `{name}` | {config} | {source} | {checked} | {sizes} |")
    return HEAD + "\n".join(lines) + "\n"


def _size(recipe: Any) -> str:
    model, plan = parameters.model_shape(recipe.model.config), recipe_plan.plan_of(recipe, mixed_precision=True)
    seconds = step_time.step_seconds(model, plan, memory.GPUS["h100"], mfu=0.4, length=1024, epochs=1)
    return f"{memory.total(model, plan) / 1e9:.0f} | {seconds:.3g}"


if __name__ == "__main__":
    print(page(), end="")
