"""Hashes of a model as a teacher, by which its cached steps know it again."""

from __future__ import annotations

import json

from torch import nn

from lcm_lightning.errors import short
from lcm_lightning.models.identity import DIGITS, tensors_digest, updates_digest, weights_digest
from lcm_lightning.models.lora_files import locate_lora, match_layers, read_lora
from lcm_lightning.models.stable_diffusion import StableDiffusion

# Of the UNet's config: what changes its output and not the shape or number of its weights.
UNET_CONFIG = (
    *("attention_head_dim", "num_attention_heads", "norm_num_groups", "norm_eps", "act_fn", "flip_sin_to_cos"),
    *("freq_shift", "downsample_padding", "mid_block_scale_factor", "resnet_time_scale_shift", "upcast_attention"),
    *("center_input_sample", "only_cross_attention", "time_embedding_act_fn"),
)


def teacher_identity(model: StableDiffusion, teacher_lora: str | None) -> dict[str, str]:
    """What the outputs of `model` on given latents and embeddings depend on, but rounding, by part.

    As for `lcm_lightning.models.identity.encoder_key`: equal weights in the same precision have equal hashes wherever
    they lie, and random ones are called so.

    Args:
        teacher_lora: a LoRA that is fused into the weights (see `locate_lora`).

    Raises:
        UserError: the files of the UNet or of the LoRA are missing.
    """
    config, vae = model.unet.config, model.vae_config
    unet = "random" if model.files is None else weights_digest(model.files["unet"])
    settings = json.dumps({name: config.get(name) for name in UNET_CONFIG})
    return {
        "unet": tensors_digest([], f"{unet} {settings}")[:DIGITS],
        "teacher_lora": "none" if teacher_lora is None else unet_lora_digest(teacher_lora, model.unet),
        "noise_schedule": tensors_digest([("", model.alphas_cumprod())])[:DIGITS],
        "prediction_type": model.prediction_type,
        "latent_scale": f"{vae.get('scaling_factor')} {vae.get('shift_factor') or 0.0}",
    }


def unet_lora_digest(source: str, unet: nn.Module) -> str:
    """Hash of a LoRA's part on the UNet, whatever the layout of its file. Raises `UserError`."""
    key = "method.teacher_lora"
    said = f"{key}={short(source, 80)}"
    matched, _ = match_layers(read_lora(locate_lora(source, key), said), {"unet": unet}, said)
    return updates_digest(matched.get("unet", {}))
