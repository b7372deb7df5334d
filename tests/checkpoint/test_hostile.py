"""Files that others wrote run nothing while they are read: each of these would create a file named EXECUTED."""

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

import fiddle as fdl
import pytest
import torch
import yaml
from hand import save_llama
from launching import nemo_each
from torch.distributed.checkpoint import FileSystemReader

from aligner.backend import loading, safe_reading
from aligner.checkpoint import checkpoint_diff, folders, nemo1_archive
from aligner.checkpoint.huggingface import export_hf, import_hf
from aligner.checkpoint.tokenizers import named_tokenizer
from aligner.cli.parsing.yaml_recipe import load_yaml
from aligner.common.errors import AlignError, CheckpointError, ConfigError, UntrustedError
from aligner.generate import restore
from aligner.model import adapters, architecture

Make = Callable[[Path], None]


class Payload:
    """Its pickle creates a file when it is loaded."""

    def __init__(self, marker: Path, function: Any = os.system) -> None:
        self.call = (function, (f"touch {marker}",))

    def __reduce__(self) -> Any:
        return self.call


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tiny_in: Any) -> Path:
    """A run of four steps."""
    return fdl.build(tiny_in(tmp_path_factory.mktemp("hostile"))())()


@pytest.fixture
def marker(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file, and a module `evil` in sys.path that creates it when it is imported."""
    (tmp_path / "EXECUTED.d").mkdir()
    found = tmp_path / "EXECUTED.d/EXECUTED"
    (tmp_path / "evil.py").write_text(
        f"open({str(found)!r}, 'w').close()\nclass Config: ...\ndef call(*_, **__): ...\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return found


@pytest.fixture
def checkpoint(run: Path, tmp_path: Path) -> Path:
    """A copy of the run's checkpoint, in a copy of the run."""
    shutil.copytree(run, tmp_path / "copy/run")
    (found,) = (tmp_path / "copy/run/checkpoints").glob("*")
    # Hashes find damage; whoever can write the files can write hashes, too.
    (found / "hashes.json").unlink()
    return found


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


def test_a_run_does_not_resume_from_it(checkpoint: Path, marker: Path, tiny: Any, execute: Any, tmp_path: Path) -> None:
    torch.save({"global_step": Payload(marker)}, checkpoint / "weights/common.pt")
    recipe = tiny()
    recipe.log.log_dir, recipe.trainer.max_steps = str(tmp_path / "copy"), 6
    with pytest.raises(CheckpointError, match=r"names \w+\.system"):
        execute(recipe)
    assert not marker.exists()


def test_objects_among_the_weights_are_plain_values(
    checkpoint: Path, marker: Path, tiny: Any, execute: Any, tmp_path: Path
) -> None:
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
    recipe = tiny()
    recipe.log.log_dir, recipe.trainer.max_steps = str(tmp_path / "copy"), 6
    with pytest.raises(UntrustedError, match=r"\(among the weights\): names \w+\.system"):
        execute(recipe)
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


class Call:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def test_a_state_of_model_optimizer_is_a_pickle_too(
    checkpoint: Path, marker: Path, tiny: Any, execute: Any, tmp_path: Path
) -> None:
    """NeMo looks for one in every checkpoint that it restores, and unpickles it."""
    (checkpoint / "weights/modelopt_state").mkdir()
    torch.save(Payload(marker), checkpoint / "weights/modelopt_state/common.pt")
    recipe = tiny()
    recipe.log.log_dir, recipe.trainer.max_steps = str(tmp_path / "copy"), 6
    with pytest.raises(UntrustedError, match=r"modelopt_state/common\.pt: names \w+\.system"):
        execute(recipe)
    assert not marker.exists()


def test_a_filter_of_zarr_is_refused(tmp_path: Path) -> None:
    (tmp_path / "weight").mkdir()
    (tmp_path / "weight/.zarray").write_text(json.dumps({"dtype": "<f4", "filters": [{"id": "pickle"}]}))
    with pytest.raises(UntrustedError, match="pickle"):
        loading.check_zarr(tmp_path)


# ---- io.json ------------------------------------------------------------------------------------------------------


def pyref(module: str, name: str) -> dict[str, str]:
    return {"type": "pyref", "module": module, "name": name}


def called(module: str, name: str) -> Callable[[dict[str, Any], Path], None]:
    """Have a function called in the place of the model's tokenizer."""

    def change(document: dict[str, Any], marker: Path) -> None:
        objects = document["objects"]
        tokenizer = next(v for k, v in objects.items() if k.startswith("auto_tokenizer"))
        meta = objects[tokenizer["metadata"]["key"]]
        meta["items"][0][1] = pyref(module, name)
        tokenizer["items"][0][1]["value"] = f"touch {marker}"

    return change


def of_type(module: str, name: str) -> Callable[[dict[str, Any], Path], None]:
    def change(document: dict[str, Any], marker: Path) -> None:
        paths = ["<root>.model.tokenizer.x"]
        document["objects"]["x"] = {"type": pyref(module, name), "items": [], "metadata": None, "paths": paths}

    return change


CONTEXTS = {
    "a function of the system": called("os", "system"),
    "a module beside it": called("evil", "call"),
    "the type of an object, imported even if it is unused": of_type("evil", "Config"),
    "a module in an allowed one": called("nemo.lightning.io.mixin", "shutil.rmtree"),
    "a function that an allowed module has imported": called("torch.nn.modules.module", "warnings.os.system"),
    "a function of torch that runs a shell": called("torch.utils.collect_env", "run"),
    "a tokenizer that unpickles": called("nemo.collections.common.tokenizers.tabular_tokenizer", "TabularTokenizer"),
    "a specification that imports": called("megatron.core.transformer.spec_utils", "ModuleSpec"),
    "our own import": called("aligner.checkpoint.huggingface", "import_hf"),
    "our own runner of code": called("aligner.judge.verifiers", "python_tests"),
    "the names of a function's module": called("torch.nn.functional", "silu.__globals__.get"),
    "the builtins of a function": called("torch.nn.functional", "silu.__builtins__.get"),
    "a method of an allowed class": called("nemo.collections.llm.gpt.model.llama", "LlamaModel.import_from"),
    "a builtin": called("builtins", "eval"),
}


@pytest.mark.parametrize("change", CONTEXTS.values(), ids=CONTEXTS)
def test_a_context_is_built_of_what_nemo_saves(change: Any, checkpoint: Path, marker: Path) -> None:
    document = json.loads((checkpoint / "context/io.json").read_text())
    change(document, marker)
    (checkpoint / "context/io.json").write_text(json.dumps(document))
    readers: list[Callable[[], Any]] = [
        lambda: named_tokenizer(str(checkpoint)),
        lambda: safe_reading.load_context(checkpoint / "context", "model"),
        lambda: safe_reading.load_context(checkpoint / "context"),
        lambda: export_hf(str(checkpoint), str(checkpoint / "out")),
        lambda: restore.restore(checkpoint, lambda config: None),
    ]
    for read in readers:
        with pytest.raises(UntrustedError, match=r"io\.json: names .*, which no checkpoint of NeMo has"):
            read()
    assert not marker.exists() and "evil" not in sys.modules


def test_a_pickled_part_of_a_context_is_no_exception(checkpoint: Path, marker: Path) -> None:
    """NeMo's own restriction allows all of torch, in which there are functions that run a shell."""
    from torch.utils import collect_env

    # NeMo writes an object so that it could not write as a config, which depends on what the process has loaded before.
    document = json.loads((checkpoint / "context/io.json").read_text())
    (plugin,) = (value for key, value in document["objects"].items() if key.startswith("megatron_mixed_precision"))
    held, path = "pickled", "<root>.trainer.plugins"
    plugin["items"] = [["IdentityElement()", {"type": "leaf", "value": held, "paths": [path]}]]
    plugin["metadata"] = None
    (checkpoint / "context/io.json").write_text(json.dumps(document))
    (checkpoint / "context" / held).write_bytes(pickle.dumps(None))
    safe_reading.load_context(checkpoint / "context")
    for payload in (Payload(marker), Payload(marker, collect_env.run), partial(collect_env.run, "true")):
        (checkpoint / "context" / held).write_bytes(pickle.dumps(payload))
        with pytest.raises(UntrustedError, match="names"):
            safe_reading.load_context(checkpoint / "context")
    # A class of ours is not changed by what is loaded.
    changed = b"\x80\x04cnemo.collections.llm.gpt.model.llama\nLlamaConfig\nN}\x8c\x01xK\x01s\x86b."
    (checkpoint / "context" / held).write_bytes(changed)
    with pytest.raises(UntrustedError, match="attributes of"):
        safe_reading.load_context(checkpoint / "context")
    assert not marker.exists()


@pytest.mark.parametrize("value", [True, {"type": "leaf", "value": True}, {"type": "leaf", "value": 1}])
def test_a_tokenizer_does_not_bring_code_along(value: Any, checkpoint: Path, marker: Path) -> None:
    document = json.loads((checkpoint / "context/io.json").read_text())
    objects = document["objects"]
    tokenizer = next(v for k, v in objects.items() if k.startswith("auto_tokenizer"))
    names = next(v for v in objects.values() if v["items"] == [["Index(index=0)", "pretrained_model_name"]])
    (folder,) = [path.parent for path in (checkpoint / "context").glob("*/tokenizer.json")]
    (folder / "mine.py").write_text((marker.parent.parent / "evil.py").read_text() + "class Mine: ...\n")
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": [None, "mine.Mine"]}, "tokenizer_class": "Mine"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer["items"].append(["Attr(name='x')", value])
    names["items"].append(["Index(index=1)", "trust_remote_code"])
    (checkpoint / "context/io.json").write_text(json.dumps(document))
    with pytest.raises(UntrustedError, match="names trust_remote_code"):
        named_tokenizer(str(checkpoint))
    tokenizer["items"][-1][1] = {"type": "leaf", "value": False}
    (checkpoint / "context/io.json").write_text(json.dumps(document))
    with pytest.raises((ValueError, AttributeError)) as refused:
        named_tokenizer(str(checkpoint))
    assert not isinstance(refused.value, UntrustedError), "NeMo's importers write False"
    with pytest.raises(ConfigError):
        named_tokenizer(str(folder))
    assert not marker.exists()


def test_what_the_user_trusts_is_loaded(checkpoint: Path, marker: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    document = json.loads((checkpoint / "context/io.json").read_text())
    called("evil", "call")(document, marker)
    (checkpoint / "context/io.json").write_text(json.dumps(document))
    monkeypatch.setenv("NEMO_ALIGN_TRUST", "another, evil")
    try:
        assert safe_reading.load_context(checkpoint / "context", "model").tokenizer is None
    finally:
        sys.modules.pop("evil", None)
    assert marker.exists()


# ---- recipes in YAML ----------------------------------------------------------------------------------------------

RECIPE: dict[str, Any] = {"_target_": "aligner.api.align", "_partial_": True}
YAML: dict[str, Any] = {
    "os.system": {"_target_": "os.system", "command": "touch {marker}"},
    "evil.call": {"_target_": "evil.call"},
    "builtins.exec": {"_target_": "builtins.exec", "_partial_": True},
    "subprocess.run": {"_target_": "subprocess.run", "_call_": False},
    "aligner.checkpoint.huggingface.import_hf": {"_target_": "aligner.checkpoint.huggingface.import_hf"},
    "aligner.judge.verifiers.python_tests": {"_target_": "aligner.judge.verifiers.python_tests", "response": ""},
    "aligner.api.align": {"_target_": "aligner.api.align"},
    "nemo.collections.llm.api.import_ckpt": {"_target_": "nemo.collections.llm.api.import_ckpt"},
    "trust_remote_code": {
        "_target_": "nemo.collections.common.tokenizers.AutoTokenizer", "trust_remote_code": True,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", YAML)
def test_a_recipe_of_someone_else_is_built_of_what_recipes_have(name: str, tmp_path: Path, marker: Path) -> None:
    hostile = json.loads(json.dumps(YAML[name]).replace("{marker}", str(marker)))
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(RECIPE | {"model": {"parts": [hostile]}}))
    with pytest.raises(ConfigError, match=rf"r\.yaml\.model\.parts\[0\]\.\w+: names {name}, which no recipe.*TRUST="):
        fdl.build(load_yaml(tmp_path / "r.yaml"))
    assert not marker.exists() and "evil" not in sys.modules


def test_no_enumeration_of_someone_else_is_imported(tmp_path: Path, marker: Path) -> None:
    for kind in ("evil.Config", "os.environ"):
        values = {"_target_": "aligner.common.yaml_values.member", "kind": kind, "name": "x"}
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(RECIPE | {"model": values}))
        with pytest.raises(UntrustedError, match=f"names {kind}"):
            fdl.build(load_yaml(tmp_path / "r.yaml"))
    (tmp_path / "r.yaml").write_text("a: !!python/object/apply:os.system ['touch " + str(marker) + "']\n")
    with pytest.raises(ConfigError, match="is not YAML"):
        load_yaml(tmp_path / "r.yaml")
    assert not marker.exists()


def test_a_recipe_with_an_own_loss_is_read_once_it_is_trusted(
    tmp_path: Path, marker: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(RECIPE | {"loss": {"_target_": "evil.call", "_partial_": True}}))
    monkeypatch.setenv("NEMO_ALIGN_TRUST", "evil")
    try:
        assert load_yaml(tmp_path / "r.yaml").loss.__fn_or_cls__.__name__ == "call"
    finally:
        sys.modules.pop("evil", None)


def test_commands_refuse_in_one_line(tmp_path: Path, marker: Path, checkpoint: Path) -> None:
    document = {"_target_": "aligner.api.align", "_partial_": True, "loss": {"_target_": "os.system", "command": "x"}}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(document))
    (checkpoint / "weights/.metadata").write_bytes(pickle.dumps(Payload(marker)))
    (tmp_path / "rows.jsonl").write_text('{"prompt": "1+1=", "chosen_response": "2", "rejected_response": "3"}\n')
    run = str(checkpoint.parent.parent)
    commands = [
        ["align", "--yaml", "r.yaml", "--dryrun"],
        ["size", "--yaml", "r.yaml"],
        ["lint-preferences", "train=rows.jsonl", f"tokenizer={run}"],
        ["evaluate", "data=rows.jsonl", f"checkpoint={run}"],
        ["export-hf", f"checkpoint={run}", "output=out"],
        ["report", run, "prompts=rows.jsonl"],
    ]
    for code, _, errors in nemo_each([["llm", *words] for words in commands], tmp_path):
        (line,) = [line for line in errors.splitlines() if line.startswith("Error: ")]
        assert code == 1 and "system, which no " in line and "NEMO_ALIGN_TRUST=" in line
    assert not marker.exists()


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


def test_adapters_of_someone_else_run_nothing(checkpoint: Path, marker: Path) -> None:
    document = json.loads((checkpoint / "context/io.json").read_text())
    called("os", "system")(document, marker)
    (checkpoint / "context/io.json").write_text(json.dumps(document))
    with pytest.raises(UntrustedError, match=r"names os\.system"):
        adapters.peft_config_of(checkpoint)
    assert not marker.exists()
