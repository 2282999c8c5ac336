"""What is measured of a student's pictures while it trains, and what is done by it."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from helpers.adapters import randomise
from helpers.commands import in_process
from helpers.photos import small_batches
from lcm_lightning.callbacks import shared_sampling
from lcm_lightning.callbacks.checkpoints import Checkpoints
from lcm_lightning.callbacks.export import ExportLora
from lcm_lightning.callbacks.student_quality import StudentQuality
from lcm_lightning.config.resolvers import package_file
from lcm_lightning.diffusion.consistency import ConsistencyDistillation
from lcm_lightning.errors import UserError
from lcm_lightning.evaluation.features import Clip, ClipPatches
from lcm_lightning.evaluation.kernel_distances import Cmmd, kid
from lcm_lightning.evaluation.metrics import Resampling
from lcm_lightning.evaluation.student import StudentMeasure
from lcm_lightning.methods.lcm_lora import LCM, LcmLoraDistillation
from lcm_lightning.methods.lora import LoraFinetuning
from lcm_lightning.models.adapters import LoraSettings, active_adapters
from lcm_lightning.models.sampling import DDIM, sample
from lcm_lightning.models.stable_diffusion import load_stable_diffusion
from lcm_lightning.runs.checkpoint_files import AtomicCheckpointIO, find_checkpoint, global_step
from lcm_lightning.runs.contents import Adapter, read_manifest, write_manifest

CLIP = package_file("assets/tiny_clip")
FIGURES = ("val/student_distance", "val/student_cmmd", "val/student_kid")


def student(pipeline: Path, lr: float = 0.01) -> LcmLoraDistillation:
    module = LcmLoraDistillation(
        load_stable_diffusion(str(pipeline)),
        distillation=ConsistencyDistillation(),
        lora=LoraSettings(rank=4, alpha=4, target_modules="attention"),
        optimizer=partial(torch.optim.AdamW, lr=lr),
    )
    randomise(module, seed=1)
    return module


def quality(folder: Path, **options: Any) -> StudentQuality:
    small = {"num_images": 4, "steps": 1, "teacher_steps": 2, "batch_size": 3, "bootstrap_samples": 4, "min_photos": 4}
    return StudentQuality(str(folder), CLIP, **(small | options))


def trainer_with(folder: Path, *callbacks: L.Callback, max_steps: int = 4) -> L.Trainer:
    return L.Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        max_epochs=-1,
        val_check_interval=2,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        logger=False,
        callbacks=[*callbacks, Checkpoints(str(folder / "checkpoints"))],
        plugins=[AtomicCheckpointIO()],
        enable_progress_bar=False,
        enable_model_summary=False,
    )


def validated(module: L.LightningModule, callback: StudentQuality, folder: Path, shards: Path) -> dict[str, float]:
    """What a validation logs."""
    trainer = trainer_with(folder, callback)
    trainer.validate(module, datamodule=small_batches(shards), verbose=False)
    return {name: value.item() for name, value in trainer.callback_metrics.items()}


# ---- the measure ---------------------------------------------------------------------------------------------------


def mmd_of_pairs(kernel: Callable[[np.ndarray, np.ndarray], float], x: np.ndarray, y: np.ndarray) -> float:
    """Gretton et al. 2012, eq. 4: the mean over i != j of ``k(x_i, x_j) + k(y_i, y_j) - k(x_i, y_j) - k(x_j, y_i)``."""
    pairs = [(i, j) for i, j in product(range(len(x)), repeat=2) if i != j]
    terms = [kernel(x[i], x[j]) + kernel(y[i], y[j]) - kernel(x[i], y[j]) - kernel(x[j], y[i]) for i, j in pairs]
    return float(np.mean(terms))


def test_the_distance_of_pairs_is_that_of_its_definition_on_all_images_and_on_each_half():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(9, 5))
    y = x + 0.5 * rng.normal(size=(9, 5))
    resampling = Resampling.of(np.arange(9), 9, samples=3)
    unit = [v / np.linalg.norm(v, axis=1, keepdims=True) for v in (x, y)]
    found = kid(y, resampling, paired=True).draws(x), Cmmd(y, resampling, paired=True).draws(x)
    for row, counts in enumerate(resampling.real.astype(bool)):
        cubic = mmd_of_pairs(lambda a, b: (a @ b / 5 + 1) ** 3, x[counts], y[counts])
        gaussian = mmd_of_pairs(lambda a, b: np.exp(-((a - b) ** 2).sum() / 200), *(v[counts] for v in unit))
        assert found[0][row] == pytest.approx(cubic, rel=1e-9)
        assert found[1][row] == pytest.approx(1000 * gaussian, rel=1e-9)
    assert kid(x, resampling, paired=True).draws(x) == pytest.approx(np.zeros(7), abs=1e-12)


def pictures(count: int, seed: int) -> Tensor:
    """Coarse noise."""
    cells = torch.rand(count, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return (255 * torch.nn.functional.interpolate(cells, scale_factor=8)).round().byte()


def test_a_student_like_its_teacher_is_at_0_and_one_that_leaves_it_goes_up_in_every_figure():
    teacher, other = pictures(12, seed=0), pictures(12, seed=1).float() * 0.2
    measure = StudentMeasure(Clip(CLIP), teacher, None, samples=10, device=torch.device("cpu"), batch_size=5)
    figures = [measure((teacher.float() * (1 - a) + other * a).round().byte()) for a in (0.0, 0.3, 1.0)]
    for name in ("distance", "cmmd", "kid"):
        values = [figure[name].value for figure in figures]
        assert values[0] == pytest.approx(0, abs=1e-6)
        assert values == sorted(values) and values[2] > 10 * abs(values[0])
        assert figures[2][name].low < values[2] < figures[2][name].high


def test_against_photos_the_figures_are_the_evaluations():
    clip = Clip(CLIP)
    drawn, teacher, photos = (pictures(8, seed) for seed in range(3))
    measure = StudentMeasure(clip, teacher, photos, samples=5, device=torch.device("cpu"), batch_size=3)
    resampling = Resampling.of(np.arange(8), 8, samples=5)
    real, mean_patch = ClipPatches(clip)(photos).numpy(), ClipPatches(clip)
    scale = np.sqrt((real.astype(float) ** 2).mean())
    expected = kid(real / scale, resampling)
    for images, figures in ((drawn, measure(drawn)), (teacher, measure.teacher)):
        draws = Cmmd(clip(photos).numpy(), resampling).draws(clip(images).numpy())
        assert figures["cmmd"].value == pytest.approx(draws[0], rel=1e-4)
        assert figures["kid"].value == pytest.approx(expected.draws(mean_patch(images).numpy() / scale)[0], rel=1e-4)


# ---- the callback --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("min_photos", [4, 5])
def test_it_logs_what_the_students_own_pictures_give(
    tmp_path: Path, pipeline_folder: Path, flickr_shards: Path, min_photos: int
):
    """With 4 held-out photos: against them, or, as too few, against the teacher's pictures."""
    module, callback = student(pipeline_folder), quality(tmp_path, min_photos=min_photos)
    logged = validated(module, callback, tmp_path, flickr_shards)
    samples = list(small_batches(flickr_shards).iterate_split("val"))
    captions = [s.captions[0] for s in samples]
    draw = partial(sample, module.model, captions, seeds=range(4), resolution=32)
    with active_adapters(module.model, ("lcm",)):
        drawn = draw(steps=1, guidance_scale=1.0, sampler=LCM)
    with active_adapters(module.model, ()):
        teacher = draw(steps=2, guidance_scale=7.5, sampler=DDIM)
    drawn, teacher = ((255 * images).round().byte() for images in (drawn, teacher))
    photos = torch.stack([square(s.image) for s in samples]) if min_photos == 4 else None
    measure = StudentMeasure(Clip(CLIP), teacher, photos, samples=4, device=torch.device("cpu"), batch_size=4)
    for name, figure in measure(drawn).items():
        assert logged[f"val/student_{name}"] == pytest.approx(figure.value, rel=1e-3, abs=1e-5)
        assert logged[f"val/student_{name}_high"] == pytest.approx(figure.high, rel=1e-3, abs=1e-5)
    assert logged["val/student_distance"] > 0
    assert (tmp_path / "quality.png").is_file()
    assert callback.history[0]["loss"] == [logged["val/loss"]]


