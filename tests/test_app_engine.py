"""What draws for the app, without a browser: the newest wish wins, a teacher draws once, pictures are `sample`'s."""

from __future__ import annotations

import gc
import inspect
import io
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from peft.tuners.lora import LoraLayer
from PIL import Image

from lcm_lightning.app import choices as choices_module
from lcm_lightning.app import engine as engine_module
from lcm_lightning.app.choices import Choices, local_runs
from lcm_lightning.app.engine import Column, Drawable, Engine, Settings, Superseded, columns
from lcm_lightning.app.evaluations import Shown, picture_rows, read_evaluation
from lcm_lightning.app.html import Panel, evaluation, pictures
from lcm_lightning.app.panels import Wish, draw, followed
from lcm_lightning.config.entry import configurations
from lcm_lightning.config.resolvers import register_resolvers
from lcm_lightning.errors import UserError
from lcm_lightning.evaluation.model_sources import LoadedModel, ModelSource
from lcm_lightning.methods import adapter_kinds
from lcm_lightning.models import adapters
from lcm_lightning.models.adapters import LoraSettings, add_lora, load_lora, lora_parameters, lora_state_dict
from lcm_lightning.models.lora_files import save_lora
from lcm_lightning.models.sampling import DDIM, sample
from lcm_lightning.models.stable_diffusion import StableDiffusion, load_stable_diffusion
from lcm_lightning.output.pictures import png_bytes
from lcm_lightning.runs.contents import Adapter, write_manifest

KINDS = adapter_kinds()
TUNED, STUDENT = KINDS["finetuned"], KINDS["lcm"]
DOG = Settings("dog", steps=2, guidance_scale=1.0, seed=3)
GUIDED = replace(DOG, steps=3, guidance_scale=7.5)


@pytest.fixture(scope="module")
def lora_files(tmp_path_factory: pytest.TempPathFactory, pipeline_folder: Path) -> dict[str, Path]:
    """A LoRA for each kind, at random."""
    files = {}
    for seed, kind in enumerate((TUNED, STUDENT)):
        model = load_stable_diffusion(str(pipeline_folder))
        add_lora(model.unet, "x", LoraSettings(rank=4, alpha=4))
        generator = torch.Generator().manual_seed(seed)
        for parameter in lora_parameters(model.unet, "x"):
            parameter.data.normal_(0, 0.1, generator=generator)
        files[kind.name] = tmp_path_factory.mktemp("loras") / f"{kind.name}.safetensors"
        save_lora(lora_state_dict(model.unet, "x"), files[kind.name])
    return files


@pytest.fixture
def source(pipeline_folder: Path, lora_files: dict[str, Path]) -> ModelSource:
    """A student on a fine-tuned teacher."""
    return made(pipeline_folder, lora_files)


def made(pipeline_folder: Path, files: dict[str, Path], **scales: float) -> ModelSource:
    def load() -> LoadedModel:
        model = load_stable_diffusion(str(pipeline_folder))
        for name, file in files.items():
            load_lora(model, file, name, scale=scales.get(name, 1.0))
        return LoadedModel(model.eval(), tuple(KINDS[name] for name in files))

    return ModelSource("dogs", "run:dogs", load)


