"""What a run's log holds beside what is shown: progress that a terminal has as a bar, warnings, why the run died."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TextIO

from lcm_lightning.errors import UserError

log = logging.getLogger(__name__)

SHOWN = {"shown": True}  # `extra` of a record that is on the screen in another form
RANKS = ("LOCAL_RANK", "NODE_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")  # by which Lightning knows a process too


class NotShown(logging.Filter):
    """Keeps off the screen what is there already; see `conf/hydra/job_logging/run.yaml`."""

    def filter(self, record: logging.LogRecord) -> bool:
        """False for records of `SHOWN`."""
        return not getattr(record, "shown", False)


def run_log(filename: str) -> logging.Handler:
    """What writes a run's log: the first of its processes, to which others would add the same lines or files beside."""
    return logging.FileHandler(filename) if is_first_process(os.environ) else logging.NullHandler()


def is_first_process(environment: Mapping[str, str]) -> bool:
    """Whether a process is its run's only one or the first, by what Lightning, torchrun or a cluster tells it.

    Asked before torch is imported, and so not of Lightning. `RANK` is of all processes, where it is there.
    """
    told = ("RANK",) if "RANK" in environment else RANKS
    return all(environment.get(name, "0") == "0" for name in told)


@contextmanager
def logged_warnings() -> Iterator[None]:
    """Python's warnings go to the log too, as one line each."""
    show = warnings.showwarning

    def show_and_log(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        show(message, category, filename, lineno, file, line)
        log.warning("%s: %s", category.__name__, " ".join(str(message).split()), extra=SHOWN)

    warnings.showwarning = show_and_log
    try:
        yield
    finally:
        warnings.showwarning = show


@contextmanager
def logged_errors() -> Iterator[None]:
    """What ends a run goes to its log too: a mistake as its message, anything unforeseen with its traceback."""
    try:
        yield
    except UserError as error:
        log.error("ended by an error: %s", error, extra=SHOWN)
        raise
    except KeyboardInterrupt:
        log.warning("interrupted", extra=SHOWN)
        raise
    except Exception:
        log.exception("ended by an error", extra=SHOWN)
        raise
