"""Secrets in text: passwords in URLs, keys of known shapes, values under secret names, values of secret variables.

`hidden` and `hidden_in` replace them by `[hidden: WHAT]`. Applied twice, they change nothing the second time.
"""

from __future__ import annotations

import functools
import os
import re
import urllib.parse
from collections.abc import Iterable, Mapping
from pathlib import PurePath
from typing import Any

# ---- names ----------------------------------------------------------------------------------------------------------

# One word of a name is enough: NEMO_PW, but not PATH, MONKEY, AUTHOR or TOKENIZER.
CERTAIN = re.compile(
    r"(?:^|_)(?:PASSWORDS?|PASSWD|PASSPHRASE|PASSCODE|PW|PWD|SECRETS?|CREDENTIALS?|CREDS|COOKIES?|JWT|PAT|APIKEY|APITOKEN"
    r"|DSN|AUTHORIZATION)(?=_|$)"
)
POSSIBLE = re.compile(r"(?:^|_)(?:TOKEN|KEY|PASS|O?AUTH|SIGNATURE|BEARER)(?=_|$)")
ENDINGS = re.compile(r"(?<!^)(?:PASSWORD|PASSWD|PASSPHRASE|SECRET|APIKEY|COOKIE|(?<!OLD)PWD)$")
PAIRS = re.compile(
    r"(?:^|_)(?:(?:API|ACCESS|PRIVATE|SECRET|AUTH|ACCOUNT|ENCRYPTION|SIGNING|MASTER|SERVICE|CLIENT|SESSION|DEPLOY)_KEY"
    r"|(?:API|ACCESS|AUTH|REFRESH|SECRET|SESSION|BEARER|BOT|ID|HF|HUB|GITHUB|GITLAB|SECURITY|CSRF)_TOKEN"
    r"|(?:DATABASE|DB|REDIS|MONGO|MONGODB|POSTGRES|BROKER)_UR[LI]|CONN(?:ECTION)?_?STR(?:ING)?)$"
)
# What names where a secret is, or something about it, is none.
ABOUT = re.compile(
    r"(?:^(?:PWD|OLDPWD)|_(?:FILE|FILES|PATH|DIR|ENV|NAME|NAMES|SOCK|ID|IDS|TYPE|METHOD|MODE|HOST|PORT|LENGTH|SIZE|COUNT|"
    r"FORMAT|INDEX|STORE|PROVIDER))$|(?:^|_)PUBLIC_KEY|ACCESS_KEY_ID$"
)
# eos_token, pad_token: part of a text.
IN_TEXT = re.compile(
    r"(?:^|_)(?:EOS|BOS|PAD|UNK|SEP|CLS|MASK|EOT|EOD|IMAGE|VIDEO|AUDIO|SPECIAL|START|STOP|END|PER|NEXT|FIRST|LAST)_TOKEN$"
)
TRIVIAL = re.compile(
    r"true|false|yes|no|on|off|none|null|nil|auto|default|empty|enabled|disabled|dummy|not-needed|changeme|unset|optional"
    r"|placeholder|redacted|x{3,}|password|passwd|secret|token|postgres|anonymous|str|int|bytes|bool|string|[-+.\d]{0,3}"
    r"|\[hidden:.*",
    re.IGNORECASE | re.DOTALL,
)


@functools.lru_cache(maxsize=4096)
def _certainty(name: str) -> int:
    """Return 2 for the name of a secret, 1 for a name that many other things have too, 0 for others."""
    upper = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).upper()
    upper = re.sub(r"[^A-Z0-9]+", "_", upper).strip("_")
    if ABOUT.search(upper) and upper != "AWS_ACCESS_KEY_ID":
        return 0
    if CERTAIN.search(upper) or ENDINGS.search(upper) or PAIRS.search(upper):
        return 2
    return 1 if POSSIBLE.search(upper) and not IN_TEXT.search(upper) else 0


def is_secret_name(name: str) -> bool:
    """Return whether an environment variable of this name holds a secret."""
    return _certainty(name) > 0


def is_secret(name: str, value: str) -> bool:
    """Return whether an environment variable holds a secret by its name; `1` and `true` are none under any name."""
    return is_secret_name(name) and not _is_trivial(value)


def _is_trivial(value: str) -> bool:
    return TRIVIAL.fullmatch(value) is not None


