"""What is hidden and refused as a secret, and what looks like one and is none."""

import pickle
import time

import pytest

from aligner.common.errors import ConfigError
from aligner.common.secrets_filter import hidden, hidden_in, hidden_words, is_secret

S = "Zq7" + "f3Kd9LmX2" * 4
"""What must not be seen; put together, so that no scanner takes this file for a leak."""
A = "AKIA" + "IOSFODNN7EXAMPLE"
JWT = "eyJ" + "hbGciOiJIUzI1NiJ9.eyJ" + f"zdWIiOiIxMjM0In0.{S}"
PEM = "-----BEGIN RSA PRIVATE " + f"KEY-----\nMIIE{S}\n{S}\n-----END RSA PRIVATE " + "KEY-----"

TEXTS = [
    f"https://user:{S}@hub",
    f"https://{S}@github.com/org/repo.git",
    f"https://{S}:x-oauth-basic@github.com/org/repo",
    f"postgres://me:{S}@db.host:5432/runs",
    f"redis://:{S}@cache:6379/0",
    f"http://user:{S}/with@slash@host/v1",
    f"https://user:p@{S}@host/v1",
    f"HTTPS://User:{S}@Host/v1",
    f"cannot reach http://user:{S}@host:8000/v1 (Connection refused)",
    f"git+https://oauth2:{S}@gitlab.com/a/b@v1",
    f"remote = 'https://u:{S}@h/x', retried",
    f"https://host/v1?token={S}",
    f"https://host/v1?a=b&api_key={S}&c=d",
    f"https://host/v1?access_token={S}#top",
    f"https://bucket.s3.amazonaws.com/x?X-Amz-Signature={S}&X-Amz-Date=1",
    f"https://account.blob.core.windows.net/x?sv=2022&sig={S}",
    f"https://host/v1?key={S}",
    f"hf_{S}",
    f"token hf_{S}, expired",
    f"sk-{S}",
    f"sk-proj-{S}",
    f"sk-ant-api03-{S}",
    f"nvapi-{S}",
    f"ghp_{S}",
    f"gho_{S}",
    f"github_pat_11ABC_{S}",
    f"glpat-{S}",
    f"{A} is not valid",
    f"xoxb-123456789012-{S}",
    f"https://hooks.slack.com/services/T000/B000/{S}",
    f"AIza{S[:35]}",
    f"jwt {JWT}",
    PEM,
    f"Authorization: Bearer {S}",
    f"Authorization: Basic {S}=",
    "{'Authorization': 'Bearer " + S + "', 'Accept': '*/*'}",
    f"curl -H 'authorization: token {S}'",
    f"bearer {S}",
    f"Cookie: session={S}; theme=dark",
    f"NEMO_PW={S}",
    f"export WANDB_API_KEY={S}",
    f"password: {S}",
    f"engine.api_key={S}",
    '{"password": "' + S + '"}',
    f'+    client = OpenAI(api_key="{S}")',
    f"-API_KEY = '{S}'",
    'os.environ["HF_TOKEN"] = "' + S + '"',
    f"\\nghp_{S}\\n",
    f"AccountName=x;AccountKey={S}==;EndpointSuffix=y",
    f"dsn = 'https://{S}@sentry.io/1'",
]


@pytest.mark.parametrize("text", TEXTS, ids=range(len(TEXTS)))
def test_a_secret_in_a_text_is_hidden(text: str) -> None:
    shown = hidden(text)
    assert S not in shown and S[:35] not in shown and A not in shown and JWT not in shown
    assert "[hidden: " in shown and hidden(shown) == shown, "twice is as once"


def test_what_stands_beside_a_secret_stays() -> None:
    assert hidden(f"https://user:{S}@hub/v1 is down") == "https://[hidden: credentials]@hub/v1 is down"
    assert hidden(f"https://h/v1?a=b&api_key={S}&c=d") == "https://h/v1?a=b&api_key=[hidden: api_key]&c=d"
    assert hidden(f"a\n{PEM}\nb") == "a\n[hidden: private key]\nb"
    assert hidden(f"x=1 NEMO_PW={S} y=2") == "x=1 NEMO_PW=[hidden: NEMO_PW] y=2"


