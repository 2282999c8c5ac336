"""SDXL: the same conditions, predictions and pictures as diffusers' own pipeline."""

from __future__ import annotations

import copy
import json
import logging
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, LCMScheduler, StableDiffusionXLPipeline
from torch import Tensor

from helpers.adapters import random_batch, randomise
from helpers.photos import cached_latents, small_batches
from helpers.pipelines import build_tiny_sdxl
from lcm_lightning.diffusion.consistency import ConsistencyDistillation
from lcm_lightning.diffusion.distribution_matching import DistributionMatching
from lcm_lightning.diffusion.trajectory import TrajectoryDistillation
from lcm_lightning.errors import UserError
from lcm_lightning.methods.dmd2_lora import Dmd2LoraDistillation
from lcm_lightning.methods.kd_lora import KdLoraDistillation
from lcm_lightning.methods.lcm import LcmDistillation
from lcm_lightning.methods.lcm_lora import LCM, LcmLoraDistillation
from lcm_lightning.methods.lora import LoraFinetuning
from lcm_lightning.methods.pcm_lora import PcmLoraDistillation
from lcm_lightning.methods.tcd_lora import TcdLoraDistillation
from lcm_lightning.models.adapters import LoraSettings
from lcm_lightning.models.condition import Condition
from lcm_lightning.models.discriminator import encoder_features
from lcm_lightning.models.identity import encoder_key, model_digest
from lcm_lightning.models.sampling import DDIM, sample
from lcm_lightning.models.stable_diffusion import StableDiffusionXL, load_stable_diffusion
from lcm_lightning.models.variants import save_pipeline

PROMPTS = ["a dog on a beach", "two children"]
SEEDS = [3, 4]
EQUAL = 1e-5  # both sides do the same operations in float32, but for the order of a batch


@pytest.fixture
def sdxl(sdxl_folder: Path) -> StableDiffusionXL:
    """A fresh float32 model of `sdxl_folder`."""
    model = load_stable_diffusion(str(sdxl_folder))
    assert isinstance(model, StableDiffusionXL)
    return model


@pytest.fixture(scope="module")
def pipeline(sdxl_folder: Path) -> StableDiffusionXLPipeline:
    """What diffusers makes of `sdxl_folder`."""
    loaded = StableDiffusionXLPipeline.from_pretrained(sdxl_folder, add_watermarker=False)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def changed(folder: Path, to: Path, file: str, **values: object) -> Path:
    """A copy of a model's folder with other values in one of its configs."""
    shutil.copytree(folder, to)
    (to / file).write_text(json.dumps(json.loads((to / file).read_text()) | values))
    return to


def drawn(model: StableDiffusionXL, **options: object) -> Tensor:
    settings = {"seeds": SEEDS, "steps": 4, "guidance_scale": 1.0, "sampler": LCM, "resolution": 32}
    return sample(model, PROMPTS, **(settings | options))


# ---- conditions ----------------------------------------------------------------------------------------------------


def test_captions_are_embedded_as_diffusers_does(sdxl, pipeline):
    condition = sdxl.encode_text(PROMPTS)
    text, _, pooled, _ = pipeline.encode_prompt(PROMPTS, do_classifier_free_guidance=False)
    torch.testing.assert_close(condition.text, text, atol=EQUAL, rtol=0)
    torch.testing.assert_close(condition.pooled, pooled, atol=EQUAL, rtol=0)
    assert condition.text.shape == (2, 16, 80) and condition.pooled.shape == (2, 40) and condition.time_ids is None
    assert not torch.equal(condition.text[0], condition.text[1])


@pytest.mark.parametrize("force_zeros", [True, False])
def test_an_empty_caption_is_what_guidance_takes_for_none(force_zeros: bool, tmp_path: Path):
    pipeline = build_tiny_sdxl(force_zeros=force_zeros)
    pipeline.save_pretrained(tmp_path)
    found = load_stable_diffusion(str(tmp_path)).encode_text(["", "a dog"])
    text, no_text, pooled, no_pooled = pipeline.encode_prompt("a dog")
    torch.testing.assert_close(found.text, torch.cat([no_text, text]), atol=EQUAL, rtol=0)
    torch.testing.assert_close(found.pooled, torch.cat([no_pooled, pooled]), atol=EQUAL, rtol=0)
    assert bool(found.text[0].any()) is not force_zeros


