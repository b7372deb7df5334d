"""Errors of a command on one line, without a parser's or Fiddle's own words."""

from __future__ import annotations

import contextlib
import signal
import sys
import traceback
from collections.abc import Iterator

import typer

from aligner.common.errors import AlignError
from aligner.common.secrets_filter import hidden

FIDDLE = "\n\nFiddle context:"
"""What Fiddle appends to the message of every error in a function that it calls."""


@contextlib.contextmanager
def on_one_line() -> Iterator[None]:
    """End the process with code 1 on an error in the block: a line for the user's, a traceback for ours."""
    try:
        yield
    except AlignError as error:
        _end(str(error).partition(FIDDLE)[0])
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        sys.exit(128 + signal.SIGINT)
    except typer.Abort:
        _end("not confirmed; nothing was started")
    except typer.Exit as wanted:
        sys.exit(wanted.exit_code)
    except Exception as error:
        print(hidden(traceback.format_exc()), end="", file=sys.stderr)
        _end(f"{type(error).__name__}: {error}".partition(FIDDLE)[0])


def _end(message: str) -> None:
    sys.stdout.flush()
    print(f"Error: {hidden(message)}", file=sys.stderr, flush=True)
    sys.exit(1)
