"""Draw for people who look on: one picture at a time, the newest wish first, a teacher's picture once."""

from __future__ import annotations

import gc
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import torch
from PIL import Image

from lcm_lightning.errors import UserError
from lcm_lightning.evaluation.model_sources import LoadedModel, ModelSource
from lcm_lightning.models.adapters import merged_adapters, set_adapter_weight
from lcm_lightning.models.kinds import BASE, AdapterKind, Role
from lcm_lightning.models.sampling import Sampler, check_finite, sample
from lcm_lightning.output.pictures import drawing_settings, settings_text, to_pil

LARGEST_SIDE = 4  # times the model's own: more would take hours, or all memory, and draw badly
T = TypeVar("T")


class Superseded(Exception):
    """A newer wish has taken the place of this one."""


@dataclass(frozen=True)
class Column:
    """A way of drawing from a model, whose pictures stand in a column of their own.

    Attributes:
        title: above them.
        role: "student", or what the teacher is.
        adapters: names of those that act.
        sampler, steps, guidance_scale: see `lcm_lightning.models.sampling.sample`; the last two where nothing else is
            asked for.
    """

    title: str
    role: Role
    adapters: tuple[str, ...]
    sampler: Sampler
    steps: int
    guidance_scale: float


@dataclass(frozen=True)
class Settings:
    """What a picture depends on beside its model; a side that is None is the model's own."""

    prompt: str
    steps: int
    guidance_scale: float
    seed: int = 0
    negative_prompt: str = ""
    width: int | None = None
    height: int | None = None


@dataclass(frozen=True)
class Picture:
    """What was drawn, how long that took, reading and merging of models aside, and the text of its file's settings."""

    image: Image.Image
    seconds: float
    settings: str


@dataclass
class Job(Generic[T]):
    """Work of the drawing thread.

    Attributes:
        said: where it stands, in words.
    """

    said: str = "waiting"
    future: Future[T] = field(default_factory=Future)

    def done(self, within: float) -> bool:
        """Whether it has ended, waiting at most so many seconds for it."""
        # `wait` does not count one that was cancelled before it began.
        return self.future.done() or bool(wait([self.future], within).done)

    def result(self) -> T:
        """What it gave. Raises what it did: `Superseded`, also where it was cancelled, or a `UserError`."""
        try:
            return self.future.result()
        except CancelledError:
            raise Superseded from None


def columns(adapters: Sequence[AdapterKind], *, guidance_scale: float, taught: bool) -> list[Column]:
    """What is compared of a model with these adapters: its teacher and each student.

    A model without a student stands beside what it was before it was fine-tuned.

    Args:
        guidance_scale: that of the model without adapters.
        taught: the model without its students is a teacher; not where it is a full LCM itself.
    """
    tuned = [kind for kind in adapters if kind.role != "student"]
    students = [kind for kind in adapters if kind.role == "student"]
    acting = tuple(kind.name for kind in tuned)

    def column(kind: AdapterKind, names: tuple[str, ...]) -> Column:
        return Column(kind.title, kind.role, names, kind.sampler, kind.steps, kind.guidance_scale)

    found = [column(replace(BASE, guidance_scale=guidance_scale), ())] if taught and not (tuned and students) else []
    if taught and tuned:
        found.append(column(tuned[-1], acting))
    return found + [column(kind, (*acting, kind.name)) for kind in students]


@dataclass(frozen=True)
class Drawable:
    """What can be drawn from a model that has been read; holds nothing of its memory.

    Attributes:
        lora_names: adapters that can be weighted.
    """

    source: ModelSource
    columns: Sequence[Column]
    lora_names: Sequence[str]