def test_the_network_predicts_what_diffusers_does_of_photos_of_any_size(sdxl, pipeline):
    generator = torch.Generator().manual_seed(0)
    x_t, timesteps = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([17, 900])
    sizes = [[333, 500, 0, 84, 32, 32], [3024, 4032, 12, 0, 32, 32]]
    time_ids = torch.tensor(sizes, dtype=torch.float32)
    condition = sdxl.encode_text(PROMPTS).with_sizes(time_ids)
    with torch.no_grad():
        expected = pipeline.unet(
            x_t,
            timesteps,
            encoder_hidden_states=condition.text,
            added_cond_kwargs={"text_embeds": condition.pooled, "time_ids": time_ids},
        ).sample
        found = sdxl.denoise(x_t, timesteps, condition)
        whole = sdxl.denoise(x_t, timesteps, condition.with_sizes(None))
        of_32_px = sdxl.denoise(x_t, timesteps, condition.with_sizes(torch.tensor([[32.0, 32, 0, 0, 32, 32]] * 2)))
    torch.testing.assert_close(found, expected, atol=EQUAL, rtol=0)
    assert torch.equal(whole, of_32_px) and (whole - found).abs().max() > 100 * EQUAL


def test_sizes_are_not_rounded_to_the_type_of_embeddings():
    condition = Condition(torch.ones(1, 2, 3), torch.ones(1, 2), torch.tensor([[333.0, 499, 1, 2, 3, 4]]))
    found = condition.to(dtype=torch.bfloat16)
    assert found.text.dtype == found.pooled.dtype == torch.bfloat16
    assert torch.equal(found.time_ids, condition.time_ids) and found.time_ids.dtype == torch.float32


# ---- drawing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sampler", "scheduler", "guidance_scale", "negative_prompt"),
    [
        (LCM, LCMScheduler, 1.0, None),
        (LCM, LCMScheduler, 2.0, None),
        (DDIM, DDIMScheduler, 7.5, None),
        (DDIM, DDIMScheduler, 7.5, "blurred"),
    ],
)
def test_pictures_are_those_of_diffusers(sdxl, pipeline, sampler, scheduler, guidance_scale, negative_prompt):
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    expected = pipeline(
        PROMPTS,
        negative_prompt=negative_prompt and [negative_prompt] * 2,
        height=32,
        width=32,
        num_inference_steps=4,
        guidance_scale=guidance_scale,
        generator=[torch.Generator().manual_seed(seed) for seed in SEEDS],
        output_type="pt",
    ).images
    found = drawn(sdxl, sampler=sampler, guidance_scale=guidance_scale, negative_prompt=negative_prompt or "")
    torch.testing.assert_close(found, expected, atol=EQUAL, rtol=0)
    assert not torch.allclose(found[0], found[1], atol=100 * EQUAL)


def test_a_picture_of_another_shape_is_told_its_own_size(sdxl, pipeline):
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    shape = {"height": 32, "width": 48, "generator": generators, "output_type": "pt"}
    expected = pipeline(PROMPTS, num_inference_steps=4, guidance_scale=1.0, **shape).images
    torch.testing.assert_close(drawn(sdxl, resolution=(32, 48)), expected, atol=EQUAL, rtol=0)


def test_encoders_that_are_read_on_first_use_draw_the_same(sdxl, sdxl_folder: Path):
    deferred = load_stable_diffusion(str(sdxl_folder), defer_encoders=True)
    assert deferred.text_encoder is deferred.text_encoder_2 is deferred.vae is None
    assert encoder_key(deferred) == encoder_key(sdxl)
    assert torch.equal(drawn(deferred), drawn(sdxl))


def test_a_vae_that_overflows_in_half_precision_computes_in_single(sdxl_folder: Path, tmp_path: Path, caplog):
    """As diffusers decodes by `force_upcast`; the VAE without it, as madebyollin/sdxl-vae-fp16-fix, stays in half."""
    with caplog.at_level(logging.WARNING):
        model = load_stable_diffusion(str(sdxl_folder), dtype=torch.float16)
    assert re.search(r"model\.path=\S+ its VAE overflows in float16 and computes in float32, slower; mod", caplog.text)
    assert model.vae.dtype == model.vae_dtype == torch.float32 and model.unet.dtype == torch.float16
    latents = torch.randn(1, 4, 8, 8)
    whole = load_stable_diffusion(str(sdxl_folder))
    assert torch.equal(model.decode_latents(latents), whole.decode_latents(latents))
    pixels = torch.rand(1, 3, 32, 32)
    assert torch.equal(model.posterior(pixels)[0], whole.posterior(pixels)[0])
    assert load_stable_diffusion(str(sdxl_folder), dtype=torch.bfloat16).vae.dtype == torch.bfloat16

    fixed = changed(sdxl_folder, tmp_path / "fixed", "vae/config.json", force_upcast=False)
    caplog.clear()
    assert load_stable_diffusion(str(fixed), dtype=torch.float16).vae.dtype == torch.float16 and not caplog.text


