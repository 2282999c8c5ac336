"""Errors a user can act on, and how entry points show them."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class UserError(Exception):
    """A mistake in a command, a configuration or an input file.

    The message names the key, the value found, what was expected and the command or setting that fixes it.
    Entry points print it without a traceback and exit with status 2.
    """


def first_line(error: BaseException) -> str:
    """The start of another library's message, for quoting in one of ours."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def innermost(error: BaseException) -> BaseException:
    """What `error` was raised from, and that from, to the first: Hydra wraps an error at each level of the tree."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def report_user_errors(entry_point: Callable[P, R]) -> Callable[P, R]:
    """Decorate an entry point so that a `UserError` ends it with one line on stderr and status 2.

    Goes under `@hydra.main`: Hydra would otherwise print the traceback of its own machinery.
    """

    @functools.wraps(entry_point)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return entry_point(*args, **kwargs)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)

    return run
