"""Whole UNets that act in the place of a model's own: full LCMs made, written as pipelines' folders and read."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import cast

import diffusers
import torch
from diffusers import UNet2DConditionModel
from safetensors import SafetensorError
from torch import nn

from lcm_lightning.diffusion.schedule import alphas_cumprod_from_config, unsupported_schedule
from lcm_lightning.errors import UserError
from lcm_lightning.models.older_readers import add_for_older_readers
from lcm_lightning.models.pipeline_files import (
    check_networks,
    locate_pipeline,
    model_path,
    read_config,
    read_network,
    read_scheduler_config,
)
from lcm_lightning.models.sampling import Sampler, make_scheduler
from lcm_lightning.models.stable_diffusion import StableDiffusion
from lcm_lightning.output.files import whole_files

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


def locate_full_lcm(source: str, key: str) -> Path:
    """The folder of a full LCM's pipeline: that, a run's, or one downloaded from the hub.

    Raises:
        UserError: nothing is there, or its UNet is told no guidance scale; names `key`, the setting that gave `source`.
    """
    run = Path(source).expanduser() / "pipeline"
    with said_of(key):
        folder = locate_pipeline(str(run) if run.is_dir() else source, None)
        check_networks(folder)
        told = read_config(folder, "unet").get("time_cond_proj_dim")
    if not told:
        raise UserError(
            f"{key}={source}: no full LCM: its UNet is told no guidance scale (time_cond_proj_dim is null); give a run "
            "of method=lcm, or a full LCM such as SimianLuo/LCM_Dreamshaper_v7"
        )
    return folder


def load_full_lcm(model: StableDiffusion, source: str, name: str, key: str) -> None:
    """Add the full LCM at `source` (see `locate_full_lcm`) as variant `name`; see `load_variant`.

    Raises:
        UserError: it cannot be read, or is not of latents, captions, noise and prediction as the model's are.
    """
    folder = locate_full_lcm(source, key)
    with said_of(key):
        check_same_kind(model, folder)
        load_variant(model, folder, name)


def check_same_kind(model: StableDiffusion, folder: Path) -> None:
    """Raise a `UserError` unless the UNet of the pipeline in `folder` takes and predicts what the model's does."""
    unet, vae, schedule = read_config(folder, "unet"), read_config(folder, "vae"), read_scheduler_config(folder)
    if reason := unsupported_schedule(schedule):
        raise UserError(f"{model_path(folder)}: scheduler_config.json: {reason}; give another full LCM")
    compared = {
        "number of latents' channels": (unet.get("in_channels", 4), model.unet.config.in_channels),
        "scale of latents": (vae.get("scaling_factor", 0.18215), model.vae_config.scaling_factor),
        "width of captions": (unet.get("cross_attention_dim", 1280), model.unet.config.cross_attention_dim),
        "prediction type": (schedule.get("prediction_type", "epsilon"), model.prediction_type),
        "number of train timesteps": (schedule.get("num_train_timesteps", 1000), len(model.alphas_cumprod())),
    }
    remedy = "set model.path to the Stable Diffusion model that this LCM was made from"
    for what, (theirs, ours) in compared.items():
        if theirs != ours:
            raise UserError(
                f"{model_path(folder)}: its {what} is {theirs}, that of {model.name_or_path} {ours}; {remedy}"
            )
    if not torch.allclose(alphas_cumprod_from_config(schedule), model.alphas_cumprod()):
        raise UserError(f"{model_path(folder)}: its noise schedule is not that of {model.name_or_path}; {remedy}")


@contextmanager
def said_of(key: str) -> Iterator[None]:
    """Messages on a pipeline name `key` as what gave its path."""
    try:
        yield
    except UserError as error:
        raise UserError(str(error).replace("model.path=", f"{key}=")) from error


def save_pipeline(model: StableDiffusion, name: str, sampler: Sampler, folder: Path) -> None:
    """Write the model with its variant `name` as a folder that diffusers' pipelines of full LCMs load.

    See `save_whole`.
    """
    model.load_encoders()
    parts = {**model.pipeline_parts(), "unet": model.variants[name]}
    pipeline = getattr(diffusers, model.lcm_pipeline)(
        **parts, scheduler=make_scheduler(sampler, model.scheduler_config)
    )
    save_whole(pipeline, folder)


def save_whole(pipeline: diffusers.DiffusionPipeline, folder: Path) -> None:
    """Write a pipeline's folder, which older programs read too (`older_readers`), every file whole, the index last.

    Raises `OSError`.
    """
    with whole_files(folder, last=INDEX) as temporary:
        try:
            pipeline.save_pretrained(temporary)
            add_for_older_readers(temporary)
            forget_origin(temporary)
        except SafetensorError as error:  # of a full disk, for one
            raise OSError(str(error)) from error


def forget_origin(folder: Path) -> None:
    """Remove from the configs of a pipeline in `folder` where each was read from, a path on this machine.

    Nothing is lost: who loads a network sets it anew.
    """
    for file in (folder / INDEX, *folder.glob("*/config.json")):
        config = json.loads(file.read_text(encoding="utf-8"))
        if config.pop("_name_or_path", None) is not None:
            file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
