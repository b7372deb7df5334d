"""GPT-2B-001, the model of NeMo-Aligner's guide; starts from its `.nemo` archive, or another of NeMo 1's.

NeMo 2 has no config of it: 24 layers, a gated SiLU, norms with zero-centered weights, half of each head rotated.
"""

import nemo_run as run
from torch.nn.functional import silu

from aligner.recipes import families
from aligner.recipes.families import Layout

NAME = "gpt_2b"


def model() -> run.Config:
    """NeMo's `GPTConfig` with the sizes of GPT-2B-001."""
    return families.nemo(
        "GPTModel",
        "GPTConfig",
        num_layers=24,
        hidden_size=2048,
        ffn_hidden_size=5440,
        num_attention_heads=16,
        seq_length=4096,
        vocab_size=256000,
        activation_func=silu,
        gated_linear_unit=True,
        layernorm_zero_centered_gamma=True,
        add_bias_linear=False,
        position_embedding_type="rope",
        rotary_percent=0.5,
        share_embeddings_and_output_weights=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        init_method_std=0.014,
    )


RECIPES = families.recipes(
    NAME,
    "GPT-2B-001",
    model,
    source="GPT-2B-001_bf16_tp1.nemo",
    layout=Layout(),
    adapters=Layout(),
    apply_chat_template=False,
)
sft_recipe, dpo_recipe, ipo_recipe = RECIPES.sft, RECIPES.dpo, RECIPES.ipo
rpo_recipe, kto_recipe = RECIPES.rpo, RECIPES.kto
self_rewarding_recipe, meta_rewarding_recipe = RECIPES.self_rewarding, RECIPES.meta_rewarding
