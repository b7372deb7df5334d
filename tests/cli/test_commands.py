"""`nemo llm` as a user types it, each command in a process of its own."""

import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from launching import TIME_LIMIT, nemo_each

from aligner.cli.commands import COMMANDS as OURS

PLACES = ["prompts=p.jsonl", "output=c.jsonl", "engine.devices=2"]
MISTAKES = [
    (["--factory", "tiny_dpo", "-y", "loss.bta=1"], "loss.bta: there is no such argument"),
    (["--factory", "tiny_dop", "-y"], "--factory: there is no 'tiny_dop'; did you mean 'tiny_dpo'? MODEL"),
    (["-y"], "--factory: missing"),
    (["--factory", "tiny_dpo", "-y", "loss=dpi"], "loss: there is no 'dpi'; there are: dpo, robust_dpo, ipo"),
    (["--factory", "tiny_dpo", "-y", "loss.beta=0"], "loss.beta: must be above 0"),
    (["-f", "tiny_dpo", "-y", "data.train=none.jsonl"], "none.jsonl: no such file"),
    (["-f", "tiny_sft", "-y", "--dryrun", "run.executor=local", "data.train=no.jsonl"], "no.jsonl: no such file"),
    (["-f", "tiny_sft", "-y", "trainer.devices=2"], "trainer.devices, trainer.num_nodes: 2 GPUs are needed, and this"),
    (["-f", "tiny_sft", "-y", "trainer.num_nodes=2"], "2 x 1 GPUs are needed, and this machine has 0; submit it by "),
    (["-f", "tiny_dpo(nmae='x')", "-y"], "--factory: tiny_dpo has no argument 'nmae'; did you mean 'name'? (there"),
    (["-f", "no_such.recipe", "-y"], "--factory: 'no_such.recipe' cannot be imported (No module named 'no_such')"),
    (["-f", "broken.recipe", "-y"], "--factory: 'broken.recipe' cannot be imported (No module named 'of_the_users')"),
    (["-f", "mine.nothing", "-y"], "--factory: mine.nothing gives a run.Config of dict, and a run.Partial of align is"),
    (["-f", "tiny_dpo", "-y", "trian=3"], "trian: there is no such argument; did you mean 'trainer'?"),
    (["-f", "tiny_dpo", "-y", "optim.config.qqq=3"], "optim.config.qqq: "),
    (["-f", "tiny_dpo", "-y", "trainer.max_steps=abc"], "trainer.max_steps: expected a whole number, found 'abc'"),
    (["-f", "tiny_dpo", "-y", "data.apply_chat_template=perhaps"], "expected True or False, found 'perhaps'"),
    (["-f", "tiny_dpo", "-y", "word"], "word: expected name=value"),
    (["-f", "tiny_dpo", "-y", "run.executor=slrum"], "run.executor: there is no 'slrum'; did you mean 'slurm'? There"),
    (["-f", "tiny_dpo", "-y", "run.executor=slurm"], "run.executor.account: missing; add run.executor.account=..."),
    (["-f", "tiny_dpo", "-y", "run.executor=docker"], "run.executor.container_image: missing"),
    (["-f", "tiny_dpo", "-y", "run.executor=local", "run.executor.tasks=2"], "run.executor.tasks: there is no such"),
    (["-f", "tiny_dpo", "-y", "run.executor=local", "loss.beta=0"], "loss.beta: must be above 0"),
    (["lint-preferences", "-y", "train=x.jsonl"], "tokenizer: missing; add tokenizer=..."),
    (["lint-preferences", "-y", "trian=x.jsonl"], "trian: there is no such argument; did you mean 'train'?"),
    (["lint-preferences", "--fast", "train=x.jsonl"], "--fast: there is no such option; see nemo llm lint-preferences"),
    (["diff-runs", "runs/a", "runs/b"], "runs/a: expected name=value (there are: one, other)"),
    (["diff-runs", "-y", "one=runs/a", "other=runs/b"], "runs/a: has no config.yaml; expected the folder of a run"),
    (["self-reward", "-f", "tiny_spin", "-y", "generate.prompts=no.jsonl"], "iteration 1: no.jsonl: no such file"),
    (["-f", "tiny_sft", "-y", "--dryrun", "data.global_batch_size=33"], "33 cannot be cut into micro-batches"),
    (["--factory", "tiny_dpo", "-y", "run.executor=nowhere"], "nowhere"),
    (
        ["self-reward", "--factory", "tiny_spin", "-y", "judge.num_judgments=1"],
        "judge.num_judgments: this recipe has nothing of that to set",
    ),
    (["self-reward", "--factory", "tiny_spin", "-y", "align.los.beta=1"], "there is nothing to set below 'los'"),
    (["self-reward", "-f", "tiny_self_rewarding(beta=[0.1])", "-y"], "beta: has 1 values for 3 iterations"),
    (
        ["self-reward", "-f", "tiny_spin", "--dryrun", "align.data.global_batch_size=33"],
        "iteration 1: data.glob",
    ),
    (
        ["self-reward", "-f", "tiny_spin", "--dryrun", "generate.prompts=no.jsonl"],
        "iteration 1: no.jsonl: no such",
    ),
    (
        ["generate-responses", "-y", "prompts=p.jsonl", "engine=megatron"],
        "output: missing; add output=... (nemo llm generate-responses --help",
    ),
    (
        ["generate-responses", "-y", "prompts=p.jsonl", "outptu=c.jsonl"],
        "outptu: there is no such argument; did",
    ),
    (
        ["generate-responses", "-y", "engine.checkpoint=x", "engine=megatron", *PLACES, "run.executor=local"],
        "engine.num_nodes=1 and engine.devices=2, but the executor starts 1 x 1 processes",
    ),
    (["--factory", "tiny_dpo", "-y", "model.config.attention_backend=fast"], "'fast' is not one of flash, fused, unf"),
    (["--factory", "tiny_dpo", "-y", "limits.max_time_per_run=3h"], "limits.max_time_per_run: '3h' is not a time"),
    (["report", "runs/none"], "./runs/none: has no metrics.csv with a line; expected the folder"),
    (["--factory", "tiny_dpo", "-y", "optim.config.adam_espilon=1"], "optim.config.adam_espilon: Megatron's Optim"),
    (["--factory", "tiny_dpo", "-y", "data.batching=pack"], "data.batching: 'pack' is not one of 'padded', 'length_g"),
]
SETTINGS = [
    "model.config.attention_backend=unfused", "trainer.deterministic=True", "limits.max_time_per_run=03:45:00",
    "resume.allow_changes=loss.beta,data.seed", "log.ckpt.monitor=val/loss", "log.ckpt.every_n_minutes=30",
]  # fmt: skip
LISTS = ["peft.target_modules=[linear_qkv,linear_proj]", "data.train=[0.7,a.jsonl,0.3,b.jsonl]"]
EVERY_ITERATION = ["generate.num_generations=3", "align.loss.beta=0.2", "align.loss=ipo"]
CHOSEN = ["loss.beta=0.2", "loss=ipo", "reference=synced", "reference.sync_steps=5", "peft=lora", "peft.dim=8"]
COMMANDS = {
    "help": ["--help"],
    "align help": ["align", "--help"],
    "lint help": ["lint-preferences", "--help"],
    "to yaml": ["align", "--factory", "tiny_dpo", "loss.beta=0.05", "--to-yaml", "recipe.yaml"],
    "from yaml": ["align", "--yaml", "recipe.yaml", "trainer.max_steps=7", "--dryrun", "-y"],
    "settings": ["align", "--factory", "tiny_dpo", *SETTINGS, "--to-yaml", "settings.yaml"],
    "verify help": ["verify-resume", "--help"],
    "size": ["size", "--factory", "llama3_8b_self_rewarding(num_nodes=2)", "gpu=h200", "align.data.seq_length=2048"],
    "iterations": ["self-reward", "--factory", "tiny_self_rewarding", *EVERY_ITERATION, "--to-yaml", "r.yaml"],
    "completion": ["completion", "output=nemo.bash"],
    "lists": ["align", "--factory", "tiny_dpo(peft_scheme='lora')", *LISTS, "--to-yaml", "lists.yaml"],
    "own function": ["align", "--factory", "mine.careful", "--to-yaml", "own.yaml"],
    "own argument": ["align", "--factory", "mine.careful(beta=0.7)", "--to-yaml", "own7.yaml"],
    "own name": ["align", "--factory", "site_dpo", "--to-yaml", "site.yaml"],
    "chosen": ["align", "--factory", "tiny_dpo", *CHOSEN, "--to-yaml", "chosen.yaml"],
    **{message: [*(["align"] if a[0].startswith("-") else []), *a] for a, message in MISTAKES},
}