@pytest.fixture
def engine() -> Iterator[Engine]:
    made = Engine(torch.device("cpu"))
    yield made
    made.close()


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Prompts of the drawings that were begun."""
    begun: list[str] = []

    def counted(model: StableDiffusion, prompts: list[str], **settings: object) -> torch.Tensor:
        begun.extend(prompts)
        return sample(model, prompts, **settings)  # type: ignore[arg-type]

    monkeypatch.setattr(engine_module, "sample", counted)
    return begun


def teacher_and_student(engine: Engine, source: ModelSource) -> list[Column]:
    return engine.load(source).result().columns


def levels(image: Image.Image) -> np.ndarray:
    return np.asarray(image, dtype=int)


def test_a_student_stands_beside_its_teacher_and_a_finetuned_model_beside_its_base():
    def compared(*names: str, taught: bool = True) -> list[tuple[str, tuple[str, ...]]]:
        return [
            (column.title, column.adapters)
            for column in columns([KINDS[name] for name in names], guidance_scale=7.5, taught=taught)
        ]

    base = ("base", ())
    assert compared() == [base]
    assert compared("lcm") == [base, (STUDENT.title, ("lcm",))]
    assert compared("finetuned") == [base, (TUNED.title, ("finetuned",))]
    assert compared("finetuned", "lcm") == [(TUNED.title, ("finetuned",)), (STUDENT.title, ("finetuned", "lcm"))]
    assert compared("full_lcm", taught=False) == [(KINDS["full_lcm"].title, ("full_lcm",))]


def test_pictures_are_those_that_sample_draws_of_the_model_with_its_loras_so_weighted(
    engine: Engine, source: ModelSource, pipeline_folder: Path, lora_files: dict[str, Path]
):
    _, student = teacher_and_student(engine, source)
    for weight in (1.0, 0.3, 1.0):  # and back
        picture = engine.draw(engine.ticket(), source, student, DOG, {"finetuned": weight}).result()
        model = made(pipeline_folder, lora_files, finetuned=weight).load().model
        with torch.no_grad():
            from lcm_lightning.models.adapters import merged_adapters

            with merged_adapters(model, ["finetuned", "lcm"]):
                (expected,) = sample(model, ["dog"], seeds=[3], steps=2, guidance_scale=1.0, sampler=STUDENT.sampler)
        assert np.abs(levels(picture.image) - 255 * expected.permute(1, 2, 0).numpy()).max() <= 1


def test_a_teacher_is_drawn_once_for_prompt_and_seed_and_a_student_each_time(
    engine: Engine, source: ModelSource, sampled: list[str]
):
    teacher, student = teacher_and_student(engine, source)

    def drawn(column: Column, settings: Settings, **weights: float) -> int:
        before = len(sampled)
        engine.draw(engine.ticket(), source, column, settings, weights).result()
        return len(sampled) - before

    assert [drawn(teacher, GUIDED), drawn(student, DOG), drawn(teacher, GUIDED), drawn(student, DOG)] == [1, 1, 0, 1]
    assert drawn(teacher, replace(GUIDED, seed=4)) == drawn(teacher, replace(GUIDED, prompt="cat")) == 1
    assert drawn(teacher, GUIDED, finetuned=0.5) == 1 and drawn(teacher, GUIDED, lcm=0.5) == 0


def test_models_of_one_teacher_share_its_picture(engine: Engine, pipeline_folder: Path, lora_files, sampled: list[str]):
    alone = replace(made(pipeline_folder, {"finetuned": lora_files["finetuned"]}), name="alone")
    both = replace(made(pipeline_folder, lora_files), name="both")
    _, tuned = teacher_and_student(engine, alone)
    teacher, _ = teacher_and_student(engine, both)
    first = engine.draw(engine.ticket(), alone, tuned, GUIDED).result()
    second = engine.draw(engine.ticket(), both, teacher, GUIDED).result()
    assert second.image is first.image and len(sampled) == 1
    assert "LoRAs: alone" in first.settings.replace('"', "") and "LoRAs: both" in second.settings.replace('"', "")


def test_of_fifty_wishes_at_once_the_running_one_is_left_at_its_next_step_and_the_last_one_drawn(
    engine: Engine, source: ModelSource, sampled: list[str], monkeypatch: pytest.MonkeyPatch
):
    teacher, _ = teacher_and_student(engine, source)
    inside, go_on, steps = held_in_a_step(monkeypatch)
    jobs = [engine.draw(engine.ticket(), source, teacher, replace(GUIDED, prompt="0"))]
    assert inside.wait(30)
    jobs += [engine.draw(engine.ticket(), source, teacher, replace(GUIDED, prompt=str(n))) for n in range(1, 50)]
    go_on.set()
    for job in jobs[:-1]:
        with pytest.raises(Superseded):
            job.result()
    jobs[-1].result()
    assert sampled == ["0", "49"] and len(steps) == 1 + GUIDED.steps


def held_in_a_step(monkeypatch: pytest.MonkeyPatch) -> tuple[threading.Event, threading.Event, list[int]]:
    """Set when a model is in the midst of a step; to be set, that it goes on; and the steps begun."""
    inside, go_on, steps = threading.Event(), threading.Event(), list[int]()
    denoise = StableDiffusion.denoise

    def slow(model: StableDiffusion, *arguments: torch.Tensor) -> torch.Tensor:
        steps.append(1)
        inside.set()
        assert go_on.wait(30)
        return denoise(model, *arguments)

    monkeypatch.setattr(StableDiffusion, "denoise", slow)
    return inside, go_on, steps


@dataclass
class Reading:
    """Sources that say which of them was read, and which models there are in memory."""

    pipeline_folder: Path
    read: list[str] = field(default_factory=list)
    models: list[weakref.ref[StableDiffusion]] = field(default_factory=list)

    def source(self, name: str) -> ModelSource:
        plain = made(self.pipeline_folder, {})

        def load() -> LoadedModel:
            loaded = plain.load()
            self.read.append(name)
            self.models.append(weakref.ref(loaded.model))
            return loaded

        return replace(plain, name=name, load=load)

    def alive(self) -> int:
        return sum(model() is not None for model in self.models)


def test_the_models_used_last_stay_and_others_are_read_again(pipeline_folder: Path):
    engine, reading = Engine(torch.device("cpu"), kept_models=2), Reading(pipeline_folder)
    a, b, c = map(reading.source, "abc")
    for wanted in (a, b, a, c, a, b):
        engine.load(wanted).result()
    engine.close()
    assert reading.read == ["a", "b", "c", "b"]


def test_no_more_models_than_are_kept_lie_in_memory_and_each_is_read_once_for_a_drawing(pipeline_folder: Path):
    engine, reading = Engine(torch.device("cpu"), kept_models=1), Reading(pipeline_folder)
    sources = [reading.source(name) for name in "abc"]
    wish, alive, shown = Wish(["a", "b", "c"], DOG, teacher_steps=1, teacher_guidance=1.0), [], list[list[bool]]()
    for panels in draw(engine, OneModel(*sources), wish):  # type: ignore[arg-type]
        gc.collect()
        alive.append(reading.alive())
        shown.append([bool(panel.picture) for panel in panels])
    assert max(alive) == 1 and reading.read == ["a", "b", "c"]
    assert shown[-1] == [True]  # of the one teacher that they are
    assert engine.known(sources[0]) is not None
    engine.close()


def fill_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the fifth change of weights on there is no room, for that one."""
    update, merged = adapters._update, list[str]()

    def full(layer: LoraLayer, name: str) -> torch.Tensor:
        merged.append(name)
        if len(merged) == 5:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return update(layer, name)

    monkeypatch.setattr(adapters, "_update", full)


