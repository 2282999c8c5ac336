"""What a step needs: counted model FLOPs."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache, partial
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lcm_lightning.diffusion.consistency import ConsistencyDistillation
from lcm_lightning.methods.lcm_lora import LcmLoraDistillation
from lcm_lightning.models.adapters import LoraSettings
from lcm_lightning.models.stable_diffusion import StableDiffusion, StableDiffusionXL


def _in_place_product(total: torch.Size, a: torch.Size, b: torch.Size, **_: object) -> int:
    return 2 * a[0] * a[1] * b[1]


# torch's counter knows the sum of a matrix and a matrix product, but not in place.
IN_PLACE = {torch.ops.aten.addmm_: _in_place_product}


TEXT_ENCODERS = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}


def without_memory(pipeline: Path) -> StableDiffusion:
    """The networks of a pipeline folder with nothing behind their weights, in bf16."""
    with torch.device("meta"):
        unet, vae = (
            network.from_config(network.load_config(pipeline, subfolder=part)).to(torch.bfloat16)
            for network, part in ((UNet2DConditionModel, "unet"), (AutoencoderKL, "vae"))
        )
        encoders = {
            part: kind(CLIPTextConfig.from_pretrained(pipeline, subfolder=part)).to(torch.bfloat16)
            for part, kind in TEXT_ENCODERS.items()
            if (pipeline / part).is_dir()
        }
    tokenizers = ("tokenizer", "tokenizer_2")[: len(encoders)]
    kind = StableDiffusionXL if len(encoders) > 1 else StableDiffusion
    model = kind(
        **{part: CLIPTokenizer.from_pretrained(pipeline, subfolder=part) for part in tokenizers},
        **encoders,
        vae=vae,
        unet=unet,
        scheduler_config=DDIMScheduler.load_config(pipeline, subfolder="scheduler"),
        name_or_path=str(pipeline),
        dtype=torch.bfloat16,
    )
    model._no_autocast = nullcontext  # autocast knows no such device
    return model


@cache
def step_flops(pipeline: Path, *, resolution: int, batch_size: int, rank: int) -> dict[str, float]:
    """FLOPs of one distillation step, in all, of its VAE and text encoding, and of its guided teacher.

    Every matrix product, convolution and attention counts 2 per multiplication and addition, counted by torch while the
    step runs without data: nothing elementwise, no normalisation, nothing done twice for want of memory. The backward
    pass is what this step needs, gradients of activations and adapters; frozen weights have none.
    """
    module = LcmLoraDistillation(
        without_memory(pipeline),
        distillation=ConsistencyDistillation(),
        lora=LoraSettings(rank=rank, alpha=rank),
        optimizer=partial(torch.optim.AdamW),
    ).to("meta")
    module.log = lambda *_, **__: None
    pixels = torch.zeros(batch_size, 3, resolution, resolution, device="meta")
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as encoding:
        module.model.encode_images(pixels, torch.zeros((), device="meta"))
        condition = module.model.encode_text([""] * batch_size)
    x_t = torch.zeros(batch_size, *module.model.latent_shape(resolution), device="meta")
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as teacher, torch.no_grad():
        module.teacher(condition)(x_t, torch.zeros(batch_size, dtype=torch.int64, device="meta"))
    batch = {
        "pixel_values": pixels,
        "captions": [""] * batch_size,
        "seed": torch.arange(batch_size),
        "weight": torch.ones(batch_size, device="meta"),
    }
    with FlopCounterMode(display=False, custom_mapping=IN_PLACE) as step:
        module.training_step(batch, 0).backward()
    counted = {"step": step, "encoding": encoding, "teacher": teacher}
    return {name: float(counter.get_total_flops()) for name, counter in counted.items()}