class Typed(NamedTuple):
    """What became of a command."""

    code: int
    said: str
    errors: str


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    (folder / "broken.py").write_text("import of_the_users\n")
    (folder / "mine.py").write_text(
        "import nemo_run as run\nfrom aligner import recipes\n\n"
        "def careful(beta: float = 0.3) -> run.Partial:\n"
        "    recipe = recipes.tiny_llama.dpo_recipe(name='careful')\n    recipe.loss.beta = beta\n    return recipe\n\n"
        "nothing = lambda: run.Config(dict)\n"
    )
    (folder / "workspace.py").write_text(
        "import nemo_run as run\nfrom aligner import recipes\nfrom aligner.api import align\n\n"
        "@run.cli.factory(target=align, name='site_dpo')\n"
        "def careful() -> run.Partial:\n"
        "    recipe = recipes.tiny_llama.dpo_recipe(name='careful')\n    recipe.loss.beta = 0.3\n    return recipe\n"
    )
    return folder


@pytest.fixture(scope="module")
def typed(folder: Path) -> dict[str, Typed]:
    """All commands, one after the other, in one folder."""
    done = nemo_each([["llm", *words] for words in COMMANDS.values()], folder)
    return {name: Typed(*found) for name, found in zip(COMMANDS, done, strict=True)}