def test_a_model_is_itself_again_where_its_device_had_no_room_for_a_merge(
    engine: Engine, source: ModelSource, monkeypatch: pytest.MonkeyPatch
):
    _, student = teacher_and_student(engine, source)
    expected = engine.draw(engine.ticket(), source, student, DOG).result()
    fill_memory(monkeypatch)
    with pytest.raises(torch.OutOfMemoryError):
        engine.draw(engine.ticket(), source, student, DOG, {"finetuned": 0.5}).result()
    again = engine.draw(engine.ticket(), source, student, DOG).result()
    assert np.array_equal(levels(again.image), levels(expected.image))


def test_a_merge_that_fails_half_way_leaves_no_trace(source: ModelSource, monkeypatch: pytest.MonkeyPatch):
    model = source.load().model
    before = {key: value.clone() for key, value in model.state_dict().items()}
    fill_memory(monkeypatch)
    with pytest.raises(torch.OutOfMemoryError), adapters.merged_adapters(model, ["finetuned", "lcm"]):
        pass
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_model_whose_weights_cannot_be_put_back_is_read_again(
    engine: Engine, source: ModelSource, monkeypatch: pytest.MonkeyPatch
):
    teacher, student = teacher_and_student(engine, source)
    expected = engine.draw(engine.ticket(), source, student, DOG).result()
    restore = engine_module.ModelOnDevice.restore

    def full(model: engine_module.ModelOnDevice) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(engine_module.ModelOnDevice, "restore", full)
    with pytest.raises(torch.OutOfMemoryError):
        engine.draw(engine.ticket(), source, teacher, GUIDED).result()
    monkeypatch.setattr(engine_module.ModelOnDevice, "restore", restore)
    again = engine.draw(engine.ticket(), source, student, DOG).result()
    assert np.array_equal(levels(again.image), levels(expected.image))


