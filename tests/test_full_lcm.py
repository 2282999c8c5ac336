"""Full LCMs: whole UNets told their guidance scale, drawn as diffusers' LatentConsistencyModelPipeline draws them."""

from __future__ import annotations

import json
import shutil
from functools import partial
from pathlib import Path

import lightning as L
import numpy as np
import pytest
import torch
from diffusers import LatentConsistencyModelImg2ImgPipeline, LatentConsistencyModelPipeline, UNet2DConditionModel
from omegaconf import OmegaConf
from PIL import Image
from torch import Tensor

from helpers.adapters import random_batch, randomise, train
from helpers.commands import in_process
from helpers.photos import small_batches
from lcm_lightning.callbacks.export import ExportLora, ExportPipeline
from lcm_lightning.callbacks.student_quality import StudentQuality
from lcm_lightning.config.resolvers import package_file
from lcm_lightning.diffusion.consistency import ConsistencyDistillation, guidance_embedding
from lcm_lightning.errors import UserError
from lcm_lightning.evaluation.contenders import Lineup
from lcm_lightning.evaluation.model_sources import LoadedModel
from lcm_lightning.inspect import describe
from lcm_lightning.methods.lcm import FULL_LCM, STUDENT, LcmDistillation
from lcm_lightning.methods.lcm_lora import LCM, LcmLoraDistillation
from lcm_lightning.models.adapters import LoraSettings, active_adapters, add_lora, lora_state_dict, merged_adapters
from lcm_lightning.models.lora_files import save_lora
from lcm_lightning.models.sampling import DDIM, InitialImage, Sampler, sample
from lcm_lightning.models.stable_diffusion import StableDiffusion, load_stable_diffusion
from lcm_lightning.runs.contents import read_manifest
from lcm_lightning.runs.loading import load_run

PROMPTS, SEEDS = ["a dog on a beach", "two children"], [3, 4]
NAME = LcmDistillation.kind.name


def full_lcm(folder: Path, lr: float = 0.1, **settings: object) -> LcmDistillation:
    return LcmDistillation(
        load_stable_diffusion(str(folder)),
        distillation=ConsistencyDistillation(),
        guidance_dimension=16,
        optimizer=partial(torch.optim.SGD, lr=lr),
        **settings,
    )


def unsettle(unet: torch.nn.Module, seed: int) -> None:
    """A network in mid-training, which minds what guidance it is told."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        unet.time_embedding.cond_proj.weight.normal_(0, 0.5, generator=generator)
        unet.conv_out.weight.mul_(1.3)


def fit(module: LcmDistillation, run: Path) -> L.Trainer:
    """A step of training, exported."""
    callbacks = [ExportLora(str(run / "lora")), ExportPipeline(str(run / "pipeline"))]
    return train(module, [random_batch(1, 2)], max_steps=1, callbacks=callbacks)


@pytest.fixture(scope="module")
def trained(pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[LcmDistillation, Path]:
    """A module after a step from mid-training, and its run's folder."""
    run = tmp_path_factory.mktemp("run")
    module = full_lcm(pipeline_folder, w_min=3.0, w_max=9.0)
    for seed, name in enumerate((STUDENT, NAME)):
        unsettle(module.model.variants[name], seed)
    fit(module, run)
    target = "lcm_lightning.models.stable_diffusion.load_stable_diffusion"
    OmegaConf.save({"model": {"_target_": target, "path": str(pipeline_folder)}, "data": {}}, run / "config.yaml")
    return module, run


def our_images(model: StableDiffusion, guidance_scale: float = 8.5, sampler: Sampler = FULL_LCM) -> Tensor:
    settings = {"seeds": SEEDS, "steps": 3, "guidance_scale": guidance_scale, "sampler": sampler, "resolution": 32}
    return sample(model, PROMPTS, **settings)


def diffusers_images(folder: Path, guidance_scale: float) -> Tensor:
    pipeline = LatentConsistencyModelPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    images = [
        pipeline(
            prompt,
            height=32,
            width=32,
            num_inference_steps=3,
            guidance_scale=guidance_scale,
            generator=torch.Generator().manual_seed(seed),
            output_type="pt",
        ).images
        for prompt, seed in zip(PROMPTS, SEEDS, strict=True)
    ]
    return torch.cat(images)