def test_our_commands_stand_beside_nemos(typed: dict[str, Typed]) -> None:
    done = typed["help"]
    assert done.code == 0
    for command in (*OURS, "pretrain", "finetune", "export"):
        assert f" {command} " in done.said
    assert "could not register" not in done.errors


def test_help_tells_recipes_by_model_and_method(typed: dict[str, Typed]) -> None:
    said = typed["align help"].said
    assert "sft dpo ipo rpo kto  gemma2_2b " in said and " smollm2_135m tiny " in said
    assert "the reference model (`aligner.model.reference`)" in said and "llama3_8b_dpo" not in said


def test_a_recipe_is_sized(typed: dict[str, Typed]) -> None:
    done = typed["size"]
    assert done.code == 0 and "on 2 nodes of 8: tensor 2, data 8" in done.said
    assert "KV cache" in done.said and "of 141 (h200)" in done.said and "2,048 tokens a sequence" in done.said


OFFERED = [
    ("nemo ", ["llm"]),
    ("nemo llm al", ["align"]),
    ("nemo llm align --factory llama31_8", ["llama31_8b_dpo", "llama31_8b_kto"]),
    ("nemo llm align -f tiny_dpo -y lo", ["log.", "log=", "loss.", "loss="]),
    ("nemo llm align -f tiny_dpo -y loss=ip", ["ipo"]),
    ("nemo llm align -f tiny_dpo -y loss.", ["loss.beta="]),
    ("nemo llm align -f tiny_dpo -y trainer.strategy.tensor", ["trainer.strategy.tensor_model_parallel_size="]),
    ("nemo llm align -f tiny_dpo -y run.executor=", ["docker", "local", "slurm"]),
    ("nemo llm align --dr", ["--dryrun"]),
    ("nemo llm size --factory tiny_self", ["tiny_self_rewarding"]),
    ("nemo llm size --factory tiny_dpo gp", ["gpu="]),
    ("nemo llm self-reward -f tiny_spin -y generate.num_g", ["generate.num_generations="]),
    ("nemo llm lint-preferences train=", []),
]


