"""ComfyUI's own code on the CPU: its checkpoint and LoRA loaders, its KSampler and its VAE.

python with_comfyui.py INPUTS CHECKOUT
"""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from common import Inputs, Report, Weights, commit_of, difference

FOLDER, CHECKOUT = sys.argv[1:]
sys.path.insert(0, CHECKOUT)
sys.argv = ["main.py", "--cpu", "--fp32-unet", "--fp32-vae", "--fp32-text-enc"]

import comfy.options

comfy.options.enable_args_parsing()
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.utils
import comfyui_version
import numpy as np
import torch
from comfy_extras.nodes_model_advanced import ModelSamplingDiscrete


@torch.no_grad()
def draw(model: Any, clip: Any, vae: Any, inputs: Inputs) -> np.ndarray:
    """Its picture [H, W, 3] in 0..255: sampler lcm, scheduler sgm_uniform, cfg 1, from our noise."""
    conditions = [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in (inputs.expected["prompt"], "")]
    noise = torch.from_numpy(inputs.noise)
    steps, seed = inputs.expected["steps"], inputs.expected["seed"]
    latents = comfy.sample.sample(
        model, noise, steps, 1.0, "lcm", "sgm_uniform", *conditions, torch.zeros_like(noise), seed=seed
    )
    return 255 * vae.decode(latents)[0].float().numpy()


def timesteps(model: Any, steps: int) -> list[int]:
    """At which it would call the UNet."""
    sampling = model.get_model_object("model_sampling")
    sigmas = comfy.samplers.calculate_sigmas(sampling, "sgm_uniform", steps)
    return [round(float(sampling.timestep(sigma))) for sigma in sigmas[:-1]]


@torch.no_grad()
def merged(model: Any, inputs: Inputs) -> dict[str, float]:
    """The weights that it has patched beside those of our fused file."""
    from safetensors import safe_open

    weights = Weights()
    ours, before = (safe_open(inputs / name, "pt") for name in ("fused.safetensors", "base.safetensors"))
    for key in model.patches:
        name = f"model.{key}"
        found = model.patch_weight_to_device(key, return_weight=True)
        weights.add(found.numpy(), ours.get_tensor(name).float().numpy(), before.get_tensor(name).float().numpy())
    return weights.row()


def main() -> None:
    """Every file that ComfyUI should take."""
    inputs = Inputs(FOLDER)
    report = Report("ComfyUI", "torch", ComfyUI=comfyui_version.__version__, commit=commit_of(CHECKOUT))
    report.listen()
    with report.row("base.safetensors") as row:
        model, clip, vae, _ = comfy.sd.load_checkpoint_guess_config(inputs / "base.safetensors")
        row["base"] = difference(draw(model, clip, vae, inputs), inputs.base, inputs.lora)
    for file in ("kohya_lora_weights", "pytorch_lora_weights"):
        with report.row(f"base.safetensors and {file}.safetensors") as row:
            lora = comfy.utils.load_torch_file(inputs / f"lora/{file}.safetensors")
            adapted, adapted_clip = comfy.sd.load_lora_for_models(model, clip, lora, 1.0, 1.0)
            if file.startswith("kohya"):  # before anything is drawn: drawing leaves the weights patched
                row |= merged(adapted, inputs)
            row["picture"] = difference(draw(adapted, adapted_clip, vae, inputs), inputs.lora, inputs.base)
    with report.row("4 steps by sgm_uniform, without and with the node ModelSamplingDiscrete") as row:
        distilled = ModelSamplingDiscrete().patch(model, "lcm", False)[0]
        row["timesteps"] = {"without": timesteps(model, 4), "with": timesteps(distilled, 4)}
    del model, clip, vae, adapted, adapted_clip, distilled  # 8 GB
    comfy.model_management.unload_all_models()
    gc.collect()
    with report.row("fused.safetensors") as row:
        parts = comfy.sd.load_checkpoint_guess_config(inputs / "fused.safetensors")[:3]
        row["picture"] = difference(draw(*parts, inputs), inputs.lora, inputs.base)
    report.finish()


if __name__ == "__main__":
    main()