INNOCENT = [
    "/data/my runs/train.jsonl",
    "commit 4190b966ed2f1c0b5a8f3f6e3f2b1a0c9d8e7f60",
    "sha256:9f86d081884c7d659a2feaa0c55ad015a3bf4f1b2b0b822cd15d6c15b0f00a08",
    "meta-llama/Llama-3.1-8B-Instruct",
    "nvcr.io/nvidia/nemo:25.04",
    "docker://nvcr.io#nvidia/nemo:25.04",
    "docker://user@registry#nvidia/nemo:25.04",
    "hf://org/model@main",
    "https://huggingface.co/org/model/resolve/main/config.json",
    "http://localhost:8000/v1",
    "http://localhost:8000/models/a@v1",
    "https://git@github.com/org/repo.git",
    "ssh://git@github.com/org/repo.git",
    "git@github.com:org/repo.git",
    "s3://bucket/prefix/file.jsonl",
    "write to me@example.com",
    "https://host/v1?max_tokens=1000&page=2&keyword=cats",
    "tokens_per_second=4021.5",
    "tokens_per_second: 4021.5",
    "tokenizer=/models/tokenizer.json",
    "tokenizer: aligner/demo/tiny-tokenizer",
    "max_tokens=1024",
    "eos_token: <|reserved_special_token_128|>",
    "'pad_token': '<|finetune_right_pad_id|>'",
    "token_ids=[1, 2, 3]",
    "prompt_key=prompt, label_key=chosen_response",
    "sort_key: prompt_length",
    "key = 'prompt'",
    "the key 'prompt' is missing; found the keys 'a', 'b'",
    "KeyError: 'input_ids'",
    "engine.api_key_env=OPENAI_API_KEY",
    "engine.api_key_env: the environment has no OPENAI_API_KEY; export it where the job starts",
    "api_key=os.environ[self.api_key_env] if self.api_key_env else None",
    "password=read_password(file), token=tokenizer.decode(ids)",
    "def login(password: str, token: str) -> None:",
    "export HF_TOKEN=$HF_TOKEN_FROM_VAULT",
    "export WANDB_API_KEY=$(cat ~/.wandb)",
    "no API key; run `wandb login`, or set WANDB_API_KEY",
    "author=Ann Author, keyboard=qwerty, monkey=7, passes=3",
    "passed=12 failed=0 bypass=True",
    "a bearer of good news",
    "PYTHONPATH=/nemo_run/code:/home/me/lib",
    "PWD=/home/me OLDPWD=/home",
    "NCCL_IB_HCA=mlx5_0:1 CUDA_VISIBLE_DEVICES=0,1",
    "sk-learn-contrib-tools and task-specific-fine-tuning-20250101",
    "hf_model_of_a_long_name_with_words_2",
    "2026-11-30T19:35:12+0000 step 4000 of 100000 loss 0.6931471805599453",
    "--label --kill-on-bad-exit=0 --container-mounts /data:/data",
    "-----BEGIN CERTIFICATE-----\nMIIE\n-----END CERTIFICATE-----",
    "-----BEGIN PUBLIC KEY-----\nMIIE\n-----END PUBLIC KEY-----",
]


@pytest.mark.parametrize("text", INNOCENT, ids=range(len(INNOCENT)))
def test_what_only_looks_like_a_secret_stays(text: str) -> None:
    assert hidden(text) == text
    if "(" not in text:  # code is no command line
        assert hidden_words(text.split()) == text.split()
    assert hidden_in({"data": [text, (text, 1)]}) == {"data": [text, (text, 1)]}


