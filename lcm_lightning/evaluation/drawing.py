"""The first stage, drawing: every prompt by every contender, once; what is on disk is not drawn again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from lightning.fabric import Fabric
from PIL import Image
from rich.progress import Progress
from safetensors.torch import load_file, save_file
from torch import Tensor

from lcm_lightning.evaluation.contenders import ROLES, Contender, Lineup
from lcm_lightning.evaluation.model_sources import ModelLoader, ModelSource
from lcm_lightning.models.adapters import merged_adapters
from lcm_lightning.models.identity import token_embeddings_digest
from lcm_lightning.models.sampling import check_finite, sample
from lcm_lightning.models.stable_diffusion import StableDiffusion
from lcm_lightning.output.pictures import to_pil

DRAWING = 2  # changes when the same model draws other pixels than before, so that old images are not taken for new


@dataclass(frozen=True)
class Drawing:
    """What all contenders draw.

    Attributes:
        prompts: one an image.
        seed: image i starts from the noise of ``seed + i``.
        resolution: side of the images, px.
        batch_size: images at a time.
    """

    prompts: Sequence[str]
    seed: int
    resolution: int
    batch_size: int

    @property
    def seeds(self) -> list[int]:
        """One an image."""
        return list(range(self.seed, self.seed + len(self.prompts)))

    def batches(self) -> list[range]:
        """Indices of the images of each batch."""
        total = len(self.prompts)
        return [range(start, min(start + self.batch_size, total)) for start in range(0, total, self.batch_size)]


@dataclass(frozen=True)
class ModelImages:
    """What a contender drew.

    Attributes:
        contender: with the name it has among the others.
        source: the first of the sources that has it.
        weights: a digest of those it draws with.
        folder: of the images.
    """

    contender: Contender
    source: ModelSource
    weights: str
    folder: Path


@dataclass(frozen=True)
class Drawn:
    """What later stages know of the models.

    Attributes:
        images: one entry a contender, by role.
        token_embeddings: digests of each model's text encoders, by name of its source.
        dtype: of weights and activations.
    """

    images: list[ModelImages]
    token_embeddings: dict[str, str]
    dtype: torch.dtype


def draw_models(
    sources: Sequence[ModelSource],
    loader: ModelLoader,
    lineup: Lineup,
    drawing: Drawing,
    root: Path,
    fabric: Fabric,
    progress: Progress,
) -> Drawn:
    """Draw what is missing below `root`, model after model; contenders of the same role, weights and sampler are one.

    Every rank draws its share and returns the same.
    """
    found: dict[str, ModelImages] = {}
    keys: dict[tuple[str, str], str] = {}
    teachers: dict[str, list[tuple[str, str]]] = {}
    token_embeddings: dict[str, str] = {}
    for source in sources:
        loaded = loader.load(source)
        model, identities = loaded.model, loaded.identities()
        model.check_resolution(drawing.resolution)
        token_embeddings[source.name] = " ".join(
            token_embeddings_digest(encoder, model.dtype) for encoder in model.text_encoders.values()
        )
        contenders = lineup.contenders(loaded.adapters, own_guidance=model.guidance_scale, taught=loaded.taught)
        for contender in contenders:
            weights = " ".join(identities[name] for name in ("", *contender.adapters))
            folder = image_folder(root, contender, drawing, weights, model.device.type, model.dtype)
            key = f"{contender.role} {folder.name}"
            keys[source.name, contender.slug] = key
            teachers.setdefault(key, []).append((source.name, contender.teacher))
            if key not in found:
                found[key] = ModelImages(contender, source, weights, folder)
                draw_missing(model, contender, drawing, folder, fabric, progress)
    return Drawn(distinguish(found, keys, teachers), token_embeddings, model.dtype)


def distinguish(
    found: Mapping[str, ModelImages],
    keys: Mapping[tuple[str, str], str],
    teachers: Mapping[str, Sequence[tuple[str, str]]],
) -> list[ModelImages]:
    """Contenders with names of their own: where one has several weights or guidances, the source's is added.

    Args:
        found: by a key of their own.
        keys: that key by name of the source and the contender's slug in it.
        teachers: by key of a contender, its teacher's in each source that has it, as `keys` has them.
    """
    owners: dict[str, dict[tuple[str, float], str]] = {}
    for images in found.values():
        drawn_with = images.weights, images.contender.guidance_scale
        owners.setdefault(images.contender.name, {}).setdefault(drawn_with, images.source.name)

    def named(images: ModelImages) -> Contender:
        contender, sharing = images.contender, owners[images.contender.name]
        owner = sharing[images.weights, contender.guidance_scale]
        return contender if len(sharing) == 1 else replace(contender, name=f"{contender.name}-{owner}", model=owner)

    def with_teachers(key: str) -> ModelImages:
        slugs = tuple(dict.fromkeys(named(found[keys[place]]).slug for place in teachers[key]))
        contender = replace(named(found[key]), teacher=slugs[0], teachers=slugs)
        return replace(found[key], contender=contender)

    return sorted(map(with_teachers, found), key=lambda images: ROLES.index(images.contender.role))


def image_folder(
    root: Path, contender: Contender, drawing: Drawing, weights_identity: str, device: str, dtype: torch.dtype
) -> Path:
    """Where a contender's images lie: the name ends in a digest of everything their pixels depend on.

    Args:
        weights_identity: of the networks with the contender's adapters; see `LoadedModel.identities`.
        device: kind of device that draws, as "cpu": kernels of different kinds round differently.
        dtype: of weights and activations.
    """
    sampler = [asdict(contender.sampler), contender.steps, contender.guidance_scale]
    program = [DRAWING, version("diffusers"), device, str(dtype)]
    content = json.dumps([program, weights_identity, sampler, asdict(drawing)], sort_keys=True, default=list)
    return root / f"{contender.sampler.name}_{contender.steps}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"


def image_file(folder: Path, index: int) -> Path:
    """The file of image `index`."""
    return folder / f"{index:06d}.png"


def latents_file(folder: Path, batch: range) -> Path:
    """The file of the final latents of a batch: what students are held against their teacher by."""
    return folder / f"{batch.start:06d}.safetensors"


def is_drawn(folder: Path, batch: range) -> bool:
    """Whether a batch lies there whole."""
    return latents_file(folder, batch).is_file() and all(image_file(folder, index).is_file() for index in batch)


def draw_missing(
    model: StableDiffusion, contender: Contender, drawing: Drawing, folder: Path, fabric: Fabric, progress: Progress
) -> int:
    """Draw what is not in `folder` yet, whole batches, shared out over the ranks; returns this rank's images.

    A batch is always the same images, whoever draws it and when, so an interrupted or a distributed evaluation gives
    the same pictures. Files appear whole, and the one that completes a batch last.
    """
    folder.mkdir(parents=True, exist_ok=True)
    # Shared out before looking for files: ranks look at different times, and must not disagree on whose a batch is.
    shared = drawing.batches()[fabric.global_rank :: fabric.world_size]
    mine = [batch for batch in shared if not is_drawn(folder, batch)]
    total = len(drawing.prompts)
    done = sum(map(len, shared)) - sum(map(len, mine))
    # The other ranks are taken to be as far; the first rank's share is the largest.
    bar = progress.add_task(contender.label, total=total, completed=min(done * fabric.world_size, total))
    seeds = drawing.seeds
    with merged_adapters(model, contender.adapters):
        for batch in mine:
            latents: list[Tensor] = []
            images = sample(
                model,
                [drawing.prompts[i] for i in batch],
                seeds=[seeds[i] for i in batch],
                steps=contender.steps,
                guidance_scale=contender.guidance_scale,
                sampler=contender.sampler,
                resolution=drawing.resolution,
                on_latents=latents.append,
            )
            check_finite(contender.label, images, *latents)
            _write_latents(torch.cat(latents), latents_file(folder, batch))
            for index, image in zip(batch, images, strict=True):
                _write_png(image, image_file(folder, index))
            done += len(batch)
            progress.update(bar, completed=min(done * fabric.world_size, total))
    fabric.barrier()
    progress.update(bar, completed=total)
    return sum(map(len, mine))


def _write_latents(latents: Tensor, file: Path) -> None:
    temporary = file.with_name(f".{file.name}")
    save_file({"latents": latents.to("cpu", torch.float16).contiguous()}, temporary)
    temporary.replace(file)


def _write_png(image: Tensor, file: Path) -> None:
    temporary = file.with_name(f".{file.name}")
    to_pil(image).save(temporary, format="PNG", compress_level=1)
    temporary.replace(file)


def read_images(folder: Path, indices: range) -> Tensor:
    """Images uint8 [B, 3, H, W] drawn before."""
    arrays = [np.asarray(Image.open(image_file(folder, index))) for index in indices]
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


def read_latents(folder: Path, batch: range) -> Tensor:
    """Final latents [B, C, h, w] of a batch drawn before, float32; kept to 11 bits."""
    return load_file(latents_file(folder, batch))["latents"].float()
