"""Contexts of checkpoints and recipes of others name classes and functions: only what those have is imported."""

import json
import pickle
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import cloudpickle
import fiddle as fdl
import pytest
import yaml
from hostile import Payload
from launching import nemo_each
from nemo import lightning as nl

from aligner.backend import safe_reading
from aligner.checkpoint.huggingface import export_hf
from aligner.checkpoint.tokenizers import named_tokenizer
from aligner.cli.parsing.yaml_recipe import load_yaml
from aligner.common.errors import ConfigError, UntrustedError
from aligner.generate import restore
from aligner.model import adapters

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

    safe_reading.load_context(checkpoint / "context")
    # NeMo writes an object into a file so, if it cannot write what the object was built from; which of both it does
    # depends on what the process has loaded before.
    document = json.loads((checkpoint / "context/io.json").read_text())
    name, held, place = "MegatronMixedPrecision", "pickled", "<root>.trainer.plugins"
    key = next(key for key, value in document["objects"].items() if value.get("paths") == [place])
    document["objects"][key] = {
        "type": pyref("nemo.lightning.pytorch.plugins.mixed_precision", name),
        "items": [["IdentityElement()", {"type": "leaf", "value": held, "paths": [place]}]],
        "metadata": None,
        "paths": [place],
    }
    (checkpoint / "context/io.json").write_text(json.dumps(document))
    # An object, or the configuration that NeMo keeps of it once a context with one of its class was loaded, as here.
    plugin = nl.MegatronMixedPrecision(precision="32")
    configuration = vars(plugin).pop("__io__")
    for good in (plugin, configuration):
        (checkpoint / "context" / held).write_bytes(cloudpickle.dumps(good))
        assert type(safe_reading.load_context(checkpoint / "context").trainer.precision_plugin).__name__ == name
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


def test_adapters_of_someone_else_run_nothing(checkpoint: Path, marker: Path) -> None:
    document = json.loads((checkpoint / "context/io.json").read_text())
    called("os", "system")(document, marker)
    (checkpoint / "context/io.json").write_text(json.dumps(document))
    with pytest.raises(UntrustedError, match=r"names os\.system"):
        adapters.peft_config_of(checkpoint)
    assert not marker.exists()


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