def test_what_waits_ends_where_the_engine_is_closed(source: ModelSource, monkeypatch: pytest.MonkeyPatch):
    engine = Engine(torch.device("cpu"))
    inside, go_on, _ = held_in_a_step(monkeypatch)
    engine.warm_up(source)
    assert inside.wait(30)
    waiting = engine.load(source)
    closing = threading.Thread(target=engine.close)
    closing.start()
    while not waiting.future.cancelled():
        assert closing.is_alive()
        time.sleep(0.01)
    go_on.set()
    closing.join(30)
    assert waiting.done(within=0) and list(followed(waiting)) == []
    with pytest.raises(Superseded):
        waiting.result()


def test_a_warm_engine_has_read_and_drawn_and_drops_that_for_who_wants_a_picture(
    engine: Engine, source: ModelSource, sampled: list[str], monkeypatch: pytest.MonkeyPatch
):
    engine.warm_up(source).result()
    known = engine.known(source)
    assert known is not None and sampled == [""]
    inside, go_on, steps = held_in_a_step(monkeypatch)
    monkeypatch.setattr(engine_module, "sample", lambda *args, **kw: sample(*args, **{**kw, "steps": 2}))
    warming = engine.warm_up(source)
    assert inside.wait(30)
    drawing = engine.draw(engine.ticket(), source, known.columns[-1], DOG)
    go_on.set()
    with pytest.raises(Superseded):
        warming.result()
    drawing.result()
    assert len(steps) == 1 + DOG.steps


def test_a_side_that_the_model_does_not_take_and_a_model_that_is_gone_are_said_in_a_sentence(
    engine: Engine, source: ModelSource
):
    _, student = teacher_and_student(engine, source)
    for settings, said in ((replace(DOG, width=33), "width=33"), (replace(DOG, height=4096), "height=4096")):
        with pytest.raises(UserError, match=said):
            engine.draw(engine.ticket(), source, student, settings).result()

    def gone() -> LoadedModel:
        raise UserError("run=dogs: no config.yaml there")

    with pytest.raises(UserError, match="no config"):
        engine.load(replace(source, load=gone)).result()


def test_a_negative_prompt_acts_where_guidance_does_and_the_file_says_it(engine: Engine, source: ModelSource):
    teacher, student = teacher_and_student(engine, source)
    for column, settings, acts in ((teacher, GUIDED, True), (student, DOG, False), (student, GUIDED, True)):
        plain, against = (
            engine.draw(engine.ticket(), source, column, replace(settings, negative_prompt=negative)).result()
            for negative in ("", "cat")
        )
        assert np.array_equal(levels(plain.image), levels(against.image)) != acts
        assert ("\nNegative prompt: cat\n" in against.settings) == acts


