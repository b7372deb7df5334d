"""Packed, padded and one by one: the same log-probabilities and the same gradients (peers.md section 3, rows 2 and 17).

The rows are conversations under a template that ends turns with the tokenizer's own EOS, as Llama 3's does: what
looks for the end of a sequence by its first EOS cuts them short (NeMo-Aligner 0.7).
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fiddle as fdl
import nemo_run as run
import pytest
import safetensors.torch
import torch
from hand import SaveGradients, differ
from launching import forked
from nemo.collections.common.tokenizers import AutoTokenizer
from transformers import AutoTokenizer as HFTokenizer

from aligner import losses
from aligner.cli.pack_preferences import pack_preferences
from aligner.demo import toy
from aligner.losses import unpaired

Tiny = Callable[..., Any]

EOS_ENDS_TURNS = (
    "{% for m in messages %}{{ m['role'][0] + ':' + m['content'] + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'a:' }}{% endif %}"
)
LOSSES = {
    "dpo": run.Partial(losses.dpo, beta=0.5),
    "ipo": run.Partial(losses.ipo),
    "kto": run.Partial(unpaired.kto, beta=0.5),
}
CUTS: dict[str, dict[str, Any]] = {
    "one by one": {"micro_batch_size": 1},
    "length grouped": {"batching": "length_grouped", "micro_batch_size": 2},
    "padding free": {"batching": "padding_free", "micro_batch_size": 4},
    "one pack": {"batching": "packed", "packed_sequence_size": 2000},
    "some packs": {"batching": "packed", "packed_sequence_size": 150},
    "two packs a batch": {"batching": "packed", "packed_sequence_size": 150, "micro_batch_size": 2},
}


def turns(*texts: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def said(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


ROWS: list[tuple[Any, ...]] = [
    (turns("1+1?", "2", "and 2+2?"), "four", "three and some more words"),
    (turns("22+33="), "it is fifty five of course", "?"),
    (turns("hello", "hi", "3+4?", "7", "sure?"), "yes", "no it is eight"),
    (turns("a"), "b", "c"),
    # In several messages, of which a tool's is context.
    (turns("9+9="), [*said("9"), {"role": "tool", "content": "9"}, *said("18")], "99"),
    (turns("is it?", "what?", "so " * 8), "so it is", "it is not so and it never will have been"),
    (turns("7+7=", "13", "no"), "14 then", "15"),
    (turns("0+0="), "0", "nothing at all"),
]


@pytest.fixture
def packed(tiny: Tiny, tmp_path: Path) -> Callable[..., Any]:
    """A recipe of one step on all rows, which writes its gradient to a file and its log-probabilities to a folder."""
    hf = HFTokenizer.from_pretrained(toy.TOKENIZER)
    hf.chat_template = EOS_ENDS_TURNS
    hf.save_pretrained(tmp_path / "tokenizer")
    keys = ("prompt", "chosen_response", "rejected_response")
    rows = [
        dict(zip(keys, (prompt, *(text if isinstance(text, list) else said(text) for text in texts)), strict=True))
        for prompt, *texts in ROWS
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))

    def make(name: str, loss: str, ranks: int = 1, **options: Any) -> Any:
        recipe = tiny(name, held_out=0, num_gpus_per_node=ranks)
        recipe.loss = LOSSES[loss]
        recipe.model.tokenizer = run.Config(AutoTokenizer, str(tmp_path / "tokenizer"))
        recipe.data.train, recipe.data.seq_length = str(tmp_path / "rows.jsonl"), 100
        recipe.data.global_batch_size = 8
        for field, value in options.items():
            setattr(recipe.data, field, value)
        recipe.reference.dir = str(tmp_path / f"{name} reference")
        recipe.trainer.max_steps = 1
        recipe.model.config.init_method_std = 0.15
        recipe.trainer.callbacks = [run.Config(SaveGradients, path=str(tmp_path / name))]
        return recipe

    return make


def scores(folder: Path) -> torch.Tensor:
    (path,) = folder.glob("*.safetensors")
    return safetensors.torch.load_file(path)["logps"]


@pytest.mark.parametrize("loss", LOSSES)
def test_packed_padded_and_one_by_one_are_the_same(packed: Callable[..., Any], tmp_path: Path, loss: str) -> None:
    fdl.build(packed("padded", loss, micro_batch_size=8))()
    known = scores(tmp_path / "padded reference")
    assert known.abs().min() > 1 and len(known.unique()) > 10
    for name, options in CUTS.items():
        fdl.build(packed(name, loss, **options))()
        torch.testing.assert_close(scores(tmp_path / f"{name} reference"), known, rtol=1e-5, atol=1e-5)
        assert differ(tmp_path / "padded", tmp_path / name) < 1e-5, name


@pytest.mark.slow
def test_two_ranks_and_packs_made_ahead_of_time(packed: Callable[..., Any], tmp_path: Path) -> None:
    rows, tokenizer, packs = (str(tmp_path / name) for name in ("rows.jsonl", "tokenizer", "packs"))
    pack_preferences(rows, tokenizer, packs, seq_length=100, packed_sequence_size=140)
    count = json.loads((tmp_path / "packs" / "meta.json").read_text())["packs"]
    assert 2 <= count < 8 and count % 2 == 0
    ahead = {"train": str(tmp_path / "packs"), "global_batch_size": count}
    fdl.build(packed("padded", "dpo", micro_batch_size=8))()
    fdl.build(packed("ahead", "dpo", **ahead, micro_batch_size=1))()
    two = {name: packed(f"{name} on two", "dpo", ranks=2, **options) for name, options in CUTS.items()}
    two["ahead"] = packed("ahead on two", "dpo", ranks=2, **ahead, micro_batch_size=1)
    codes, said = forked(tmp_path, [(2, job) for job in two.values()])
    assert codes == [[0, 0]] * len(two), said[-4000:]
    for name in ("ahead", *(f"{name} on two" for name in two)):
        assert differ(tmp_path / "padded", tmp_path / name) < 1e-5, name
