"""What a judge is asked: templates with places for the question and the answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
from jinja2.sandbox import SandboxedEnvironment

from aligner.common.errors import ConfigError
from aligner.data.rows import TextOrMessages

JUDGES = Path(__file__).parent / "judge-templates"


def template(name: str, field: str, *, needed: set[str], known: set[str]) -> Callable[..., str]:
    """A template as a function of its placeholders.

    Args:
        name: one of the package's (`additive`, `direct`, `meta`), or a file.
        field: the argument it was given as, for messages.
        needed: placeholders that it must have.
        known: placeholders that it may have beside them.

    Raises:
        ConfigError: there is no such file, or its text is not a template with these placeholders.
    """
    path = JUDGES / f"{name}.jinja"
    if not path.is_file():
        path = Path(name).expanduser()
    if not path.is_file():
        ours = ", ".join(sorted(found.stem for found in JUDGES.glob("*.jinja")))
        raise ConfigError(f"{field}: {name!r} is neither a file nor one of {ours}")
    environment = SandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=False)
    text = path.read_text()
    try:
        used = jinja2.meta.find_undeclared_variables(environment.parse(text))
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"{field}: {path}:{error.lineno} is not a template ({error.message})") from None
    for missing in sorted(needed - used):
        raise ConfigError(f"{field}: {path} has no {{{{ {missing} }}}}, so the judge would not see it")
    for strange in sorted(used - needed - known):
        raise ConfigError(
            f"{field}: {path} has {{{{ {strange} }}}}, which nothing fills in; there are: "
            f"{', '.join(sorted(needed | known))}"
        )
    return environment.from_string(text).render


def as_text(prompt: TextOrMessages) -> str:
    """A prompt as a judge reads it: one user message as it is, a conversation with who says what."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in prompt)


def settings_of(name: str) -> Any:
    """What a file that was judged by a template remembers of it: its text."""
    path = JUDGES / f"{name}.jinja"
    return (path if path.is_file() else Path(name).expanduser()).read_text()
