"""CPU seconds of the metrics and their intervals: ``python benchmarks/metrics.py --images 5000 --photos 1000``.

``python benchmarks/metrics.py --quick`` holds measuring against drawing instead: the embedded pipeline and CLIP on 300
images a contender, as under ``evaluation=quick``.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from lightning.fabric import Fabric

from lcm_lightning.evaluation.contenders import Lineup
from lcm_lightning.evaluation.drawing import Drawing, ModelImages, draw_missing, image_file, latents_file
from lcm_lightning.evaluation.features import Clip, ClipPatches
from lcm_lightning.evaluation.frechet import FrechetDistance
from lcm_lightning.evaluation.kernel_distances import kid
from lcm_lightning.evaluation.manifold import Manifold
from lcm_lightning.evaluation.measurement import measure
from lcm_lightning.evaluation.metrics import Resampling
from lcm_lightning.evaluation.model_sources import LoadedModel, ModelSource
from lcm_lightning.evaluation.protocol import Protocol
from lcm_lightning.evaluation.reference import RealImages, read_reference
from lcm_lightning.methods.lcm_lora import LcmLoraDistillation
from lcm_lightning.models.stable_diffusion import load_stable_diffusion
from lcm_lightning.output.progress import image_progress

ASSETS = Path(__file__).parent.parent / "lcm_lightning" / "assets"


def main() -> None:
    """Time each metric on random features whose spectrum decays as a power law."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--photos", type=int, default=1000)
    parser.add_argument("--dimension", type=int, default=2048)
    parser.add_argument("--samples", type=int, default=100, help="ways to halve the photos")
    parser.add_argument("--fid-samples", type=int, default=4, help="ways for FID, which are all alike")
    parser.add_argument("--quick", action="store_true", help="measuring against drawing on the embedded pipeline")
    arguments = parser.parse_args()
    if arguments.quick:
        measuring_against_drawing()
        return
    rng = np.random.default_rng(0)
    scale = np.arange(1, arguments.dimension + 1) ** -0.7

    def features(number: int) -> np.ndarray:
        return (rng.normal(size=(number, arguments.dimension)) * scale).astype(np.float32)

    generated, real = features(arguments.images), features(arguments.photos)
    photos = np.sort(np.arange(arguments.images) % arguments.photos)
    resampling, few = (
        Resampling.of(photos, arguments.photos, samples) for samples in (arguments.samples, arguments.fid_samples)
    )
    once = np.ones((1, arguments.images)), np.ones((1, arguments.photos))
    distance = FrechetDistance(generated, real)
    cpu_seconds("FID, first value", lambda: distance.draws(*once))
    rows = len(few.real)
    cpu_seconds(f"FID, {rows} rows", lambda: distance.draws(few.generated, few.real), rows)
    cpu_seconds(f"KID, {arguments.samples} ways to halve", lambda: kid(real, resampling).draws(generated))
    cpu_seconds(
        f"neighbourhoods, {arguments.samples} ways to halve", lambda: Manifold(real, resampling).draws(generated)
    )
    print(f"peak memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")


def measuring_against_drawing(images: int = 300, drawn: int = 20) -> None:
    """Every contender of a distilled model draws one batch, which stands for all of them, and is measured on all.

    Students draw with the base model's weights: a merged LoRA takes no time.
    """
    lineup = Lineup(guidance_scale=4.0, rivals={"dpmpp": [10, 20]})
    contenders = [replace(contender, adapters=()) for contender in lineup.contenders([LcmLoraDistillation.kind])]
    protocol = Protocol("quick", str(ASSETS / "tiny_clip"), split="train", num_images=images, batch_size=drawn)
    clip, fabric = Clip(protocol.clip), Fabric(accelerator="cpu", devices=1)
    model = load_stable_diffusion(str(ASSETS / "tiny"), dtype=torch.bfloat16)
    with TemporaryDirectory() as scratch, image_progress(disable=True) as progress:
        real = RealImages("twemoji", str(ASSETS / "data" / "twemoji"), "train", images, 64, scratch)
        reference = read_reference(real, [ClipPatches(clip), clip], progress)
        drawing = Drawing(reference.prompts(1), 0, 64, drawn)
        first = replace(drawing, prompts=drawing.prompts[:drawn])
        source = ModelSource("tiny", "tiny", lambda: LoadedModel(model, ()))
        images_of = [ModelImages(c, source, "tiny", Path(scratch) / "images" / c.slug) for c in contenders]

        def draw() -> None:
            for entry in images_of:
                draw_missing(model, entry.contender, first, entry.folder, fabric, progress)

        one_batch = cpu_seconds(f"drawing {drawn} of {images} images, {len(contenders)} contenders", draw)
        for entry in images_of:
            repeat_batch(entry.folder, drawing)
        measuring = cpu_seconds(
            f"measuring {images} images each",
            lambda: measure(images_of, drawing, reference, ClipPatches(clip), clip, protocol, progress),
        )
    print(f"measuring takes {100 * measuring * drawn / images / one_batch:.1f} % of the time of drawing")


def repeat_batch(folder: Path, drawing: Drawing) -> None:
    """Give the files of the first batch to the others too."""
    first, *others = drawing.batches()
    for batch in others:
        latents_file(folder, batch).symlink_to(latents_file(folder, first))
        for index, original in zip(batch, first, strict=True):
            image_file(folder, index).symlink_to(image_file(folder, original))


def cpu_seconds(name: str, work: Callable[[], object], times: int = 1) -> float:
    """Print what `work` took, in all and each of its `times`; returns the first."""
    started = time.process_time()
    work()
    elapsed = time.process_time() - started
    print(f"{name}: {elapsed:.2f} s" + (f", {elapsed / times:.2f} s each" if times > 1 else ""), flush=True)
    return elapsed


if __name__ == "__main__":
    main()