class ModelOnDevice:
    """A model that is drawn from again and again: adapters stay merged until others are to act."""

    def __init__(self, source: ModelSource, device: torch.device) -> None:
        self.source = source
        self.loaded: LoadedModel = source.load()
        self.model = self.loaded.model.to(device)
        lora_names = [kind.name for kind in self.loaded.adapters if not kind.whole]
        found = columns(self.loaded.adapters, guidance_scale=self.model.guidance_scale, taught=self.loaded.taught)
        self.drawable = Drawable(source, found, lora_names)
        self._identities: dict[str, str] | None = None
        self._merged = ExitStack()
        self._acting: tuple[tuple[str, float], ...] | None = None

    def identity(self, names: Sequence[str]) -> tuple[str, ...]:
        """What tells the model with the adapters `names` from others: digests of their weights."""
        if self._identities is None:
            self.let_act([(name, 1.0) for name in self.drawable.lora_names])  # a weight would count as the file's own
            self.let_act(())
            self._identities = self.loaded.identities()
        return tuple(self._identities[name] for name in ("", *names))

    def let_act(self, acting: Sequence[tuple[str, float]]) -> None:
        """Merge exactly these adapters, each by its weight, into the model."""
        if tuple(acting) == self._acting:
            return
        self.restore()
        for name, weight in acting:
            set_adapter_weight(self.model, name, weight)
        self._merged.enter_context(merged_adapters(self.model, [name for name, _ in acting]))
        self._acting = tuple(acting)

    def restore(self) -> None:
        """Take the model back to its own weights."""
        self._merged.close()
        self._acting = None


class Engine:
    """Models and the one thread that draws from them.

    Who wants pictures takes a `ticket` and gives it with every drawing. One whose ticket is not the newest any more is
    dropped before it starts, or between two steps of its sampler.
    """

    def __init__(self, device: torch.device, kept_models: int = 2, kept_pictures: int = 64) -> None:
        """`kept_models` stay on the device, those used last, and as many pictures of teachers in memory."""
        self.device = device
        self.kept_models = kept_models
        self.kept_pictures = kept_pictures
        self._counting = threading.Lock()
        self._newest = 0
        # One thread, also because each that computes would bring the threads of its own OpenMP pool.
        self._thread = ThreadPoolExecutor(1, "drawing")
        self._models: OrderedDict[int, ModelOnDevice] = OrderedDict()
        self._known: dict[int, Drawable] = {}
        self._pictures: OrderedDict[Any, Picture] = OrderedDict()

    def close(self) -> None:
        """Drop what waits, end the drawing thread and take every model back to its own weights."""
        self.ticket()
        self._thread.shutdown(cancel_futures=True)
        while self._models:
            self._models.popitem()[1].restore()

    def ticket(self) -> int:
        """The newest wish; those before it are void."""
        with self._counting:
            self._newest += 1
            return self._newest

    def known(self, source: ModelSource) -> Drawable | None:
        """What can be drawn from a model, if it has been read, whether or not it is still there."""
        return self._known.get(id(source))

    def load(self, source: ModelSource, ticket: int | None = None) -> Job[Drawable]:
        """Read a model, if it is not there. Without a ticket it is read whatever else is wished for."""
        return self._start(ticket, lambda job: self._model(job, source).drawable)

    def warm_up(self, source: ModelSource) -> Job[None]:
        """Read a model and draw once from it, as its student: what a first drawing sets up is there for the next."""
        ticket = self.ticket()

        def work(job: Job[None]) -> None:
            model = self._model(job, source)
            column = model.drawable.columns[-1]
            settings = Settings("", column.sampler.min_steps, column.guidance_scale)
            self._drawn(job, ticket, model, column, settings, [(name, 1.0) for name in column.adapters])

        return self._start(ticket, work)

    def draw(
        self,
        ticket: int,
        source: ModelSource,
        column: Column,
        settings: Settings,
        weights: Mapping[str, float] | None = None,
    ) -> Job[Picture]:
        """Draw a picture; that of a teacher is taken from memory where it has been drawn before.

        Args:
            weights: by which the changes of LoRAs are multiplied, by name; 1 of those not named.
        """
        return self._start(ticket, lambda job: self._draw(job, ticket, source, column, settings, weights or {}))

    def _start(self, ticket: int | None, work: Callable[[Job[T]], T]) -> Job[T]:
        job: Job[T] = Job()

        def run() -> T:
            if ticket is not None:
                self._check(ticket)
            return work(job)

        job.future = self._thread.submit(run)
        return job

    def _check(self, ticket: int) -> None:
        if ticket != self._newest:
            raise Superseded

    def _model(self, job: Job[Any], source: ModelSource) -> ModelOnDevice:
        key = id(source)
        if key not in self._models:
            job.said = f"reading {source.name}"
            while len(self._models) >= self.kept_models:
                self._models.popitem(last=False)[1].restore()
            gc.collect()
            self._models[key] = ModelOnDevice(source, self.device)
            self._known[key] = self._models[key].drawable
        self._models.move_to_end(key)
        return self._models[key]

    def _draw(
        self,
        job: Job[Picture],
        ticket: int,
        source: ModelSource,
        column: Column,
        settings: Settings,
        weights: Mapping[str, float],
    ) -> Picture:
        model = self._model(job, source)
        acting = [(name, weights.get(name, 1.0)) for name in column.adapters]
        if column.role == "student":
            return self._drawn(job, ticket, model, column, settings, acting)
        with self._adapting(model):
            key = (model.identity(column.adapters), tuple(acting), column.sampler.name, settings)
        if key not in self._pictures:
            self._pictures[key] = self._drawn(job, ticket, model, column, settings, acting)
        self._pictures.move_to_end(key)
        while len(self._pictures) > self.kept_pictures:
            self._pictures.popitem(last=False)
        # Another model of the same teacher may have drawn it, whose name would be in the settings.
        return replace(self._pictures[key], settings=file_settings(model, column, settings, acting))

    @contextmanager
    def _adapting(self, model: ModelOnDevice) -> Iterator[None]:
        """A block that merges adapters; where it fails the model is dropped, whose weights may be half merged."""
        try:
            yield
        except BaseException:
            self._models.pop(id(model.source), None)
            raise

    def _drawn(
        self,
        job: Job[Any],
        ticket: int,
        model: ModelOnDevice,
        column: Column,
        settings: Settings,
        acting: Sequence[tuple[str, float]],
    ) -> Picture:
        def on_step(taken: int) -> None:
            job.said = f"step {taken + 1} of {settings.steps}"
            self._check(ticket)

        width, height = sides(model, settings)
        with self._adapting(model):
            model.let_act(acting)
        start = time.perf_counter()
        images = sample(
            model.model,
            [settings.prompt],
            seeds=[settings.seed],
            steps=settings.steps,
            guidance_scale=settings.guidance_scale,
            sampler=column.sampler,
            resolution=(height, width),
            negative_prompt=acting_negative_prompt(column, settings),
            on_step=on_step,
        )
        seconds = time.perf_counter() - start
        check_finite(model.source.spec, images)
        return Picture(to_pil(images[0]), seconds, file_settings(model, column, settings, acting))


