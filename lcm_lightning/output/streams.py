"""Standard output that may end before the work does: `| head` has seen enough, or a disk is full."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from typing import Any, TextIO, cast

from lcm_lightning.errors import fail


class LastingStream:
    """A text stream that takes what is written for ever, and passes it on as long as that can be written.

    Attributes:
        error: why nothing is passed on any more; None while it is.
    """

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream
        self.error: OSError | None = None

    def write(self, text: str) -> int:
        """Write what can be written; returns the text's length, as a file does."""
        if self.error is None:
            try:
                self.stream.write(text)
            except OSError as error:
                self._end(error)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write each."""
        for text in lines:
            self.write(text)

    def flush(self) -> None:
        """Pass on what is buffered."""
        if self.error is None:
            try:
                self.stream.flush()
            except OSError as error:
                self._end(error)

    def close(self) -> None:
        """Pass on what is buffered: libraries close what they log to when they end, and the stream is not theirs."""
        self.flush()

    def __eq__(self, other: object) -> bool:
        """Whether it is the same stream: absl closes one that it was given and that is not `sys.stderr` any more."""
        return other is self or other is self.stream

    def __hash__(self) -> int:
        return hash(self.stream)

    def _end(self, error: OSError) -> None:
        self.error = error
        with suppress(OSError):  # a stream without a file, as a notebook's
            # What is buffered would be tried again, by Python at its end or by code that holds the file itself.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name: str) -> Any:
        """All else is the stream's."""
        return getattr(self.stream, name)


@contextmanager
def lasting_output() -> Iterator[None]:
    """Work goes on when its output is read no more; the program ends with status 2 if it was to be and could not.

    A reader that leaves, as `head` does, wants no more: that is no error. Decorates a program's main function.
    """
    output = LastingStream(sys.stdout)
    errors = LastingStream(sys.stderr)
    with redirect_stdout(cast(TextIO, output)), redirect_stderr(cast(TextIO, errors)):
        try:
            yield
        finally:
            output.flush()
        if output.error is not None and not isinstance(output.error, BrokenPipeError):
            fail(
                f"standard output: cannot be written ({output.error}); the rest was done; send it to a place with room"
            )
