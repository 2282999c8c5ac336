"""The progress bar of everything outside training: done of total, images a second, time left."""

from __future__ import annotations

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text


class ImagesPerSecond(ProgressColumn):
    """Throughput of late. Nothing beside a task that was added with `counts_images=False`."""

    def render(self, task: Task) -> Text:
        """Images per second, "-" before the first are done."""
        if not task.fields.get("counts_images", True):
            return Text()
        speed = task.finished_speed or task.speed
        return Text(images_per_second(speed) if speed else "- images/s")


def images_per_second(speed: float) -> str:
    """A throughput in words, to two digits at least."""
    return f"{speed:.0f} images/s" if speed >= 10 else f"{speed:.2g} images/s"


def image_progress(console: Console | None = None, *, disable: bool = False) -> Progress:
    """A bar that counts images; `disable` shows nothing, as on all ranks but the first."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), ImagesPerSecond())
    return Progress(*columns, TimeRemainingColumn(), console=console, disable=disable)
