"""How often the embedded pipeline draws what it is told, judged by pixels and by the embedded CLIP.

python scripts/measure_tiny_pipeline.py [--pipeline FOLDER]
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from lcm_lightning.config.resolvers import package_file
from lcm_lightning.data.datamodule import iterate_split
from lcm_lightning.evaluation.features import Clip

COUNT, BATCH = 90, 30


def main() -> None:
    """Print, for names of the training and of the test split, how often image and name find each other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pipeline", default=package_file("assets/tiny"), help="diffusers folder")
    folder = parser.parse_args().pipeline
    clip = Clip(package_file("assets/tiny_clip"))
    for split in ("train", "test"):
        samples = list(iterate_split(package_file("assets/data/noto_emoji"), split))
        samples = samples[:: len(samples) // COUNT][:COUNT]
        captions = [sample.captions[0] for sample in samples]
        real, drawn = pixels([sample.image for sample in samples]), pixels(draw(Path(folder), captions))
        by_pixels = -torch.cdist(drawn.flatten(1).float(), real.flatten(1).float())
        print(f"{split}: nearest real picture by pixels is its own: {hits(by_pixels)}")
        for name, images in (("real", real), ("drawn", drawn)):
            by_clip = hits(clip(images) @ F.normalize(clip.text_features(captions), dim=1).T)
            print(f"{split}: own caption is nearest to the {name} picture by CLIP: {by_clip}")


def draw(folder: Path, captions: Sequence[str]) -> list[Image.Image]:
    """An image of each caption, by diffusers' own pipeline: DPM-Solver++, 25 steps, guidance 4, seeds 0, 1, 2, ..."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.bfloat16)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    images: list[Image.Image] = []
    for start in range(0, len(captions), BATCH):
        chunk = list(captions[start : start + BATCH])
        generators = [torch.Generator().manual_seed(start + place) for place in range(len(chunk))]
        images += pipeline(chunk, num_inference_steps=25, guidance_scale=4.0, generator=generators).images
    return images


def pixels(images: Sequence[Image.Image]) -> Tensor:
    """uint8 [N, 3, 64, 64]."""
    return torch.from_numpy(np.stack([np.asarray(image.convert("RGB")) for image in images])).permute(0, 3, 1, 2)


def hits(similarity: Tensor) -> str:
    """Of [N, N]: how often the diagonal is its row's largest, and among its five largest."""
    places = (similarity > similarity.diag()[:, None]).sum(dim=1)
    return f"{(places == 0).float().mean():.0%} first, {(places < 5).float().mean():.0%} among five, of {len(places)}"


if __name__ == "__main__":
    main()
