"""Progress: a bar on a terminal, and a line each tenth of the way where output goes to a file."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    Task,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

PARTS = 10  # lines that tell of a whole
UNKNOWN = 1000  # images between two lines where the whole is not known


class ImagesPerSecond(ProgressColumn):
    """Throughput of late. Nothing beside a task that was added with `counts_images=False`."""

    def render(self, task: Task) -> Text:
        """Images per second, "-" before the first are done."""
        if not task.fields.get("counts_images", True):
            return Text()
        speed = task.finished_speed or task.speed
        return Text(images_per_second(speed) if speed else "- images/s")


class ProgressLines(Progress):
    """Tells of each task by `PARTS` lines, each with what is done, images a second and the time left."""

    def __init__(self, console: Console) -> None:
        super().__init__(console=console, disable=True)  # it would draw a bar
        self.told: dict[TaskID, int] = {}

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        """Go on by so many."""
        super().advance(task_id, advance)
        self.tell(task_id)

    def update(self, task_id: TaskID, **changes: Any) -> None:
        """Change what is done or to be done."""
        super().update(task_id, **changes)
        self.tell(task_id)

    def tell(self, task_id: TaskID) -> None:
        """Print a line if the task has come to another part of its whole."""
        task = self._tasks[task_id]
        part = tenth(task.completed, task.total) if task.total else int(task.completed) // UNKNOWN
        if part > self.told.get(task_id, 0):
            self.told[task_id] = part
            self.console.print(line(task), soft_wrap=True, markup=False, highlight=False)


def line(task: Task) -> str:
    """What is done of a task, its speed, and what is left."""
    whole = f"{task.completed:g}" + (f"/{task.total:g}" if task.total else "")
    parts = [f"{task.description}: {whole}"]
    seconds, done = task.elapsed, task.completed
    if seconds and task.fields.get("counts_images", True):
        parts.append(images_per_second(done / seconds))
    if seconds and task.total and done < task.total:
        parts.append(time_left(seconds, done, task.total))
    return ", ".join(parts)


def tenth(done: float, total: float) -> int:
    """How many tenths of the whole are done."""
    return int(PARTS * done / total)


def time_left(seconds: float, done: float, total: float) -> str:
    """What so much will take that is yet to do, in words, after `done` has taken `seconds`."""
    return f"{timedelta(seconds=round(seconds / done * (total - done)))} left"


def images_per_second(speed: float) -> str:
    """A throughput in words, to two digits at least."""
    return f"{speed:.0f} images/s" if speed >= 10 else f"{speed:.2g} images/s"


def draws_bars(console: Console) -> bool:
    """Whether what is printed is seen at once, and can be drawn over: on a terminal or in a notebook."""
    return console.is_interactive or console.is_jupyter


def image_progress(console: Console | None = None, *, disable: bool = False) -> Progress:
    """A bar that counts images, or lines where none can be drawn.

    Args:
        disable: show nothing, as on all ranks but the first.
    """
    console = console or Console()
    if not (disable or draws_bars(console)):
        return ProgressLines(console)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), ImagesPerSecond())
    return Progress(*columns, TimeRemainingColumn(), console=console, disable=disable)
