"""Whole UNets that act in the place of a model's own: full LCMs made, written as pipelines' folders and read."""

from __future__ import annotations

import copy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import cast

from diffusers import LatentConsistencyModelPipeline, UNet2DConditionModel
from safetensors import SafetensorError
from torch import nn

from lcm_lightning.models.pipeline_files import read_network
from lcm_lightning.models.sampling import Sampler, make_scheduler
from lcm_lightning.models.stable_diffusion import StableDiffusion
from lcm_lightning.output.files import replace

INDEX = "model_index.json"


def with_guidance_embedding(unet: UNet2DConditionModel, dimension: int) -> UNet2DConditionModel:
    """A trainable float32 copy of `unet` that is told the guidance scale in an embedding of `dimension`.

    The embedding's projection is 0, so that the copy predicts what `unet` does whatever it is told; diffusers would
    draw it at random.
    """
    told = copy.deepcopy(unet).float()
    embedding = told.time_embedding
    projection = nn.Linear(dimension, embedding.linear_1.in_features, bias=False, device=unet.device)
    nn.init.zeros_(projection.weight)
    embedding.cond_proj = projection
    told.register_to_config(time_cond_proj_dim=dimension)
    return told.requires_grad_()


def load_variant(model: StableDiffusion, folder: Path, name: str) -> None:
    """Add the UNet of the pipeline in `folder`, frozen, in the model's type, as variant `name`. Raises `UserError`."""
    unet = cast(UNet2DConditionModel, read_network(folder, "unet", model.dtype))
    if model.memory_format is not None:
        unet.to(memory_format=model.memory_format)
    model.add_variant(name, unet.requires_grad_(False).eval().to(model.device))


def save_pipeline(model: StableDiffusion, name: str, sampler: Sampler, folder: Path) -> None:
    """Write the model with its variant `name` as a folder that diffusers' LatentConsistencyModelPipeline loads.

    Every file appears whole, the index last. Raises `OSError`.
    """
    model.load_encoders()
    pipeline = LatentConsistencyModelPipeline(
        vae=model.vae,
        text_encoder=model.text_encoder,
        tokenizer=model.tokenizer,
        unet=cast(UNet2DConditionModel, model.variants[name]),
        scheduler=make_scheduler(sampler, model.scheduler_config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder, prefix=".") as temporary:
        try:
            pipeline.save_pretrained(temporary)
        except SafetensorError as error:  # of a full disk, for one
            raise OSError(str(error)) from error
        files = [path for path in Path(temporary).rglob("*") if path.is_file()]
        for path in sorted(files, key=lambda path: path.name == INDEX):
            target = folder / path.relative_to(temporary)
            target.parent.mkdir(exist_ok=True)
            path.chmod(0o644)  # safetensors makes files that only their owner can read
            replace(path, target)
