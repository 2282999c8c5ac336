"""Plain diffusers, of any version: the folder with the LoRA in both layouts, and the fused folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import diffusers
import numpy as np
import torch
from common import Inputs, Report, difference


def draw(pipeline: Any, inputs: Inputs) -> np.ndarray:
    """Its picture [H, W, 3] in 0..255."""
    expected = inputs.expected
    pipeline.set_progress_bar_config(disable=True)
    return (
        255
        * pipeline(
            expected["prompt"],
            num_inference_steps=expected["steps"],
            guidance_scale=expected["guidance_scale"],
            height=expected["size"],
            width=expected["size"],
            generator=torch.Generator().manual_seed(expected["seed"]),
            output_type="np",
        ).images[0]
    )


def load(folder: str) -> Any:
    """A pipeline in float32."""
    return diffusers.StableDiffusionPipeline.from_pretrained(folder, torch_dtype=torch.float32, safety_checker=None)


def main() -> None:
    """Draw from a folder of inputs, the first argument."""
    inputs = Inputs(sys.argv[1])
    report = Report("diffusers", "diffusers", "transformers", "peft", "torch")
    report.listen()
    scheduler = getattr(diffusers, inputs.expected["scheduler"])
    for file in ("pytorch_lora_weights", "kohya_lora_weights"):
        with report.row(f"pipeline/ and {file}.safetensors") as row:
            pipeline = load(inputs / "pipeline")
            pipeline.scheduler = scheduler.from_config(inputs.expected["scheduler_config"])
            row["base"] = difference(draw(pipeline, inputs), inputs.base, inputs.lora)
            pipeline.load_lora_weights(inputs / "lora", weight_name=f"{file}.safetensors")
            row["picture"] = difference(draw(pipeline, inputs), inputs.lora, inputs.base)
    with report.row("fused/") as row:
        row["picture"] = difference(draw(load(inputs / "fused"), inputs), inputs.lora, inputs.base)
    report.finish()


if __name__ == "__main__":
    main()
