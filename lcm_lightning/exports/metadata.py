"""What exported files say of themselves in their headers, in the words that other programs look for."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import PurePath
from typing import Any

from torch import Tensor

from lcm_lightning.models.kinds import AdapterKind, usual_kind
from lcm_lightning.models.latent_diffusion import LatentDiffusionModel
from lcm_lightning.models.lora_files import LORA_NETWORKS, METADATA
from lcm_lightning.models.pipeline_files import unet_is_xl

SPEC_VERSION = "1.0.0"  # of the Stability AI Model Metadata Standard; hashes are written by `save_tensors`
DIFFUSERS, ORIGINAL = "diffusers", "https://github.com/Stability-AI/generative-models"  # whose names tensors have
DYNAMIC = "Dynamic"  # how kohya's scripts say that layers differ


@dataclass(frozen=True)
class Described:
    """What a file's author says of it, beside what its tensors tell. None is not written."""

    title: str | None = None
    author: str | None = None
    license: str | None = None


@dataclass(frozen=True)
class BaseVersion:
    """Names of a base model: `spec`, the metadata standard's, and `kohya`, that of kohya's scripts."""

    spec: str
    kohya: str
    v2: bool = False


def base_version(model: LatentDiffusionModel) -> BaseVersion:
    """Which Stable Diffusion a model is of, by what its UNet is told, as kohya's scripts and A1111 tell them apart."""
    config, velocity = model.unet.config, model.prediction_type == "v_prediction"
    if unet_is_xl(config):
        return BaseVersion("stable-diffusion-xl-v1-base", "sdxl_base_v1-0")
    if config.cross_attention_dim == 1024:
        name = "stable-diffusion-v2-768-v" if velocity else "stable-diffusion-v2-512"
        return BaseVersion(name, "sd_v2_v" if velocity else "sd_v2", v2=True)
    return BaseVersion("stable-diffusion-v1", "sd_v1")


def model_name(model: LatentDiffusionModel) -> str:
    """The last part of where it came from: of a hub id, a folder or a file."""
    return PurePath(model.name_or_path).name.removesuffix(".safetensors")


def model_spec(
    model: LatentDiffusionModel,
    kinds: Sequence[AdapterKind],
    implementation: str,
    described: Described,
    *,
    lora: bool,
) -> dict[str, str]:
    """`modelspec.*` (github.com/Stability-AI/ModelSpec), and how the model is drawn from, of a model with `kinds`.

    The prediction type is that of training: "epsilon", "v" or diffusers' name. `sampler` is a class of diffusers, and
    `sampler_settings` what it is built with beside the model's noise schedule.
    """
    usual, side = usual_kind(kinds, model.guidance_scale), model.default_resolution
    name = model_name(model)
    titles = " + ".join(kind.title for kind in kinds)
    hint = f"{usual.sampler.scheduler}, {usual.steps} steps, guidance scale {usual.guidance_scale:g}"
    said = {
        "sai_model_spec": SPEC_VERSION,
        "architecture": base_version(model).spec + ("/lora" if lora else ""),
        "implementation": implementation,
        "title": described.title or (f"{titles} for {name}" if lora else " + ".join(filter(None, (name, titles)))),
        "author": described.author,
        "license": described.license,
        "date": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "resolution": f"{side}x{side}",
        "prediction_type": {"v_prediction": "v"}.get(model.prediction_type, model.prediction_type),
        "usage_hint": hint,
    }
    return {f"modelspec.{key}": value for key, value in said.items() if value is not None} | {
        "sampler": usual.sampler.scheduler,
        "sampler_settings": json.dumps(dict(usual.sampler.settings), sort_keys=True),
        "steps": str(usual.steps),
        "guidance_scale": f"{usual.guidance_scale:g}",
    }


def base_metadata(model: LatentDiffusionModel) -> dict[str, str]:
    """What A1111 knows a LoRA's base model by; one that says anything but this is Stable Diffusion 1's to it."""
    version = base_version(model)
    return {
        "ss_base_model_version": version.kohya,
        "ss_v2": str(version.v2),
        "ss_sd_model_name": model_name(model),
    }


def network_metadata(ranks: Mapping[str, int]) -> dict[str, str]:
    """What kohya's scripts say of a LoRA with these ranks by layer, where alpha is the rank."""
    found = set(ranks.values())
    rank = str(found.pop()) if len(found) == 1 else DYNAMIC
    return {"ss_network_module": "networks.lora", "ss_network_dim": rank, "ss_network_alpha": rank}


def adapter_metadata(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """peft's settings of each network as diffusers' `save_lora_weights` packs them, of a LoRA whose alpha is its rank.

    Without settings of a network that has tensors, diffusers 0.42 would take peft's defaults, rank 8, for its.
    """
    packed: dict[str, Any] = {}
    for network in LORA_NETWORKS:
        if ranks := layer_ranks(tensors, network):
            packed |= {f"{network}.{key}": value for key, value in _peft_settings(ranks).items()}
    return {METADATA: json.dumps(packed, sort_keys=True)}


def _peft_settings(ranks: Mapping[str, int]) -> dict[str, Any]:
    """Arguments of `LoraConfig`; those alone that it has had in every version."""
    rank = Counter(ranks.values()).most_common(1)[0][0]
    # transformers 5 has dropped the first part of a text encoder's names; peft compares their ends.
    named = {layer.removeprefix("text_model."): value for layer, value in ranks.items()}
    others = {layer: value for layer, value in named.items() if value != rank}
    return {
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": others,
        "alpha_pattern": others,
        "target_modules": sorted(named),
        "bias": "none",
    }


def layer_ranks(tensors: Mapping[str, Tensor], network: str) -> dict[str, int]:
    """The rank of each layer of `network`, of a LoRA's tensors under diffusers' keys."""
    start, end = f"{network}.", ".lora_A.weight"
    return {
        key.removeprefix(start).removesuffix(end): tensor.shape[0]
        for key, tensor in tensors.items()
        if key.startswith(start) and key.endswith(end)
    }
