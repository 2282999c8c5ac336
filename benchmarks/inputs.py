"""What both programs read: a pipeline folder with random weights, and shards with a .txt beside each image."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import torch
import webdataset as wds
from PIL import Image

from lcm_lightning.models.stable_diffusion import load_stable_diffusion
from lcm_lightning.toy.networks import save_pipeline

DISTINCT = 64  # images; more shards repeat them, reading and decoding costs the same


def random_pipeline(folder: Path) -> Path:
    """SD v1-5's architecture with random weights as a diffusers folder (2.1 GB, float16), made where it is missing."""
    if not (folder / "model_index.json").is_file():
        torch.manual_seed(0)
        save_pipeline(load_stable_diffusion("", dtype=torch.bfloat16, unet_init="random"), folder)
    return folder


def random_shards(folder: Path, *, samples: int, side: int, per_shard: int = 1000) -> Path:
    """Shards of `samples` smooth random pictures of `side` px with captions, made where they are missing."""
    done = folder / "done.json"
    wanted = {"samples": samples, "side": side}
    if done.is_file() and json.loads(done.read_text()) == wanted:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    pictures = [_picture(seed, side) for seed in range(min(DISTINCT, samples))]
    for shard, start in enumerate(range(0, samples, per_shard)):
        with wds.TarWriter(str(folder / f"train-{shard:06d}.tar"), encoder=False) as writer:
            for number in range(start, min(start + per_shard, samples)):
                picture, caption = pictures[number % len(pictures)], f"picture number {number}"
                writer.write({"__key__": f"{number:06d}", "jpg": picture, "txt": caption.encode()})
    done.write_text(json.dumps(wanted))
    return folder


def _picture(seed: int, side: int) -> bytes:
    cells = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(cells).resize((side, side), Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()