def _fits(name: str, value: str) -> bool:
    """Return whether `value` beside `name`, in a text or a mapping, is a secret, and no word of a recipe or program."""
    certainty = _certainty(name)
    if not certainty or len(value) < 4 or _is_trivial(value) or value == name or value.startswith(("$", "/", "~")):
        return False
    if re.fullmatch(r"(?:self|cls|args|kwargs|os|config|settings|options)\..*", value):
        return False
    if certainty == 2:
        return True
    # `sort_key: prompt`, `token=token_ids`: keys and tokens of a recipe are words.
    wanted = r"\d" if re.search("key$", name, re.IGNORECASE) else r"[\dA-Z]"
    return re.fullmatch(r"[\w\-.=+/~%:]{8,}", value) is not None and re.search(wanted, value) is not None


# ---- shapes ---------------------------------------------------------------------------------------------------------

SHAPES: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (kind, re.compile(pattern, re.DOTALL))
    for kind, pattern in (
        (
            "private key",
            r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY(?: BLOCK)?-----.*?(?:-----END [A-Z0-9 ]{0,60}-----|\Z)",
        ),
        ("JWT", r"eyJ[\w-]{8,400}\.eyJ[\w-]{8,8192}(?:\.[\w-]*)?"),
        ("Hugging Face token", r"hf_[A-Za-z0-9]{30,}|api_org_[A-Za-z0-9]{30,}"),
        (
            "API key",
            r"(?:(?<![A-Za-z0-9])|(?<=\\n))sk-(?=[\w-]{0,80}\d)(?:[A-Za-z]{1,12}\d{0,3}-){0,3}[A-Za-z0-9_]{16,}[\w-]*",
        ),
        (
            "API key",
            r"(?:nvapi-|xai-|pplx-)[\w-]{20,}|(?:gsk_|r8_)[A-Za-z0-9]{30,}|[rs]k_(?:live|test)_\w{16,}",
        ),
        ("GitHub token", r"gh[pousr]_[A-Za-z0-9]{30,}|github_pat_\w{30,}"),
        ("GitLab token", r"gl(?:pat|dt|rt|cbt|ptt|soat|ft)-[\w.-]{20,}"),
        ("AWS key", r"(?<![A-Z0-9])(?:AKIA|ASIA)[A-Z0-9]{16}(?![A-Z0-9])"),
        ("Slack token", r"xox[abeoprs]-[A-Za-z0-9-]{10,}|xapp-[A-Za-z0-9-]{20,}"),
        ("Slack webhook", r"(?<=hooks\.slack\.com/)services/[\w/]{20,}"),
        ("Google key", r"AIza[\w-]{35}|ya29\.[\w-]{20,}"),
        ("package index token", r"npm_[A-Za-z0-9]{36}|pypi-AgE[\w-]{50,}"),
    )
)

# Each pattern begins at a mark, so that a line of a million letters takes no time.
PASSWORD_WITH_SLASH = re.compile(r"(?<=://)[^\s:/@\"'<>\[]{0,200}:(?!\d+[/?#])[^\s\"'@<>]{1,200}@")
USERINFO = re.compile(r"(?<=://)[^\s/?#\"'<>\\]{1,2000}@")
QUERY = re.compile(r"(?<=[?&;])([\w.\-%]{1,60})=([^&\s\"'#;<>\\]+)")
HEADER = re.compile(
    r"(?i)((?<![a-z])(?:proxy-)?authorization\\?[\"']?\s{0,4}[:=,]\s{0,4}\\?[\"']?(?:(?:bearer|basic|token|digest)\s+)?)"
    r"((?!(?:bearer|basic|token|digest)\s)[^\s\"',;\\\[]{4,})"
)
BEARER = re.compile(r"(?i)((?<![a-z])bearer\s+)((?=[^\s\"',]*\d)[\w.~+/=-]{8,}|[\w.~+/=-]{20,})")
COOKIE = re.compile(r"(?i)((?<![a-z])(?:set-)?cookie\\?[\"']?:\s{0,4}\\?[\"']?)([^\s=;:\"']{1,80}=[^\r\n\"']+)")
ASSIGNED = re.compile(
    r"(?<![\w.])(?<!\w-)(?P<name>[A-Za-z_][\w.\-]{1,80})(?P<mark>\\?[\"']?\]?(?:\s{0,4}:\s{0,4}|\s{0,4}=\s{0,4}))"
    r"(?:(?P<quote>\\?[\"'])(?P<quoted>[^\"'\r\n\\]{4,2000})(?=(?P=quote))|(?=(?P<bare>[^\s\"'`,;&(){}\[\]<>]{4,}))(?P=bare)(?![(\[{]))"
)


def _hide(what: str) -> str:
    return f"[hidden: {what}]"


