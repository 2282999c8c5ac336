"""onnxruntime alone: the exported networks, in the loop of diffusers' LCMScheduler.

    python with_onnxruntime.py INPUTS

Exports with `python -m lcm_lightning.export`, so this package runs in the environment too.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import diffusers
import numpy as np
import onnxruntime
import torch
from common import Inputs, Report, difference
from transformers import CLIPTokenizer

LORA = "lora/pytorch_lora_weights.safetensors"


def export(inputs: Inputs) -> Path:
    """A folder of ours with the LoRA in the weights, made where it is missing."""
    folder = Path(inputs / "onnx")
    if not (folder / "model_index.json").is_file():
        command = [sys.executable, "-m", "lcm_lightning.export", "model=sd15", f"model.path={inputs / 'pipeline'}"]
        command += [
            "format=onnx",
            "dtype=float32",
            "overwrite=true",
            f"output={folder}",
            f"lora={inputs / LORA}",
            "lora_role=lcm",
        ]
        subprocess.run(command, check=True, stdout=sys.stderr)
    return folder


def draw(folder: Path, inputs: Inputs) -> np.ndarray:
    """Its picture [H, W, 3] in 0..255."""
    expected = inputs.expected

    def network(name: str) -> onnxruntime.InferenceSession:
        return onnxruntime.InferenceSession(folder / name / "model.onnx", providers=["CPUExecutionProvider"])

    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    tokens = tokenizer(
        expected["prompt"], padding="max_length", max_length=tokenizer.model_max_length, return_tensors="np"
    )["input_ids"]
    text_encoder, unet, decoder = (network(name) for name in ("text_encoder", "unet", "vae_decoder"))
    text = text_encoder.run(None, {"input_ids": tokens.astype(kind(text_encoder, "input_ids"))})[0]
    scheduler = getattr(diffusers, expected["scheduler"]).from_pretrained(folder / "scheduler")
    scheduler.set_timesteps(expected["steps"])
    generator = torch.Generator().manual_seed(expected["seed"])
    latents = torch.randn(inputs.noise.shape, generator=generator)
    for timestep in scheduler.timesteps:
        given = {"sample": latents.numpy(), "encoder_hidden_states": text}
        given["timestep"] = np.asarray(timestep.item(), dtype=kind(unet, "timestep"))
        found = torch.from_numpy(unet.run(None, given)[0])
        latents = scheduler.step(found, timestep, latents, generator=generator).prev_sample
    scale = diffusers.AutoencoderKL.load_config(folder / "vae_decoder")["scaling_factor"]
    picture = decoder.run(None, {"latent_sample": (latents / scale).numpy()})[0][0]
    return 255 * np.clip(picture.transpose(1, 2, 0) / 2 + 0.5, 0, 1)


def kind(network: onnxruntime.InferenceSession, name: str) -> type[np.generic]:
    """numpy's type of an input."""
    kinds = {"tensor(int64)": np.int64, "tensor(int32)": np.int32, "tensor(float)": np.float32}
    return kinds[next(given.type for given in network.get_inputs() if given.name == name)]


def main() -> None:
    """The folder."""
    inputs = Inputs(sys.argv[1])
    report = Report("onnxruntime", "onnxruntime")
    report.listen()
    with report.row("onnx/") as row:
        row["picture"] = difference(draw(export(inputs), inputs), inputs.lora, inputs.base)
    report.finish()


if __name__ == "__main__":
    main()
