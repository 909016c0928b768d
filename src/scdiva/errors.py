"""Every public error of scdiva, in one file.

An error reads as help. It says what was found, what was expected and how to fix it, in one line; the command line
prints that line and exits with code 2, and nothing is written.
"""

from __future__ import annotations

from functools import partial
from typing import Any


class ScdivaError(Exception):
    """Base of all errors that scdiva raises on purpose.

    Parameters
    ----------
    found
        What is there, with the offending name, number or path.
    expected
        What should be there instead.
    fix
        What the user can do about it.
    """

    def __init__(self, found: str, *, expected: str, fix: str) -> None:
        self.found = found
        self.expected = expected
        self.fix = fix
        super().__init__(found, expected, fix)

    def __str__(self) -> str:
        return f"{self.found} (expected: {self.expected}; fix: {self.fix})"

    def __reduce__(self) -> tuple[Any, ...]:
        # the default would call the class with positional arguments, and an error must survive the way out of a worker
        return partial(type(self), expected=self.expected, fix=self.fix), (self.found,)


class SourceError(ScdivaError):
    """A file, folder or AnnData cannot be used as a source of cells."""


class ScaleError(ScdivaError):
    """The expression matrix is not raw counts and cannot be turned back into raw counts exactly."""


class GeneError(ScdivaError):
    """Genes are unknown, of another species, or cover too little of the data."""


class KeyNotFoundError(ScdivaError):
    """A layer, an ``.obs`` column or another named slot does not exist."""


class OutputError(ScdivaError):
    """A result cannot be written where it was asked for."""


class ConfigError(ScdivaError):
    """A run configuration holds an unknown key or an impossible value."""


class BundleError(ScdivaError):
    """A model bundle is missing, incomplete, damaged or does not fit."""


class UntrainedHeadError(ScdivaError):
    """A part of a model was asked for that its training never touched."""


class UnsupportedError(ScdivaError):
    """A model was asked for something that models of its kind do not do."""


class TrainingError(ScdivaError):
    """Training cannot start or go on."""


class NonFiniteLossError(TrainingError):
    """The loss became NaN or infinite; names the step, the cells and the last good checkpoint."""
