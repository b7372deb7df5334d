"""Files that others wrote run nothing while they are read: each of these would create a file named EXECUTED.

What names code in words, contexts and recipes, is in test_hostile_names.py.
"""

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hand import save_llama
from hostile import Call, Payload
from torch.distributed.checkpoint import FileSystemReader

from aligner.backend import loading, safe_reading
from aligner.checkpoint import checkpoint_diff, folders, nemo1_archive
from aligner.checkpoint.huggingface import export_hf, import_hf
from aligner.checkpoint.tokenizers import named_tokenizer
from aligner.common.errors import AlignError, CheckpointError, ConfigError, UntrustedError
from aligner.generate import restore
from aligner.model import architecture

# ---- pickles ------------------------------------------------------------------------------------------------------


def stack_global(*, memoized: bool) -> bytes:
    """`os.system`, named by strings on the stack; or by strings of the memo."""
    if memoized:
        return b"\x80\x04\x8c\x02os\x94\x8c\x06system\x94000h\x00h\x01\x93\x8c\x04true\x85R."
    return b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c\x04true\x85R."


FORMS: dict[str, Callable[[Path], bytes]] = {
    **{f"protocol {n}": lambda marker, n=n: pickle.dumps(Payload(marker), n) for n in range(6)},
    "names on the stack": lambda marker: stack_global(memoized=False),
    "names in the memo": lambda marker: stack_global(memoized=True).replace(b"000h", b"0h", 1),
    "INST": lambda marker: b"(S'touch " + str(marker).encode() + b"'\nios\nsystem\n.",
    "eval": lambda marker: pickle.dumps(Payload(marker, eval)),
    "a dotted name of an allowed module": lambda marker: (
        b"\x80\x04\x8c\x24torch.distributed.checkpoint.metadata\x8c\x09os.system\x93\x8c\x04true\x85R."
    ),
    "an extension": lambda marker: b"\x80\x02\x82\x01.",
    "getattr": lambda marker: b"\x80\x04\x8c\x08builtins\x8c\x07getattr\x93\x8c\x01a\x8c\x05upper\x86R.",
    "functools.partial": lambda marker: pickle.dumps(partial(os.system, f"touch {marker}")),
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_metadata_is_unpickled_by_its_own_names_alone(form: Any, checkpoint: Path, marker: Path) -> None:
    (checkpoint / "weights/.metadata").write_bytes(form(marker))
    try:
        found = folders.find_corruption(checkpoint)
        assert found is not None
    except UntrustedError as error:
        assert str(error).startswith(f"{checkpoint}/weights/.metadata: names ") and "\n" not in str(error)
    assert not marker.exists()


def test_a_checkpoint_that_would_run_something_is_refused_wherever_it_is_read(checkpoint: Path, marker: Path) -> None:
    (checkpoint / "weights/.metadata").write_bytes(pickle.dumps(Payload(marker)))
    run = checkpoint.parent.parent
    readers: list[Callable[[], Any]] = [
        lambda: named_tokenizer(str(run)),  # lint-preferences, pack-preferences
        lambda: restore.find(str(run), run),  # evaluate, generate-responses, report prompts=
        lambda: export_hf(str(checkpoint), str(run / "out")),
        lambda: folders.latest_checkpoint(run),  # a run that resumes
        lambda: checkpoint_diff.read(checkpoint),
        lambda: architecture.vocabulary_rows(checkpoint),
        lambda: FileSystemReader(checkpoint / "weights").read_metadata(),  # Megatron's own
    ]
    for read in readers:
        with pytest.raises(UntrustedError, match=r"\.metadata: names \w+\.system, which no checkpoint of NeMo"):
            read()
    assert not marker.exists()


@pytest.mark.parametrize("function", [os.system, eval, exec], ids=lambda function: function.__name__)
def test_the_unsharded_state_holds_plain_values(function: Any, checkpoint: Path, marker: Path) -> None:
    from megatron.core import dist_checkpointing

    torch.save({"global_step": Payload(marker, function)}, checkpoint / "weights/common.pt")
    (checkpoint / "align.json").unlink()
    readers: list[Callable[[], Any]] = [
        lambda: folders.step_of(checkpoint),
        lambda: checkpoint_diff.read(checkpoint),
        lambda: dist_checkpointing.load_common_state_dict(str(checkpoint / "weights")),
    ]
    for read in readers:
        with pytest.raises(UntrustedError, match=r"common\.pt: names [a-z]+\.(system|eval|exec)"):
            read()
    assert not marker.exists()


def test_a_run_does_not_resume_from_it(checkpoint: Path, marker: Path, resume: Any) -> None:
    torch.save({"global_step": Payload(marker)}, checkpoint / "weights/common.pt")
    with pytest.raises(CheckpointError, match=r"names \w+\.system"):
        resume()
    assert not marker.exists()


def test_objects_among_the_weights_are_plain_values(checkpoint: Path, marker: Path, resume: Any) -> None:
    """One of Megatron's own objects is replaced by a pickle, at the end of its file."""
    meta = safe_reading.read_metadata(checkpoint / "weights")
    index = next(key for key in meta.storage_data if type(meta.state_dict_metadata[key.fqn]).__name__[0] == "B")
    info, packed = meta.storage_data[index], io.BytesIO()
    torch.save(Payload(marker), packed)
    file = checkpoint / "weights" / info.relative_path
    info.offset, info.length = file.stat().st_size, len(packed.getvalue())
    file.write_bytes(file.read_bytes() + packed.getvalue())
    (checkpoint / "weights/.metadata").write_bytes(pickle.dumps(meta))
    with pytest.raises(UntrustedError, match=r"\(among the weights\): names \w+\.system"):
        checkpoint_diff.read(checkpoint)
    with pytest.raises(UntrustedError, match=r"\(among the weights\): names \w+\.system"):
        resume()
    assert not marker.exists()


def test_extra_states_of_transformer_engine_are_plain_values(marker: Path) -> None:
    def saved(value: Any) -> io.BytesIO:
        packed = io.BytesIO()
        torch.save(torch.frombuffer(bytearray(pickle.dumps(value)), dtype=torch.uint8), packed)
        packed.seek(0)
        return packed

    loading.check_object("layers.linear._extra_state/0", saved({"scale": torch.ones(2), "steps": 3}))
    for hostile in (Payload(marker), [torch.ones(1), Payload(marker, eval)]):
        with pytest.raises(UntrustedError, match=r"_extra_state/0 \(among the weights\): names"):
            loading.check_object("layers.linear._extra_state/0", saved(hostile))
    inner = io.BytesIO()
    torch.save(Payload(marker), inner)
    nested = pickle.dumps(torch.ones(1))  # a tensor is pickled as bytes that torch.load takes
    assert b"_load_from_bytes" in nested
    with pytest.raises(UntrustedError):
        loading.check_object("a._extra_state", saved(Call(torch.storage._load_from_bytes, inner.getvalue())))
    assert not marker.exists()


def test_a_state_of_model_optimizer_is_a_pickle_too(checkpoint: Path, marker: Path, resume: Any) -> None:
    """NeMo looks for one in every checkpoint that it restores, and unpickles it."""
    (checkpoint / "weights/modelopt_state").mkdir()
    torch.save(Payload(marker), checkpoint / "weights/modelopt_state/common.pt")
    with pytest.raises(UntrustedError, match=r"modelopt_state/common\.pt: names \w+\.system"):
        resume()
    assert not marker.exists()


def test_a_filter_of_zarr_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weight").mkdir()
    (tmp_path / "weight/.zarray").write_text(json.dumps({"dtype": "<f4", "filters": [{"id": "pickle"}]}))
    with pytest.raises(UntrustedError, match="pickle"):
        loading.check_zarr(tmp_path)


# ---- archives, models of Hugging Face -----------------------------------------------------------------------------


def test_an_archive_of_nemo_1_runs_nothing(checkpoint: Path, tmp_path: Path, marker: Path) -> None:
    folder = tmp_path / "archive"
    folder.mkdir()
    (folder / "model_config.yaml").write_text("num_layers: 1\n")
    torch.save({"model.language_model.x": Payload(marker)}, folder / "model_weights.ckpt")
    with tarfile.open(tmp_path / "flat.nemo", "w:") as packed:
        packed.add(folder, arcname=".")
    with pytest.raises(UntrustedError, match=r"model_weights\.ckpt: names \w+\.system"):
        import_hf(str(tmp_path / "flat.nemo"), str(tmp_path / "out"))
    (folder / "model_weights.ckpt").unlink()
    shutil.copytree(checkpoint / "weights", folder / "model_weights")
    (folder / "model_weights/.metadata").write_bytes(pickle.dumps(Payload(marker)))
    with pytest.raises(UntrustedError, match=r"\.metadata: names \w+\.system"):
        import_hf(str(folder), str(tmp_path / "out"))
    (folder / "model_config.yaml").write_text(f"a: !!python/object/apply:os.system ['touch {marker}']\n")
    with pytest.raises((AlignError, yaml.YAMLError)):
        nemo1_archive.unpack(folder, tmp_path)
    assert not marker.exists()


def test_a_model_of_hugging_face_runs_nothing(tmp_path: Path, marker: Path) -> None:
    """Weights that are a pickle, and Python files that its configuration and tokenizer name."""
    source = tmp_path / "llama"
    save_llama(source)
    (source / "mine.py").write_text((tmp_path / "evil.py").read_text() + "class Mine: ...\n")
    classes = {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.Mine", "AutoTokenizer": ["mine.Mine", None]}
    for name in ("config.json", "tokenizer_config.json"):
        described = json.loads((source / name).read_text()) | {"auto_map": classes}
        (source / name).write_text(json.dumps(described))
    for weights in source.glob("*.safetensors"):
        weights.unlink()
    torch.save({"model.embed_tokens.weight": Payload(marker)}, source / "pytorch_model.bin")
    script = "import sys\nfrom aligner.checkpoint.huggingface import import_hf\nimport_hf(*sys.argv[1:])\n"
    (tmp_path / "convert.py").write_text(script)
    done = subprocess.run(
        [sys.executable, str(tmp_path / "convert.py"), str(source), str(tmp_path / "out")],
        capture_output=True, text=True, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode and not marker.exists(), done.stderr[-2000:]


def test_caches_and_packs_are_no_pickles(tmp_path: Path, marker: Path, hf: Any) -> None:
    import safetensors

    from aligner.data import prepacked

    hostile = pickle.dumps(Payload(marker))
    (tmp_path / "scores.safetensors").write_bytes(hostile)
    with pytest.raises(safetensors.SafetensorError):
        safetensors.safe_open(tmp_path / "scores.safetensors", "pt")
    settings: Any = None
    packed = tmp_path / "packed"
    packed.mkdir()
    for name in ("packs.arrow", "meta.json"):
        (packed / name).write_bytes(hostile)
    with pytest.raises(ConfigError, match="is damaged"):
        prepacked.load(packed, hf, settings, "data.train")
    assert not marker.exists()
