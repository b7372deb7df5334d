"""What a person gives reaches sbatch, srun and the job letter by letter, or is refused; no shell runs it."""

import importlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nemo_run as run
import pytest
from cluster import slurm

from aligner import executors
from aligner.common.errors import ConfigError
from aligner.executors import values
from aligner.judge.verifiers import exact_match

TEXTS = [
    "plain", "with space", " around ", "it's", 'say "so"', "$(touch HACKED)", "`touch HACKED`", "a; touch HACKED",
    "a && touch HACKED", "a | b > c", "größer 模型", "-x", "--help", "$HOME ${SLURM_JOB_ID}", "$$", "$head_node_ip_var",
    "\\", "back\\slash\\n", "#no comment", "a # b", "*?[a]", "{a..c}", "!history", "~", "a=b", "%j",
    "x/nemo_run/y", "it's /nemo_run's \"$x\"", "{{ jinja }}", "{% raw %}",
]  # fmt: skip
PROGRAM = f"""#!{sys.executable}
import json, os, sys
with open(os.environ["RECORD"], "a") as file:
    file.write(json.dumps([sys.argv[1:], dict(os.environ)]) + "\\n")
"""


@pytest.fixture(autouse=True)
def no_input(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """NeMo-Run's commands look at standard input, which pytest forbids."""
    with open(os.devnull) as nothing:
        monkeypatch.setattr("sys.stdin", nothing)
        yield


@pytest.fixture
def record(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Programs of Slurm that write down what they are called with."""
    for name in ("srun", "scontrol"):
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(PROGRAM)
        program.chmod(0o755)
    monkeypatch.setenv("RECORD", str(tmp_path / "record"))
    return tmp_path / "record"


def script_of(**settings: Any) -> str:
    launch = importlib.import_module("aligner.executors.launch")
    given: dict[str, Any] = {"account": "acct"} | settings
    executor = executors.slurm(**given)
    with launch._experiment("quoting", {"st": run.Partial(exact_match, row={}, response="x")}, executor) as made:
        made.dryrun(log=False, delete_exp_dir=False)
        (script,) = (path.read_text() for path in Path(made._exp_dir).glob("*_sbatch.sh"))
        shutil.rmtree(made._exp_dir)
    return script


def run_script(text: str, folder: Path, record: Path) -> tuple[list[str], dict[str, str]]:
    """Return arguments and environment of the job's srun."""
    script = folder / "script.sh"
    script.write_text(text)
    subprocess.run(["bash", "-n", script], check=True)
    environment = os.environ | {"PATH": f"{folder / 'bin'}:{os.environ['PATH']}", "SLURM_JOB_ID": "7"}
    # The script puts this Python's folder first, which has no srun.
    subprocess.run(["bash", script], cwd=folder, env=environment, capture_output=True, timeout=60)
    assert not list(folder.rglob("HACKED"))
    return next((argv, env) for argv, env in map(json.loads, record.read_text().splitlines()) if "--output" in argv)


def flags(text: str) -> dict[str, str]:
    """The flags of the script, read as Slurm reads them: with a shell's quotes, one line each."""
    words = [shlex.split(line, comments=True) for line in re.findall(r"^#SBATCH (.*)$", text, flags=re.MULTILINE)]
    assert all(len(line) == 1 for line in words)
    return {name: value for (word,) in words for name, _, value in [word.partition("=")]}


@pytest.mark.parametrize("text", TEXTS)
def test_every_text_arrives(text: str, tmp_path: Path, record: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / f"in {text.replace('/', '_').replace(',', '_')}"
    folder.mkdir()
    monkeypatch.chdir(folder)
    # Slurm has no backslashes in these, and NeMo-Run replaces its folder in them.
    plain = text.replace("/nemo_run", "").replace("\\", "")
    given = {"partition": plain, "exclude": plain, "mem": plain, "account": plain}
    script = script_of(env_vars={"MINE": text}, **given)
    found = flags(script)
    assert {name: found[f"--{name}"] for name in given} == given
    argv, env = run_script(script, tmp_path, record)
    assert env["MINE"] == text
    assert argv[argv.index("--kill-on-bad-exit=0") + 1 :][:2] == [f"--chdir={folder}", "python"]
    assert re.fullmatch(r"/[\w./-]*/log-[\w.-]*st_%j_0\.out", argv[argv.index("--output") + 1])


def test_slurm_reads_every_flag(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real sbatch, whose quotes are nearly those of a shell."""
    folder = tmp_path / "it's here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    with slurm(tmp_path / "cluster") as environment:
        everything = os.environ | environment

        def output(*words: str) -> str:
            return subprocess.run(words, env=everything, capture_output=True, text=True, check=True).stdout

        for text in TEXTS:
            script = folder / "script.sh"
            more = {"hold": True, "comment": text, "job_name": "named"}
            script.write_text(script_of(container_image="i", partition="gpu", sbatch=more))
            job = output("sbatch", "--parsable", str(script)).strip()
            assert output("squeue", "-h", "-j", job, "-o", "%j %P %k") == f"named gpu {text}\n"


@pytest.mark.parametrize("text", TEXTS)
def test_every_image_and_mount_arrives(
    text: str, tmp_path: Path, record: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    mounts = [f"/data/{text}:/in/{text}:ro", "/plain:/plain"]
    script = script_of(container_image=text, container_mounts=mounts, env_vars={"MINE": text})
    argv, env = run_script(script, tmp_path, record)
    assert argv[argv.index("--container-image") + 1] == text and env["MINE"] == text
    arrived = argv[argv.index("--container-mounts") + 1].split(",")
    assert arrived[:-1] == [*mounts, f"{tmp_path}:{tmp_path}"] and arrived[-1].endswith("/st:/nemo_run")
    assert argv[argv.index("--container-env") + 1] == "MINE"


def test_a_mount_of_the_jobs_own_folder_is_nemo_runs(
    tmp_path: Path, record: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    script = script_of(container_image="i", container_mounts=["/$nemo_run/my logs:/logs"])
    argv, _ = run_script(script, tmp_path, record)
    first = argv[argv.index("--container-mounts") + 1].split(",")[0]
    assert re.fullmatch(r"/.*/st/my logs:/logs", first)


@pytest.mark.parametrize("text", TEXTS)
def test_quoted_is_read_back(text: str) -> None:
    assert values.unquoted(values.quoted(text)) == text and shlex.split(values.quoted(text)) == [text]


@pytest.mark.parametrize("character", ["\n", "\r", "\t", "\0", "\x1b", "\x85", "\u2028"])
@pytest.mark.parametrize(
    ("given", "field"),
    [
        ({"account": "aXb"}, "account"), ({"partition": "aXb"}, "partition"), ({"exclude": "aXb"}, "exclude"),
        ({"mem": "aXb"}, "mem"), ({"container_image": "aXb"}, "container_image"),
        ({"sbatch": {"qos": "aXb"}}, "sbatch.qos"),
        ({"container_image": "i", "container_mounts": ["/aXb:/b"]}, "container_mounts"),
        ({"ssh": "me@hostX", "job_dir": "/j"}, "ssh"), ({"ssh": "me@host", "job_dir": "/jX"}, "job_dir"),
    ],
)  # fmt: skip
def test_line_breaks_are_refused(given: dict[str, Any], field: str, character: str) -> None:
    changed = json.loads(json.dumps(given).replace("X", json.dumps(character)[1:-1]))
    with pytest.raises(ConfigError, match=rf"^run\.executor\.{field}: '.*' has the character '.*' in it") as refused:
        executors.slurm(**({"account": "a"} | changed))
    assert len(str(refused.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"container_mounts": ["/a,b:/c"], "container_image": "i"}, r"run.executor.container_mounts: .*has a comma"),
        ({"partition": "a\\b"}, r"run.executor.partition: 'a\\\\b' has a backslash"),
        ({"sbatch": {"qos=x\n#": "y"}}, r"run.executor.sbatch: 'qos=x\\n#' is no flag of sbatch"),
        ({"env_vars": {"A;B": "x"}}, r"run.executor.env_vars: 'A;B' is no name of a variable"),
        ({"ssh": "me@host;x", "job_dir": "/j"}, r"run.executor.ssh: 'me@host;x'; write user@host"),
        ({"ssh": "-oProxyCommand=x@host", "job_dir": "/j"}, r"run.executor.ssh: .*write user@host"),
        ({"ssh": "me@host", "job_dir": "/my jobs"}, r"run.executor.job_dir: '/my jobs'; NeMo-Run writes it into"),
        ({"ssh": "me@host", "job_dir": "/j$(x)"}, r"run.executor.job_dir: .*NeMo-Run writes it into"),
        ({"env_vars": {"HTTPS_PROXY": "http://u:p4ssw0rd@p"}}, r"HTTPS_PROXY looks like a secret"),
        ({"env_vars": {"NOTE": "ghp_" + "a1B2" * 9}}, r"NOTE looks like a secret"),
        ({"env_vars": {"NEMO_PW": "p4ssw0rd"}}, r"NEMO_PW looks like a secret"),
        ({"env_vars": {"NOTE": "of the sw0rdfish"}}, r"NOTE looks like a secret"),
        ({"container_image": "docker://u:p4ssw0rd@r#i"}, r"container_image: has what looks like a secret \(credent"),
        (
            {"setup_lines": ["export HF_TOKEN=p4ssw0rd"]},
            r"setup_lines, container_mounts: has what looks like a secret \(HF_TOKEN\)",
        ),
        ({"sbatch": {"comment": "sw0rdfish"}}, r"sbatch.comment: has what looks like a secret \(OTHER_PW\)"),
    ],
)
def test_what_nothing_can_quote_and_secrets_are_refused(
    given: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OTHER_PW", "sw0rdfish")
    with pytest.raises(ConfigError, match=message) as refused:
        executors.slurm(account="a", **given)
    assert "p4ssw0rd" not in str(refused.value) and "sw0rdfish" not in str(refused.value)


def test_secrets_of_the_shell_do_not_reach_a_jobs_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    secret = "Wd4Rk8" + "SEKRET"
    for name, value in {"NEMO_PW": secret, "HF_ENDPOINT": f"https://user:{secret}@hub", "HF_COOKIE": secret}.items():
        monkeypatch.setenv(name, value)
    launch = importlib.import_module("aligner.executors.launch")
    for executor in (executors.slurm(account="a"), executors.local(ntasks_per_node=2)):
        with launch._experiment("kept", {"st": run.Partial(exact_match, row={}, response="x")}, executor) as made:
            made.dryrun(log=False, delete_exp_dir=False)
            files = [path for path in Path(made._exp_dir).rglob("*") if path.is_file()]
            assert files and not [path for path in files if secret.encode() in path.read_bytes()]
            shutil.rmtree(made._exp_dir)
    for make in (executors.local, executors.slurm):
        needed: dict[str, Any] = {"account": "a"} if make is executors.slurm else {}
        for name in ("DB_PW", "GITHUB_PAT", "SESSION_COOKIE", "DATABASE_URL"):
            with pytest.raises(ConfigError, match=f"{name} looks like a secret"):
                make(env_vars={name: "x"}, **needed)


@pytest.mark.parametrize("home", ["/my home", "/a;b", "/a$b", "/it's", "-x", "/a\nb"])
def test_a_home_of_nemo_run_that_needs_quotes_is_refused(home: str, monkeypatch: pytest.MonkeyPatch) -> None:
    checks = importlib.import_module("aligner.executors.checks")
    monkeypatch.setattr(checks, "get_nemorun_home", lambda: home)
    with pytest.raises(ConfigError, match=r"^NEMORUN_HOME: .*without quotes"):
        checks.check_executor(executors.local(), detach=False)
