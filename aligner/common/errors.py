"""The exceptions that this package raises on purpose.

    AlignError
    ├── UserError (ValueError)      something the user gave is not as it must be
    │   ├── RowError                a row of a data file: the message begins with file:line
    │   ├── ConfigError             an argument: the message begins with its name
    │   └── CheckpointError         a folder that should hold a model
    └── GateError (RuntimeError)    the run contradicts what theory says; going on would waste hours

Messages say where, what was found, what was expected and what to do, in this order. Every class can be
pickled: the exception of a rank travels through a launcher.
"""

from __future__ import annotations

REQUEUE = 75
"""Exit code of a job that has saved and is to be run again: EX_TEMPFAIL of sysexits.h."""


class AlignError(Exception):
    """Root of everything raised on purpose."""


class UserError(AlignError, ValueError):
    """What the user gave is not as it must be."""


class RowError(UserError):
    """A row, or the whole, of a data file; `fault` is what kind of mistake it is, for who counts them."""

    def __init__(self, message: str, *, fault: str = "unreadable") -> None:
        super().__init__(message)
        self.fault = fault


class ConfigError(UserError):
    """An argument of a recipe."""


class CheckpointError(UserError):
    """A folder that should hold a model and does not, or no room to write one."""


class SanityCheckError(AlignError, RuntimeError):
    """The run contradicts what must hold, for example a loss other than ln 2 at step 0."""
