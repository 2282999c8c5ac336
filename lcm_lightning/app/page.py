"""The page, of Gradio's components."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from lcm_lightning.app import html
from lcm_lightning.app.choices import Choices
from lcm_lightning.app.engine import Column, Drawable, Engine, Settings, Superseded
from lcm_lightning.app.evaluations import find_evaluations, read_evaluation
from lcm_lightning.app.panels import Wish, draw, explained, followed
from lcm_lightning.errors import UserError, first_line
from lcm_lightning.methods import adapter_kinds

MOST_STEPS, MOST_TEACHER_STEPS, MOST_GUIDANCE = 8, 100, 15  # of sliders, unless a model's usual ones are more
SLIDERS = 4  # for weights of LoRAs
LARGEST_SEED = 2**32 - 1
USUAL_ROLE = "finetuned"  # of LoRAs of one's own
LARGEST_FILE = "4gb"  # of a LoRA that is dropped
CLEANING = (3600, 86_400)  # seconds: how often dropped files are looked for, and how old those are that go
ANOTHER_CAME_FIRST = "another page's wish came first; draw again"
# The typefaces of the machine: Gradio's own come from the internet.
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
QUIET: dict[str, Any] = {"show_progress": "hidden", "api_visibility": "private"}
# Every wish reaches the engine at once, which knows the newest.
AT_ONCE: dict[str, Any] = {**QUIET, "trigger_mode": "multiple", "concurrency_limit": None}


class Page:
    """The components and what they do."""

    def __init__(self, engine: Engine, choices: Choices, outputs: Path, prompt: str) -> None:
        self.engine = engine
        self.choices = choices
        self.outputs = outputs
        self.first = choices.first()
        self._wishes: defaultdict[str | None, int] = defaultdict(int)  # by session
        with gr.Blocks(title="LCM-Lightning", analytics_enabled=False, delete_cache=CLEANING) as self.blocks:
            self.set_for = gr.State(None)  # the model whose usual settings are set
            with gr.Tab("Draw"):
                self._add_prompt(prompt)
                self._add_settings()
                self._add_own_loras()
            with gr.Tab("Evaluations") as self.evaluations_tab:
                self.evaluation = gr.Dropdown(
                    [], label="Evaluation", info="of the runs in the folder of outputs, the newest first"
                )
                self.report = gr.HTML()
            self._connect()

    def _add_prompt(self, prompt: str) -> None:
        with gr.Row(equal_height=True):
            self.prompt = gr.Textbox(
                prompt, label="Prompt", scale=5, autofocus=True, max_lines=1, elem_id="prompt", min_width=240
            )
            self.draw_button = gr.Button("Draw", variant="primary", scale=1, elem_id="draw", min_width=100)
        self.message = gr.HTML(elem_id="message")
        self.pictures = gr.HTML(elem_id="pictures")

    def _add_settings(self) -> None:
        with gr.Row():
            self.models = gr.Dropdown(
                self.choices.listed(),
                value=[self.first],
                multiselect=True,
                label="Models",
                elem_id="models",
                scale=3,
                min_width=240,
            )
            self.as_typed = gr.Checkbox(
                False, label="Draw as I type", info="students, 1 or 2 steps", scale=1, min_width=240, elem_id="typing"
            )
        with gr.Row():
            self.steps = gr.Slider(1, MOST_STEPS, 4, step=1, label="Steps", elem_id="steps", min_width=160)
            self.guidance = gr.Slider(0, MOST_GUIDANCE, 1, step=0.1, label="Guidance", info="1: none, one pass a step")
            with gr.Column(min_width=200), gr.Row():
                self.seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=LARGEST_SEED, min_width=90)
                self.lock = gr.Checkbox(True, label="Lock", info="keep the seed", min_width=90)
            self.next = gr.Button("Next seed", min_width=100)
        with gr.Accordion("Teacher, negative prompt, size", open=False):
            self.negative = gr.Textbox(label="Negative prompt", info="acts where guidance is above 1", max_lines=1)
            with gr.Row():
                self.with_teacher = gr.Checkbox(True, label="Draw the teacher", min_width=160)
                self.teacher_steps = gr.Slider(
                    1, MOST_TEACHER_STEPS, 50, step=1, label="Teacher's steps", min_width=160
                )
                self.teacher_guidance = gr.Slider(
                    0, MOST_GUIDANCE, 7.5, step=0.1, label="Teacher's guidance", min_width=160
                )
            with gr.Row():
                size: dict[str, Any] = {"info": "0: the model's own", "precision": 0, "minimum": 0, "min_width": 160}
                self.width = gr.Number(0, label="Width", **size)
                self.height = gr.Number(0, label="Height", **size)
        with gr.Accordion("Weights of LoRAs", open=False, visible=False) as self.weighting:
            self.weights = [gr.Slider(-1, 2, 1, step=0.05, visible=False, interactive=True) for _ in range(SLIDERS)]

    def _add_own_loras(self) -> None:
        with gr.Accordion("LoRAs of your own", open=False) as self.own:
            with gr.Row():
                self.dropped = gr.File(
                    file_count="multiple", file_types=[".safetensors"], label="Drop .safetensors files", min_width=240
                )
                self.lines = gr.Textbox(
                    label="or files, run folders, hub ids",
                    info="one a line, all of them together; lcm:PLACE says that it is an LCM-LoRA",
                    lines=3,
                    min_width=240,
                )
            with gr.Row():
                self.role = gr.Dropdown([USUAL_ROLE], value=USUAL_ROLE, label="What they are", min_width=160)
                self.base_model = gr.Dropdown(
                    self.choices.base_models, value=self.choices.base_model, label="On the model", min_width=160
                )
                self.use = gr.Button("Use", min_width=100)

    def _connect(self) -> None:
        shown = [self.seed, self.message, self.pictures]
        wish: list[Any] = [self.models, self.prompt, self.negative, self.seed, self.steps, self.guidance]
        wish += [self.teacher_steps, self.teacher_guidance, self.width, self.height, *self.weights]
        drawn = [self.with_teacher, self.lock, *wish]
        gr.on([self.draw_button.click, self.prompt.submit], self._draw, drawn, shown, **AT_ONCE)
        self.next.click(self._draw_next, drawn, shown, **AT_ONCE)
        # The wish of the next key waits in the browser for the picture of this one: else none would ever be finished.
        typing = {**AT_ONCE, "trigger_mode": "always_last", "queue": False}
        self.prompt.input(self._draw_typed, [self.as_typed, *wish], [self.message, self.pictures], **typing)
        defaults = [self.steps, self.guidance, self.teacher_steps, self.teacher_guidance, self.negative]
        chosen = [self.models, self.set_for]
        loaded = [self.message, self.set_for, *defaults, self.weighting, *self.weights]
        guided = [self.models, self.guidance, self.teacher_guidance, self.with_teacher]
        self.models.input(self._choose, chosen, loaded, **AT_ONCE).success(
            self._negative, guided, self.negative, **QUIET
        )
        used = [self.dropped, self.lines, self.role, self.base_model]
        for event in (self.use.click, self.dropped.upload):
            event(self._use_loras, used, [self.message, self.models], **QUIET).success(
                self._choose, chosen, loaded, **QUIET
            )
        gr.on([part.change for part in guided[1:]], self._negative, guided, self.negative, **QUIET)
        self.evaluations_tab.select(self._list_evaluations, self.evaluation, self.evaluation, **QUIET)
        self.evaluation.change(self._show_evaluation, self.evaluation, self.report, **QUIET)
        self.own.expand(self._roles, None, self.role, **QUIET)
        self.blocks.load(self._arrive, self.models, self.models, **QUIET)
        self.blocks.load(self._load, chosen, loaded, **QUIET)

    def _wish(self, request: gr.Request) -> int:
        """The number of a wish among those of its page."""
        self._wishes[request.session_hash] += 1
        return self._wishes[request.session_hash]

    def _is_last(self, request: gr.Request, wish: int) -> bool:
        """Whether a page has not wished for anything since: what took the place of its wish is another page's."""
        return self._wishes[request.session_hash] == wish

    def _draw(self, request: gr.Request, with_teacher: bool, lock: bool, *values: Any) -> Iterator[tuple[Any, ...]]:
        wish, panels = self._wish(request), list[html.Panel]()
        seed = int(values[SEED] or 0)
        seed = seed if lock else (seed + 1) % (LARGEST_SEED + 1)
        values = (*values[:SEED], seed, *values[SEED + 1 :])
        try:
            yield seed, html.note("drawing"), gr.skip()
            for panels in draw(self.engine, self.choices, wished(*values), teachers=with_teacher):
                yield gr.skip(), html.note("drawing"), html.pictures(panels)
            yield gr.skip(), "", gr.skip()
        except Superseded:
            if self._is_last(request, wish):
                for panel in panels:
                    panel.waits = "not drawn"
                yield gr.skip(), html.note(ANOTHER_CAME_FIRST), html.pictures(panels) if panels else gr.skip()
            else:
                yield gr.skip(), gr.skip(), gr.skip()
        except Exception as error:
            yield gr.skip(), html.problem(explained(error)), gr.skip()

    def _draw_next(
        self, request: gr.Request, with_teacher: bool, lock: bool, *values: Any
    ) -> Iterator[tuple[Any, ...]]:
        yield from self._draw(request, with_teacher, False, *values)

    def _draw_typed(self, request: gr.Request, as_typed: bool, *values: Any) -> tuple[Any, ...]:
        if not as_typed:
            return gr.skip(), gr.skip()
        wish = self._wish(request)
        try:
            *_, panels = draw(self.engine, self.choices, wished(*values).while_typed(), teachers=False)
            return "", html.pictures(panels)
        except Superseded:
            return html.note(ANOTHER_CAME_FIRST) if self._is_last(request, wish) else gr.skip(), gr.skip()
        except Exception as error:
            return html.problem(explained(error)), gr.skip()

    def _choose(self, request: gr.Request, keys: Sequence[str], set_for: str | None) -> Iterator[Any]:
        yield from self._load(request, keys, set_for, self.engine.ticket())

    def _load(
        self, request: gr.Request, keys: Sequence[str], set_for: str | None, ticket: int | None = None
    ) -> Iterator[Any]:
        """Read the chosen models that stay on the device, and set what is usual for the first one if it is another."""
        wish, unchanged = self._wish(request), [gr.skip()] * (7 + SLIDERS)
        try:
            models = []
            for key in keys[: self.engine.kept_models]:
                job = self.engine.load(self.choices.source(key), ticket)
                for said in followed(job):
                    yield [html.note(f"{said} ..."), *unchanged]
                models.append(job.result())
            another = models and keys[0] != set_for
            yield ["", keys[0], *self._usual(keys[0], models[0])] if another else ["", *unchanged]
        except Superseded:
            yield [html.note(ANOTHER_CAME_FIRST) if self._is_last(request, wish) else gr.skip(), *unchanged]
        except Exception as error:
            yield [html.problem(explained(error)), *unchanged]

    def _usual(self, key: str, model: Drawable) -> list[Any]:
        teacher_steps, teacher_guidance = self.choices.teacher_settings(key)
        students = [column for column in model.columns if column.role == "student"]
        steps, guidance = (students[0].steps, students[0].guidance_scale) if students else (4, 1.0)
        names = model.lora_names[:SLIDERS]
        sliders = [gr.update(label=name, value=1, visible=True) for name in names]
        sliders += [gr.update(value=1, visible=False)] * (SLIDERS - len(names))
        negative = gr.update(interactive=reads_negative_prompt(model.columns, guidance, teacher_guidance))
        usual = [
            reaching(steps, MOST_STEPS),
            reaching(guidance, MOST_GUIDANCE),
            reaching(teacher_steps, MOST_TEACHER_STEPS),
            reaching(teacher_guidance, MOST_GUIDANCE),
        ]
        return [*usual, negative, gr.update(visible=bool(names)), *sliders]

    def _use_loras(self, files: Sequence[str] | None, text: str, role: str, base_model: str) -> tuple[Any, ...]:
        try:
            key = self.choices.add_loras([*(files or ()), *text.splitlines()], role, base_model)
        except Exception as error:
            return html.problem(explained(error)), gr.skip()
        return "", gr.update(choices=self.choices.listed(), value=[key])

    def _negative(self, keys: Sequence[str], guidance: float, teacher_guidance: float, with_teacher: bool) -> Any:
        """A negative prompt can be given where a pass of the network would read it."""
        models = [self.engine.known(self.choices.source(key)) for key in keys]
        columns = [column for model in models if model is not None for column in model.columns]
        shown = [column for column in columns if with_teacher or column.role == "student"]
        return gr.update(interactive=reads_negative_prompt(shown, guidance, teacher_guidance))

    def _arrive(self, keys: Sequence[str]) -> Any:
        """Offer runs that have ended since the page was built."""
        return gr.update(choices=self.choices.listed(), value=keys)

    def _roles(self) -> Any:
        """What LoRAs can be; asked only here: it imports every method."""
        return gr.update(choices=[kind.name for kind in adapter_kinds().values() if not kind.whole])

    def _list_evaluations(self, current: str | None) -> Any:
        names = find_evaluations(self.outputs)
        chosen = current if current in names else next(iter(names), None)
        return gr.update(choices=names, value=chosen, info="" if names else "none yet: python evaluate.py run=...")

    def _show_evaluation(self, name: str | None) -> str:
        if name is None:
            return ""
        try:
            return html.evaluation(read_evaluation(self.outputs, name))
        except Exception as error:
            return html.problem(explained(error))


