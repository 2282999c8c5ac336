"""A full LCM of others as the teacher of a LoRA."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionPipeline
from torch import Tensor

from helpers.adapters import random_batch, randomise, train
from helpers.commands import in_process
from helpers.pipelines import build_tiny_pipeline, save_full_lcm
from lcm_lightning.callbacks.export import ExportLora, ExportPipeline
from lcm_lightning.callbacks.student_quality import StudentQuality
from lcm_lightning.config.resolvers import package_file
from lcm_lightning.diffusion.consistency import ConsistencyDistillation
from lcm_lightning.errors import UserError
from lcm_lightning.methods.kd_lora import TEACHER, KdLoraDistillation
from lcm_lightning.methods.randomness import SampleRandomness
from lcm_lightning.models.adapters import LoraSettings, active_adapters
from lcm_lightning.models.sampling import SamplingSetup, sample
from lcm_lightning.models.stable_diffusion import StableDiffusion, load_stable_diffusion
from lcm_lightning.runs.contents import read_manifest


@pytest.fixture(scope="module")
def full_lcm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of method=lcm, as far as it is a teacher."""
    folder = tmp_path_factory.mktemp("run")
    save_full_lcm(build_tiny_pipeline(), folder / "pipeline")
    return folder


def kd(folder: Path, teacher: Path, dtype: torch.dtype = torch.float32, **settings: Any) -> KdLoraDistillation:
    return KdLoraDistillation(
        load_stable_diffusion(str(folder), dtype=dtype),
        teacher_lcm=str(teacher),
        distillation=ConsistencyDistillation(),
        lora=LoraSettings(4, 4),
        optimizer=partial(torch.optim.SGD, lr=1e-3),
        **settings,
    )


def drawn(model: StableDiffusion, setup: SamplingSetup) -> Tensor:
    settings = {"steps": setup.steps, "guidance_scale": setup.guidance_scale, "sampler": setup.sampler}
    with active_adapters(model, setup.adapters):
        return sample(model, ["a dog"], seeds=[3], resolution=32, **settings)


# ---- student -------------------------------------------------------------------------------------------------------


def test_the_exported_student_draws_the_same_in_diffusers(pipeline_folder: Path, full_lcm: Path, tmp_path: Path):
    module = kd(pipeline_folder, full_lcm)
    randomise(module, seed=7)
    callbacks = [ExportLora(str(tmp_path / "lora")), ExportPipeline(str(tmp_path / "pipeline"))]
    trainer = train(module, [random_batch(1, 2)], callbacks=callbacks)
    (adapter,) = read_manifest(tmp_path)
    assert adapter.kind == module.kind and not (tmp_path / "pipeline").exists()
    pipeline = StableDiffusionPipeline.from_pretrained(pipeline_folder, safety_checker=None)
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    pipeline.load_lora_weights(tmp_path / "lora", weight_name=adapter.file)
    pipeline.set_progress_bar_config(disable=True)
    shape = {"height": 32, "width": 32, "generator": torch.Generator().manual_seed(3), "output_type": "pt"}
    settings = {"num_inference_steps": adapter.kind.steps, "guidance_scale": adapter.kind.guidance_scale}
    _, student = module.sampling_setups(teacher_steps=50, guidance_scale=7.5, student_steps=[adapter.kind.steps])
    torch.testing.assert_close(
        drawn(module.model, student), pipeline("a dog", **shape, **settings).images, atol=1e-4, rtol=0
    )
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    kept = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert kept and all(".lora_" in name for name in kept)  # of the teacher nothing


# ---- teacher -------------------------------------------------------------------------------------------------------


def test_it_is_told_w_the_student_is_not(pipeline_folder: Path, full_lcm: Path, monkeypatch: pytest.MonkeyPatch):
    module = kd(pipeline_folder, full_lcm, w_min=2.0, w_max=6.0)
    told = {}
    for name, unet in (("teacher", module.model.variants[TEACHER]), ("student", module.model.unet)):
        unet.register_forward_pre_hook(
            lambda _, args, given, name=name: told.update({name: given["timestep_cond"]}), with_kwargs=True
        )
    seeds = torch.arange(8)
    module.losses(
        torch.zeros(8, 4, 8, 8), module.model.encode_text(["a"] * 8), SampleRandomness(seeds, torch.device("cpu"))
    )
    assert told["student"] is None and len(told["teacher"].unique(dim=0)) == 8


def test_it_is_frozen_in_the_models_type_and_as_it_was_after_training(pipeline_folder: Path, full_lcm: Path):
    module = kd(pipeline_folder, full_lcm, torch.bfloat16)
    teacher = module.model.variants[TEACHER]
    before = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    train(module, [random_batch(1, 2)], precision="bf16-mixed")
    assert {p.dtype for p in teacher.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in teacher.parameters()) and not teacher.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


def test_the_sample_grid_shows_it_told_the_middle_of_the_range(pipeline_folder: Path, full_lcm: Path):
    module = kd(pipeline_folder, full_lcm / "pipeline", w_min=4.0, w_max=6.0)
    teacher, student = module.sampling_setups(teacher_steps=50, guidance_scale=7.5, student_steps=[4])
    assert (teacher.label, teacher.guidance_scale, student.label) == ("teacher, 4 steps", 6.0, "KD-LoRA, 4 steps")
    alone = load_stable_diffusion(str(full_lcm / "pipeline"))
    torch.testing.assert_close(drawn(module.model, teacher), drawn(alone, teacher))


