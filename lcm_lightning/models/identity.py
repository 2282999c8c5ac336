"""Hashes of networks, adapters and tokenizers, by which caches and evaluations know them again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPTokenizer

from lcm_lightning.errors import short
from lcm_lightning.models.adapters import active_adapters, lora_layers
from lcm_lightning.models.lora_files import LayerUpdate, locate_lora, read_lora
from lcm_lightning.models.pipeline_files import NetworkFiles
from lcm_lightning.models.stable_diffusion import StableDiffusion

# Of the text encoder's config: what changes its output and not the shape or number of its weights.
TEXT_CONFIG = ("num_hidden_layers", "num_attention_heads", "hidden_act", "layer_norm_eps")
PROBES = ("a dog, running on the beach!", "Zwei Männer; 37 % größer", "naïve café — 犬 🐕", "x" * 300)
DIGITS = 16


def encoder_key(model: StableDiffusion, teacher_lora: str | None = None) -> dict[str, str]:
    """Hashes of "vae", "text_encoder" and "tokenizer", from the files, whether or not they have been loaded.

    Equal weights of equal names in the same precision have equal hashes, in a folder or in a single file, wherever they
    lie and whatever else their files hold. Random weights are called so: they are other ones in every process.

    Args:
        teacher_lora: a LoRA on the model (see `locate_lora`); its part on the text encoder counts.

    Raises:
        UserError: the files of VAE or text encoder are missing.
    """
    key = {"vae": "random", "text_encoder": "random", "tokenizer": tokenizers_digest(model)}
    if model.files is not None:
        key["vae"] = weights_digest(model.files["vae"])
        text = [part for name in model.text_encoders for part in _text_encoder_parts(model.files[name])]
        text += ["zeros"] * model.empty_is_zero
        key["text_encoder"] = hashlib.sha256(" ".join(text).encode()).hexdigest()[:DIGITS]
    lora = None if teacher_lora is None else text_lora_digest(teacher_lora)
    return key if lora is None else {**key, "text_encoder": f"{key['text_encoder']}+lora-{lora}"}


def _text_encoder_parts(files: NetworkFiles) -> list[str]:
    config = files.config()
    return [weights_digest(files), *(str(config.get(name)) for name in TEXT_CONFIG)]


def cache_key(model: StableDiffusion, resolution: int, teacher_lora: str | None) -> dict[str, str]:
    """All that latents and embeddings of given captions and images of `resolution` px depend on, but rounding."""
    return {**encoder_key(model, teacher_lora), "resolution": str(resolution)}


def weights_digest(files: NetworkFiles) -> str:
    """Hash of the weights of a network, as they are in its files."""
    return tensors_digest(files.tensors())[:DIGITS]


def tensors_digest(tensors: Iterable[tuple[str, Tensor]], context: str = "") -> str:
    """Hex digest of `context` and of named tensors in the order given: names, types, shapes and values."""
    digest = hashlib.sha256(context.encode())
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def model_digest(model: StableDiffusion) -> str:
    """Hex digest of all that a model draws by but its adapters.

    Weights, the networks' configs (a VAE's scaling factor is no weight), tokenizer and noise schedule; not where they
    lie, nor which version of a library wrote them.
    """
    model.load_encoders()
    with active_adapters(model, ()):
        texts = [encoder.config.to_dict() for encoder in model.text_encoders.values()]  # type: ignore[operator,union-attr]
        configs = [model.unet.config, model.vae.config, *texts, model.scheduler_config]
        own = {k: v for k, v in model.state_dict().items() if ".lora_" not in k and not k.startswith("variants.")}
    content = [[_without_origin(config) for config in configs], tokenizers_digest(model)]
    content += ["zeros"] * model.empty_is_zero
    tensors = {k.replace(".base_layer.", "."): v for k, v in own.items()}
    return tensors_digest(sorted(tensors.items()), json.dumps(content, sort_keys=True, default=str))


def _without_origin(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if not key.startswith("_") and key != "transformers_version"}


def adapter_digest(model: StableDiffusion, name: str) -> str:
    """Hex digest of the weights and scales of an adapter, or of a variant's weights; not of its name."""
    if name in model.variants:
        return tensors_digest(sorted(model.variants[name].state_dict().items()))
    scales = [layer.scaling[name] for layer in lora_layers(model) if name in layer.lora_A]
    tensors = {
        k.replace(f".{name}.", "."): v for k, v in model.state_dict().items() if ".lora_" in k and f".{name}." in k
    }
    return tensors_digest(sorted(tensors.items()), json.dumps(scales))


def token_embeddings_digest(text_tower: nn.Module, dtype: torch.dtype) -> str:
    """Hex digest of the token embeddings of a text encoder in `dtype`: equal ones stand for the same text tower."""
    embeddings: Tensor = text_tower.get_input_embeddings().weight  # type: ignore[operator]
    return tensors_digest([("", embeddings.to(dtype))])


def text_lora_digest(source: str) -> str | None:
    """Hash of a LoRA's part on the text encoder; None where it has none. Raises `UserError`."""
    key = "teacher_lora"
    file = read_lora(locate_lora(source, key), f"{key}={short(source, 80)}")
    part = {
        f"{network.removeprefix('text_encoder')}{name.replace('.', '_').removeprefix('text_model_')}": update
        for (network, name), update in file.updates.items()
        if network.startswith("text_encoder")
    }
    return updates_digest(part) if part else None


def updates_digest(updates: Mapping[str, LayerUpdate]) -> str:
    """Hash of a LoRA's updates by the names of their layers, their strength among them."""
    tensors = {
        f"{name} {side}": tensor
        for name, update in updates.items()
        for side, tensor in (("down", update.down.float()), ("up", update.scale * update.up.float()))
    }
    return tensors_digest(sorted(tensors.items()))[:DIGITS]


def tokenizers_digest(model: StableDiffusion) -> str:
    """`tokenizer_digest` of a model's tokenizers, one after the other, and in how many chunks they read, if several."""
    digests = " ".join(tokenizer_digest(tokenizer) for tokenizer in model.tokenizers.values())
    return digests if model.prompt_chunks == 1 else f"{digests} in {model.prompt_chunks} chunks"


def tokenizer_digest(tokenizer: CLIPTokenizer) -> str:
    """Hash of the vocabulary, the length of a chunk, and how some hard captions come out."""
    tokens = tokenizer(list(PROBES), padding="max_length", max_length=tokenizer.model_max_length, truncation=True)
    content = [sorted(tokenizer.get_vocab().items()), tokenizer.model_max_length, tokens.input_ids]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:DIGITS]
