"""Pictures of noise, shards of them and their latents."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.fabric import Fabric
from PIL import Image
from safetensors.numpy import load, save

from lcm_lightning.data.datamodule import CaptionedImages
from lcm_lightning.data.shards import find_shards
from lcm_lightning.diffusion.consistency import ConsistencyDistillation
from lcm_lightning.methods.lcm_lora import LcmLoraDistillation
from lcm_lightning.models.adapters import LoraSettings
from lcm_lightning.models.identity import cache_key
from lcm_lightning.models.stable_diffusion import load_stable_diffusion
from lcm_lightning.prepare.encoding import CacheSettings, cache_latents
from lcm_lightning.prepare.teaching import TeacherSettings, cache_teacher


def noise_jpeg(seed: int) -> bytes:
    """A 48 x 40 px JPEG of coarse noise."""
    cells = np.random.default_rng(seed).integers(0, 255, (5, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(cells).resize((48, 40), Image.Resampling.BICUBIC).save(buffer, "JPEG")
    return buffer.getvalue()


def small_batches(shards: Path, **options: Any) -> CaptionedImages:
    """Shards of captioned photos as the data of a small run in this process."""
    defaults = {"resolution": 32, "batch_size": 4, "num_workers": 0, "val_limit": 4, "shuffle_buffer": 8}
    return CaptionedImages("photos", str(shards), **(defaults | options))


def cached_latents(
    shards: Path,
    pipeline: Path,
    output: Path,
    resolution: int = 32,
    *,
    bucket_step: int | None = None,
    batch_size: int = 8,
) -> Path:
    """`output`, filled with the latents of a folder of shards of images by a pipeline, in float32: centre crops, of
    squares or in buckets, and their mirror images.
    """
    model = load_stable_diffusion(str(pipeline))
    cache_latents(
        find_shards(str(shards)),
        output,
        images=str(shards),
        model=model,
        key=cache_key(model, resolution, None),
        settings=CacheSettings(flips=True, dtype="float32"),
        bucket_step=bucket_step,
        batch_size=batch_size,
        workers=1,
    )
    return output


def cached_teacher_steps(latents: Path, pipeline: Path, output: Path, draws: int) -> Path:
    """`output`, filled with cached latents and steps of LCM-LoRA's teacher, under the settings of its experiments."""
    module = LcmLoraDistillation(
        load_stable_diffusion(str(pipeline)),
        distillation=ConsistencyDistillation(),
        lora=LoraSettings(rank=4),
        optimizer=torch.optim.AdamW,
    )
    fabric = Fabric(accelerator="cpu", devices=1)
    cache_teacher(small_batches(latents), output, module, TeacherSettings(draws, dtype="float32"), fabric)
    return output


def spoil_one_sample(shard: Path) -> None:
    """Put NaN into all latents of the first sample."""
    with tarfile.open(shard) as archive:
        first = next(member for member in archive if member.name.endswith(".safetensors"))
        content = archive.extractfile(first).read()
    tensors = load(content)
    spoilt = save({name: np.full_like(t, np.nan) if name == "moments" else t for name, t in tensors.items()})
    assert len(spoilt) == len(content)
    with shard.open("r+b") as file:
        file.seek(first.offset_data)
        file.write(spoilt)
