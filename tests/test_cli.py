"""`nemo llm align` as a user types it, each in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import yaml
from launching import nemo_each

NEMO = Path(sys.executable).parent / "nemo"


def nemo(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    # A wide terminal, so that tables do not cut what is looked for.
    env = os.environ | {"COLUMNS": "200", "NO_COLOR": "1", "TERM": "dumb"}
    return subprocess.run([str(NEMO), "llm", *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=240)


def test_our_commands_stand_beside_nemos(tmp_path: Path) -> None:
    done = nemo("--help", cwd=tmp_path)
    assert done.returncode == 0
    for command in (
        "align",
        "import-hf",
        "export-hf",
        "merge",
        "lint-preferences",
        "pack-preferences",
        "pretrain",
        "export",
    ):
        assert f" {command} " in done.stdout
    assert "could not register" not in done.stderr


MISTAKES = [
    (["--factory", "tiny_dpo", "-y", "loss.bta=1"], "loss.bta: there is no such argument"),
    (["--factory", "tiny_dop", "-y"], "--factory: there is no 'tiny_dop'; there are: smollm2_135m_dpo"),
    (["-y"], "--factory: missing"),
    (["--factory", "tiny_dpo", "-y", "loss=dpi"], "loss: there is no 'dpi'; there are: dpo, robust_dpo, ipo"),
    (["--factory", "tiny_dpo", "-y", "loss.beta=0"], "loss.beta: must be above 0"),
    (["-f", "tiny_dpo", "-y", "data.train=none.jsonl"], "none.jsonl: no such file"),
    (["--factory", "tiny_dpo", "-y", "run.executor=nowhere"], "nowhere"),
    (["--factory", "tiny_dpo", "-y", "data.batching=pack"], "data.batching: 'pack' is not one of 'padded', 'length_g"),
]


def test_a_mistake_is_one_clear_line_and_exit_code_1(tmp_path: Path) -> None:
    done = nemo_each([["llm", "align", *arguments] for arguments, _ in MISTAKES], tmp_path)
    for (code, _, said), (arguments, message) in zip(done, MISTAKES, strict=True):
        assert code == 1, arguments
        assert message in said
        assert "Traceback" not in said
    assert not (tmp_path / "runs").exists()


def test_yaml_makes_the_round_trip_and_overrides_still_count(tmp_path: Path) -> None:
    done = nemo("align", "--factory", "tiny_dpo", "loss.beta=0.05", "--to-yaml", "recipe.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load((tmp_path / "recipe.yaml").read_text())["loss"]["beta"] == 0.05
    done = nemo("align", "--yaml", "recipe.yaml", "trainer.max_steps=7", "--dryrun", "-y", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "max_steps=7" in done.stdout
    assert "beta=0.05" in done.stdout
    assert not (tmp_path / "runs").exists()


def test_loss_reference_and_adapters_are_chosen_by_name(tmp_path: Path) -> None:
    chosen = ["loss.beta=0.2", "loss=ipo", "reference=moving", "reference.every=5", "peft=lora", "peft.dim=8"]
    done = nemo("align", "--factory", "tiny_dpo", *chosen, "--to-yaml", "recipe.yaml", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    written = yaml.safe_load((tmp_path / "recipe.yaml").read_text())
    assert written["loss"] == {"_target_": "aligner.losses.ipo", "_partial_": True, "beta": 0.2}
    assert written["reference"] == {"_target_": "aligner.reference.Moving", "every": 5}
    assert written["peft"]["dim"] == 8


def test_an_error_in_our_own_module_is_loud(tmp_path: Path) -> None:
    code = "import sys; sys.modules['aligner.recipes'] = None; sys.argv = ['nemo', 'llm', 'align'];import aligner.cli"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert "Traceback" in done.stderr and "could not register its commands" in done.stderr
