"""A Stable Diffusion pipeline small enough to run in milliseconds."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel

from lcm_lightning.models.architectures import SD15_SCHEDULER, byte_tokenizer

TINY_TEXT_LENGTH = 16


def build_tiny_pipeline(seed: int = 0, **scheduler_config: object) -> StableDiffusionPipeline:
    """Random weights in SD v1-5's classes: 32 px images, 8 x 8 x 4 latents, attention on both maps."""
    torch.manual_seed(seed)
    text = CLIPTextConfig(
        vocab_size=514,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TINY_TEXT_LENGTH,
        bos_token_id=512,
        eos_token_id=513,
    )
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    vae = AutoencoderKL(
        block_out_channels=(16, 16, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
    )
    return StableDiffusionPipeline(
        vae=vae,
        text_encoder=CLIPTextModel(text),
        tokenizer=byte_tokenizer(514, TINY_TEXT_LENGTH),
        unet=unet,
        scheduler=DDIMScheduler.from_config({**SD15_SCHEDULER, **scheduler_config}),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def save_full_lcm(pipeline: StableDiffusionPipeline, folder: Path, seed: int = 5) -> UNet2DConditionModel:
    """A full LCM of a pipeline's shapes in the layout of SimianLuo/LCM_Dreamshaper_v7, with a UNet of its own."""
    torch.manual_seed(seed)
    config = {key: value for key, value in pipeline.unet.config.items() if not key.startswith("_")}
    unet = UNet2DConditionModel.from_config({**config, "time_cond_proj_dim": 16})
    LatentConsistencyModelPipeline(
        vae=pipeline.vae,
        text_encoder=pipeline.text_encoder,
        tokenizer=pipeline.tokenizer,
        unet=unet,
        scheduler=LCMScheduler.from_config(pipeline.scheduler.config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(folder)
    return unet
