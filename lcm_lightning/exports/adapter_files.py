"""LoRA files for diffusers, and for what reads those of kohya's scripts: ComfyUI, A1111 and others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from lcm_lightning.exports.metadata import (
    DIFFUSERS,
    ORIGINAL,
    Described,
    adapter_metadata,
    base_metadata,
    layer_ranks,
    model_spec,
    network_metadata,
)
from lcm_lightning.models.adapters import kohya_state_dict
from lcm_lightning.models.kinds import KOHYA_FILE, LORA_FILE, AdapterKind
from lcm_lightning.models.latent_diffusion import LatentDiffusionModel
from lcm_lightning.models.lora_files import LORA_NETWORKS, save_lora
from lcm_lightning.models.pipeline_files import unet_is_xl
from lcm_lightning.models.stable_diffusion import StableDiffusion


def write_diffusers_lora(
    tensors: Mapping[str, Tensor],
    model: LatentDiffusionModel,
    kinds: Sequence[AdapterKind],
    folder: Path,
    described: Described = Described(),  # noqa: B008  # frozen
    **more: str,
) -> Path:
    """Write what `load_lora_weights` of diffusers loads; the file's path.

    Args:
        tensors: under diffusers' keys, alpha being the rank, as `lora_state_dict` gives them.
        kinds: of the adapters that are in them, in training order.
        more: said in the header too.

    Raises:
        OSError: it cannot be written.
    """
    said = model_spec(model, kinds, DIFFUSERS, described, lora=True) | base_metadata(model) | adapter_metadata(tensors)
    save_lora(dict(tensors), folder / LORA_FILE, **said, **more)
    return folder / LORA_FILE


def write_kohya_lora(
    tensors: Mapping[str, Tensor],
    model: LatentDiffusionModel,
    kinds: Sequence[AdapterKind],
    folder: Path,
    described: Described = Described(),  # noqa: B008  # frozen
    **more: str,
) -> Path:
    """Write the same by the names of kohya's scripts; see `write_diffusers_lora`."""
    ranks = {
        f"{network}.{layer}": rank  # both text encoders of SDXL have layers of one name
        for network in LORA_NETWORKS
        for layer, rank in layer_ranks(tensors, network).items()
    }
    said = model_spec(model, kinds, ORIGINAL if unet_is_xl(model.unet.config) else DIFFUSERS, described, lora=True)
    said |= base_metadata(model) | network_metadata(ranks)
    save_lora(kohya_state_dict(dict(tensors), model.unet), folder / KOHYA_FILE, **said, **more)
    return folder / KOHYA_FILE


@torch.no_grad()
def joint_state_dict(
    model: StableDiffusion, names: Sequence[str], dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    """One LoRA whose update of every layer is the sum of those of the adapters `names`, under diffusers' keys.

    ``sum_i s_i B_i A_i = [s_1 B_1, s_2 B_2, ...] [A_1; A_2; ...]``: ranks add up, and the scales
    ``s_i = weight alpha / rank`` are folded into B.
    """
    tensors: dict[str, Tensor] = {}
    for network, module in {"unet": model.unet, **model.text_encoders}.items():
        if module is None:  # not read yet, so that nothing is added to it
            continue
        for path, layer in module.named_modules():
            present = [name for name in names if isinstance(layer, LoraLayer) and name in layer.lora_A]
            if not present:
                continue
            down = [layer.lora_A[name].weight.float() for name in present]
            up = [layer.lora_B[name].weight.float() * layer.scaling[name] for name in present]
            key = f"{network}.{_saved_layer(network, path)}"
            tensors[f"{key}.lora_A.weight"] = torch.cat(down, 0).cpu().to(dtype)
            tensors[f"{key}.lora_B.weight"] = torch.cat(up, 1).cpu().to(dtype)
    return tensors


def _saved_layer(network: str, layer: str) -> str:
    """A layer's name in files, with the part of a text encoder's that transformers 5 leaves out of its module."""
    return layer if network == "unet" or layer.startswith(("text_model.", "text_projection")) else f"text_model.{layer}"