def square(image: Any) -> Tensor:
    """A 48 x 40 px photo at 32 px: the shorter side, then the centre."""
    small = image.resize((round(48 * 32 / 40), 32), 3)
    left = (small.width - 32) // 2
    return torch.from_numpy(np.array(small.crop((left, 0, left + 32, 32)))).permute(2, 0, 1)


def test_training_is_the_same_to_the_bit_with_it_and_after_a_stop(
    tmp_path: Path, pipeline_folder: Path, flickr_shards: Path
):
    """4 steps without it; 4 with it; and 2, then 2 more from the checkpoint: the figures are the same too."""
    states, histories = {}, {}
    for name, runs in {"without": [4], "with": [4], "stopped": [2, 4]}.items():
        for max_steps in runs:
            folder = tmp_path / name
            callbacks = [] if name == "without" else [quality(folder)]
            torch.manual_seed(0)
            trainer, checkpoint = trainer_with(folder, *callbacks, max_steps=max_steps), find_checkpoint("auto", folder)
            data = small_batches(flickr_shards)
            trainer.fit(student(pipeline_folder), datamodule=data, ckpt_path=checkpoint, weights_only=True)
            histories[name] = [callback.history for callback in callbacks]
        random = torch.get_rng_state() if name != "stopped" else torch.empty(0)
        states[name] = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True), random
    assert torch.equal(states["without"][1], states["with"][1])
    for name in ("with", "stopped"):
        (expected, found) = (states[run][0] for run in ("without", name))
        assert found["global_step"] == 4
        assert all(torch.equal(found["state_dict"][key], tensor) for key, tensor in expected["state_dict"].items())
        assert str(found["optimizer_states"]) == str(expected["optimizer_states"])
    assert list(histories["with"][0]) == [2, 4]
    assert histories["with"] == histories["stopped"]