def test_a_file_says_how_its_picture_was_drawn(engine: Engine, source: ModelSource, pipeline_folder: Path):
    _, student = teacher_and_student(engine, source)
    picture = engine.draw(engine.ticket(), source, student, DOG, {"finetuned": 0.5}).result()
    with Image.open(io.BytesIO(png_bytes(picture.image, picture.settings))) as file:
        assert file.info["parameters"] == (
            f"dog\nSteps: 2, Sampler: LCM, CFG scale: 1.0, Size: 32x32, Model: {pipeline_folder.name}, "
            'LoRAs: "dogs: finetuned 0.5, lcm 1", Seed: 3'
        )
        assert np.array_equal(levels(file), levels(picture.image))


class OneModel:
    """In the place of `Choices`."""

    def __init__(self, *sources: ModelSource) -> None:
        self.sources = {source.name: source for source in sources}

    def source(self, key: str) -> ModelSource:
        return self.sources[key]


def test_the_page_gets_the_student_first_and_one_column_for_a_teacher_of_two(
    engine: Engine, source: ModelSource, sampled: list[str]
):
    twin = replace(source, name="twins")
    wish = Wish(["dogs", "twins"], DOG, teacher_steps=3, teacher_guidance=7.5)
    states = [[bool(panel.picture) for panel in panels] for panels in draw(engine, OneModel(source, twin), wish)]  # type: ignore[arg-type]
    assert [False, True, False, False] in states and states[-1] == [True, True, True] and len(sampled) == 3


def test_an_error_in_one_column_leaves_the_others(engine: Engine, source: ModelSource):
    wish = Wish(["dogs"], replace(DOG, steps=2000), teacher_steps=2, teacher_guidance=7.5)
    *_, panels = draw(engine, OneModel(source), wish)  # type: ignore[arg-type]
    assert [bool(panel.picture) for panel in panels] == [True, False] and "steps=2000" in panels[1].problem


def test_what_is_typed_is_text_and_no_markup():
    image = Image.new("RGB", (8, 8))
    shown = pictures(
        [Panel("<b>", engine_module.Picture(image, 0.1, '"><script>alert(1)</script>')), Panel("a", problem="<i>")]
    )
    assert "<script" not in shown and "<i>" not in shown and "<b>" not in shown


@pytest.fixture
def choices(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Choices]]:
    """What a command with these settings offers, with the runs of `tmp_path`."""
    before = HydraConfig.instance().cfg
    register_resolvers()
    with initialize_config_dir(str(configurations()), version_base="1.3"):

        def make(*overrides: str) -> Choices:
            cfg = compose("app", overrides=list(overrides), return_hydra_config=True)
            HydraConfig.instance().set_config(cfg)
            return Choices(cfg, tmp_path)

        yield make
    HydraConfig.instance().cfg = before


def leave_run(folder: Path, lora: Path, kind: str, pipeline_folder: Path) -> None:
    """A run's folder as far as drawing reads it."""
    (folder / "lora").mkdir(parents=True)
    (folder / "lora" / "pytorch_lora_weights.safetensors").write_bytes(lora.read_bytes())
    write_manifest(folder / "lora", [Adapter(KINDS[kind])])
    model = {"_target_": "lcm_lightning.models.stable_diffusion.load_stable_diffusion", "path": str(pipeline_folder)}
    samples = {"teacher_steps": 20, "guidance_scale": 3.0}
    config = {"name": "dogs", "model": model, "data": None, "callbacks": {"samples": samples}}
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(config)))