def reaching(value: float, most: float) -> Any:
    """A slider at `value`, as long as that asks for: Gradio refuses what is beyond a slider's end."""
    return gr.update(value=value, maximum=max(value, most))


def reads_negative_prompt(columns: Sequence[Column], guidance: float, teacher_guidance: float) -> bool:
    """Whether one of them takes a second pass of the network a step, which is told what not to draw."""
    scales = {column: guidance if column.role == "student" else teacher_guidance for column in columns}
    return any(column.sampler.passes(scale) > 1 for column, scale in scales.items())


SEED = 3  # among the values of a wish


def wished(
    models: Sequence[str],
    prompt: str | None,  # None, as the others, where nothing was typed
    negative_prompt: str | None,
    seed: int | None,
    steps: int,
    guidance: float,
    teacher_steps: int,
    teacher_guidance: float,
    width: int | None,
    height: int | None,
    *weights: float,
) -> Wish:
    """What the components say. Raises a `UserError` where no model is chosen."""
    if not models:
        raise UserError("Models: none is chosen; choose one")
    settings = Settings(
        prompt or "", int(steps), guidance, int(seed or 0), negative_prompt or "", width or None, height or None
    )
    return Wish(models, settings, int(teacher_steps), teacher_guidance, weights)


def serve(page: Page, host: str, port: int | None, share: bool) -> str:
    """Let the page be seen, and return its address; the program's end ends it.

    Pictures are part of what the page is told. Gradio serves its own files, and those dropped on the page to who knows
    their address, which holds their SHA-256; it deletes them after a day or where the program ends.

    Raises:
        UserError: the port is taken, or the host is none of this machine.
    """
    try:
        _, address, shared = page.blocks.queue(api_open=False).launch(
            server_name=host,
            server_port=port,
            share=share,
            max_file_size=LARGEST_FILE,
            prevent_thread_lock=True,
            quiet=True,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            ssr_mode=False,
            pwa=False,
            mcp_server=False,
            theme=THEME,
            css=html.CSS,
        )
    except OSError as error:
        raise UserError(f"host={host} port={port}: {first_line(error)}; port=null takes a free one") from error
    return shared or address
