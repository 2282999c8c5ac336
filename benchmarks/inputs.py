"""What both programs read: a pipeline folder with random weights, and shards with a .txt beside each image."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
import webdataset as wds
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks.cases import FEW
from lcm_lightning.models.architectures import (
    SD15_SCHEDULER,
    SD15_TEXT,
    SD15_UNET,
    SD15_VAE,
    SDXL_UNET,
    build_sdxl,
    byte_tokenizer,
)
from lcm_lightning.models.stable_diffusion import StableDiffusion, StableDiffusionXL, load_stable_diffusion
from lcm_lightning.toy.networks import save_pipeline

DISTINCT = 64  # images; more shards repeat them, reading and decoding costs the same


@dataclass(frozen=True)
class Size:
    """What a machine trains and draws to be measured.

    Attributes:
        build: makes the model, with random weights.
        resolution: of its images, px.
        rank: of adapters.
    """

    build: Callable[[], StableDiffusion]
    resolution: int
    rank: int


@dataclass(frozen=True)
class Inputs:
    """Folders: of a pipeline, of shards enough for the peer's reader (`random_shards`), and of some to cache."""

    pipeline: Path
    shards: Path
    few: Path


def sd15() -> StableDiffusion:
    """SD v1-5's architecture."""
    return load_stable_diffusion("", dtype=torch.bfloat16, unet_init="random")


def shallow_sdxl() -> StableDiffusionXL:
    """SDXL with 4 transformer layers instead of 10 at its lowest resolution: 1.32 instead of 2.57 billion parameters.

    diffusers' script reads two UNets in float32 before it casts one: of SDXL whole that is more than 24 GB.
    """
    return StableDiffusionXL(
        **build_sdxl(torch.bfloat16, {}, {**SDXL_UNET, "transformer_layers_per_block": (1, 2, 4)}), dtype=torch.bfloat16
    )


def small() -> StableDiffusion:
    """SD v1-5's classes, levels, caption length and noise schedule, with 32 to 64 channels instead of 128 to 1280.

    Groups that are normalised have 32 numbers or more: fewer magnify rounding.
    """
    width, narrow = 64, {"block_out_channels": (32, 64, 64, 64), "layers_per_block": 1, "norm_num_groups": 8}
    text = {"vocab_size": 514, "hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2}
    text |= {"num_attention_heads": 4, "bos_token_id": 512, "eos_token_id": 513}
    unet = {"sample_size": 16, "cross_attention_dim": width, "attention_head_dim": 4}
    return StableDiffusion(
        tokenizer=byte_tokenizer(text["vocab_size"], SD15_TEXT["max_position_embeddings"]),
        text_encoder=CLIPTextModel(CLIPTextConfig(**{**SD15_TEXT, **text})),
        vae=AutoencoderKL(**{**SD15_VAE, **narrow, "sample_size": 128, "block_out_channels": (32,) * 4}),
        unet=UNet2DConditionModel(**{**SD15_UNET, **narrow, **unet}),
        scheduler_config=SD15_SCHEDULER,
        name_or_path="random/small",
        dtype=torch.float32,
    )


SIZES = {"sd15": Size(sd15, resolution=512, rank=64), "small": Size(small, resolution=128, rank=4)}


def make_inputs(folder: Path, size: Size) -> Inputs:
    """What is missing of a size's inputs in `folder`."""
    made = inputs_in(folder)
    saved_pipeline(size.build, made.pipeline)
    # More samples than the peer's reader comes to: at the end of a shard it fails with webdataset 1.0.
    random_shards(made.shards, samples=2000, side=size.resolution, per_shard=2000)
    random_shards(made.few, samples=FEW, side=size.resolution)
    return made


def inputs_in(folder: Path) -> Inputs:
    """Where `make_inputs` puts them."""
    return Inputs(folder / "pipeline", folder / "shards", folder / "few_shards")


RANDOM = {"sd15": sd15, "sdxl": shallow_sdxl}  # 2.1 and 4.4 GB


def random_pipeline(folder: Path, model: str) -> Path:
    """One of `RANDOM` with random weights as a diffusers folder in float16, made where it is missing."""
    return saved_pipeline(RANDOM[model], folder)


def saved_pipeline(build: Callable[[], StableDiffusion], folder: Path) -> Path:
    """The model that `build` makes, as a diffusers folder in float16; made where it is missing, whole or not at all."""
    if not (folder / "model_index.json").is_file():
        torch.manual_seed(0)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder.parent) as scratch:
            save_pipeline(build(), Path(scratch, "pipeline"))
            Path(scratch, "pipeline").rename(folder)
    return folder


def random_shards(folder: Path, *, samples: int, side: int, per_shard: int = 1000) -> Path:
    """Shards of `samples` smooth random pictures of `side` px with captions, made where they are missing.

    A .json beside each says the size of a larger original, as diffusers' script for SDXL asks of its shards.
    """
    done = folder / "done.json"
    wanted, original = {"samples": samples, "side": side, "sizes": True}, {"width": 1024, "height": 1024}
    if done.is_file() and json.loads(done.read_text()) == wanted:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    pictures = [_picture(seed, side) for seed in range(min(DISTINCT, samples))]
    for shard, start in enumerate(range(0, samples, per_shard)):
        with wds.TarWriter(str(folder / f"train-{shard:06d}.tar"), encoder=False) as writer:
            for number in range(start, min(start + per_shard, samples)):
                picture, caption = pictures[number % len(pictures)], f"picture number {number}"
                sample = {"__key__": f"{number:06d}", "jpg": picture, "txt": caption.encode()}
                writer.write({**sample, "json": json.dumps(original).encode()})
    done.write_text(json.dumps(wanted))
    return folder


def _picture(seed: int, side: int) -> bytes:
    cells = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(cells).resize((side, side), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
