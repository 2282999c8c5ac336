"""Stable Diffusion's architectures in figures: what single files go by, and v1-5 and SDXL with random weights."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from tokenizers.pre_tokenizers import ByteLevel
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

CLIP_MERGES = Path(__file__).parents[1] / "assets" / "clip_tokenizer" / "merges.txt"
SD15_UNET: dict[str, Any] = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
SD15_VAE: dict[str, Any] = {
    "sample_size": 512,
    "in_channels": 3,
    "out_channels": 3,
    "latent_channels": 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "scaling_factor": 0.18215,
}
SD15_TEXT: dict[str, Any] = {
    "vocab_size": 49408,
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "hidden_act": "quick_gelu",
    "bos_token_id": 49406,
    "eos_token_id": 49407,
}
SD15_SCHEDULER = {
    "num_train_timesteps": 1000,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "prediction_type": "epsilon",
    "clip_sample": False,
    "set_alpha_to_one": False,
    "steps_offset": 1,
    "timestep_spacing": "leading",
}
# SDXL base 1.0 (Podell et al. 2023, arXiv 2307.01952); its first text encoder, noise schedule and VAE's networks are
# those of v1-5.
SDXL_UNET: dict[str, Any] = {
    "sample_size": 128,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * 2,
    "up_block_types": ("CrossAttnUpBlock2D",) * 2 + ("UpBlock2D",),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SDXL_VAE: dict[str, Any] = {**SD15_VAE, "sample_size": 1024, "scaling_factor": 0.13025, "force_upcast": True}
SDXL_TEXT_2: dict[str, Any] = {
    **SD15_TEXT,
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "hidden_act": "gelu",
    "projection_dim": 1280,
}
# What differs in v2: OpenCLIP's ViT-H/14 up to its last layer but one, and wider heads where the UNet is wider.
SD2_UNET: dict[str, Any] = {
    **SD15_UNET,
    "cross_attention_dim": 1024,
    "attention_head_dim": (5, 10, 20, 20),
    "use_linear_projection": True,
}
SD2_TEXT: dict[str, Any] = {
    **SD15_TEXT,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 23,
    "num_attention_heads": 16,
    "hidden_act": "gelu",
}


@dataclass(frozen=True)
class Architecture:
    """The configs of a pipeline's networks, noise schedule and tokenizer, as its authors trained it.

    Attributes:
        title: what people call it.
        unet, vae, text_encoder, text_encoder_2, scheduler: as diffusers and transformers write them; a second text
            encoder has SDXL alone.
        tokenizer, tokenizer_2: make them.
        prediction_type: what every model of it predicts; None: some predict noise, some velocity.
    """

    title: str
    unet: Mapping[str, Any]
    text_encoder: Mapping[str, Any]
    tokenizer: Callable[[], CLIPTokenizer]
    prediction_type: str | None
    vae: Mapping[str, Any] = field(default_factory=lambda: SD15_VAE)
    scheduler: Mapping[str, Any] = field(default_factory=lambda: SD15_SCHEDULER)
    text_encoder_2: Mapping[str, Any] | None = None
    tokenizer_2: Callable[[], CLIPTokenizer] | None = None

    @property
    def text_encoders(self) -> dict[str, Mapping[str, Any]]:
        """By name, as a pipeline calls them."""
        second = {} if self.text_encoder_2 is None else {"text_encoder_2": self.text_encoder_2}
        return {"text_encoder": self.text_encoder, **second}

    def make_tokenizers(self) -> dict[str, CLIPTokenizer]:
        """By name, as a pipeline calls them."""
        second = {} if self.tokenizer_2 is None else {"tokenizer_2": self.tokenizer_2()}
        return {"tokenizer": self.tokenizer(), **second}


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """New floating point tensors are of type `dtype` for the duration of a block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def build_text_encoder(dtype: torch.dtype) -> CLIPTextModel:
    """SD v1-5's text encoder with random weights, 123,060,480 parameters."""
    with default_dtype(dtype):
        return CLIPTextModel(CLIPTextConfig(**SD15_TEXT))


def build_text_encoder_2(dtype: torch.dtype) -> CLIPTextModelWithProjection:
    """SDXL's second text encoder with random weights, 694,659,840 parameters."""
    with default_dtype(dtype):
        return CLIPTextModelWithProjection(CLIPTextConfig(**SDXL_TEXT_2))


def build_vae(dtype: torch.dtype, config: Mapping[str, Any] = SD15_VAE) -> AutoencoderKL:
    """SD v1-5's VAE, or SDXL's, with random weights, 83,653,863 parameters."""
    with default_dtype(dtype):
        return AutoencoderKL(**config)