@pytest.mark.parametrize(("line", "expected"), OFFERED, ids=[line for line, _ in OFFERED])
def test_tab_offers(typed: dict[str, Typed], folder: Path, line: str, expected: list[str]) -> None:
    assert typed["completion"].code == 0, typed["completion"].errors
    press = 'source nemo.bash; COMP_LINE=$1 COMP_POINT=${#1}; _nemo_align; printf "%s\\n" "${COMPREPLY[@]}"'
    done = subprocess.run(
        ["bash", "-c", press, "bash", line], cwd=folder, capture_output=True, text=True, timeout=TIME_LIMIT
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
    offered = done.stdout.split()
    assert set(expected) <= set(offered) and bool(offered) == bool(expected)
    assert len(offered) == len(set(offered))


def test_help_tells_the_arguments(typed: dict[str, Typed]) -> None:
    said = typed["lint help"].said
    for words in (
        "exit code 1",
        "tokenizer=",
        "seq_length= [2048]",
        "nemo llm lint-preferences -y train=... tokenizer=...",
    ):
        assert words in said


@pytest.mark.parametrize("message", [message for _, message in MISTAKES])
def test_a_mistake_is_one_clear_line_and_exit_code_1(typed: dict[str, Typed], folder: Path, message: str) -> None:
    done = typed[message]
    assert done.code == 1 and done.said == ""
    told = [line for line in done.errors.splitlines() if "pynvml" not in line]
    assert len(told) == 1 and told[0].startswith("Error: ") and message in told[0], done.errors
    assert not (folder / "runs").exists()


def test_yaml_makes_the_round_trip_and_overrides_still_count(typed: dict[str, Typed], folder: Path) -> None:
    assert typed["to yaml"].code == 0, typed["to yaml"].errors
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["loss"]["beta"] == 0.05
    done = typed["from yaml"]
    assert done.code == 0, done.errors
    assert "max_steps=7" in done.said and "beta=0.05" in done.said


def test_loss_reference_and_adapters_are_chosen_by_name(typed: dict[str, Typed], folder: Path) -> None:
    assert typed["chosen"].code == 0, typed["chosen"].errors
    written = yaml.safe_load((folder / "chosen.yaml").read_text())
    assert written["loss"] == {"_target_": "aligner.losses.pairs.ipo", "_partial_": True, "beta": 0.2}
    assert written["reference"] == {"_target_": "aligner.model.reference.SyncedReference", "sync_steps": 5}
    assert written["peft"]["dim"] == 8


def test_an_error_in_our_own_module_is_loud(tmp_path: Path) -> None:
    code = "import sys; sys.modules['aligner.api'] = None; sys.argv = ['nemo', 'llm', 'align'];"
    code += "import aligner.cli.commands"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "could not register its commands" in done.stderr


def test_lists_need_no_quotes_which_a_shell_removes(typed: dict[str, Typed], folder: Path) -> None:
    assert typed["lists"].code == 0, typed["lists"].errors
    recipe = yaml.safe_load((folder / "lists.yaml").read_text())
    assert recipe["peft"]["target_modules"] == ["linear_qkv", "linear_proj"]
    assert recipe["data"]["train"] == [0.7, "a.jsonl", 0.3, "b.jsonl"]


def test_recipes_of_the_users_own_are_found(typed: dict[str, Typed], folder: Path) -> None:
    for name, file, beta in (("own function", "own", 0.3), ("own argument", "own7", 0.7), ("own name", "site", 0.3)):
        assert typed[name].code == 0, typed[name].errors
        recipe = yaml.safe_load((folder / f"{file}.yaml").read_text())
        assert (recipe["log"]["name"], recipe["loss"]["beta"]) == ("careful", beta)


def test_settings_of_long_runs_are_understood(typed: dict[str, Typed], folder: Path) -> None:
    assert typed["settings"].code == 0, typed["settings"].errors
    from aligner.cli.parsing.yaml_recipe import load_yaml

    recipe = load_yaml(folder / "settings.yaml")
    assert recipe.trainer.deterministic is True
    assert (recipe.limits.max_time_per_run, recipe.resume.allow_changes) == (
        "03:45:00",
        ["loss.beta", "data.seed"],
    )
    assert (recipe.log.ckpt.monitor, recipe.log.ckpt.every_n_minutes) == ("val/loss", 30)
    assert recipe.model.config.attention_backend.name == "unfused"
    assert typed["verify help"].code == 0 and "kill -9" in typed["verify help"].said


def test_what_is_set_of_a_stage_is_set_in_every_round(typed: dict[str, Typed], folder: Path) -> None:
    assert typed["iterations"].code == 0, typed["iterations"].errors
    iterations = yaml.safe_load((folder / "r.yaml").read_text())["iterations"]
    assert [(one["generate"]["num_generations"], one["align"]["loss"]["beta"]) for one in iterations] == [(3, 0.2)] * 3
