"""A model in one file, by the names that Stable Diffusion's own code has for its weights.

ComfyUI, A1111 and the like open it. The inverse of diffusers' conversions, which `models.single_file` reads with: the
UNet's and the VAE's names are those of Rombach et al. (2022, github.com/CompVis/latent-diffusion), text encoders are
transformers' CLIP in Stable Diffusion 1, OpenCLIP in 2, and one of each in SDXL.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lcm_lightning.errors import UserError
from lcm_lightning.exports.fused import fuse
from lcm_lightning.exports.metadata import ORIGINAL, Described, base_version, model_name, model_spec
from lcm_lightning.models.architectures import SD15_SCHEDULER
from lcm_lightning.models.kinds import AdapterKind
from lcm_lightning.models.lora_files import original_name
from lcm_lightning.models.pipeline_files import unet_is_xl
from lcm_lightning.models.sampling import DDIM, make_scheduler
from lcm_lightning.models.single_file import UNET
from lcm_lightning.models.stable_diffusion import StableDiffusion
from lcm_lightning.output.tensors import save_tensors

LATENT_SCALES = {False: 0.18215, True: 0.13025}  # by whether it is SDXL
VAE = "first_stage_model."
CLIP, OPENCLIP = "cond_stage_model.transformer.", "cond_stage_model.model."
XL_CLIP, XL_OPENCLIP = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."

IN_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
IN_OPENCLIP = {
    "embeddings.position_embedding.weight": "positional_embedding",
    "embeddings.token_embedding.weight": "token_embedding.weight",
    "final_layer_norm.weight": "ln_final.weight",
    "final_layer_norm.bias": "ln_final.bias",
}
IN_OPENCLIP_BLOCK = {
    "layer_norm1": "ln_1",
    "layer_norm2": "ln_2",
    "mlp.fc1": "mlp.c_fc",
    "mlp.fc2": "mlp.c_proj",
    "self_attn.out_proj": "attn.out_proj",
}


def write_single_file(
    model: StableDiffusion, kinds: Sequence[AdapterKind], folder: Path, dtype: torch.dtype, described: Described
) -> Path:
    """Write the model with its adapters in its weights, in `dtype`; the file's path. The model itself is changed.

    Raises:
        UserError: the layout cannot say what it is; see `check_layout`.
        OSError: it cannot be written.
    """
    check_layout(model)
    said = model_spec(model, kinds, ORIGINAL, described, lora=False)
    fuse(model, kinds, dtype)
    name = "-".join([model_name(model), *(kind.result for kind in kinds)])
    path = folder / f"{name}.safetensors"
    save_tensors(original_state_dict(model), path, said)
    return path


def check_layout(model: StableDiffusion) -> None:
    """Raise a `UserError` for a model that readers of the layout, which take its kind's usual settings, would not draw.

    These are noise schedule, scale and shift of latents, which no tensor says; and a full LCM's guidance has no name.
    """
    usual = {**SD15_SCHEDULER, "rescale_betas_zero_snr": model.scheduler_config.get("rescale_betas_zero_snr")}
    scheduler: Any = make_scheduler(DDIM, usual)
    alphas, expected = model.alphas_cumprod().cpu(), scheduler.alphas_cumprod
    own, scale = model.vae_config.scaling_factor, LATENT_SCALES[unet_is_xl(model.unet.config)]
    reason = None
    if model.guidance_dimension:
        reason = "a full LCM is told its guidance scale, which this layout has no name for"
    elif alphas.shape != expected.shape or not torch.allclose(alphas, expected, atol=1e-5):
        reason = "this layout cannot say the model's noise schedule, which is not Stable Diffusion's"
    elif abs(own - scale) > 1e-6:
        reason = f"this layout cannot say the VAE's scale of latents, {own:g}, where programs take {scale:g}"
    elif model.vae_config.get("shift_factor"):
        reason = "this layout cannot say that the VAE's latents are shifted (shift_factor)"
    elif model.prediction_type not in ("epsilon", "v_prediction"):
        reason = f"this layout cannot say that the model predicts the {model.prediction_type}"
    if reason:
        raise UserError(f"format=single_file: {reason}; set format=fused")


def original_state_dict(model: StableDiffusion) -> dict[str, Tensor]:
    """All weights of the model, which carries no adapters, by the names of Stable Diffusion's own code."""
    tensors = {UNET + original_key(key, model.unet.config): value for key, value in model.unet.state_dict().items()}
    tensors |= {VAE + key: value for key, value in vae_tensors(model.vae)}
    texts = model.text_encoders
    if unet_is_xl(model.unet.config):
        tensors |= clip_tensors(texts["text_encoder"], XL_CLIP)
        tensors |= openclip_tensors(texts["text_encoder_2"], XL_OPENCLIP)
    elif base_version(model).v2:
        tensors |= openclip_tensors(texts["text_encoder"], OPENCLIP)
    else:
        tensors |= clip_tensors(texts["text_encoder"], CLIP)
    return tensors | markers(model)