def _hide_user(match: re.Match[str]) -> str:
    """Hide user and password of a URL; a user alone is a token with http, and a name with ssh, docker, s3..."""
    before = match.string[max(0, match.start() - 20) : match.start()]
    user, colon, password = match[0][:-1].partition(":")
    with_http = re.search(r"(?i)https?://$", before) is not None
    if (not colon or not password) and (not with_http or user in ("git", "")):
        return match[0]
    return f"{_hide('credentials')}@"


def _hide_query(match: re.Match[str]) -> str:
    name, value = match[1], match[2]
    secret = _certainty(name) or name.lower() in ("sig", "x-amz-credential", "x-amz-signature", "client_secret")
    return f"{name}={_hide(name)}" if secret and not _is_trivial(value) else match[0]


def _hide_assigned(match: re.Match[str]) -> str:
    value = match["quoted"] or match["bare"]
    spaced = match["bare"] is not None and re.search(r"\s=|=\s|:", match["mark"]) is not None
    name = match["name"].rpartition(".")[2].lstrip("-")
    # `password = read()` and `password: str` are code; without quotes only a value with a digit is none.
    if not _fits(name, value) or (spaced and not re.search(r"\d", value)):
        return match[0]
    return f"{match['name']}{match['mark']}{match['quote'] or ''}{_hide(name)}"


# ---- values of the environment --------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=1024)
def _values_of(name: str, value: str) -> tuple[str, ...]:
    """Return the texts that are secret in a variable of the environment: its value, or a password in its URL."""
    found: set[str] = set()
    for match in USERINFO.finditer(value) if "://" in value else ():
        password = match[0][:-1].partition(":")[2]
        found |= {form for form in (password, urllib.parse.unquote(password)) if not _is_trivial(form)}
    text = value.strip()
    if is_secret(name, text) and not text.startswith(("/", "~", "./")):
        found |= {text, urllib.parse.quote(text, safe="")}
    return tuple(form for form in found if len(form) >= 8)


def _secret_values() -> list[tuple[str, str]]:
    """Return secret texts of the environment with the names of their variables; the longest first."""
    found = {form: name for name, value in os.environ.items() for form in _values_of(name, value)}
    return sorted(found.items(), key=lambda item: -len(item[0]))


def _hide_values(text: str) -> str:
    for value, name in _secret_values():
        if value in text:
            # A short password may also be part of a word.
            edge = len(value) < 16
            before, after = (r"(?<![A-Za-z0-9])", r"(?![A-Za-z0-9])") if edge else ("", "")
            text = re.sub(f"{before}{re.escape(value)}{after}", lambda _, name=name: _hide(name), text)
    return text


# ---- what others call -----------------------------------------------------------------------------------------------


def hidden(text: str) -> str:
    """Replace the secrets of a text by `[hidden: WHAT]`; a text without any is returned as it is."""
    if "://" in text:
        text = USERINFO.sub(_hide_user, text)
        text = PASSWORD_WITH_SLASH.sub(_hide_user, text)
        text = QUERY.sub(_hide_query, text)
    text = _hide_values(text)
    for kind, shape in SHAPES:
        text = shape.sub(_hide(kind), text)
    for kind, shape in (("authorization", HEADER), ("bearer token", BEARER), ("cookie", COOKIE)):
        text = shape.sub(rf"\g<1>{_hide(kind)}", text)
    return ASSIGNED.sub(_hide_assigned, text)


def hidden_in(value: Any, *, name: str = "") -> Any:
    """Return a copy of a JSON-like value with its secrets hidden, also those that only their key tells.

    Args:
        value: mappings, lists and tuples of anything; what is neither text nor a path is returned as it is.
        name: the key that `value` stands under.
    """
    if isinstance(value, str):
        shown = hidden(value)
        return _hide(name) if shown == value and _fits(name, value) else shown
    if isinstance(value, PurePath):
        shown = hidden(str(value))
        return value if shown == str(value) else shown
    if isinstance(value, Mapping):
        return {
            hidden(key) if isinstance(key, str) else key: hidden_in(item, name=str(key)) for key, item in value.items()
        }
    if isinstance(value, list | tuple):
        shown = [hidden_in(item, name=name) for item in value]
        return tuple(shown) if isinstance(value, tuple) else shown
    return value


def hidden_words(words: Iterable[str]) -> list[str]:
    """Return a command line with its secrets hidden, also `--password WORD`."""
    shown, option = [], ""
    for word in words:
        name, equals, value = word.partition("=")
        if equals and _fits(name.rpartition(".")[2].lstrip("-"), value):
            shown.append(f"{name}={_hide(name.rpartition('.')[2].lstrip('-'))}")
        else:
            shown.append(hidden_in(word, name=option))
        option = word.lstrip("-") if word.startswith("--") and not equals else ""
    return shown