def test_runs_are_offered_the_newest_student_first_chosen_and_loaded(
    choices, tmp_path: Path, lora_files: dict[str, Path], pipeline_folder: Path, engine: Engine
):
    assert [key for _, key in choices().listed()] == ["tiny"] == [choices().first()]
    for name, kind in (("distilled/1", "lcm"), ("tuned/1", "finetuned")):
        leave_run(tmp_path / name, lora_files[kind], kind, pipeline_folder)
    (tmp_path / "broken" / "1" / "lora").mkdir(parents=True)
    (tmp_path / "broken" / "1" / "config.yaml").write_text("{}")
    (tmp_path / "broken" / "1" / "lora" / "adapters.json").write_text("{")
    offered = choices()
    assert [title for title, _ in offered.listed()][:2] == ["tuned/1, fine-tuned", "distilled/1, LCM-LoRA"]
    assert len(local_runs(tmp_path)) == 3 and offered.first() == f"run:{tmp_path}/distilled/1"
    assert offered.teacher_settings(offered.first()) == (20, 3.0)
    source = offered.source(offered.first())
    assert offered.source(offered.first()) is source  # known again
    assert engine.load(source).result().lora_names == ["lcm"]


@pytest.mark.parametrize(
    "content", ["name: x\n", "name: [x\n", "- x\n", "data: here\n", "data: {name: x}\n", "\x00", "name: ${\n"]
)
def test_a_damaged_run_is_passed_over_and_said_in_a_sentence(
    choices, tmp_path: Path, lora_files: dict[str, Path], pipeline_folder: Path, content: str
):
    for name, written in (("whole", 1), ("damaged", 2)):
        leave_run(tmp_path / name / "1", lora_files["lcm"], "lcm", pipeline_folder)
        os.utime(tmp_path / name / "1" / "lora", (written, written))
    (tmp_path / "damaged" / "1" / "config.yaml").write_text(content)
    offered = choices()
    damaged = f"run:{tmp_path}/damaged/1"
    if content == "name: x\n":  # it says all that is asked for before it is read
        assert offered.first() == damaged
        return
    assert offered.listed()[0][1] == damaged and offered.first() == f"run:{tmp_path}/whole/1"
    with pytest.raises(UserError, match=r"damaged/1: config\.yaml is damaged \("):
        offered.source(damaged)


def test_a_run_that_was_trained_further_is_read_again(
    choices, tmp_path: Path, lora_files: dict[str, Path], pipeline_folder: Path
):
    leave_run(tmp_path / "dogs" / "1", lora_files["lcm"], "lcm", pipeline_folder)
    offered = choices(f"run={tmp_path}/dogs/1")
    keys = ["command", f"run:{tmp_path}/dogs/1", offered.add_loras([str(tmp_path / "dogs" / "1")], "lcm", "tiny")]
    before = [offered.source(key) for key in keys]
    assert all(offered.source(key) is source for key, source in zip(keys, before, strict=True))
    exports = tmp_path / "dogs" / "1" / "lora"
    write_manifest(exports, [Adapter(STUDENT, step=2)])
    os.utime(exports / "adapters.json", ns=(2**61, 2**61))  # however coarse the clock of the disk is
    after = [offered.source(key) for key in keys]
    assert all(new is not old for new, old in zip(after, before, strict=True))
    assert all(offered.source(key) is source for key, source in zip(keys, after, strict=True))


def test_threads_that_ask_at_once_get_the_same_model(choices, monkeypatch: pytest.MonkeyPatch):
    offered, together, found = choices(), threading.Barrier(4), []
    find = choices_module.find_models

    def slow(*arguments: object) -> list[ModelSource]:
        time.sleep(0.1)
        return find(*arguments)  # type: ignore[arg-type]

    def ask() -> None:
        together.wait(30)
        found.append(offered.source("tiny"))

    monkeypatch.setattr(choices_module, "find_models", slow)
    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert len(found) == 4 and all(source is found[0] for source in found)


def test_the_embedded_pipeline_has_its_student_and_loras_of_ones_own_add_up(choices, lora_files: dict[str, Path]):
    offered = choices()
    assert offered.source("tiny").spec.endswith("tiny/student")
    assert offered.teacher_settings("tiny") == (50, 2.0)
    key = offered.add_loras([f"lcm:{lora_files['lcm']}", "", str(lora_files["finetuned"])], "finetuned", "tiny")
    assert offered.source(key).name == "lcm+finetuned" and key in [listed for _, listed in offered.listed()]
    assert offered.add_loras([f"lcm:{lora_files['lcm']}", str(lora_files["finetuned"])], "finetuned", "tiny") == key
    for lines, said in (([], "none is given"), (["/nowhere.safetensors"], "nowhere")):
        with pytest.raises(UserError, match=said):
            offered.add_loras(lines, "finetuned", "tiny")


