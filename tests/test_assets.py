"""What the package ships: two emoji data sets and a pipeline trained on them."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import tarfile
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, LCMScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPModel, CLIPTokenizer

from lcm_lightning.config.resolvers import package_file
from lcm_lightning.data.datamodule import CaptionedImages, iterate_split
from lcm_lightning.data.shards import find_shards
from lcm_lightning.models import sampling
from lcm_lightning.models.adapters import load_lora, merged_adapters
from lcm_lightning.models.sampling import DPMPP, Sampler
from lcm_lightning.models.stable_diffusion import StableDiffusion, load_stable_diffusion
from lcm_lightning.runs.contents import read_manifest
from lcm_lightning.toy.pretraining import psnr

STYLES = ("noto_emoji", "twemoji")
ASSETS = Path(package_file("assets"))
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def embedded() -> StableDiffusion:
    """The embedded pipeline."""
    return load_stable_diffusion(str(ASSETS / "tiny"))


def keys(style: str, split: str) -> list[str]:
    return [sample.key for sample in iterate_split(str(ASSETS / "data" / style), split)]


@pytest.mark.parametrize("style", STYLES)
def test_shards_are_what_their_index_says(style: str):
    folder = ASSETS / "data" / style
    index = json.loads((folder / "index.json").read_text())
    assert find_shards(str(folder)).name == style
    for part in index["splits"].values():
        for shard in part["shards"]:
            assert hashlib.sha256((folder / shard["file"]).read_bytes()).hexdigest() == shard["sha256"]
    assert {split: part["samples"] for split, part in index["splits"].items()} == {
        "train": 1513,
        "val": 33,
        "test": 90,
    }


def test_both_styles_hold_out_the_same_emoji():
    for split in ("train", "val", "test"):
        assert keys("noto_emoji", split) == keys("twemoji", split)
    assert not set(keys("noto_emoji", "train")) & set(keys("noto_emoji", "test") + keys("noto_emoji", "val"))


def test_the_small_set_is_a_part_of_the_large_one_split_by_split():
    for split in ("train", "val", "test"):
        large, small = (
            {sample.key: sample for sample in iterate_split(str(ASSETS / "data" / name), split)}
            for name in ("twemoji", "twemoji_small")
        )
        assert all(small[key].captions == large[key].captions for key in small)
        assert all(small[key].image.tobytes() == large[key].image.tobytes() for key in small)
    assert len(keys("twemoji_small", "train")) == 109


@pytest.mark.parametrize("style", STYLES)
def test_pictures_are_64_px_with_clean_captions(style: str):
    for sample in iterate_split(str(ASSETS / "data" / style), "test"):
        assert sample.image.size == (64, 64)
        assert len(set(sample.captions)) == len(sample.captions) >= 2
        for caption in sample.captions:
            assert caption == " ".join(caption.split()).lower()
            assert "_" not in caption


def held_out_psnr(model: StableDiffusion, style: str) -> float:
    """Mean PSNR in dB of the autoencoder on the test split."""
    data = CaptionedImages(style, str(ASSETS / "data" / style), resolution=64, batch_size=45, num_workers=0)
    values = []
    for batch in data.test_dataloader():
        images = batch["pixel_values"]
        latents = model.encode_images(images, torch.zeros(len(images), *model.latent_shape(64)))
        values.append(psnr(model.decode_latents(latents) * 2 - 1, images))
    return torch.cat(values).mean().item()


@pytest.mark.parametrize(("style", "reported"), [("noto_emoji", 29.9), ("twemoji", 31.8)])
def test_autoencoder_reconstructs_held_out_pictures(embedded: StableDiffusion, style: str, reported: float):
    assert held_out_psnr(embedded, style) >= reported


@pytest.mark.parametrize("style", STYLES)
def test_latents_have_unit_scale(embedded: StableDiffusion, style: str):
    data = CaptionedImages(style, str(ASSETS / "data" / style), resolution=64, batch_size=90, num_workers=0)
    images = next(iter(data.test_dataloader()))["pixel_values"]
    latents = embedded.encode_images(images, torch.zeros(len(images), *embedded.latent_shape(64)))
    assert torch.all(latents.mean(dim=(0, 2, 3)).abs() < 0.25)
    assert torch.all((latents.std(dim=(0, 2, 3)) - 1).abs() < 0.25)


@pytest.mark.parametrize("scheduler", [DDIMScheduler, DPMSolverMultistepScheduler, LCMScheduler])
def test_diffusers_draws_with_the_pipeline(scheduler: type):
    pipeline = StableDiffusionPipeline.from_pretrained(ASSETS / "tiny", safety_checker=None)
    assert {network.dtype for network in (pipeline.unet, pipeline.vae, pipeline.text_encoder)} == {torch.float32}
    pipeline.scheduler = scheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline("red heart", num_inference_steps=2, output_type="np").images
    assert images.shape == (1, 64, 64, 3)
    assert np.isfinite(images).all()


def test_clip_prefers_the_right_caption_for_pictures_it_was_trained_on():
    clip, tokenizer = (loader.from_pretrained(ASSETS / "tiny_clip") for loader in (CLIPModel, CLIPTokenizer))
    data = CaptionedImages(
        "noto_emoji",
        str(ASSETS / "data" / "noto_emoji"),
        resolution=64,
        batch_size=64,
        num_workers=0,
        flip_probability=0.0,
        caption_dropout=0.0,
    )
    batch = next(iter(data.train_dataloader()))
    tokens = tokenizer(batch["captions"], padding="max_length", truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        logits = clip(tokens, batch["pixel_values"]).logits_per_image
    assert (logits.argmax(dim=1) == torch.arange(64)).float().mean() > 0.5


def test_pipeline_and_clip_share_the_text_tower():
    clip = load_file(ASSETS / "tiny_clip" / "model.safetensors")
    text = load_file(ASSETS / "tiny" / "text_encoder" / "model.safetensors")
    for name, weight in text.items():
        assert torch.equal(weight, clip[name if name in clip else f"text_model.{name}"])


def test_weights_stay_small():
    files = {name: [f for f in (ASSETS / name).rglob("*") if f.is_file()] for name in ("tiny", "tiny_clip")}
    sizes = {name: sum(file.stat().st_size for file in of) for name, of in files.items()}
    assert sizes["tiny"] < 41e6 and sizes["tiny_clip"] < 10e6
    assert not [file for of in files.values() for file in of if file.suffix in (".bin", ".ckpt", ".pt")]


def build_script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("build_emoji_shards", ROOT / "scripts" / "build_emoji_shards.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def package(folder: Path, style: str) -> Path:
    """An npm package of two emoji, one of them a flag."""
    root = folder / style / "package"
    (root / "img" / style / "64").mkdir(parents=True)
    entry = {"has_img_google": True, "has_img_twitter": True, "short_name": "heart"}
    heart = entry | {"name": "HEAVY BLACK HEART", "unified": "2764-FE0F", "image": "2764.png", "sort_order": 1}
    heart |= {"short_names": ["heart"], "category": "Smileys & Emotion", "subcategory": "heart"}
    flag = heart | {"unified": "1F1EA", "category": "Flags", "sort_order": 2}
    (root / "emoji.json").write_text(json.dumps([flag, heart]))
    Image.new("RGBA", (64, 64), (255, 0, 0, 128)).save(root / "img" / style / "64" / "2764.png")
    archive = folder / f"emoji-datasource-{style}-16.0.0.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(root, "package")
    return archive


def test_build_script_lays_pictures_on_white_and_names_them(tmp_path: Path):
    script = build_script()
    (record,) = script.records(package(tmp_path, "google"), "google")
    assert record.key == "2764-fe0f"
    assert record.captions == ("red heart", "red heart, heart", "red heart, smileys & emotion")
    (tmp_path / "picture.webp").write_bytes(record.image)
    assert Image.open(tmp_path / "picture.webp").getpixel((0, 0)) == (255, 127, 127)


def test_the_student_that_ships_draws_in_one_pass_what_the_pipeline_cannot(tmp_path: Path):
    """Of 40 names the nearest real picture, by pixels, is the one asked for; undistilled in one step, of fewer."""
    file = ASSETS / "tiny" / "student" / "lora" / "pytorch_lora_weights.safetensors"
    assert file.stat().st_size <= 6e6
    samples = list(iterate_split(str(ASSETS / "data" / "noto_emoji"), "train"))[::38][:40]
    real = (
        torch.from_numpy(np.stack([np.asarray(sample.image.convert("RGB")) for sample in samples])).flatten(1).float()
    )
    model = load_stable_diffusion(str(ASSETS / "tiny"))
    (adapter,) = read_manifest(ASSETS / "tiny" / "student")
    load_lora(model, file, adapter.kind.name)

    def error(names: list[str], sampler: Sampler, guidance_scale: float) -> tuple[float, float]:
        """Share of hits, and root mean square distance to the real picture."""
        prompts, settings = [sample.captions[0] for sample in samples], {"steps": 1, "resolution": 64}
        with merged_adapters(model, names):
            images = sampling.sample(
                model, prompts, seeds=range(40), sampler=sampler, guidance_scale=guidance_scale, **settings
            )
        distances = torch.cdist(images.permute(0, 2, 3, 1).flatten(1) * 255, real)
        hits = (distances.argmin(dim=1) == torch.arange(40)).float().mean().item()
        return hits, distances.diag().square().mean().sqrt().item()

    (hits, far), (_, undistilled) = error([adapter.kind.name], adapter.kind.sampler, 1.0), error([], DPMPP, 2.0)
    assert hits >= 0.9 and far < 0.8 * undistilled
