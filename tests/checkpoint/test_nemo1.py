"""`.nemo` archives of NeMo 1, made here as it wrote them: imported, they say what transformers says of their weights.

GPT-2B's function is that of StableLM in transformers, with 1 added to the weights of the norms.
"""

import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nemo_run as run
import pytest
import torch
import yaml
from launching import forked
from making import write_rows
from nemo.lightning import RestoreConfig
from reading import read_rows
from torch import Tensor
from transformers import StableLmConfig, StableLmForCausalLM

from aligner import recipes
from aligner.checkpoint import checkpoint_diff, nemo1_archive
from aligner.common.errors import CheckpointError
from aligner.common.run_folder import read_metrics
from aligner.recipes.families import Layout

LAYERS, HIDDEN, HEADS, FFN, VOCABULARY = 4, 64, 4, 88, 96
CONFIG = {
    "num_layers": LAYERS, "hidden_size": HIDDEN, "ffn_hidden_size": FFN, "num_attention_heads": HEADS,
    "kv_channels": None, "encoder_seq_length": 64, "max_position_embeddings": 64, "activation": "fast-swiglu",
    "normalization": "layernorm1p", "layernorm_epsilon": 1e-5, "bias": False, "position_embedding_type": "rope",
    "rotary_percentage": 0.5, "share_embeddings_and_output_weights": False, "transformer_engine": False,
    "make_vocab_size_divisible_by": 1, "apply_query_key_layer_scaling": True, "hidden_dropout": 0.1,
    "tokenizer": {"library": "sentencepiece", "model": "nemo:0123_sums.model", "sentencepiece_legacy": False},
}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows and a SentencePiece model."""
    from sentencepiece import SentencePieceTrainer

    home = tmp_path_factory.mktemp("legacy")
    rows = write_rows(home / "rows.jsonl", 8)
    (home / "corpus.txt").write_text(rows.read_text() * 20)
    trained: Any = SentencePieceTrainer
    trained.train(
        input=str(home / "corpus.txt"), model_prefix=str(home / "sums"), vocab_size=VOCABULARY, model_type="bpe",
        pad_id=3, minloglevel=2, hard_vocab_limit=False,
    )  # fmt: skip
    return home


def weights() -> dict[str, Tensor]:
    """Of layout (a), whole, by NeMo 1's names; drawn so that no term hides in rounding."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.2

    found = {
        "embedding.word_embeddings.weight": drawn(VOCABULARY, HIDDEN),
        "output_layer.weight": drawn(VOCABULARY, HIDDEN),
        "rotary_pos_emb.inv_freq": torch.ones(4),
        "encoder.final_layernorm.weight": drawn(HIDDEN),
        "encoder.final_layernorm.bias": drawn(HIDDEN),
    }
    for i in range(LAYERS):
        layer = f"encoder.layers.{i}."
        for norm in ("input_layernorm", "post_attention_layernorm"):
            found |= {f"{layer}{norm}.weight": drawn(HIDDEN), f"{layer}{norm}.bias": drawn(HIDDEN)}
        found |= {
            f"{layer}self_attention.query_key_value.weight": drawn(3 * HIDDEN, HIDDEN),
            f"{layer}self_attention.dense.weight": drawn(HIDDEN, HIDDEN),
            f"{layer}mlp.dense_h_to_4h.weight": drawn(2 * FFN, HIDDEN),
            f"{layer}mlp.dense_4h_to_h.weight": drawn(HIDDEN, FFN),
        }
    return found


def part(name: str, tensor: Tensor, rank: int, ranks: int) -> Tensor:
    """What NeMo 1 gave a tensor-parallel rank."""
    if "layernorm" in name or "inv_freq" in name:
        return tensor
    if name.endswith(("dense.weight", "dense_4h_to_h.weight")) and "h_to_4h.weight" not in name.replace("4h_to_h", ""):
        return tensor.chunk(ranks, dim=1)[rank]
    if "dense_h_to_4h" in name:
        return torch.cat([half.chunk(ranks)[rank] for half in tensor.chunk(2)])
    return tensor.chunk(ranks)[rank]


def archive(home: Path, name: str, *, tensor: int = 1, pipeline: int = 1, **config: Any) -> Path:
    """A packed archive of the flat layout."""
    folder = home / name
    each = LAYERS // pipeline
    for stage in range(pipeline):
        for rank in range(tensor):
            held: dict[str, Any] = {}
            for key, value in weights().items():
                layer = int(key.split(".")[2]) if key.startswith("encoder.layers") else None
                first, last = key.startswith("embedding"), key.startswith(("output", "encoder.final"))
                if layer is not None and layer // each != stage:
                    continue
                if (first and stage) or (last and stage != pipeline - 1):
                    continue
                here = key if layer is None else key.replace(f".{layer}.", f".{layer % each}.", 1)
                held[f"model.language_model.{here}"] = part(key, value, rank, tensor).clone()
            held["model.language_model.encoder.layers.0.mlp._extra_state"] = None
            place = f"tp_rank_{rank:02d}_pp_rank_{stage:03d}" if pipeline > 1 else f"mp_rank_{rank:02d}"
            where = folder / place if tensor * pipeline > 1 else folder
            where.mkdir(parents=True, exist_ok=True)
            torch.save(held, where / "model_weights.ckpt")
    (folder / "model_config.yaml").write_text(yaml.safe_dump(CONFIG | config))
    (folder / "0123_sums.model").write_bytes((home / "sums.model").read_bytes())
    packed = home / f"{name}.nemo"
    with tarfile.open(packed, "w:") as file:
        file.add(folder, arcname=".")
    return packed