def build_sd15(dtype: torch.dtype, encoders: Mapping[str, Any]) -> dict[str, Any]:
    """All networks of SD v1-5 with random weights, and a tokenizer that spells captions in bytes.

    The UNet has 859,520,964 parameters. Weights are drawn from the global torch generator directly in `dtype`.
    `encoders` may hold a "text_encoder" and a "vae" to take instead. Returns the arguments of `StableDiffusion` other
    than `dtype`.
    """
    encoders = encoders or {"text_encoder": build_text_encoder(dtype), "vae": build_vae(dtype)}
    with default_dtype(dtype):
        unet = UNet2DConditionModel(**SD15_UNET)
    return {
        "tokenizer": byte_tokenizer(SD15_TEXT["vocab_size"], SD15_TEXT["max_position_embeddings"]),
        **encoders,
        "unet": unet,
        "scheduler_config": dict(SD15_SCHEDULER),
        "name_or_path": "random/stable-diffusion-v1-5",
    }


def build_sdxl(
    dtype: torch.dtype, encoders: Mapping[str, Any], unet_config: Mapping[str, Any] = SDXL_UNET
) -> dict[str, Any]:
    """As `build_sd15` of SDXL, whose UNet has 2,567,463,684 parameters; for `StableDiffusionXL`."""
    encoders = encoders or {
        "text_encoder": build_text_encoder(dtype),
        "text_encoder_2": build_text_encoder_2(dtype),
        "vae": build_vae(dtype, SDXL_VAE),
    }
    with default_dtype(dtype):
        unet = UNet2DConditionModel(**unet_config)
    length = SD15_TEXT["max_position_embeddings"]
    return {
        "tokenizer": byte_tokenizer(SD15_TEXT["vocab_size"], length),
        "tokenizer_2": byte_tokenizer(SDXL_TEXT_2["vocab_size"], length),
        **encoders,
        "unet": unet,
        "scheduler_config": dict(SD15_SCHEDULER),
        "name_or_path": "random/stable-diffusion-xl-base-1.0",
    }


def byte_tokenizer(vocab_size: int, max_length: int) -> CLIPTokenizer:
    """A `CLIPTokenizer` without merges: one token a byte, begin and end at the last two ids of the vocabulary."""
    return _tokenizer([], vocab_size, model_max_length=max_length)


def clip_tokenizer(pad_token: str) -> CLIPTokenizer:
    """The tokenizer of CLIP and OpenCLIP (Radford et al. 2021), which Stable Diffusion 1, 2 and XL were trained with.

    It ships as its 48,894 merges, in the order of their ids: the vocabulary is the bytes, the bytes at a word's end,
    what each merge makes, and the two marks.
    """
    merges = CLIP_MERGES.read_text(encoding="utf-8").splitlines()[1:]
    length = SD15_TEXT["max_position_embeddings"]
    return _tokenizer(merges, SD15_TEXT["vocab_size"], model_max_length=length, pad_token=pad_token)


def _tokenizer(merges: list[str], vocab_size: int, **settings: Any) -> CLIPTokenizer:
    letters = _printable_bytes()
    tokens = letters + [letter + "</w>" for letter in letters] + [merge.replace(" ", "") for merge in merges]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    vocabulary["<|startoftext|>"] = vocab_size - 2
    vocabulary["<|endoftext|>"] = vocab_size - 1
    with tempfile.TemporaryDirectory() as folder:
        vocab_file, merges_file = Path(folder, "vocab.json"), Path(folder, "merges.txt")
        vocab_file.write_text(json.dumps(vocabulary), encoding="utf-8")
        merges_file.write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
        return CLIPTokenizer.from_pretrained(folder, **settings)


def _printable_bytes() -> list[str]:
    """The 256 characters byte-level BPE writes bytes with (Radford et al. 2019), in the order CLIP's vocabulary has."""
    return sorted(ByteLevel.alphabet())


CLIP_L, OPENCLIP = partial(clip_tokenizer, "<|endoftext|>"), partial(clip_tokenizer, "!")
SD1 = Architecture("Stable Diffusion 1", SD15_UNET, SD15_TEXT, CLIP_L, "epsilon")
SD2 = Architecture("Stable Diffusion 2", SD2_UNET, SD2_TEXT, OPENCLIP, None)
SDXL = Architecture(
    "SDXL",
    SDXL_UNET,
    SD15_TEXT,
    CLIP_L,
    "epsilon",
    vae=SDXL_VAE,
    text_encoder_2=SDXL_TEXT_2,
    tokenizer_2=OPENCLIP,
)