# ---- what the network is told --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dimension", [4, 16, 256])
def test_the_embedding_is_that_of_diffusers(dimension: int):
    w = torch.tensor([0.0, 4.2, 7.5, 15.0])
    expected = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, w, embedding_dim=dimension)
    torch.testing.assert_close(guidance_embedding(w, dimension), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dimension", [2, 7])
def test_an_embedding_without_two_frequencies_or_of_odd_width_is_refused(dimension: int):
    with pytest.raises(ValueError, match=f"dimension={dimension}"):
        guidance_embedding(torch.ones(1), dimension)


def test_it_begins_as_its_teacher_whatever_it_is_told(pipeline_folder: Path):
    """The same picture, by a sampler of the same steps that tells nothing."""
    module = full_lcm(pipeline_folder)
    teacher = our_images(module.model, guidance_scale=1.0, sampler=LCM)
    for name in (STUDENT, NAME):
        with active_adapters(module.model, (name,)):
            assert all(torch.equal(our_images(module.model, told), teacher) for told in (1.0, 8.5))


# ---- training ------------------------------------------------------------------------------------------------------


def test_a_step_moves_all_of_the_student_and_the_target_a_share_of_the_way(pipeline_folder: Path, tmp_path: Path):
    module = full_lcm(pipeline_folder, ema_decay=0.75)
    unsettle(module.model.variants[STUDENT], 0)
    student, target = (dict(module.model.variants[name].named_parameters()) for name in (STUDENT, NAME))
    before = {name: [p.detach().clone() for p in (student[name], target[name])] for name in student}
    teacher = {name: p.detach().clone() for name, p in module.model.unet.named_parameters()}
    fit(module, tmp_path)
    assert module.trained_by(NAME) == list(student.values())
    assert all(not torch.equal(student[name], old) for name, (old, _) in before.items() if "cond_proj" in name)
    moved = [name for name, (old, _) in before.items() if not torch.equal(student[name], old)]
    assert len(moved) > 0.9 * len(student)  # all but what has no gradient, as the keys' biases
    for name, (_, old) in before.items():
        torch.testing.assert_close(target[name], 0.75 * old + 0.25 * student[name])
    assert all(torch.equal(p, teacher[name]) for name, p in module.model.unet.named_parameters())


def test_a_checkpoint_holds_student_and_target(pipeline_folder: Path, tmp_path: Path):
    module = full_lcm(pipeline_folder)
    trainer = fit(module, tmp_path)
    trainer.save_checkpoint(tmp_path / "a.ckpt")
    kept = torch.load(tmp_path / "a.ckpt", weights_only=True)["state_dict"]
    assert {".".join(name.split(".")[:3]) for name in kept} == {f"model.variants.{name}" for name in (STUDENT, NAME)}
    fresh = full_lcm(pipeline_folder)
    fresh.load_state_dict(kept, strict=False)
    for name in (STUDENT, NAME):
        pairs = zip(*(m.model.variants[name].parameters() for m in (module, fresh)), strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)


def test_copies_of_a_compiled_network_are_compiled(pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    settings = {"distillation": ConsistencyDistillation(), "optimizer": partial(torch.optim.SGD, lr=0.1)}
    variants = LcmDistillation(load_stable_diffusion(str(pipeline_folder), compile=True), **settings).model.variants
    assert len(variants) == 3 and all(unet._compiled_call_impl is not None for unet in variants.values())


def test_its_pictures_are_measured_and_the_best_steps_pipeline_is_kept(
    pipeline_folder: Path, tmp_path: Path, flickr_shards: Path
):
    """The learning rate is 0: no step is better than the first that was measured."""
    module = full_lcm(pipeline_folder, lr=0.0)
    unsettle(module.model.variants[NAME], 0)
    module.model.variants[STUDENT].load_state_dict(module.model.variants[NAME].state_dict())
    small = {"num_images": 4, "steps": 2, "teacher_steps": 2, "bootstrap_samples": 0, "min_photos": 5}
    quality = StudentQuality(str(tmp_path / "quality"), package_file("assets/tiny_clip"), **small)
    export = ExportPipeline(str(tmp_path / "pipeline"), best_by="val/student_cmmd")
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=2,
        val_check_interval=1,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[quality, export],
    )
    trainer.fit(module, datamodule=small_batches(flickr_shards))
    assert [adapter.step for adapter in read_manifest(tmp_path)] == [1] and list(quality.history) == [1, 2]
    assert trainer.callback_metrics["val/student_distance"] > 0.01  # drawn with what was unsettled


@pytest.mark.parametrize(("w_min", "w_max", "expected"), [(5.0, 15.0, 8.5), (2.0, 4.0, 5.0), (9.0, 9.0, 10.0)])
def test_it_is_drawn_with_a_guidance_it_was_trained_on(
    pipeline_folder: Path, w_min: float, w_max: float, expected: float
):
    module = full_lcm(pipeline_folder, w_min=w_min, w_max=w_max)
    assert module.kind.guidance_scale == expected
    (_, setup) = module.sampling_setups(teacher_steps=50, guidance_scale=7.5, student_steps=[4])
    assert (setup.label, setup.guidance_scale) == ("full LCM, 4 steps", expected)


def test_a_full_lcm_is_no_teacher(trained: tuple[LcmDistillation, Path]):
    folder = trained[1] / "pipeline"
    settings = {"distillation": ConsistencyDistillation(), "optimizer": partial(torch.optim.SGD, lr=0.1)}
    for method in (LcmDistillation, partial(LcmLoraDistillation, lora=LoraSettings(4, 4))):
        with pytest.raises(UserError, match=r"model\.path=.*: a full LCM.*give the Stable Diffusion model"):
            method(load_stable_diffusion(str(folder)), **settings)


# ---- what it leaves ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance_scale", [8.5, 1.0])
def test_the_exported_folder_draws_the_same_in_diffusers(trained: tuple[LcmDistillation, Path], guidance_scale: float):
    module, run = trained
    expected = diffusers_images(run / "pipeline", guidance_scale)
    with active_adapters(module.model, (NAME,)):
        torch.testing.assert_close(our_images(module.model, guidance_scale), expected, atol=1e-5, rtol=0)
    read = load_stable_diffusion(str(run / "pipeline"))
    torch.testing.assert_close(our_images(read, guidance_scale), expected, atol=1e-5, rtol=0)
    other = diffusers_images(run / "pipeline", guidance_scale + 2)
    assert (other - expected).abs().max() > 0.01  # what it is told counts


def test_a_run_brings_its_teacher_and_what_became_of_it(trained: tuple[LcmDistillation, Path], pipeline_folder: Path):
    module, run = trained
    loaded = load_run(run)
    assert loaded.adapters == (module.kind,) and not (run / "lora").exists()
    student = our_images(loaded.model)  # all it has acts
    with merged_adapters(loaded.model, (NAME,)):
        assert torch.equal(our_images(loaded.model), student)
    with active_adapters(module.model, (NAME,)):
        assert torch.equal(our_images(module.model), student)
    with merged_adapters(loaded.model, ()):
        base = our_images(loaded.model, 7.5, DDIM)
    assert torch.equal(base, our_images(load_stable_diffusion(str(pipeline_folder)), 7.5, DDIM))
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


def test_an_evaluation_knows_teacher_and_student_again(trained: tuple[LcmDistillation, Path], pipeline_folder: Path):
    loaded = load_run(trained[1])
    identities = LoadedModel(loaded.model, loaded.adapters).identities()
    base = LoadedModel(load_stable_diffusion(str(pipeline_folder)), ()).identities()
    assert identities[""] == base[""] and identities[NAME] != identities[""]
    alone = LoadedModel(load_stable_diffusion(str(trained[1] / "pipeline")), (LcmDistillation.kind,))
    assert LoadedModel(loaded.model, loaded.adapters).taught and not alone.taught
    with torch.no_grad():
        loaded.model.variants[NAME].conv_out.bias.add_(1)
    changed = LoadedModel(loaded.model, loaded.adapters).identities()
    assert (changed[""], changed[NAME] != identities[NAME]) == (identities[""], True)


def test_without_its_teacher_it_is_compared_with_nobody():
    lineup = Lineup(student_steps=(4, 1))
    alone = lineup.contenders((LcmDistillation.kind,), taught=False)
    assert [(c.slug, c.teacher, c.network_evaluations) for c in alone] == [
        ("full_lcm_4", "full_lcm_4", 4),
        ("full_lcm_1", "full_lcm_1", 1),
    ]
    beside = lineup.contenders((LcmDistillation.kind,))
    assert {c.teacher for c in beside} == {"base_ddim_50"} and beside[-2:] == [
        *(c for c in beside if c.role == "student")
    ]


def test_it_draws_from_a_photo_as_diffusers_does(trained: tuple[LcmDistillation, Path]):
    """In all steps: of fewer, diffusers' LCMs spread as many over the rest, and every sampler here takes a share."""
    folder, photo = trained[1] / "pipeline", torch.rand(3, 32, 48, generator=torch.Generator().manual_seed(0))
    pipeline = LatentConsistencyModelImg2ImgPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    settings = {"num_inference_steps": 3, "guidance_scale": 8.5, "strength": 1.0, "output_type": "pt"}
    expected = pipeline("a dog", image=photo[None], generator=torch.Generator().manual_seed(3), **settings).images
    drawn = {"seeds": [3], "steps": 3, "guidance_scale": 8.5, "sampler": FULL_LCM}
    init_image = InitialImage(2 * photo - 1, strength=1.0)
    found = sample(load_stable_diffusion(str(folder)), ["a dog"], **drawn, init_image=init_image)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_a_style_lora_acts_on_it(
    trained: tuple[LcmDistillation, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    folder = trained[1] / "pipeline"
    model = load_stable_diffusion(str(folder))
    add_lora(model.unet, "style", LoraSettings(4, 4))
    randomise(model.unet, seed=7)
    save_lora(lora_state_dict(model.unet, "style"), tmp_path / "style.safetensors")
    common = ("model=sd15", f"model.path={folder}", "lora=style.safetensors", "accelerator=cpu", "dtype=float32")
    chosen = ("prompt=dog", "num_images=1", "seed=3", "steps=3", "output=a")
    in_process("lcm_lightning.generate", *common, *chosen, "lora_role=finetuned")
    pipeline = LatentConsistencyModelPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(tmp_path, weight_name="style.safetensors")
    settings = {"num_inference_steps": 3, "guidance_scale": 8.5, "height": 32, "width": 32, "output_type": "np"}
    expected = pipeline("dog", generator=torch.Generator().manual_seed(3), **settings).images[0]
    found = np.asarray(Image.open(tmp_path / "a" / "dog-3.png"), dtype=float) / 255
    assert np.abs(found - expected).max() < 1 / 255


def test_another_student_on_top_is_refused(
    trained: tuple[LcmDistillation, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.safetensors").touch()
    with pytest.raises(SystemExit):
        folder = f"model.path={trained[1] / 'pipeline'}"
        in_process("lcm_lightning.generate", "model=sd15", folder, "lora=a.safetensors", "lora_role=lcm", "prompt=dog")
    assert "a full LCM, which takes no LCM-LoRA on top" in capsys.readouterr().err


def test_its_run_is_no_lora(
    trained: tuple[LcmDistillation, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        in_process("lcm_lightning.generate", "model=sd15", f"lora={trained[1]}", "prompt=cat")
    assert f"left no LoRA; give run={trained[1]}" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"method\.teacher_lora=.*: a run that trained a whole UNet"):
        LcmDistillation.check_settings(teacher_lora=str(trained[1]))


def test_generate_draws_from_a_run_and_from_the_folder_alone(
    trained: tuple[LcmDistillation, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    _, run = trained
    common = ("prompt=cat", "num_images=1", "accelerator=cpu", "dtype=float32")
    in_process("lcm_lightning.generate", f"run={run}", *common, "output=a")
    in_process("lcm_lightning.generate", "model=sd15", f"model.path={run / 'pipeline'}", *common, "output=b")
    one, other = (Image.open(tmp_path / folder / "cat-0.png") for folder in "ab")  # each says its own model
    assert one.tobytes() == other.tobytes()


def test_inspect_says_what_the_run_left(trained: tuple[LcmDistillation, Path]):
    ((_, rows),) = describe(trained[1])
    assert ("step", "1") in rows and "refused" not in dict(rows)
    assert ("adapter", "full_lcm (full LCM)") in rows
    assert ("guidance", "told to the UNet (a full LCM)") in rows


def test_the_published_layout_is_read(trained: tuple[LcmDistillation, Path], tmp_path: Path):
    """SimianLuo/LCM_Dreamshaper_v7 names a safety checker, and an LCMScheduler with settings of its own."""
    folder = shutil.copytree(trained[1] / "pipeline", tmp_path / "published")
    (folder / "adapters.json").unlink()
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"], "requires_safety_checker": True}
    (folder / "model_index.json").write_text(json.dumps(index))
    scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    (folder / "scheduler" / "scheduler_config.json").write_text(json.dumps(scheduler | {"clip_sample": True}))
    found = our_images(load_stable_diffusion(str(folder)))
    torch.testing.assert_close(found, diffusers_images(trained[1] / "pipeline", 8.5), atol=1e-5, rtol=0)


# ---- mistakes ------------------------------------------------------------------------------------------------------


def test_a_sampler_that_does_not_tell_and_a_network_that_is_not_told_are_refused(
    trained: tuple[LcmDistillation, Path], tiny_model: StableDiffusion
):
    model = load_stable_diffusion(str(trained[1] / "pipeline"))
    with pytest.raises(UserError, match=r"sampler=ddim: .* is a full LCM"):
        our_images(model, sampler=DDIM)
    with pytest.raises(UserError, match=r"sampler=full_lcm: is for full LCMs"):
        our_images(tiny_model)
    with pytest.raises(UserError, match=r"guidance_scale=0\.5: expected at least 1"):
        our_images(model, guidance_scale=0.5)


def test_sharded_weights_are_refused(pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch):
    module = full_lcm(pipeline_folder)
    monkeypatch.setattr(LcmDistillation, "device_mesh", property(lambda self: object()))
    with pytest.raises(UserError, match=r"trainer=fsdp: .*take trainer=ddp"):
        module.configure_model()


def test_a_manifest_of_a_whole_unet_is_read_back(trained: tuple[LcmDistillation, Path]):
    (adapter,) = read_manifest(trained[1])
    assert adapter.kind.whole and adapter.kind.sampler.tells_guidance and adapter.file == "unet"
    assert isinstance(load_run(trained[1]).model.unet, UNet2DConditionModel)


# ---- all commands --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_run_trains_draws_is_gone_on_with_and_is_evaluated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    chosen = (
        "experiment=quickstart",
        "method=lcm",
        "~method.lora",
        "debug=fdr",
        "trainer.limit_val_batches=1",
        "resume=auto",
    )
    grid = (
        "callbacks.samples.teacher_steps=1",
        "callbacks.samples.num_prompts=1",
        "callbacks.samples.student_steps=[1]",
    )
    small = ("data.num_workers=0", "data.batch_size=2", "data.val_limit=2", "hydra.run.dir=run")
    for steps in (1, 2):
        in_process("train", *chosen, *grid, *small, f"max_steps={steps}", f"trainer.max_steps={steps}")
        assert [adapter.step for adapter in read_manifest(tmp_path / "run")] == [steps]
    evaluation = ("evaluation=quick", "logger=csv", "accelerator=cpu", "dtype=float32", "evaluation.num_images=4")
    evaluation += ("evaluation.bootstrap_samples=2", "evaluation.latency_repeats=1", "~evaluation.lineup.rivals")
    lineup = ("evaluation.lineup.teacher_steps=1", "evaluation.lineup.student_steps=[1,2]")
    in_process("evaluate", "run=run", *evaluation, *lineup)
    models = json.loads((tmp_path / "run" / "evaluation" / "metrics.json").read_text())["models"]
    students = {model["slug"]: model["network_evaluations"] for model in models if model["role"] == "student"}
    assert students == {"full_lcm_1": 1, "full_lcm_2": 2}
    alone = ("models=[tiny]", "model=tiny", "model.path=run/pipeline", "data=noto_emoji", "run_dir=alone")
    in_process("evaluate", *alone, *evaluation, *lineup)
    models = json.loads((tmp_path / "alone" / "metrics.json").read_text())["models"]
    assert {(model["slug"], model["teacher"]) for model in models} == {(f"full_lcm_{n}",) * 2 for n in (1, 2)}
