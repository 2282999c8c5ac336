"""Fixtures shared by all tests: a Stable Diffusion pipeline small enough to run in milliseconds."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel

from lcm_lightning.data.records import Record
from lcm_lightning.data.shards import find_shards
from lcm_lightning.data.writing import ShardSettings, write_shards
from lcm_lightning.models.architectures import SD15_SCHEDULER, byte_tokenizer
from lcm_lightning.models.identity import cache_key
from lcm_lightning.models.stable_diffusion import StableDiffusion, load_stable_diffusion
from lcm_lightning.prepare.encoding import CacheSettings, cache_latents

ROOT = Path(__file__).parent.parent
TINY_TEXT_LENGTH = 16

# Networks this small gain nothing from more threads, and lose much where other programs use the cores, as other
# tests do.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


def build_tiny_pipeline(seed: int = 0, **scheduler_config: object) -> StableDiffusionPipeline:
    """Random weights in SD v1-5's classes: 32 px images, 8 x 8 x 4 latents, attention on both maps."""
    torch.manual_seed(seed)
    text = CLIPTextConfig(
        vocab_size=514,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TINY_TEXT_LENGTH,
        bos_token_id=512,
        eos_token_id=513,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 16, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=byte_tokenizer(514, TINY_TEXT_LENGTH),
        unet=unet,
        scheduler=DDIMScheduler.from_config({**SD15_SCHEDULER, **scheduler_config}),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@pytest.fixture(scope="session")
def saved_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes saved `StableDiffusionPipeline` folders that differ in their scheduler's config, each once."""
    folders: dict[tuple, Path] = {}

    def saved(**scheduler_config: object) -> Path:
        key = tuple(sorted(scheduler_config.items()))
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("pipeline")
            build_tiny_pipeline(**scheduler_config).save_pretrained(folders[key])
        return folders[key]

    return saved


@pytest.fixture(scope="session")
def pipeline_folder(saved_pipeline: Callable[..., Path]) -> Path:
    """A saved `StableDiffusionPipeline` folder (epsilon prediction)."""
    return saved_pipeline()


@pytest.fixture
def tiny_model(pipeline_folder: Path) -> StableDiffusion:
    """A fresh float32 model of `pipeline_folder`."""
    return load_stable_diffusion(str(pipeline_folder))


@pytest.fixture(scope="session")
def flickr_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards as `prepare` makes them of Flickr8k, five captions an image: 24 train, 4 val and 4 test samples."""
    folder = tmp_path_factory.mktemp("flickr8k")
    records = [
        Record(f"{split}{n}", noise_jpeg(seed), tuple(f"photo {seed}, caption {c}" for c in range(5)), split)
        for part, (split, samples) in enumerate((("train", 24), ("val", 4), ("test", 4)))
        for n, seed in enumerate(range(100 * part, 100 * part + samples))
    ]
    write_shards(records, folder, name="flickr8k", settings=ShardSettings(samples_per_shard=6), workers=1)
    return folder


def cached_latents(shards: Path, pipeline: Path, output: Path, resolution: int = 32) -> Path:
    """`output`, filled with the latents of a folder of shards of images by a pipeline, in float32."""
    model = load_stable_diffusion(str(pipeline))
    cache_latents(
        find_shards(str(shards)),
        output,
        images=str(shards),
        model=model,
        key=cache_key(model, resolution, None),
        settings=CacheSettings(flips=True, dtype="float32"),
        workers=1,
    )
    return output


def noise_jpeg(seed: int) -> bytes:
    """A 48 x 40 px JPEG of coarse noise."""
    cells = np.random.default_rng(seed).integers(0, 255, (5, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(cells).resize((48, 40), Image.Resampling.BICUBIC).save(buffer, "JPEG")
    return buffer.getvalue()


@pytest.fixture
def train_command() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `python train.py ...` as a process of its own, without standard input: a prompt would fail."""

    def run(*overrides: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(ROOT / "train.py"), *overrides],
            capture_output=True,
            text=True,
            timeout=240,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=False,
        )

    return run
