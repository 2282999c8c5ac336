"""Pipelines of Stable Diffusion and SDXL small enough to run in milliseconds."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lcm_lightning.models.architectures import SD15_SCHEDULER, byte_tokenizer

TINY_TEXT_LENGTH = 16
TINY_TEXT = {
    "vocab_size": 514,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": TINY_TEXT_LENGTH,
    "bos_token_id": 512,
    "eos_token_id": 513,
}

TINY_VAE = {  # latents of 8 x 8 x 4 for 32 px images
    "block_out_channels": (16, 16, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 3,
    "up_block_types": ("UpDecoderBlock2D",) * 3,
    "latent_channels": 4,
    "layers_per_block": 1,
    "norm_num_groups": 8,
    "sample_size": 32,
}
TINY_XL_UNET = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2),
    "cross_attention_dim": 80,
    "attention_head_dim": [2, 4],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 8,
    "projection_class_embeddings_input_dim": 40 + 6 * 8,
    "norm_num_groups": 8,
}
TINY_XL_VAE = {**TINY_VAE, "scaling_factor": 0.13025, "force_upcast": True}
TINY_XL_TEXT_2 = {**TINY_TEXT, "hidden_size": 48, "num_hidden_layers": 3, "projection_dim": 40, "hidden_act": "gelu"}


def padding_tokenizer() -> CLIPTokenizer:
    """One that pads as OpenCLIP's does."""
    tokenizer = byte_tokenizer(514, TINY_TEXT_LENGTH)
    tokenizer.pad_token = "!"
    return tokenizer


def build_tiny_pipeline(seed: int = 0, **scheduler_config: object) -> StableDiffusionPipeline:
    """Random weights in SD v1-5's classes: 32 px images, 8 x 8 x 4 latents, attention on both maps."""
    torch.manual_seed(seed)
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
    return StableDiffusionPipeline(
        vae=AutoencoderKL(**TINY_VAE),
        text_encoder=CLIPTextModel(CLIPTextConfig(**TINY_TEXT)),
        tokenizer=byte_tokenizer(514, TINY_TEXT_LENGTH),
        unet=unet,
        scheduler=DDIMScheduler.from_config({**SD15_SCHEDULER, **scheduler_config}),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def build_tiny_sdxl(seed: int = 0, *, force_zeros: bool = True) -> StableDiffusionXLPipeline:
    """Random weights in SDXL's classes, with its order of blocks: attention on the smaller map, two transformers deep.

    The tokenizers pad differently, as SDXL's do, and the second text encoder is wider than the first.
    """
    torch.manual_seed(seed)
    return StableDiffusionXLPipeline(
        vae=AutoencoderKL(**TINY_XL_VAE),
        text_encoder=CLIPTextModel(CLIPTextConfig(**TINY_TEXT)),
        text_encoder_2=CLIPTextModelWithProjection(CLIPTextConfig(**TINY_XL_TEXT_2)),
        tokenizer=byte_tokenizer(514, TINY_TEXT_LENGTH),
        tokenizer_2=padding_tokenizer(),
        unet=UNet2DConditionModel(**TINY_XL_UNET),
        scheduler=DDIMScheduler.from_config(SD15_SCHEDULER),
        force_zeros_for_empty_prompt=force_zeros,
        add_watermarker=False,
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
