"""What a run's log holds beside what is shown: progress that a terminal has as a bar, and Python's warnings."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TextIO

log = logging.getLogger(__name__)

SHOWN = {"shown": True}  # `extra` of a record that is on the screen in another form


class NotShown(logging.Filter):
    """Keeps off the screen what is there already; see `conf/hydra/job_logging/run.yaml`."""

    def filter(self, record: logging.LogRecord) -> bool:
        """False for records of `SHOWN`."""
        return not getattr(record, "shown", False)


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
