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
from transformers import CLIPModel, CLIPTokenizer

from lcm_lightning.data.datamodule import iterate_split
from lcm_lightning.resolvers import package_file

COUNT, BATCH = 90, 30


def main() -> None:
    """Print, for names of the training and of the test split, how often image and name find each other."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pipeline", default=package_file("assets/tiny"), help="diffusers folder")
    folder = parser.parse_args().pipeline
    for split in ("train", "test"):
        samples = list(iterate_split(package_file("assets/data/noto_emoji"), split))
        samples = samples[:: len(samples) // COUNT][:COUNT]
        captions = [sample.captions[0] for sample in samples]
        real, drawn = pixels([sample.image for sample in samples]), pixels(draw(Path(folder), captions))
        by_pixels = -torch.cdist(drawn.flatten(1), real.flatten(1))
        print(f"{split}: nearest real picture by pixels is its own: {hits(by_pixels)}")
        for name, images in (("real", real), ("drawn", drawn)):
            print(
                f"{split}: own caption is nearest to the {name} picture by CLIP: {hits(similarities(images, captions))}"
            )


def draw(folder: Path, captions: Sequence[str]) -> list[Image.Image]:
    """An image of each caption, by diffusers' own pipeline: DPM-Solver++, 25 steps, guidance 4, seeds 0, 1, 2, ..."""
    pipeline = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.bfloat16)
    pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
    pipeline.set_progress_bar_config(disable=True)
    images: list[Image.Image] = []
    for start in range(0, len(captions), BATCH):
        chunk = list(captions[start : start + BATCH])
        generators = [torch.Generator().manual_seed(start + place) for place in range(len(chunk))]
        images += pipeline(chunk, num_inference_steps=25, guidance_scale=4.0, generator=generators).images
    return images


def pixels(images: Sequence[Image.Image]) -> Tensor:
    """Float32 [N, 3, 64, 64] in [-1, 1]."""
    arrays = np.stack([np.asarray(image.convert("RGB"), dtype=np.float32) for image in images])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2) / 127.5 - 1


@torch.no_grad()
def similarities(images: Tensor, captions: Sequence[str]) -> Tensor:
    """Cosines [images, captions] by the embedded CLIP."""
    folder = package_file("assets/tiny_clip")
    tokens = CLIPTokenizer.from_pretrained(folder)(
        list(captions), padding="max_length", truncation=True, return_tensors="pt"
    )
    found = CLIPModel.from_pretrained(folder).eval()(input_ids=tokens.input_ids, pixel_values=images)
    return F.normalize(found.image_embeds, dim=-1) @ F.normalize(found.text_embeds, dim=-1).T


def hits(similarity: Tensor) -> str:
    """Of [N, N]: how often the diagonal is its row's largest, and among its five largest."""
    places = (similarity > similarity.diag()[:, None]).sum(dim=1)
    return f"{(places == 0).float().mean():.0%} first, {(places < 5).float().mean():.0%} among five, of {len(places)}"


if __name__ == "__main__":
    main()
