"""What cannot be divided is refused with the nearest division that can."""

from types import SimpleNamespace
from typing import Any

import pytest
from nemo.lightning import MegatronStrategy

from aligner.common.errors import ConfigError
from aligner.model import parallelism

MODEL = {"num_layers": 12, "num_attention_heads": 8, "num_query_groups": 4, "ffn_hidden_size": 64}


def check(ranks: int = 1, **given: Any) -> None:
    model = {name: given.pop(name) for name in list(given) if name.startswith(("num_moe", "window", "softmax"))}
    parallelism.check(MegatronStrategy(**given).parallelism, SimpleNamespace(**MODEL | model), ranks=ranks)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"tensor_model_parallel_size": 3}, r"3 ranks cannot share .*num_attention_heads=8 evenly; use 2$"),
        ({"tensor_model_parallel_size": 8}, r"num_query_groups=4 evenly; use 4$"),
        ({"pipeline_model_parallel_size": 5}, r"12 layers cannot be divided over 5 stages; use 4 stages in all, or"),
        (
            {"pipeline_model_parallel_size": 4, "virtual_pipeline_model_parallel_size": 2},
            r"12 layers cannot be divided over 4 x 2 stages; use 6 stages",
        ),
        (
            {"pipeline_model_parallel_size": 3, "num_layers_in_first_pipeline_stage": 3},
            r"9 layers that the first and the last stage leave cannot be divided over 2 stages, or change num_layers",
        ),
        (
            {"pipeline_model_parallel_size": 2, "num_layers_in_first_pipeline_stage": 13},
            r"-1 layers that the first and the last stage leave cannot",
        ),
        (
            {"num_layers_in_first_pipeline_stage": 3, "num_layers_in_last_pipeline_stage": 9},
            r"0 layers that the first and the last stage leave cannot",
        ),
        (
            {"pipeline_model_parallel_size": 4, "account_for_embedding_in_pipeline_split": True},
            r"13 layers with the embedding as one cannot be divided over 4 stages, or",
        ),
        (
            {
                "pipeline_model_parallel_size": 2,
                "virtual_pipeline_model_parallel_size": 2,
                "num_layers_in_first_pipeline_stage": 4,
                "num_layers_in_last_pipeline_stage": 8,
                "microbatch_group_size_per_vp_stage": 1,
            },
            r"microbatch_group_size_per_vp_stage: 1, but pipeline_model_parallel_size is 2",
        ),
        (
            {
                "pipeline_model_parallel_size": 3,
                "virtual_pipeline_model_parallel_size": 2,
                "num_layers_in_first_pipeline_stage": 3,
                "num_layers_in_last_pipeline_stage": 3,
            },
            r"num_layers_in_first_pipeline_stage: 3, .* must be a multiple of virtual_pipeline_model_parallel_size=2",
        ),
        ({"virtual_pipeline_model_parallel_size": 2}, r"2 with pipeline_model_parallel_size=1, .* set it to None"),
        (
            {"pipeline_model_parallel_size": 2, "virtual_pipeline_model_parallel_size": 1},
            r"1 with pipeline_model_parallel_size=2, .* set it to None",
        ),
        ({"expert_model_parallel_size": 2}, r"the model is no mixture of experts; set it to 1"),
        ({"expert_model_parallel_size": 3, "num_moe_experts": 8}, r"cannot share 8 experts evenly; use 2$"),
        ({"expert_model_parallel_size": 2, "num_moe_experts": 8}, r"1 ranks cannot be divided into groups of 2"),
        (
            {"tensor_model_parallel_size": 2, "num_moe_experts": 8, "ranks": 2},
            r"sequence_parallel: False, but .* set it to True",
        ),
        ({"context_parallel_size": 2, "window_size": (8, 8)}, r"the model asks for window_size, which is not divided"),
    ],
)
def test_what_cannot_be_divided_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check(**given)


def test_what_can_be_divided_is_not() -> None:
    check()
    check(tensor_model_parallel_size=4, sequence_parallel=True, pipeline_model_parallel_size=3, context_parallel_size=2)
    check(pipeline_model_parallel_size=3, virtual_pipeline_model_parallel_size=2)
    check(pipeline_model_parallel_size=3, num_layers_in_first_pipeline_stage=2)
    check(
        pipeline_model_parallel_size=2,
        account_for_embedding_in_pipeline_split=True,
        account_for_loss_in_pipeline_split=True,
    )
    check(pipeline_model_parallel_size=2, num_layers_in_first_pipeline_stage=5, num_layers_in_last_pipeline_stage=7)
    check(ranks=4, num_moe_experts=8, expert_model_parallel_size=4, context_parallel_size=2)
