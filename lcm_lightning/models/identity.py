"""What cached latents and text embeddings depend on: VAE, text encoder and tokenizer, each as a short hash."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from safetensors import SafetensorError, safe_open
from torch import Tensor
from transformers import CLIPTokenizer

from lcm_lightning.errors import UserError, first_line
from lcm_lightning.models.adapters import locate_lora
from lcm_lightning.models.stable_diffusion import StableDiffusion

# Of the text encoder's config: what changes its output and not the shape or number of its weights.
TEXT_CONFIG = ("num_hidden_layers", "hidden_act", "layer_norm_eps")
PROBES = ("a dog, running on the beach!", "Zwei Männer; 37 % größer", "naïve café — 犬 🐕", "x" * 300)
DIGITS = 16


def encoder_key(model: StableDiffusion, teacher_lora: str | None = None) -> dict[str, str]:
    """Hashes of "vae", "text_encoder" and "tokenizer", from the files, whether or not they have been loaded.

    Equal weights in the same precision have equal hashes, wherever they lie and whatever else their files hold. Random
    weights are called so: they are other ones in every process.

    Args:
        teacher_lora: a LoRA on the model (see `locate_lora`); its part on the text encoder counts.

    Raises:
        UserError: the files of VAE or text encoder are missing.
    """
    key = {"vae": "random", "text_encoder": "random", "tokenizer": tokenizer_digest(model.tokenizer)}
    if model.folder is not None:
        config = json.loads((model.folder / "text_encoder" / "config.json").read_text())
        key["vae"] = weights_digest(model.folder / "vae")
        text = [weights_digest(model.folder / "text_encoder"), *(str(config.get(name)) for name in TEXT_CONFIG)]
        key["text_encoder"] = hashlib.sha256(" ".join(text).encode()).hexdigest()[:DIGITS]
    lora = None if teacher_lora is None else text_lora_digest(teacher_lora)
    return key if lora is None else {**key, "text_encoder": f"{key['text_encoder']}+lora-{lora}"}


def cache_key(model: StableDiffusion, resolution: int, teacher_lora: str | None) -> dict[str, str]:
    """All that latents and embeddings of given captions and images of `resolution` px depend on, but rounding."""
    return {**encoder_key(model, teacher_lora), "resolution": str(resolution)}


def weights_digest(folder: Path) -> str:
    """Hash of the safetensors weights that diffusers and transformers read from a network's folder."""
    whole = [folder / name for name in ("diffusion_pytorch_model.safetensors", "model.safetensors")]
    files = [path for path in whole if path.is_file()] or sorted(folder.glob("*-of-*.safetensors"))
    if not files:
        raise UserError(f"model.path: no .safetensors weights in {folder}, by which cached latents are known")
    return tensors_digest(pair for file in files for pair in _read_tensors(file))


def _read_tensors(file: Path) -> Iterable[tuple[str, Tensor]]:
    try:
        with safe_open(file, framework="pt") as opened:
            for name in sorted(opened.keys()):
                yield name, opened.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise UserError(f"model.path: {file} cannot be read ({first_line(error)})") from error


def tensors_digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """Hash of named tensors in the order given."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:DIGITS]


def text_lora_digest(source: str) -> str | None:
    """Hash of a LoRA's part on the text encoder; None where it has none. Raises `UserError`."""
    path = locate_lora(source)
    try:
        tensors, alphas = StableDiffusionPipeline.lora_state_dict(
            str(path.parent), weight_name=path.name, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise UserError(f"teacher_lora={source}: cannot be loaded ({first_line(error)})") from error
    part = sorted((name, tensor) for name, tensor in tensors.items() if name.startswith("text_encoder."))
    scales = sorted((name, torch.tensor(a)) for name, a in (alphas or {}).items() if name.startswith("text_encoder."))
    return tensors_digest([*part, *scales]) if part else None


def tokenizer_digest(tokenizer: CLIPTokenizer) -> str:
    """Hash of the vocabulary, the length captions are cut at, and how some hard captions come out."""
    tokens = tokenizer(list(PROBES), padding="max_length", max_length=tokenizer.model_max_length, truncation=True)
    content = [sorted(tokenizer.get_vocab().items()), tokenizer.model_max_length, tokens.input_ids]
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:DIGITS]
