"""Exceptions that this package raises deliberately.

    AlignError
    ├── UserError (ValueError)              an argument, data file or checkpoint is invalid
    │   ├── RowError                        a row of a data file: the message begins with file:line
    │   ├── ConfigError                     an argument: the message begins with its name
    │   └── CheckpointError                 a model folder, or no disk space for it
    │       └── UntrustedError              it names code that would run while it is read
    └── SanityCheckError (RuntimeError)     the run contradicts theory; continuing would waste hours

A message gives the place, the value found, the value expected and the remedy, in this order. Every class can be
pickled, because launchers pass a rank's exception between processes.
"""

from __future__ import annotations

from aligner.common.secrets_filter import hidden

REQUEUE = 75
"""Exit code of a job that has saved a checkpoint and must be requeued: EX_TEMPFAIL of sysexits.h."""


class AlignError(Exception):
    """Base class of all deliberate exceptions; their text has no secrets, as a URL's password in an argument."""

    def __str__(self) -> str:
        return hidden(super().__str__())

    def __repr__(self) -> str:
        return hidden(super().__repr__())


class UserError(AlignError, ValueError):
    """Invalid argument, data file or checkpoint."""


class RowError(UserError):
    """Invalid row or data file; `fault` names the kind of mistake, for counts by kind."""

    def __init__(self, message: str, *, fault: str = "unreadable") -> None:
        super().__init__(message)
        self.fault = fault


class ConfigError(UserError):
    """Invalid argument of a recipe."""


class CheckpointError(UserError):
    """Folder without the expected model, or too little disk space to write one."""


class UntrustedError(CheckpointError):
    """File that names code to run which is not allowed (`aligner.common.trust`); it is not damaged."""


class SanityCheckError(AlignError, RuntimeError):
    """Violated invariant of a run, for example a DPO loss other than ln 2 at step 0."""
