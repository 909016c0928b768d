"""What the baselines of annotation and integration share: other packages, kept quiet."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from scdiva.errors import UnsupportedError


def require(module: str, baseline: str, package: str) -> None:
    """Refuse to go on without a package of the extra ``eval``.

    Raises
    ------
    UnsupportedError
        It is not installed.
    """
    if find_spec(module) is None:
        raise UnsupportedError(
            f"the baseline {baseline!r} needs {package}, which is not installed",
            expected="the extra 'eval'",
            fix=f"pip install 'scdiva[eval]', or leave {baseline!r} out of the methods",
        )


@contextmanager
def other_package(module: str) -> Iterator[Any]:
    """Import a package and keep its warnings and progress messages off the terminal while it works.

    Root handlers that it installs on import (CellTypist does) are taken away again: they would print the messages of
    everybody else.
    """
    root, disabled = logging.getLogger(), logging.root.manager.disable
    handlers, level = list(root.handlers), root.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            package = import_module(module)
        finally:
            root.handlers[:] = handlers
            root.setLevel(level)
        logging.disable(logging.WARNING)
        try:
            yield package
        finally:
            logging.disable(disabled)
