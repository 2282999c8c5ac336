"""What a home of runs is told beside figures and settings, and what becomes of a run when it does not answer."""

from __future__ import annotations

import functools
import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

from lightning.pytorch.loggers import Logger
from PIL import Image

from lcm_lightning.errors import UserError, first_line
from lcm_lightning.tracking.data_records import DataRecord

log = logging.getLogger(__name__)

P = ParamSpec("P")
PAUSE = 600.0  # seconds: a server that is being restarted is back by then, and each attempt may take minutes


@dataclass(frozen=True)
class Sample:
    """A picture and how it was drawn.

    Attributes:
        model: which adapters and sampler drew it, in words.
        steps, guidance_scale: of the sampler.
        seconds: it took, its share of its batch.
    """

    prompt: str
    seed: int
    model: str
    steps: int
    guidance_scale: float
    seconds: float
    picture: Image.Image


class Tracker(ABC):
    """A logger that also keeps samples, what a run was made from, and what it has made.

    Nothing it does ends a run: see `tolerant`.
    """

    silent_until = 0.0  # time.monotonic()
    warned = False
    ended = False

    @abstractmethod
    def log_samples(self, grid: Image.Image, samples: Sequence[Sample], step: int) -> None:
        """Show a grid of pictures, and what is new in it one by one, after optimizer step `step`."""

    @abstractmethod
    def log_export(self, folder: Path, kind: str, aliases: Sequence[str]) -> None:
        """Keep what a run has exported ("lora" or "model") under names such as "latest" and "best"."""

    @abstractmethod
    def log_files(self, kind: str, files: Sequence[Path], aliases: Sequence[str] = ()) -> None:
        """Keep other files, such as of kind "evaluation"."""

    @abstractmethod
    def use_export(self, run: Path) -> None:
        """Say that this run builds on what the run in that folder exported, where a tracker has kept that."""

    @abstractmethod
    def use_data(self, data: DataRecord) -> None:
        """Say which data this run trains on."""

    @abstractmethod
    def log_data(self, data: DataRecord) -> None:
        """Say which data this run has made."""

    @abstractmethod
    def summarize(self, figures: Mapping[str, float]) -> None:
        """Show figures of the run as a whole."""

    @abstractmethod
    def alert(self, title: str, text: str, exit_code: int, *, goes_on: bool = False) -> None:
        """Tell people that the run ends early, with that status; `goes_on` where it is only interrupted."""

    def pause(self, error: Exception) -> None:
        """Leave the server alone for a while, and say so the first time."""
        self.silent_until = time.monotonic() + PAUSE
        if not self.warned:
            self.warned = True
            log.warning(
                "%s takes nothing more for now (%s); the run goes on, metrics.csv, samples/ and lora/ of its folder "
                "have all of it, and it is tried again every %d minutes",
                type(self).__name__,
                first_line(error),
                PAUSE // 60,
            )


@contextmanager
def begun(loggers: Sequence[Logger]) -> Iterator[None]:
    """Begin the runs of trackers, so that what they refuse is said before the work and not after it.

    Where the work fails, they end as failed.
    """
    for logger in loggers:
        if isinstance(logger, Tracker):
            getattr(logger, "experiment")  # noqa: B009  # whose getter begins it, and which Lightning declares nowhere
    try:
        yield
    except BaseException:
        for logger in loggers:
            logger.finalize("failed")
        raise


def tolerant(method: Callable[Concatenate[Any, P], None]) -> Callable[Concatenate[Any, P], None]:
    """Decorate a `Tracker`'s method: what fails in it is told once, and does not end a run of hours.

    A `UserError` passes: it is about the settings, and comes before the first step.
    """

    @functools.wraps(method)
    def attempt(self: Tracker, *args: P.args, **kwargs: P.kwargs) -> None:
        if self.ended or time.monotonic() < self.silent_until:
            return
        try:
            method(self, *args, **kwargs)
        except UserError:
            raise
        except Exception as error:  # of servers, disks and other libraries
            self.pause(error)

    return attempt