def test_a_teachers_pictures_are_drawn_once_and_never_taken_for_anothers(
    tmp_path: Path, pipeline_folder: Path, flickr_shards: Path, monkeypatch: pytest.MonkeyPatch
):
    drawn: list[tuple[str, int]] = []

    def counted(model: Any, prompts: list[str], **options: Any) -> Tensor:
        drawn.append((options["sampler"].name, len(prompts)))
        return sample(model, prompts, **options)

    monkeypatch.setattr(shared_sampling, "sample", counted)
    first = validated(student(pipeline_folder), quality(tmp_path), tmp_path, flickr_shards)
    assert drawn == [("ddim", 4), ("lcm", 4)]
    assert validated(student(pipeline_folder), quality(tmp_path), tmp_path, flickr_shards) == first
    assert drawn[2:] == [("lcm", 4)]
    other = student(pipeline_folder)
    with torch.no_grad():
        next(other.model.vae.parameters()).mul_(1.01)
    assert validated(other, quality(tmp_path), tmp_path, flickr_shards) != first
    validated(student(pipeline_folder), quality(tmp_path, seed=1), tmp_path, flickr_shards)
    assert drawn[3:] == [("ddim", 4), ("lcm", 4)] * 2
    assert len(list(tmp_path.glob("teacher-*.safetensors"))) == 3


def test_a_student_that_draws_nothing_finite_has_no_figures(tmp_path: Path, pipeline_folder: Path, flickr_shards: Path):
    module = student(pipeline_folder)
    with torch.no_grad():
        module.adapter_parameters()[0].fill_(torch.nan)
    logged = validated(module, quality(tmp_path), tmp_path, flickr_shards)
    assert all(np.isnan(logged[name]) for name in FIGURES)


def test_what_cannot_be_measured_is_refused(tmp_path: Path, pipeline_folder: Path, flickr_shards: Path):
    with pytest.raises(UserError, match=r"callbacks\.student_quality\.steps=51: the sampler LCM takes from 1 to 50"):
        validated(student(pipeline_folder), quality(tmp_path, steps=51), tmp_path, flickr_shards)
    tuned = LoraFinetuning(
        load_stable_diffusion(str(pipeline_folder)),
        lora=LoraSettings(rank=4, alpha=4, target_modules="attention"),
        optimizer=torch.optim.AdamW,
    )
    with pytest.raises(UserError, match=r"callbacks\.student_quality: method LoraFinetuning trains no student"):
        validated(tuned, quality(tmp_path), tmp_path, flickr_shards)


# ---- what is done by it --------------------------------------------------------------------------------------------