def stablelm() -> Callable[..., Any]:
    config = StableLmConfig(
        vocab_size=VOCABULARY, hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, num_key_value_heads=HEADS, hidden_act="silu", max_position_embeddings=64,
        layer_norm_eps=1e-5, tie_word_embeddings=False, use_qkv_bias=False, partial_rotary_factor=0.5,
    )  # fmt: skip
    model, held = StableLmForCausalLM(config).eval(), weights()
    named = {
        "model.embed_tokens.weight": held["embedding.word_embeddings.weight"],
        "lm_head.weight": held["output_layer.weight"],
        "model.norm.weight": held["encoder.final_layernorm.weight"] + 1,
        "model.norm.bias": held["encoder.final_layernorm.bias"],
    }
    for i in range(LAYERS):
        old, new = f"encoder.layers.{i}.", f"model.layers.{i}."
        heads = held[f"{old}self_attention.query_key_value.weight"].view(HEADS, 3, -1, HIDDEN).unbind(1)
        for side, rows in zip("qkv", heads, strict=True):
            named[f"{new}self_attn.{side}_proj.weight"] = rows.reshape(HIDDEN, HIDDEN)
        named[f"{new}self_attn.o_proj.weight"] = held[f"{old}self_attention.dense.weight"]
        gate, up = held[f"{old}mlp.dense_h_to_4h.weight"].chunk(2)
        named |= {f"{new}mlp.gate_proj.weight": gate, f"{new}mlp.up_proj.weight": up}
        named[f"{new}mlp.down_proj.weight"] = held[f"{old}mlp.dense_4h_to_h.weight"]
        for norm in ("input_layernorm", "post_attention_layernorm"):
            named[f"{new}{norm}.weight"] = held[f"{old}{norm}.weight"] + 1
            named[f"{new}{norm}.bias"] = held[f"{old}{norm}.bias"]
    model.load_state_dict(named)
    return model


def mean_logp(home: Path) -> float:
    """Of the rows' chosen responses, tokenized by SentencePiece itself."""
    from sentencepiece import SentencePieceProcessor

    pieces: Any = SentencePieceProcessor(model_file=str(home / "sums.model"))
    model, total, rows = stablelm(), 0.0, read_rows(str(home / "rows.jsonl"))
    for row in rows:
        prompt = pieces.encode(row.prompt)
        whole = pieces.encode(row.prompt + row.chosen_response)
        assert whole[: len(prompt)] == prompt
        ids = [*whole, pieces.eos_id()]
        with torch.inference_mode():
            logp = model(torch.tensor([ids])).logits[0].log_softmax(-1)
        total += sum(float(logp[at - 1, ids[at]]) for at in range(len(prompt), len(ids)))
    return total / len(rows)


def test_an_archive_is_a_place_to_start_from(home: Path) -> None:
    """Divided as by four ranks; the recipe of GPT-2B takes over its sizes. Then one of the later layout."""
    packed = archive(home, "four", tensor=2, pipeline=2)
    first: Any = recipes.gpt_2b.dpo_recipe(
        dir=str(home / "runs"), name="run", num_nodes=1, num_gpus_per_node=1, seq_length=64,
        train=str(home / "rows.jsonl"), validation=str(home / "rows.jsonl"),
    )  # fmt: skip
    first.resume.restore_config = run.Config(RestoreConfig, path=str(packed))
    Layout().apply(first)
    first.data.global_batch_size = first.data.micro_batch_size = 4
    first.trainer.max_steps, first.trainer.val_check_interval = 2, 2
    first.log.ckpt.every_n_train_steps = 2
    from aligner.checkpoint.huggingface import import_hf

    flat = run.Partial(import_hf, source=str(archive(home, "one")), output=str(home / "flat"))
    codes, said = forked(home, [(1, first), (1, flat)])
    assert codes == [[0], [0]], said[-3000:]
    measured = read_metrics(home / "runs/run/metrics.csv")[0]
    assert measured["val/loss"] == pytest.approx(0.6931471806, abs=1e-6)
    assert measured["val/logps_chosen_mean"] == pytest.approx(mean_logp(home), rel=1e-5)

    later = run.Partial(import_hf, source=str(_later(home, home / "flat")), output=str(home / "again"))
    codes, said = forked(home, [(1, later)])
    assert codes == [[0]], said[-3000:]
    one, other = (
        {name: value for name, value in checkpoint_diff.read(home / name_of).items() if name.startswith("module.")}
        for name_of in ("flat", "again")
    )
    assert len(one) > 5 and checkpoint_diff.first_difference(one, other) is None


