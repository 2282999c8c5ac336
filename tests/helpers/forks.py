"""Tests in a process of their own."""

from __future__ import annotations

import functools
import multiprocessing
from collections.abc import Callable
from typing import ParamSpec

P = ParamSpec("P")


def in_a_fork(test: Callable[P, None]) -> Callable[P, None]:
    """Decorates a test that goes backward through what `torch.compile` made.

    That starts threads of autograd, which no fork takes along: trainings that are forked afterwards (`stoppable.py`)
    could not go backward at all.
    """

    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        process = multiprocessing.get_context("fork").Process(target=test, args=args, kwargs=kwargs)
        process.start()
        process.join()
        assert process.exitcode == 0  # what went wrong stands in the test's standard error

    return run