def test_its_pictures_are_kept_under_a_digest_of_its_own_weights(pipeline_folder: Path, full_lcm: Path, tmp_path: Path):
    save_full_lcm(build_tiny_pipeline(), tmp_path / "other", seed=6)
    known = []
    for teacher in (full_lcm, tmp_path / "other", full_lcm):
        module = kd(pipeline_folder, teacher)
        quality = StudentQuality(str(tmp_path), package_file("assets/tiny_clip"))
        quality.setup(type("Trainer", (), {"is_global_zero": True})(), module, "fit")
        known.append(quality._weights)
    assert known[0] == known[2] != known[1]


# ---- mistakes ------------------------------------------------------------------------------------------------------


def test_a_teacher_that_is_none_is_refused(pipeline_folder: Path, tmp_path: Path):
    for teacher, said in (
        (None, r"method\.teacher_lcm=null: expected a run of method=lcm"),
        (tmp_path / "nowhere", r"method\.teacher_lcm=.*nowhere: no such folder"),
        (tmp_path, r"method\.teacher_lcm=.*: holds no model_index\.json"),
        (
            pipeline_folder,
            r"method\.teacher_lcm=.*: no full LCM: .*time_cond_proj_dim is null.*give a run of method=lcm",
        ),
    ):
        with pytest.raises(UserError, match=said):
            KdLoraDistillation.check_settings(teacher_lcm=teacher and str(teacher))


@pytest.mark.parametrize(
    ("file", "changed", "said"),
    [
        ("scheduler/scheduler_config.json", {"prediction_type": "v_prediction"}, "prediction type is v_prediction"),
        ("scheduler/scheduler_config.json", {"beta_end": 0.02}, "noise schedule is not that of"),
        ("scheduler/scheduler_config.json", {"num_train_timesteps": 500}, "number of train timesteps is 500"),
        ("vae/config.json", {"scaling_factor": 0.13025}, "scale of latents is 0.13025"),
    ],
)
def test_a_teacher_of_another_kind_of_model_is_refused(
    pipeline_folder: Path, tmp_path: Path, file: str, changed: dict[str, object], said: str
):
    save_full_lcm(build_tiny_pipeline(), tmp_path)
    (tmp_path / file).write_text(json.dumps(json.loads((tmp_path / file).read_text()) | changed))
    with pytest.raises(UserError, match=rf"method\.teacher_lcm=.*: its {said}.*set model\.path to the Stable"):
        kd(pipeline_folder, tmp_path)


def test_a_teacher_told_by_other_text_encoders_is_refused(full_lcm: Path):
    with pytest.raises(UserError, match=r"its (number of latents' channels|width of captions|scale of latents) is"):
        kd(Path(package_file("assets/tiny")), full_lcm)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"w_min": 8.0}, r"method\.w_min=8\.0"),
        ({"distillation": ConsistencyDistillation(solver="dpmpp", solver_steps=2)}, "solves no ODE; leave them out"),
    ],
)
def test_settings_that_make_no_sense_are_refused(full_lcm: Path, settings: dict[str, Any], said: str):
    with pytest.raises(UserError, match=said):
        KdLoraDistillation.check_settings(teacher_lcm=str(full_lcm), **settings)


def test_sharded_weights_are_refused(pipeline_folder: Path, full_lcm: Path, monkeypatch: pytest.MonkeyPatch):
    module = kd(pipeline_folder, full_lcm)
    monkeypatch.setattr(KdLoraDistillation, "device_mesh", property(lambda self: object()))
    with pytest.raises(UserError, match=r"trainer=fsdp: .*take trainer=ddp"):
        module.configure_model()


# ---- all commands --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_trains_draws_and_is_evaluated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pipeline_folder: Path, full_lcm: Path, flickr_shards: Path
):
    monkeypatch.chdir(tmp_path)
    places = (f"model.path={pipeline_folder}", f"data.source={flickr_shards}", f"method.teacher_lcm={full_lcm}")
    small = ("data.num_workers=0", "data.batch_size=2", "data.val_limit=2", "data.resolution=32", "hydra.run.dir=run")
    chosen = ("experiment=lcm_flickr8k", "method=kd_lora", "method.lora.rank=4", "debug=fdr", "logger=csv")
    in_process("train", *chosen, *places, *small, "callbacks.samples.student_steps=[1]")
    (adapter,) = read_manifest(tmp_path / "run")
    assert (adapter.kind.name, adapter.kind.title, adapter.kind.sampler.name) == ("kd", "KD-LoRA", "lcm")
    evaluation = ("evaluation=quick", "logger=csv", "accelerator=cpu", "dtype=float32", "evaluation.num_images=4")
    evaluation += ("evaluation.bootstrap_samples=2", "evaluation.latency_repeats=1", "~evaluation.lineup.rivals")
    lineup = ("evaluation.lineup.teacher_steps=1", "evaluation.lineup.student_steps=[1,2]")
    in_process("evaluate", "run=run", *evaluation, *lineup)
    models = json.loads((tmp_path / "run" / "evaluation" / "metrics.json").read_text())["models"]
    assert {model["slug"] for model in models if model["role"] == "student"} == {"kd_lora_1", "kd_lora_2"}
    in_process("lcm_lightning.generate", "run=run", "prompt=dog", "num_images=1", "accelerator=cpu", "output=drawn")
    assert (tmp_path / "drawn" / "dog-0.png").is_file()