def test_what_the_command_names_comes_first(choices):
    offered = choices("model=tiny", "student=true", "model.unet_init=null")
    assert offered.first() == offered.listed()[0][1] == "command"
    assert offered.teacher_settings("command") == (50, 2.0)


def test_an_evaluation_is_tables_and_small_pictures_of_each_contender(tmp_path: Path):
    folder = tmp_path / "dogs" / "1" / "evaluation" / "quick"
    for name, side in (("a", 8), ("b", 512)):
        (folder / "images" / name).mkdir(parents=True)
        for number in range(3):
            Image.new("RGB", (side, side), "red").save(folder / "images" / name / f"{number:06d}.png")
    (folder / "images" / "b" / "000002.png").unlink()  # not drawn yet
    rows = picture_rows(folder, ["images/a", "images/b"], 8)
    assert [[file.parent.name + file.name[5] for file in row] for row in rows] == [["a0", "b0"], ["a1", "b1"]]
    shown = evaluation(Shown("quick", [], ["A", "B"], rows, []))
    assert shown.count("data:image/png") == shown.count("data:image/jpeg") == 2 and len(shown) < 20_000
    with pytest.raises(ValueError):
        picture_rows(folder, ["../../../../.."], 8)
    with pytest.raises(UserError, match="not there any more"):
        read_evaluation(tmp_path, "../elsewhere")


DAMAGED = ["{", "[1]", '{"models": []}', '{"models": [1]}', '{"models": "ab"}', '{"models": {}}', "null"]


@pytest.mark.parametrize("content", DAMAGED)
def test_a_damaged_evaluation_is_said_in_a_sentence(tmp_path: Path, content: str):
    folder = tmp_path / "dogs" / "1"
    folder.mkdir(parents=True)
    (folder / "metrics.json").write_text(content)
    with pytest.raises(UserError, match=r"evaluation dogs/1: metrics\.json cannot be read"):
        read_evaluation(tmp_path, "dogs/1")


def test_pictures_that_cannot_be_read_leave_the_others(tmp_path: Path):
    whole, cut, none = tmp_path / "a.png", tmp_path / "b.png", tmp_path / "c.png"
    Image.effect_noise((64, 64), 9).save(whole)
    cut.write_bytes(whole.read_bytes()[:900])
    none.write_bytes(b"\x89PNG")
    shown = evaluation(Shown("quick", [], ["A", "B", "C", "D"], [[whole, cut, none, tmp_path / "gone.png"]], []))
    assert shown.count("data:image/png") == 1 and shown.count("cannot be read") == 3


class Browser:
    """In the place of Gradio's request: whose page it is."""

    def __init__(self, session_hash: str) -> None:
        self.session_hash = session_hash


