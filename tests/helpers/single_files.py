"""Pipelines written as one file in the layout of Stable Diffusion's own code (CompVis/latent-diffusion, OpenCLIP)."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from helpers.pipelines import (
    TINY_TEXT,
    TINY_TEXT_LENGTH,
    TINY_VAE,
    TINY_XL_TEXT_2,
    TINY_XL_UNET,
    TINY_XL_VAE,
    padding_tokenizer,
)
from lcm_lightning.models.architectures import SD15_SCHEDULER, Architecture, byte_tokenizer

TINY_UNET = {
    "sample_size": 8,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (32, 64),
    "layers_per_block": 2,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    "cross_attention_dim": 32,
    "attention_head_dim": 4,
    "norm_num_groups": 8,
}
# By 1024 channels of the text diffusers knows version 2.
TINY_UNET_2 = {**TINY_UNET, "cross_attention_dim": 1024, "attention_head_dim": [4, 8], "use_linear_projection": True}
TINY_TEXT_2 = {**TINY_TEXT, "hidden_size": 1024, "num_attention_heads": 16, "hidden_act": "gelu"}
TOKENIZER = partial(byte_tokenizer, 514, TINY_TEXT_LENGTH)
TINY = {
    "v1": Architecture("Stable Diffusion 1", TINY_UNET, TINY_TEXT, TOKENIZER, "epsilon", vae=TINY_VAE),
    "v2": Architecture("Stable Diffusion 2", TINY_UNET_2, TINY_TEXT_2, TOKENIZER, None, vae=TINY_VAE),
    "xl_base": Architecture(
        "SDXL",
        TINY_XL_UNET,
        TINY_TEXT,
        TOKENIZER,
        "epsilon",
        vae=TINY_XL_VAE,
        text_encoder_2=TINY_XL_TEXT_2,
        tokenizer_2=padding_tokenizer,
    ),
}


def build_pipeline(architecture: Architecture, seed: int = 0, **scheduler: object) -> StableDiffusionPipeline:
    """A pipeline of `architecture` with random weights."""
    torch.manual_seed(seed)
    return StableDiffusionPipeline(
        vae=AutoencoderKL(**architecture.vae),
        text_encoder=CLIPTextModel(CLIPTextConfig(**architecture.text_encoder)),
        tokenizer=architecture.tokenizer(),
        unet=UNet2DConditionModel(**architecture.unet),
        scheduler=DDIMScheduler.from_config({**SD15_SCHEDULER, **scheduler}),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def checkpoint(pipeline: StableDiffusionPipeline | StableDiffusionXLPipeline) -> dict[str, Tensor]:
    """All weights of a pipeline by the names that its authors' code gives them."""
    tensors = unet_tensors(pipeline.unet) | vae_tensors(pipeline.vae)
    if isinstance(pipeline, StableDiffusionXLPipeline):
        first = clip_tensors(pipeline.text_encoder, "conditioner.embedders.0.transformer.text_model.")
        return tensors | first | openclip_tensors(pipeline.text_encoder_2, "conditioner.embedders.1.model.")
    of_openclip = pipeline.text_encoder.config.hidden_size == 1024
    return tensors | (openclip_tensors if of_openclip else clip_tensors)(pipeline.text_encoder)


def save(tensors: Mapping[str, Tensor], path: Path, **metadata: str) -> Path:
    """Write them to one file."""
    save_file({key: tensor.contiguous().clone() for key, tensor in tensors.items()}, path, metadata=metadata or None)
    return path