def _later(home: Path, flat: Path) -> Path:
    """The archive of distributed checkpoints that holds an imported one's weights."""
    folder = home / "later"
    folder.mkdir()
    (folder / "model_config.yaml").write_text(yaml.safe_dump(CONFIG | {"mcore_gpt": True, "transformer_engine": True}))
    (folder / "0123_sums.model").write_bytes((home / "sums.model").read_bytes())
    _renamed(flat / "weights", folder / "model_weights")
    with tarfile.open(home / "later.nemo", "w:") as file:
        file.add(folder, arcname=".")
    return home / "later.nemo"


def _renamed(source: Path, target: Path) -> None:
    """A distributed checkpoint with NeMo 1's prefix."""
    import torch.distributed.checkpoint as dcp

    held: dict[str, Any] = {}
    reader = dcp.FileSystemReader(source)
    for name, meta in reader.read_metadata().state_dict_metadata.items():
        if name.startswith("module.") and hasattr(meta, "size"):
            held[name] = torch.empty(meta.size, dtype=meta.properties.dtype)  # type: ignore[union-attr]
    dcp.load(held, storage_reader=reader, no_dist=True)
    dcp.save({name.replace("module.", "model.", 1): v for name, v in held.items()}, checkpoint_id=target, no_dist=True)
    torch.save({}, target / "common.pt")
    (target / "metadata.json").write_text(
        '{"sharded_backend": "torch_dist", "sharded_backend_version": 1, "common_backend": "torch", '
        '"common_backend_version": 1}'
    )


@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 1), (4, 2)])
def test_however_many_ranks_wrote_it_the_weights_are_whole(home: Path, tensor: int, pipeline: int) -> None:
    name = f"ranks {tensor} {pipeline}"
    found = nemo1_archive.flat_weights(
        nemo1_archive.unpack(archive(home, name, tensor=tensor, pipeline=pipeline), home / f"u{name}")
    )
    expected = weights()
    assert len(found) == len(expected) - 1, "all but the rotary buffer"
    assert torch.equal(
        found["decoder.layers.3.mlp.linear_fc1.weight"], expected["encoder.layers.3.mlp.dense_h_to_4h.weight"]
    )
    for part_of, old in (
        ("self_attention.linear_proj", "self_attention.dense"),
        ("mlp.linear_fc2", "mlp.dense_4h_to_h"),
    ):
        assert torch.equal(found[f"decoder.layers.1.{part_of}.weight"], expected[f"encoder.layers.1.{old}.weight"])


def test_two_matrices_of_a_gated_mlp_become_one_and_old_heads_are_reordered(home: Path, tmp_path: Path) -> None:
    gate, up, heads = torch.randn(8, 4), torch.randn(8, 4), torch.randn(3, 2, 5, 4)
    held = {
        "model.language_model.encoder.layers.0.mlp.dense_h_to_4h.weight": gate,
        "model.language_model.encoder.layers.0.mlp.dense_h_to_4h_2.weight": up,
        "model.language_model.encoder.layers.0.self_attention.query_key_value.weight": heads.reshape(30, 4),
    }
    torch.save(held, tmp_path / "model_weights.ckpt")
    config = {"num_layers": 1, "activation": "swiglu", "megatron_legacy": True, "num_attention_heads": 2}
    found = nemo1_archive.flat_weights(nemo1_archive.Archive(tmp_path, config))
    assert torch.equal(found["decoder.layers.0.mlp.linear_fc1.weight"], torch.cat([gate, up]))
    assert torch.equal(
        found["decoder.layers.0.self_attention.linear_qkv.weight"].view(2, 3, 5, 4), heads.transpose(0, 1)
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"transformer_engine": True}, "transformer_engine: is True, which cannot be imported"),
        ({"position_embedding_type": "alibi"}, "position_embedding_type: is 'alibi'"),
        ({"activation": "mish"}, "activation: 'mish' is not one of gelu, geglu"),
        ({"normalization": "scalenorm"}, "normalization: 'scalenorm' is not known"),
    ],
)
def test_what_megatron_core_is_not_is_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        nemo1_archive.config_fields(CONFIG | config, rows=VOCABULARY)


def test_a_file_that_is_no_archive_is_named(tmp_path: Path) -> None:
    (tmp_path / "model.nemo").write_text("not a tar")
    with pytest.raises(CheckpointError, match=r"model.nemo: cannot be unpacked"):
        nemo1_archive.unpack(tmp_path / "model.nemo", tmp_path / "scratch")
    with tarfile.open(tmp_path / "other.nemo", "w:") as file:
        file.add(tmp_path / "model.nemo", arcname="weights.bin")
    with pytest.raises(CheckpointError, match=r"has no model_config.yaml; .* found weights.bin"):
        nemo1_archive.unpack(tmp_path / "other.nemo", tmp_path / "scratch")