@pytest.fixture
def page(choices, engine: Engine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The page, seen by no browser."""
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "False")
    pytest.importorskip("gradio", reason="the page is made of gradio; pip install -e '.[app]'")
    from lcm_lightning.app.page import Page

    return Page(engine, choices(), tmp_path, "red heart")


# Teacher, lock, models, prompt, negative prompt, seed, steps, guidance, those of the teacher, width, height.
TYPED = (True, True, ["tiny"], "dog", "", 0, 1, 1.0, 2, 2.0, 0, 0)


def test_a_page_whose_wish_another_one_s_has_replaced_says_so_and_waits_for_nothing(page: Any):
    mine, others = Browser("mine"), Browser("others")

    def interrupted(newer: Browser) -> tuple[Any, ...]:
        drawing, newest = page._draw(mine, *TYPED), page._draw(newer, *TYPED)
        for wish in (drawing, newest):
            next(wish)
            next(wish)  # by which it has its ticket
        *_, last = drawing
        list(newest)
        return last

    _, message, shown = interrupted(others)
    assert "another page&#x27;s wish came first" in message and "not drawn" in shown and "step " not in shown
    assert all("__type__" in shown for shown in interrupted(mine))  # what the newer one says stays


def test_a_page_whose_typing_or_choice_another_one_s_wish_has_replaced_says_so(
    page: Any, monkeypatch: pytest.MonkeyPatch
):
    def superseded(*arguments: object, **settings: object) -> Iterator[None]:
        raise Superseded
        yield

    monkeypatch.setattr("lcm_lightning.app.page.draw", superseded)
    monkeypatch.setattr(page.engine, "load", superseded)
    monkeypatch.setattr("lcm_lightning.app.page.followed", lambda job: job)
    message, _ = page._draw_typed(Browser("mine"), True, *TYPED[2:])
    assert "another page" in message
    assert "another page" in list(page._choose(Browser("mine"), ["tiny"], None))[-1][0]


def test_a_model_that_is_added_leaves_what_is_set_for_the_first(
    page: Any, tmp_path: Path, lora_files: dict[str, Path], pipeline_folder: Path
):
    leave_run(tmp_path / "dogs" / "1", lora_files["lcm"], "lcm", pipeline_folder)
    run, mine = f"run:{tmp_path}/dogs/1", Browser("mine")
    *_, (_, first, steps, *_) = page._choose(mine, ["tiny"], None)
    assert (first, steps["value"]) == ("tiny", page.engine.known(page.choices.source("tiny")).columns[-1].steps)
    *_, (message, *unchanged) = page._choose(mine, ["tiny", run], "tiny")
    assert message == "" and all(list(value) == ["__type__"] for value in unchanged)
    *_, (_, first, steps, *_) = page._choose(mine, [run], "tiny")
    assert (first, steps["value"]) == (run, STUDENT.steps)


def test_sliders_reach_what_a_student_is_usually_drawn_with(page: Any):
    """Gradio refuses a value beyond a slider's end, so that such a student could not be drawn from at all."""
    teacher = Column("base", "base", (), DDIM, 50, 7.5)
    student = Column("PCM-LoRA", "student", ("pcm",), STUDENT.sampler, 16, 1.0)
    page.choices.teacher_settings = lambda key: (200, 20.0)
    model = Drawable(ModelSource("x", "x", lambda: pytest.fail("is not read")), [teacher, student], [])
    set_ = [(slider["value"], slider["maximum"]) for slider in page._usual("x", model)[:4]]
    assert set_ == [(16, 16), (1.0, 15), (200, 200), (20.0, 20.0)]


def test_what_is_dropped_on_the_page_is_bounded_and_goes_after_a_day(page: Any, monkeypatch: pytest.MonkeyPatch):
    from lcm_lightning.app.page import serve

    told: dict[str, Any] = {}
    monkeypatch.setattr(page.blocks, "launch", lambda **settings: (told.update(settings), ("", "here", None))[1])
    monkeypatch.setattr(page.blocks, "queue", lambda **settings: page.blocks)
    assert serve(page, "127.0.0.1", None, False) == "here" and told["max_file_size"] == "4gb"
    assert page.blocks.delete_cache == (3600, 24 * 3600)


def test_gradio_sees_that_an_event_s_function_yields(page: Any):
    """One that returns another's generator is taken for a plain function, whose value fits no component."""
    events = [event.fn for event in page.blocks.fns.values() if getattr(event.fn, "__self__", None) is page]
    yielding = [fn for fn in events if "Iterator" in str(fn.__annotations__["return"])]
    assert len(yielding) >= 3 and all(map(inspect.isgeneratorfunction, yielding))