def markers(model: StableDiffusion) -> dict[str, Tensor]:
    """Empty tensors by which ComfyUI and A1111 know what a model predicts, and on which noise schedule."""
    velocity = model.prediction_type == "v_prediction"
    told = {"v_pred": velocity, "ztsnr": bool(model.scheduler_config.get("rescale_betas_zero_snr"))}
    return {name: torch.empty(0) for name, holds in told.items() if holds}


def original_key(key: str, config: Any) -> str:
    """The name of a UNet's tensor; see `original_name`, which takes that of its layer."""
    layer, dot, kind = key.rpartition(".")
    return original_name(layer, config) + dot + kind


def vae_tensors(vae: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The VAE's: levels of the decoder are counted from the image, and its attention is of 1 x 1 convolutions."""
    last = len(vae.config.block_out_channels) - 1  # type: ignore[union-attr,arg-type]
    for key, tensor in vae.state_dict().items():
        name = re.sub(r"down_blocks\.(\d+)\.resnets", r"down.\1.block", key)
        name = re.sub(r"down_blocks\.(\d+)\.downsamplers\.0", r"down.\1.downsample", name)
        name = re.sub(r"up_blocks\.(\d+)\.resnets", lambda found: f"up.{last - int(found[1])}.block", name)
        name = re.sub(r"up_blocks\.(\d+)\.upsamplers\.0", lambda found: f"up.{last - int(found[1])}.upsample", name)
        name = re.sub(r"mid_block\.resnets\.(\d+)", lambda found: f"mid.block_{int(found[1]) + 1}", name)
        name = name.replace("conv_shortcut", "nin_shortcut").replace("conv_norm_out", "norm_out")
        if attention := re.fullmatch(r"(.+)\.mid_block\.attentions\.0\.(.+)\.(weight|bias)", name):
            side, part, kind = attention.groups()
            name = f"{side}.mid.attn_1.{IN_VAE_ATTENTION[part]}.{kind}"
            tensor = tensor[:, :, None, None] if tensor.dim() == 2 else tensor
        yield name, tensor


def clip_tensors(text_encoder: nn.Module, prefix: str) -> dict[str, Tensor]:
    """Of transformers' CLIP, with the positions that it kept when Stable Diffusion was published."""
    positions = torch.arange(text_encoder.config.max_position_embeddings)[None]  # type: ignore[union-attr,arg-type]
    return {f"{prefix}text_model.{name}": tensor for name, tensor in _text_weights(text_encoder).items()} | {
        f"{prefix}text_model.embeddings.position_ids": positions
    }


def openclip_tensors(text_encoder: nn.Module, prefix: str) -> dict[str, Tensor]:
    """Of OpenCLIP, which has queries, keys and values in one matrix, and its projection transposed."""
    weights = _text_weights(text_encoder)
    tensors = {IN_OPENCLIP[name]: weights[name] for name in IN_OPENCLIP}
    if "text_projection.weight" in weights:
        tensors["text_projection"] = weights["text_projection.weight"].T
    for name, tensor in weights.items():
        if (found := re.fullmatch(r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name)) is None:
            continue
        number, layer, kind = found.groups()
        block = f"transformer.resblocks.{number}"
        if layer in IN_OPENCLIP_BLOCK:
            tensors[f"{block}.{IN_OPENCLIP_BLOCK[layer]}.{kind}"] = tensor
        elif layer == "self_attn.q_proj":
            three = [weights[name.replace("q_proj", f"{part}_proj")] for part in "qkv"]
            tensors[f"{block}.attn.in_proj_{kind}"] = torch.cat(three)
    return {prefix + name: tensor for name, tensor in tensors.items()}


def _text_weights(text_encoder: nn.Module) -> dict[str, Tensor]:
    """By their names without the part that some versions of transformers have in the module."""
    return {name.removeprefix("text_model."): tensor for name, tensor in text_encoder.state_dict().items()}
