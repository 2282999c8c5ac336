"""From what is set on the page to panels that fill."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lcm_lightning.app.choices import Choices
from lcm_lightning.app.engine import Column, Drawable, Engine, Job, Picture, Settings, Superseded
from lcm_lightning.app.html import Panel
from lcm_lightning.errors import UserError, first_line

log = logging.getLogger(__name__)

LOOK = 0.3  # seconds between two looks at where a drawing stands
MOST_TYPED_STEPS = 2  # more are not drawn between two keys


@dataclass(frozen=True)
class Wish:
    """What is set on the page.

    Attributes:
        models: keys of `Choices`.
        settings: of students' pictures.
        teacher_steps, teacher_guidance: of their teachers'.
        weights: of the LoRAs of the first model, in order.
    """

    models: Sequence[str]
    settings: Settings
    teacher_steps: int
    teacher_guidance: float
    weights: Sequence[float] = ()

    def of(self, column: Column) -> Settings:
        """The settings of a column's picture."""
        if column.role == "student":
            return self.settings
        return replace(self.settings, steps=self.teacher_steps, guidance_scale=self.teacher_guidance)

    def while_typed(self) -> Wish:
        """What is drawn between two keys."""
        return replace(self, settings=replace(self.settings, steps=min(self.settings.steps, MOST_TYPED_STEPS)))


def explained(error: Exception) -> str:
    """An error in one sentence for the page; one that is no user's mistake is logged whole, with where it happened."""
    if isinstance(error, UserError):
        return str(error)
    log.error("the page failed", exc_info=error)
    if type(error).__name__ == "OutOfMemoryError":
        return "The device's memory is full; choose a smaller width and height, or start the app with kept_models=1."
    return f"That went wrong: {first_line(error)}; where the app was started it says more."


def followed(job: Job[Any]) -> Iterator[str]:
    """Where a job stands, again and again until it has ended."""
    while not job.done(within=LOOK):
        yield job.said


def draw(engine: Engine, choices: Choices, wish: Wish, *, teachers: bool = True) -> Iterator[list[Panel]]:
    """Draw every column of the wished models, the quick ones first; yields the panels as they fill.

    Where the models are more than the device keeps they are drawn from one after another, so that each is read once.

    Args:
        teachers: draw them too.

    Raises:
        Superseded: someone has wished for something newer.
        UserError: a model is gone or cannot be read.
    """
    ticket = engine.ticket()
    panels: list[Panel] = []
    together = len(wish.models) <= engine.kept_models
    for keys in [wish.models] if together else [[key] for key in wish.models]:
        models: list[Drawable] = []
        for key in keys:
            source = choices.source(key)
            job = engine.load(source, ticket)
            for said in followed(job):
                yield [*panels, Panel(source.name, waits=said)]
            models.append(job.result())
        work = [
            (model, column, Panel(panel_title(column, wish.of(column), model.source.name * (len(wish.models) > 1))))
            for model in models
            for column in model.columns
        ]
        panels += [panel for _, _, panel in work]
        weighted = models[0] if keys[0] == wish.models[0] else None
        for model, column, panel in sorted(work, key=lambda part: part[1].role != "student"):
            if column.role != "student" and not teachers:
                panel.waits = "Enter draws it"
                continue
            weights = dict(zip(model.lora_names, wish.weights, strict=False)) if model is weighted else {}
            yield from _draw_column(engine.draw(ticket, model.source, column, wish.of(column), weights), panel, panels)
    yield panels


def _draw_column(job: Job[Picture], panel: Panel, panels: list[Panel]) -> Iterator[list[Panel]]:
    """Follow the drawing of a panel's picture; where another of `panels` has the same one, the panel goes."""
    for said in followed(job):
        panel.waits = said
        yield panels
    fill(panel, job)
    images = [other.picture.image for other in panels if other is not panel and other.picture is not None]
    if panel.picture is not None and any(panel.picture.image is image for image in images):
        panels.remove(panel)  # models of one teacher
    yield panels


def fill(panel: Panel, job: Job[Any]) -> None:
    """Put what a job has drawn, or why it has not, into its panel."""
    try:
        panel.picture = job.result()
    except Superseded:
        raise
    except Exception as error:  # whatever it is, the other columns are drawn
        panel.problem = explained(error)


def panel_title(column: Column, settings: Settings, model: str) -> str:
    """Heading of a picture: what draws it, in how many steps."""
    title = f"{column.title}, {settings.steps} step{'s' * (settings.steps > 1)}"
    return f"{title}, {model}" if model and column.role == "student" else title
