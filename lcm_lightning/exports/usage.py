"""The lines that draw with what was exported."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from lcm_lightning.models.kinds import AdapterKind, usual_kind
from lcm_lightning.models.pipeline_files import unet_is_xl
from lcm_lightning.models.programs import loader, quoted, scheduler_settings
from lcm_lightning.models.stable_diffusion import StableDiffusion

IN_INTERFACES = {"LCMScheduler": "LCM", "TCDScheduler": "TCD"}  # whatever method a student is of


def diffusers_lora(file: Path, model: StableDiffusion, kinds: Sequence[AdapterKind]) -> str:
    """Python code for a LoRA with diffusers' pipeline of its base model."""
    usual = usual_kind(kinds, model.guidance_scale)
    scheduler = usual.sampler.scheduler
    is_file = model.name_or_path.endswith(".safetensors")
    pipeline, load = loader(is_file=is_file, xl=unet_is_xl(model.unet.config))
    schedule = {**model.scheduler_config, "prediction_type": model.prediction_type}
    untold = tuple(key for key in ("prediction_type", "rescale_betas_zero_snr") if is_file and key in schedule)
    settings = scheduler_settings(usual.sampler, schedule, from_file=untold)
    told = "".join(f", {key}={value!r}" for key, value in settings.items())
    return "\n".join(
        [
            f"from diffusers import {pipeline}, {scheduler}",
            "",
            f"pipe = {pipeline}.{load}({quoted(model.name_or_path)})",
            f"pipe.scheduler = {scheduler}.from_config(pipe.scheduler.config{told})",
            f"pipe.load_lora_weights({quoted(file.parent)}, weight_name={quoted(file.name)})",
            drawing(usual),
        ]
    )


def diffusers_folder(folder: Path, model: StableDiffusion, kinds: Sequence[AdapterKind], dtype: torch.dtype) -> str:
    """Python code for a folder of diffusers'."""
    return "\n".join(
        [
            "import torch",
            "from diffusers import DiffusionPipeline",
            "",
            f"pipe = DiffusionPipeline.from_pretrained({quoted(folder)}, dtype={dtype})",
            drawing(usual_kind(kinds, model.guidance_scale)),
        ]
    )


def optimum_folder(folder: Path, model: StableDiffusion, kinds: Sequence[AdapterKind]) -> str:
    """Python code for a folder of ONNX graphs."""
    return "\n".join(
        [
            "# in an environment of its own: pip install 'optimum-onnx[onnxruntime]' diffusers",
            "from optimum.onnxruntime import ORTDiffusionPipeline",
            "",
            f"pipe = ORTDiffusionPipeline.from_pretrained({quoted(folder)})",
            drawing(usual_kind(kinds, model.guidance_scale)),
        ]
    )


def openvino_folder(folder: Path, model: StableDiffusion, kinds: Sequence[AdapterKind]) -> str:
    """Python code for a folder of OpenVINO's graphs."""
    usual = usual_kind(kinds, model.guidance_scale)
    return "\n".join(
        [
            "from openvino_genai import Text2ImagePipeline  # pip install openvino-genai pillow",
            "from PIL import Image",
            "",
            f'pipe = Text2ImagePipeline({quoted(folder)}, "CPU")',
            f'image = pipe.generate("a photo of a dog", num_inference_steps={usual.steps}, '
            f"guidance_scale={usual.guidance_scale})",
            "image = Image.fromarray(image.data[0])",
        ]
    )


def differences(found: Mapping[str, float], runtime: str) -> str:
    """How far another runtime is off torch, a line for each network."""
    return "\n".join(f"{file}: {runtime} is off torch by at most {value:.1e}" for file, value in found.items())


def single_file(file: Path, model: StableDiffusion, kinds: Sequence[AdapterKind]) -> str:
    """Where ComfyUI and A1111 look for a model, and what to set there."""
    return (
        f"Copy {file.name} to ComfyUI/models/checkpoints, or stable-diffusion-webui/models/Stable-diffusion, and "
        f"{settings(usual_kind(kinds, model.guidance_scale))}"
    )


def kohya_lora(file: Path, model: StableDiffusion, kinds: Sequence[AdapterKind]) -> str:
    """Where ComfyUI and A1111 look for it, and what to set there."""
    return (
        f"Copy {file.name} to ComfyUI/models/loras, or stable-diffusion-webui/models/Lora, and "
        f"{settings(usual_kind(kinds, model.guidance_scale))}"
    )


def settings(usual: AdapterKind) -> str:
    """How to draw, in the words of user interfaces."""
    sampler = IN_INTERFACES.get(usual.sampler.scheduler, usual.sampler.title)
    return f"draw with {usual.steps} steps of {sampler} at CFG {usual.guidance_scale:g}."


def drawing(usual: AdapterKind) -> str:
    """The call of a pipeline `pipe` that draws as `generate` does."""
    eta = usual.sampler.settings.get("eta", 0.0)
    told = f", eta={eta!r}" if eta else ""  # the pipeline's own is 0
    return (
        f'image = pipe("a photo of a dog", num_inference_steps={usual.steps}, '
        f"guidance_scale={usual.guidance_scale:g}{told}).images[0]"
    )