def acting_negative_prompt(column: Column, settings: Settings) -> str:
    """The negative prompt, where a pass of the network reads it."""
    return settings.negative_prompt if column.sampler.passes(settings.guidance_scale) > 1 else ""


def file_settings(model: ModelOnDevice, column: Column, settings: Settings, acting: Sequence[tuple[str, float]]) -> str:
    """How a picture is drawn, for its file; `acting` are adapters and their weights."""
    own = model.loaded.weights
    said = drawing_settings(
        steps=settings.steps,
        sampler=column.sampler.title,
        guidance_scale=settings.guidance_scale,
        size=sides(model, settings),
        model=model.model.name_or_path,
        loras=model.source.name,
        weights={name: weight * own.get(name, 1.0) for name, weight in acting},
    )
    negative_prompt = acting_negative_prompt(column, settings)
    return settings_text(settings.prompt, negative_prompt, said | {"Seed": settings.seed})


def sides(model: ModelOnDevice, settings: Settings) -> tuple[int, int]:
    """Width and height of what is drawn. Raises a `UserError` that names the one that the model does not take."""
    for key, side in (("width", settings.width), ("height", settings.height)):
        if side is not None:
            model.model.check_resolution(side, key)
            if side > LARGEST_SIDE * model.model.default_resolution:
                most = LARGEST_SIDE * model.model.default_resolution
                raise UserError(f"{key}={side}: expected at most {most}; the model draws best at a quarter of that")
    own = model.model.default_resolution
    return settings.width or own, settings.height or own