def test_a_vae_in_its_place_computes_in_what_it_can(sdxl_folder: Path, tmp_path: Path, caplog):
    fixed = changed(sdxl_folder, tmp_path / "fixed", "vae/config.json", force_upcast=False)
    half = {"dtype": torch.float16, "defer_encoders": True}
    model = load_stable_diffusion(str(sdxl_folder), vae=str(fixed / "vae"), **half)
    model.load_encoders()
    assert model.vae.dtype == model.vae_dtype == torch.float16 and not caplog.text
    model = load_stable_diffusion(str(fixed), vae=str(sdxl_folder / "vae"), **half)
    assert model.vae_dtype == torch.float32
    assert re.search(
        r"model\.vae=\S+ its VAE overflows .*model\.vae=madebyollin/sdxl-vae-fp16-fix does not", caplog.text
    )


# ---- what is refused -----------------------------------------------------------------------------------------------

INDEX, UNET, SCHEDULE = "model_index.json", "unet/config.json", "scheduler/scheduler_config.json"


@pytest.mark.parametrize(
    ("file", "values", "expected"),
    [
        (
            INDEX,
            {"_class_name": "StableDiffusionXLImg2ImgPipeline", "requires_aesthetics_score": True},
            r"is SDXL's refiner.* give that, such as stabilityai/stable-diffusion-xl-base-1\.0",
        ),
        (
            UNET,
            {"projection_class_embeddings_input_dim": 80},
            r"=80: expected projection_dim of .* 40 \+ 6 x 8; .*base",
        ),
        (INDEX, {"_class_name": "StableDiffusionXLInpaintPipeline"}, r"is a StableDiffusionXLInpaintPipeline; only "),
        (INDEX, {"_class_name": "StableDiffusionPipeline"}, r"addition_embed_type=text_time: a condition beside"),
        (
            SCHEDULE,
            {"timestep_spacing": "trailing"},
            r"timestep_spacing=trailing is of models distilled already .*Turbo",
        ),
        (UNET, {"addition_embed_type": None}, r"addition_embed_type=None: .*with two text encoders text_time"),
        (UNET, {"cross_attention_dim": 32}, r"cross_attention_dim=32, .*hidden_size=32 \+ 48; take"),
        ("text_encoder_2/config.json", {"hidden_size": "wide"}, r"=80, .*hidden_size=32 \+ wide; take"),
        ("text_encoder_2/config.json", {"projection_dim": None}, r"input_dim=88: expected .*, None \+ 6 x 8; give"),
        (UNET, {"in_channels": 9}, r"9 channels in and 4 out"),
        ("vae/config.json", {"latents_mean": [0, 0, 0, 0]}, r"latents_mean=.*expected null"),
    ],
)
def test_what_cannot_be_taught_is_refused_in_a_sentence(sdxl_folder: Path, tmp_path: Path, file, values, expected):
    folder = changed(sdxl_folder, tmp_path / "model", file, **values)
    with pytest.raises(UserError, match=expected) as raised:
        load_stable_diffusion(str(folder))
    assert str(raised.value).startswith("model.path=") and "\n" not in str(raised.value)


