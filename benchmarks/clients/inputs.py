"""What clients read: a pipeline, a LoRA of it in both layouts, the two fused, and the pictures that we draw of them.

In a folder of each size:

    pipeline/           as diffusers saves it, float16
    lora/               pytorch_lora_weights.safetensors, kohya_lora_weights.safetensors; kohya_attention.safetensors
                        has those of its layers that are linear ones of attention
    fused/              the pipeline with the LoRA added to its weights, float32, and the scheduler that draws from it
    base.safetensors    the pipeline in one file with Stable Diffusion's own names, float16   (real sizes only)
    fused.safetensors   fused/ as such a file, float32                                         (real sizes only)
    noise.npy           the noise that the pictures start from, [1, 4, h, w]
    base.npy, lora.npy, attention.npy  pictures of our own without and with these, [H, W, 3] in 0..255, not rounded
    expected.json       prompt, seed, size, steps, guidance, and the scheduler with its settings
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import CLIPTextConfig, CLIPTextModel

from benchmarks.inputs import small
from lcm_lightning.config.resolvers import package_file
from lcm_lightning.exports.single_checkpoint import original_state_dict
from lcm_lightning.methods.lcm_lora import LCM
from lcm_lightning.models.adapters import (
    LoraSettings,
    active_adapters,
    add_lora,
    as_pipeline,
    fuse_lora,
    kohya_state_dict,
    load_lora,
    lora_parameters,
    lora_state_dict,
)
from lcm_lightning.models.architectures import SD15_TEXT, clip_tokenizer
from lcm_lightning.models.kinds import KOHYA_FILE, LORA_FILE
from lcm_lightning.models.lora_files import save_lora
from lcm_lightning.models.sampling import Sampler, make_scheduler, sample
from lcm_lightning.models.stable_diffusion import StableDiffusion, load_stable_diffusion
from lcm_lightning.models.variants import save_whole
from lcm_lightning.output.tensors import save_tensors
from lcm_lightning.runs.contents import read_manifest

PROMPT = "a red heart"
NAME = "client"
ATTENTION_FILE = "kohya_attention.safetensors"
SD15_TOKENS = {key: SD15_TEXT[key] for key in ("vocab_size", "bos_token_id", "eos_token_id") if key in SD15_TEXT}


@dataclass(frozen=True)
class Size:
    """One pipeline to hand to clients.

    Attributes:
        load: makes the model with its LoRA as an adapter, and says its name and how it is drawn from.
        resolution: of pictures, px.
        steps: of drawing. One needs no random numbers beside the first noise, which any client can be given.
        single_file: whether clients read it in one file, too.
    """

    load: Callable[[], tuple[StableDiffusion, str, Sampler]]
    resolution: int
    steps: int
    single_file: bool


def embedded() -> tuple[StableDiffusion, str, Sampler]:
    """The embedded pipeline with the student that ships, drawn by LCM's sampler: more programs have it than TCD's."""
    model, student = load_stable_diffusion(package_file("assets/tiny")), Path(package_file("assets/tiny/student"))
    adapter = read_manifest(student)[-1]
    load_lora(model, student / "lora" / adapter.file, adapter.kind.name)
    return model, adapter.kind.name, LCM


def real_sizes() -> tuple[StableDiffusion, str, Sampler]:
    """SD v1-5's architecture and CLIP's tokenizer, with random weights."""
    torch.manual_seed(0)
    model = load_stable_diffusion("", dtype=torch.float32, unet_init="random")
    model.tokenizer = clip_tokenizer("<|endoftext|>")
    return with_random_lora(model)


def small_sizes() -> tuple[StableDiffusion, str, Sampler]:
    """The same with few channels; unlike the embedded pipeline it predicts the noise, as Stable Diffusion 1 does."""
    torch.manual_seed(0)
    model = small()
    config = CLIPTextConfig(**{**SD15_TEXT, **model.text_encoder.config.to_diff_dict(), **SD15_TOKENS})
    parts = {**model.pipeline_parts(), "text_encoder": CLIPTextModel(config).eval()}
    names = ("text_encoder", "vae", "unet")
    return with_random_lora(
        StableDiffusion(
            tokenizer=clip_tokenizer("<|endoftext|>"),
            scheduler_config=model.scheduler_config,
            name_or_path=model.name_or_path,
            dtype=torch.float32,
            **{name: parts[name] for name in names},
        )
    )


@torch.no_grad()
def with_random_lora(model: StableDiffusion) -> tuple[StableDiffusion, str, Sampler]:
    """Weights as float16 holds them, and a LoRA of random numbers."""
    for parameter in model.parameters():
        parameter.copy_(parameter.half())
    add_lora(model.unet, NAME, LoraSettings(rank=4, alpha=4), fused=False)
    generator = torch.Generator().manual_seed(1)
    for number, parameter in enumerate(lora_parameters(model.unet, NAME)):
        # A keeps its input's size; B changes the layers' outputs by a fifth.
        std = parameter[0].numel() ** -0.5 if number % 2 == 0 else 0.2
        parameter.normal_(0, std, generator=generator)
    return model, NAME, LCM


SIZES = {
    "tiny": Size(embedded, resolution=64, steps=4, single_file=False),
    "small": Size(small_sizes, resolution=128, steps=4, single_file=False),
    "sd15": Size(real_sizes, resolution=256, steps=1, single_file=True),
}


def make_inputs(folder: Path, size: Size) -> Path:
    """`folder` with all that clients of one size read; made where it is missing, `expected.json` last."""
    if (folder / "expected.json").is_file():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    model, name, sampler = size.load()
    lora = lora_state_dict(model.unet, name)
    save_lora(lora, folder / "lora" / LORA_FILE)
    save_lora(kohya_state_dict(lora, model.unet), folder / "lora" / KOHYA_FILE)
    attention = {key: tensor for key, tensor in lora.items() if ".attn" in key}
    save_lora(kohya_state_dict(attention, model.unet), folder / "lora" / ATTENTION_FILE)
    load_lora(model, folder / "lora" / ATTENTION_FILE, "attention")
    seed = 7
    drawn = {"steps": size.steps, "seed": seed, "size": size.resolution, "guidance_scale": 1.0}
    for picture, adapters in {"base": (), "lora": (name,), "attention": ("attention",)}.items():
        with active_adapters(model, adapters):
            np.save(folder / f"{picture}.npy", draw(model, sampler, seed, size))
    shape = model.latent_shape(size.resolution, size.resolution)
    np.save(folder / "noise.npy", torch.randn(1, *shape, generator=torch.Generator().manual_seed(seed)).numpy())
    as_pipeline(model).unload_lora_weights()
    write_models(model, folder, sampler, size)
    scheduler: Any = make_scheduler(sampler, model.scheduler_config)
    config = {key: value for key, value in scheduler.config.items() if not key.startswith("_")}
    expected = {"prompt": PROMPT, **drawn, "scheduler": type(scheduler).__name__, "scheduler_config": config}
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")
    return folder


def write_models(model: StableDiffusion, folder: Path, sampler: Sampler, size: Size) -> None:
    """The pipeline as it is, then with the LoRA in its weights, by the functions that exports write with."""
    model.load_encoders()
    plain = copy.deepcopy(as_pipeline(model)).to(torch.float16)
    save_whole(plain, folder / "pipeline")
    if size.single_file:
        half = {key: t.half() if t.is_floating_point() else t for key, t in original_state_dict(model).items()}
        save_tensors(half, folder / "base.safetensors", {})
    fuse_lora(model, folder / "lora" / LORA_FILE)
    fused = as_pipeline(model)
    fused.scheduler = make_scheduler(sampler, model.scheduler_config)
    save_whole(fused, folder / "fused")
    if size.single_file:
        save_tensors(original_state_dict(model), folder / "fused.safetensors", {})


def draw(model: StableDiffusion, sampler: Sampler, seed: int, size: Size) -> np.ndarray:
    """Our picture, [H, W, 3] in 0..255."""
    picture = sample(
        model,
        [PROMPT],
        seeds=[seed],
        steps=size.steps,
        guidance_scale=1.0,
        sampler=sampler,
        resolution=size.resolution,
    )[0]
    return 255 * picture.permute(1, 2, 0).numpy()
