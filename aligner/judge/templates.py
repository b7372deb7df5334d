"""Jinja templates of judge prompts, with placeholders for prompt and response."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
from jinja2.sandbox import SandboxedEnvironment

from aligner.common.errors import ConfigError
from aligner.common.time_limit import TookTooLong, time_limit
from aligner.data.rows import TextOrMessages

TEMPLATE_S = 30.0
"""Seconds in which a template must have written a prompt."""
JUDGES = Path(__file__).parent / "judge-templates"


def template(name: str, field: str, *, needed: set[str], known: set[str]) -> Callable[..., str]:
    """Load a template as a function of its placeholders.

    Args:
        name: a built-in template (`additive`, `direct`, `meta`) or a file.
        field: name of the argument, for messages.
        needed: required placeholders.
        known: optional placeholders.

    Raises:
        ConfigError: the file does not exist, or is not a template with these placeholders.
    """
    path = JUDGES / f"{name}.jinja"
    if not path.is_file():
        path = Path(name).expanduser()
    if not path.is_file():
        builtin = ", ".join(sorted(file.stem for file in JUDGES.glob("*.jinja")))
        raise ConfigError(f"{field}: {name!r} is neither a file nor one of {builtin}")
    environment = SandboxedEnvironment(undefined=jinja2.StrictUndefined, keep_trailing_newline=False)
    text = path.read_text()
    try:
        used = jinja2.meta.find_undeclared_variables(environment.parse(text))
    except jinja2.TemplateSyntaxError as error:
        raise ConfigError(f"{field}: {path}:{error.lineno} is not a template ({error.message})") from None
    for missing in sorted(needed - used):
        raise ConfigError(f"{field}: {path} has no {{{{ {missing} }}}}, so the judge would not see it")
    for unknown in sorted(used - needed - known):
        raise ConfigError(
            f"{field}: {path} has {{{{ {unknown} }}}}, which nothing fills in; there are: "
            f"{', '.join(sorted(needed | known))}"
        )
    render = environment.from_string(text).render

    def rendered(**values: Any) -> str:
        try:
            with time_limit(TEMPLATE_S):
                return render(**values)
        except (TookTooLong, jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise ConfigError(f"{field}: {path} fails ({type(error).__name__}: {error})") from None

    return rendered


def as_text(prompt: TextOrMessages) -> str:
    """Return a prompt as text: a single message as it is, a conversation with the role before each message."""
    if isinstance(prompt, str):
        return prompt
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join(f"{message['role'].capitalize()}: {message['content']}" for message in prompt)


def settings_of(name: str) -> Any:
    """Return the text of a template, which is part of the settings of a judged file."""
    path = JUDGES / f"{name}.jinja"
    return (path if path.is_file() else Path(name).expanduser()).read_text()