COMMAND = (
    "experiment=lcm_flickr8k",
    "callbacks=early_stopping",
    f"callbacks.student_quality.clip={CLIP}",
    "callbacks.student_quality.num_images=4",
    "callbacks.student_quality.teacher_steps=2",
    "callbacks.student_quality.bootstrap_samples=4",
    "callbacks.early_stopping.patience=1",
    "callbacks.samples=null",
    "trainer.precision=32-true",
    "logger=csv",
    "data.num_workers=0",
    "data.batch_size=2",
    "data.val_limit=2",
    "data.resolution=32",
    "method.lora.rank=4",
    "optimizer.lr=0",  # so that no picture gets better
    "max_steps=9",
    "val_every=2",
)


def figures(run: Path) -> list[dict[str, str]]:
    """Rows of validations."""
    with (run / "metrics.csv").open() as file:
        return [row for row in csv.DictReader(file) if row["val/loss"]]


def test_a_run_ends_where_pictures_no_longer_get_better_keeps_the_best_and_says_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pipeline_folder: Path, flickr_shards: Path
):
    monkeypatch.chdir(tmp_path)
    places = (f"model.path={pipeline_folder}", f"data.source={flickr_shards}", "hydra.run.dir=run", "trainer=cpu")
    in_process("train", *COMMAND, *places)
    run = tmp_path / "run"
    rows = figures(run)
    assert [row["step"] for row in rows] == ["1", "3"]  # counted from 0
    assert {name for name in rows[0] if "student" in name} == {
        f"{f}{e}" for f in FIGURES for e in ("", "_low", "_high")
    }
    assert rows[0]["val/student_cmmd"] == rows[1]["val/student_cmmd"] != ""
    assert global_step(run / "checkpoints" / "best.ckpt") == 2
    assert global_step(run / "checkpoints" / "last.ckpt") == 4
    assert [adapter.step for adapter in read_manifest(run)] == [2]
    for name in ("pytorch_lora_weights", "kohya_lora_weights"):
        with safe_open(run / "lora" / f"{name}.safetensors", framework="pt") as file:
            assert file.metadata()["step"] == "2"
    assert (run / "quality" / "quality.png").is_file()


@pytest.mark.parametrize(("step", "kept"), [(2, 0.5), (3, np.inf)])
def test_an_export_goes_on_from_the_best_only_where_that_is_in_its_folder(tmp_path: Path, step: int, kept: float):
    write_manifest(tmp_path / "lora", [Adapter(LcmLoraDistillation.kind, step=2)])
    export = ExportLora(str(tmp_path / "lora"), best_by="val/student_cmmd")
    export.load_state_dict({"best_value": 0.5, "best_step": step})
    assert export.state_dict()["best_value"] == kept


@pytest.mark.parametrize(("there", "kept"), [(True, 0.5), (False, np.inf)])
def test_checkpoints_go_on_from_the_best_only_where_that_is_in_their_folder(tmp_path: Path, there: bool, kept: float):
    if there:
        (tmp_path / "best.ckpt").touch()
    checkpoints = Checkpoints(str(tmp_path), best_by="val/student_cmmd")
    checkpoints.load_state_dict({"best_value": 0.5})
    assert checkpoints.state_dict()["best_value"] == kept


def test_a_step_that_is_none_is_refused(tmp_path: Path, pipeline_folder: Path):
    kind = LcmLoraDistillation.kind.to_json()
    (tmp_path / "lora").mkdir()
    entry = {"file": "a.safetensors", **kind, "step": "many"}
    (tmp_path / "lora" / "adapters.json").write_text(json.dumps({"adapters": [entry]}))
    with pytest.raises(UserError, match=r"lora/adapters\.json is damaged"):
        read_manifest(tmp_path)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_measure_and_stop_as_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pipeline_folder: Path, flickr_shards: Path, train_command: Any
):
    monkeypatch.chdir(tmp_path)
    places = (f"model.path={pipeline_folder}", f"data.source={flickr_shards}", "callbacks.student_quality.num_images=3")
    for name, trainer in {"one": "trainer=cpu", "two": "trainer=ddp_sim"}.items():
        finished = train_command(*COMMAND, *places, trainer, f"hydra.run.dir={name}")
        assert finished.returncode == 0, finished.stderr
    one, two = (figures(tmp_path / name) for name in ("one", "two"))
    assert [row["step"] for row in one] == [row["step"] for row in two] == ["1", "3"]
    for name in FIGURES:
        for a, b in zip(one, two, strict=True):
            assert float(a[name]) == pytest.approx(float(b[name]), rel=1e-3, abs=1e-4)