def test_zero_terminal_snr_is_no_sign_of_turbo(sdxl_folder: Path, tmp_path: Path):
    values = {"timestep_spacing": "trailing", "rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
    assert load_stable_diffusion(str(changed(sdxl_folder, tmp_path / "v", SCHEDULE, **values)))


def test_each_part_changes_what_a_model_and_its_caches_are_known_by(sdxl, sdxl_folder: Path, tmp_path: Path):
    def second_text_encoder(model: StableDiffusionXL) -> None:
        model.text_encoder_2.get_input_embeddings().weight.data[0] += 1

    other = load_stable_diffusion(str(sdxl_folder))
    assert model_digest(other) == model_digest(sdxl)
    second_text_encoder(other)
    assert model_digest(other) != model_digest(sdxl)
    changes: list[Callable[[StableDiffusionXLPipeline], object]] = [
        lambda pipeline: second_text_encoder(pipeline),
        lambda pipeline: pipeline.register_to_config(force_zeros_for_empty_prompt=False),
    ]
    own = encoder_key(sdxl)
    for number, change in enumerate(changes):
        pipeline = build_tiny_sdxl()
        change(pipeline)
        pipeline.save_pretrained(tmp_path / str(number))
        key = encoder_key(load_stable_diffusion(str(tmp_path / str(number)), defer_encoders=True))
        assert {name for name in own if own[name] != key[name]} == {"text_encoder"}
    sdxl.tokenizer_2.model_max_length -= 1
    assert encoder_key(sdxl)["tokenizer"] != own["tokenizer"]


# ---- training ------------------------------------------------------------------------------------------------------

ADAPTER = {"lora": LoraSettings(rank=4, alpha=4), "optimizer": torch.optim.SGD}
METHODS: dict[str, Callable[..., Any]] = {
    "lora": partial(LoraFinetuning, **ADAPTER),
    "lcm_lora": partial(LcmLoraDistillation, distillation=ConsistencyDistillation(), **ADAPTER),
    "tcd_lora": partial(TcdLoraDistillation, distillation=TrajectoryDistillation(), **ADAPTER),
    "pcm_lora": partial(
        PcmLoraDistillation,
        distillation=TrajectoryDistillation(num_ode_steps=40),
        adversarial_weight=0.1,
        **ADAPTER,
    ),
    "dmd2_lora": partial(
        Dmd2LoraDistillation, distillation=DistributionMatching(), adversarial_weight=0.1, critic_steps=1, **ADAPTER
    ),
    "lcm": partial(
        LcmDistillation, distillation=ConsistencyDistillation(), guidance_dimension=16, optimizer=torch.optim.SGD
    ),
}


def method_of(name: str, folder: Path, **options: Any) -> Any:
    """A method on a model, outside of a training."""
    torch.manual_seed(0)  # of the discriminator
    module = METHODS[name](load_stable_diffusion(str(folder), **options))
    module.log = lambda *_, **__: None
    module._trainer = SimpleNamespace(global_step=0, strategy=None)
    randomise(module, seed=7)
    return module


@pytest.mark.parametrize("name", METHODS)
def test_activations_computed_anew_are_those_of_the_adapters_that_acted(sdxl_folder: Path, name: str):
    """Teacher, student, critic and discriminator share one UNet: each has the gradient it has without checkpointing."""
    plain, anew = (method_of(name, sdxl_folder, gradient_checkpointing=on) for on in (False, True))
    batch = random_batch(1, 2)
    for turn, adapter in enumerate(reversed(plain.adapters)):
        for module in (plain, anew):
            module._trainer.global_step = turn
            module.training_step(batch, 0).backward()
        for expected, found in zip(plain.trained_by(adapter), anew.trained_by(adapter), strict=True):
            torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_on_captions_and_sizes(sdxl_folder: Path, name: str):
    """Sizes change what each part of a step makes of the same photo, and gradients reach all that trains."""
    module = method_of(name, sdxl_folder)
    small, large = ([[side, side, 0, 0, 32, 32]] * 2 for side in (40, 900))
    found: dict[str, list[float]] = {}
    for turn, adapter in enumerate(reversed(module.adapters)):  # the critic before the generator
        module._trainer.global_step = turn
        for sizes in (small, large):
            module.zero_grad()
            loss = module.training_step(random_batch(1, 2) | {"time_ids": torch.tensor(sizes, dtype=torch.float32)}, 0)
            loss.backward()
            found.setdefault(adapter, []).append(loss.item())
            trained = [parameter.grad for parameter in module.trained_by(adapter)]
            assert all(gradient is not None and gradient.isfinite().all() for gradient in trained)
            assert any(gradient.any() for gradient in trained)
    assert all(small != large for small, large in found.values())


def test_the_discriminator_sees_what_diffusers_unet_makes_of_an_image(sdxl, pipeline):
    generator = torch.Generator().manual_seed(0)
    x_t, timesteps = torch.randn(2, 4, 8, 8, generator=generator), torch.tensor([17, 900])
    time_ids = torch.tensor([[333.0, 500, 0, 84, 32, 32]] * 2)
    condition = sdxl.encode_text(PROMPTS).with_sizes(time_ids)
    seen, unet = [], copy.deepcopy(pipeline.unet)
    for block in (*unet.down_blocks, unet.mid_block):
        block.register_forward_hook(lambda _, __, out: seen.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        told = {"text_embeds": condition.pooled, "time_ids": time_ids}
        unet(x_t, timesteps, encoder_hidden_states=condition.text, added_cond_kwargs=told)
        found = encoder_features(sdxl, x_t, timesteps, condition)
    assert len(found) == len(seen) == 3
    for ours, theirs in zip(found, seen, strict=True):
        torch.testing.assert_close(ours, theirs, atol=EQUAL, rtol=0)


def test_a_full_lcm_is_a_pipeline_for_diffusers_and_teaches_a_lora(sdxl_folder: Path, tmp_path: Path):
    module = METHODS["lcm"](load_stable_diffusion(str(sdxl_folder)))
    kind, target = module.kind, module.model.variants[module.kind.name]
    with torch.no_grad():  # a new one does not hear what it is told
        target.time_embedding.cond_proj.weight.normal_(0, 0.5, generator=torch.Generator().manual_seed(1))
    save_pipeline(module.model, kind.name, kind.sampler, tmp_path)
    pipeline = StableDiffusionXLPipeline.from_pretrained(tmp_path, add_watermarker=False)
    generators = [torch.Generator().manual_seed(seed) for seed in SEEDS]
    shape = {"height": 32, "width": 32, "generator": generators, "output_type": "pt"}
    expected = pipeline(PROMPTS, num_inference_steps=4, guidance_scale=kind.guidance_scale, **shape).images
    model = load_stable_diffusion(str(tmp_path))
    found = drawn(model, sampler=kind.sampler, guidance_scale=kind.guidance_scale)
    torch.testing.assert_close(found, expected, atol=EQUAL, rtol=0)
    assert not torch.allclose(found, drawn(model, sampler=kind.sampler, guidance_scale=14.0), atol=100 * EQUAL)

    student = KdLoraDistillation(
        load_stable_diffusion(str(sdxl_folder)),
        teacher_lcm=str(tmp_path),
        distillation=ConsistencyDistillation(),
        **ADAPTER,
    )
    student.log, student._trainer = lambda *_, **__: None, SimpleNamespace(global_step=0, strategy=None)
    student.training_step(random_batch(1, 2), 0).backward()
    assert any(parameter.grad.any() for parameter in student.adapter_parameters())


def test_a_cache_holds_both_embeddings_and_the_sizes_of_photos(sdxl, sdxl_folder: Path, flickr_shards: Path, tmp_path):
    latents = cached_latents(flickr_shards, sdxl_folder, tmp_path / "latents")
    (images,), (cached,) = (small_batches(source).val_dataloader() for source in (flickr_shards, latents))
    assert cached["keys"] == images["keys"] and cached["captions"] == images["captions"]
    assert torch.equal(cached["time_ids"], images["time_ids"])
    assert images["time_ids"].tolist() == [[40, 48, 0, 3, 32, 32]] * 4
    expected = sdxl.encode_text(images["captions"])
    torch.testing.assert_close(cached["text"].float(), expected.text, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(cached["pooled"].float(), expected.pooled, atol=1e-3, rtol=1e-3)
    module = METHODS["lora"](sdxl)
    from_images, from_cache = (module._batch_losses(batch, "finetuned") for batch in (images, cached))
    torch.testing.assert_close(from_cache, from_images, rtol=1e-2, atol=0)
    shuffled = small_batches(latents).train_dataloader()
    assert all(batch["time_ids"].shape == (4, 6) for batch in shuffled)


def test_photos_can_pass_for_whole_images_as_large_as_is_drawn(sdxl, sdxl_folder: Path, flickr_shards: Path, tmp_path):
    latents = cached_latents(flickr_shards, sdxl_folder, tmp_path / "latents")
    module = METHODS["lora"](sdxl)
    for source in (flickr_shards, latents):
        told, untold = (small_batches(source, photo_sizes=sizes) for sizes in (True, False))
        assert told.draw_settings() == {key: untold.draw_settings()[key] for key in told.draw_settings()}
        assert untold.draw_settings()["photo_sizes"] == "False"  # teacher's steps cached under others are refused
        for loader in (untold.train_dataloader(), untold.val_dataloader()):
            assert all("time_ids" not in batch for batch in loader)
        ((batch,), (without,)) = (data.val_dataloader() for data in (told, untold))
        whole = torch.tensor([[32.0, 32, 0, 0, 32, 32]] * 4)
        assert not torch.equal(batch["time_ids"], whole)
        found, expected, other = (
            module._batch_losses(rows, "finetuned") for rows in (without, batch | {"time_ids": whole}, batch)
        )
        torch.testing.assert_close(found, expected)
        assert not torch.allclose(found, other)