def averaged(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The UNet's weights named as their moving averages are (`LitEma` in latent-diffusion)."""
    return {
        "model_ema." + key.removeprefix("model.").replace(".", ""): tensor
        for key, tensor in tensors.items()
        if key.startswith("model.diffusion_model.")
    }


RESNET = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1"}
RESNET |= {"norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
ENDS = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
ENDS |= {"conv_norm_out": "out.0", "conv_out": "out.2"}


def unet_tensors(unet: UNet2DConditionModel) -> dict[str, Tensor]:
    """Of a UNet: all blocks of a side are counted through, each with a resnet, attention or resampling in it."""
    layers = unet.config.layers_per_block

    def name(key: str) -> str:
        for ours, theirs in ENDS.items():
            if key.startswith(f"{ours}."):
                return key.replace(ours, theirs, 1)
        if match := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d)\.(.+)", key):
            kind, number, rest = match.groups()
            return f"middle_block.{1 if kind == 'attentions' else 2 * int(number)}.{resnet(kind, rest)}"
        side, block, kind, layer, rest = re.fullmatch(
            r"(down|up)_blocks\.(\d)\.(resnets|attentions|downsamplers|upsamplers)\.(\d)\.(.+)", key
        ).groups()
        if side == "down":
            first = 1 + int(block) * (layers + 1)
            if kind == "downsamplers":
                return f"input_blocks.{first + layers}.0.{rest.replace('conv', 'op')}"
            return f"input_blocks.{first + int(layer)}.{int(kind == 'attentions')}.{resnet(kind, rest)}"
        first = int(block) * (layers + 1)
        if kind == "upsamplers":
            attends = "CrossAttn" in unet.config.up_block_types[int(block)]
            return f"output_blocks.{first + layers}.{1 + attends}.{rest}"
        return f"output_blocks.{first + int(layer)}.{int(kind == 'attentions')}.{resnet(kind, rest)}"

    def resnet(kind: str, rest: str) -> str:
        first, dot, last = rest.partition(".")
        return RESNET[first] + dot + last if kind == "resnets" else rest

    return {f"model.diffusion_model.{name(key)}": tensor for key, tensor in unet.state_dict().items()}


def vae_tensors(vae: AutoencoderKL) -> dict[str, Tensor]:
    """Of a VAE, whose decoder counts its levels from the image, and whose attention is of 1 x 1 convolutions."""
    levels = len(vae.config.block_out_channels)

    def name(key: str) -> str:
        key = re.sub(r"down_blocks\.(\d)\.resnets", r"down.\1.block", key)
        key = re.sub(r"down_blocks\.(\d)\.downsamplers\.0", r"down.\1.downsample", key)
        key = re.sub(r"up_blocks\.(\d)\.resnets", lambda m: f"up.{levels - 1 - int(m[1])}.block", key)
        key = re.sub(r"up_blocks\.(\d)\.upsamplers\.0", lambda m: f"up.{levels - 1 - int(m[1])}.upsample", key)
        key = re.sub(r"mid_block\.resnets\.(\d)", lambda m: f"mid.block_{int(m[1]) + 1}", key)
        for ours, theirs in {
            "group_norm": "norm",
            "to_q": "q",
            "to_k": "k",
            "to_v": "v",
            "to_out.0": "proj_out",
        }.items():
            key = key.replace(f"mid_block.attentions.0.{ours}.", f"mid.attn_1.{theirs}.")
        return key.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")

    def tensor(key: str, value: Tensor) -> Tensor:
        return value[:, :, None, None] if "attentions" in key and value.ndim == 2 else value

    return {f"first_stage_model.{name(key)}": tensor(key, value) for key, value in vae.state_dict().items()}


def text_weights(text_encoder: nn.Module) -> dict[str, Tensor]:
    """Without the prefix that some versions of transformers have in the module."""
    return {key.removeprefix("text_model."): value for key, value in text_encoder.state_dict().items()}


def clip_tensors(
    text_encoder: nn.Module, prefix: str = "cond_stage_model.transformer.text_model."
) -> dict[str, Tensor]:
    """Of a text encoder as Stable Diffusion 1 has it, with the positions that transformers kept then."""
    positions = torch.arange(text_encoder.config.max_position_embeddings)[None]
    tensors = {prefix + key: value for key, value in text_weights(text_encoder).items()}
    return tensors | {f"{prefix}embeddings.position_ids": positions}


def openclip_tensors(text_encoder: nn.Module, prefix: str = "cond_stage_model.model.") -> dict[str, Tensor]:
    """Of a text encoder as OpenCLIP has it: queries, keys and values in one matrix, a projection from the left.

    Stable Diffusion 2 leaves the projection unused.
    """
    weights = text_weights(text_encoder)
    ends = {"embeddings.token_embedding.weight": "token_embedding.weight"}
    ends |= {"embeddings.position_embedding.weight": "positional_embedding"}
    ends |= {"final_layer_norm.weight": "ln_final.weight", "final_layer_norm.bias": "ln_final.bias"}
    layer = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
    layer |= {"self_attn.out_proj": "attn.out_proj"}
    width = text_encoder.config.hidden_size
    projection = weights.pop("text_projection.weight", torch.eye(width))
    tensors = {f"{prefix}text_projection": projection.T, f"{prefix}logit_scale": torch.tensor(1.0)}
    for key, value in weights.items():
        if key in ends:
            tensors[prefix + ends[key]] = value
            continue
        number, name, kind = re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", key).groups()
        block = f"{prefix}transformer.resblocks.{number}."
        if name in layer:
            tensors[f"{block}{layer[name]}.{kind}"] = value
        elif name == "self_attn.q_proj":
            three = [weights[key.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            tensors[f"{block}attn.in_proj_{kind}"] = torch.cat(three)
    return tensors
