"""What is evaluated: models with their adapters, and what identifies them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lcm_lightning.models.adapters import lora_layers
from lcm_lightning.models.identity import tokenizer_digest
from lcm_lightning.models.kinds import AdapterKind
from lcm_lightning.models.stable_diffusion import StableDiffusion


@dataclass(frozen=True)
class Subject:
    """A model with loaded adapters.

    Attributes:
        model: on the CPU, in evaluation mode.
        adapters: their kinds in training order.
    """

    model: StableDiffusion
    adapters: tuple[AdapterKind, ...]

    def identities(self) -> dict[str, str]:
        """Hex digest of the weights without adapters (under the empty name) and of each adapter by name."""
        return {"": weights_digest(self.model)} | {
            kind.name: adapter_digest(self.model, kind.name) for kind in self.adapters
        }


@dataclass(frozen=True)
class DataChoice:
    """A data set as a configuration names it.

    Attributes:
        name, source, resolution, cache_dir: see `lcm_lightning.data.datamodule.CaptionedImages`.
    """

    name: str
    source: str | None
    resolution: int
    cache_dir: str | None = None


@dataclass(frozen=True)
class SubjectSource:
    """Where a subject comes from; nothing is loaded before `load`.

    Attributes:
        name: short, unique in an evaluation.
        spec: what the user wrote.
        load: reads model and adapters.
        data: of the run it comes from; None for a model without a run.
    """

    name: str
    spec: str
    load: Callable[[], Subject]
    data: DataChoice | None = None


def weights_digest(model: StableDiffusion) -> str:
    """Hex digest of all that a model draws by but its adapters.

    Weights, the networks' configs (a VAE's scaling factor is no weight), tokenizer and noise schedule; not where they
    lie, nor which version of a library wrote them.
    """
    configs = [model.unet.config, model.vae.config, model.text_encoder.config.to_dict(), model.scheduler_config]
    content = [[_without_origin(config) for config in configs], tokenizer_digest(model.tokenizer)]
    digest = hashlib.sha256(json.dumps(content, sort_keys=True, default=str).encode())
    tensors = {k.replace(".base_layer.", "."): v for k, v in model.state_dict().items() if ".lora_" not in k}
    return _hash_tensors(digest, tensors)


def _without_origin(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not key.startswith("_") and key != "transformers_version"}


def adapter_digest(model: StableDiffusion, name: str) -> str:
    """Hex digest of the weights and scales of an adapter; not of its name."""
    scales = [layer.scaling[name] for layer in lora_layers(model) if name in layer.lora_A]
    digest = hashlib.sha256(json.dumps(scales).encode())
    tensors = {
        k.replace(f".{name}.", "."): v for k, v in model.state_dict().items() if ".lora_" in k and f".{name}." in k
    }
    return _hash_tensors(digest, tensors)


def _hash_tensors(digest: Any, tensors: Mapping[str, torch.Tensor]) -> str:
    for key, tensor in sorted(tensors.items()):
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