SECRET_NAMES = """
    WANDB_API_KEY HF_TOKEN HUGGING_FACE_HUB_TOKEN OPENAI_API_KEY AWS_SECRET_ACCESS_KEY AWS_ACCESS_KEY_ID NEMO_PW
    DB_PW DB_PWD MYSQL_PWD PGPASSWORD GITHUB_PAT HF_COOKIE SESSION_COOKIE SLURM_JWT DATABASE_URL SENTRY_DSN
    AZURE_STORAGE_CONNECTION_STRING REGISTRY_AUTH SSH_PASSPHRASE MY_CREDENTIALS ngcApiKey SMTP_PASS
"""
OTHER_NAMES = """
    PATH PWD OLDPWD KEYBOARD MONKEY TOKENIZER TOKENIZERS_PARALLELISM AUTHOR GIT_AUTHOR_NAME PASSES COMPASS PATTERN
    MAX_TOKENS TOKENS_PER_STEP EOS_TOKEN HF_TOKEN_PATH GOOGLE_CREDENTIALS_FILE SSH_AUTH_SOCK XAUTHORITY KEYCLOAK_HOST
    XDG_SESSION_ID DESKTOP_SESSION HF_HOME WANDB_PROJECT NCCL_DEBUG CUDA_VISIBLE_DEVICES SLURM_JOB_ID SSH_PUBLIC_KEY
"""


def test_names() -> None:
    assert [name for name in SECRET_NAMES.split() if not is_secret(name, S)] == []
    assert [name for name in OTHER_NAMES.split() if is_secret(name, S)] == []
    assert not is_secret("HF_HUB_DISABLE_IMPLICIT_TOKEN", "1") and not is_secret("OPENAI_API_KEY", "EMPTY")


def test_values_of_secret_variables_are_found_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NEMO_PW", "swordfish")
    monkeypatch.setenv("HF_ENDPOINT", "https://user:open%2Fsesame@hub")
    monkeypatch.setenv("MY_TOKEN", S)
    monkeypatch.setenv("SHORT_PW", "abc")
    monkeypatch.setenv("SWITCH_TOKEN", "disabled")
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", "/home/me/key.json")
    assert hidden("user swordfish was refused") == "user [hidden: NEMO_PW] was refused"
    assert hidden("user open/sesame, open%2Fsesame") == "user [hidden: HF_ENDPOINT], [hidden: HF_ENDPOINT]"
    assert hidden(f"x{S}x") == "x[hidden: MY_TOKEN]x"
    for text in ("swordfishes", "abc", "it is disabled", "/home/me/key.json"):
        assert hidden(text) == text


def test_mappings_and_command_lines() -> None:
    inner: dict[str, object] = {"password": S, "key": "prompt"}
    given: dict[str, object] = {"api_key": "swordfish", "eos_token": "</s>", "steps": 4, "inner": [inner], "n": None}
    shown = hidden_in(given)
    inner["password"] = "[hidden: password]"
    assert shown == given | {"api_key": "[hidden: api_key]"}
    assert hidden_in(shown) == shown
    words = ["nemo", "llm", "engine.api_key=swordfish", "--password", "swordfish", "--hub-token", S, "--name", "one"]
    assert hidden_words(words) == [
        "nemo", "llm", "engine.api_key=[hidden: api_key]", "--password", "[hidden: password]", "--hub-token",
        "[hidden: hub-token]", "--name", "one",
    ]  # fmt: skip


def test_errors_say_no_secret(capsys: pytest.CaptureFixture[str]) -> None:
    error = ConfigError(f"engine.base_url: http://user:{S}@host/v1 cannot be reached")
    assert str(error) == "engine.base_url: http://[hidden: credentials]@host/v1 cannot be reached"
    assert S not in f"{error} {error!r}" and S not in str(pickle.loads(pickle.dumps(error)))


@pytest.mark.parametrize(
    "line", ["x" * 1_000_000, "eyJ" * 300_000, "://" * 300_000, "a=" * 300_000, "sk-" * 300_000, "a:b@" * 250_000,
             "-----BEGIN PRIVATE KEY-----" * 20_000, "bearer " * 100_000, "cookie:" * 100_000, "?a" * 300_000],
    ids=lambda line: line[:6],
)  # fmt: skip
def test_a_line_of_a_million_letters_takes_no_time(line: str) -> None:
    began = time.monotonic()
    hidden(line)
    assert time.monotonic() - began < 5
