"""OpenVINO GenAI: the exported folder with the LoRA in it, and the pipeline's own folder with a LoRA file beside it.

    python with_openvino.py INPUTS

Exports with `python -m lcm_lightning.export`, so this package runs in the environment too.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import numpy as np
import openvino_genai
from common import Inputs, Report, difference

LORA = "lora/pytorch_lora_weights.safetensors"


def export(inputs: Inputs, name: str, *settings: str) -> str:
    """A folder of ours in `format=name`, made where it is missing."""
    folder = inputs / "-".join([name, *(["fused"] if settings else [])])
    if not Path(folder, "model_index.json").is_file():
        command = [sys.executable, "-m", "lcm_lightning.export", "model=sd15", f"model.path={inputs / 'pipeline'}"]
        command += [f"format={name}", "dtype=float32", "overwrite=true", f"output={folder}", *settings]
        subprocess.run(command, check=True, stdout=sys.stderr)
    return folder


def draw(pipeline: Any, inputs: Inputs) -> np.ndarray:
    """Its picture [H, W, 3] in 0..255, noise of torch's generator."""
    expected = inputs.expected
    picture = pipeline.generate(
        expected["prompt"],
        width=expected["size"],
        height=expected["size"],
        num_inference_steps=expected["steps"],
        guidance_scale=expected["guidance_scale"],
        generator=openvino_genai.TorchGenerator(expected["seed"]),
    )
    return np.asarray(picture.data[0], dtype=np.float64)


def main() -> None:
    """Both folders."""
    inputs = Inputs(sys.argv[1])
    report = Report("OpenVINO GenAI", "openvino-genai", "openvino", "openvino-tokenizers")
    report.listen()
    exact = {"INFERENCE_PRECISION_HINT": "f32"}
    with report.row("openvino-fused/") as row:
        folder = export(inputs, "openvino", f"lora={inputs / LORA}", "lora_role=lcm")
        pipeline = openvino_genai.Text2ImagePipeline(folder, "CPU", **exact)
        row["picture"] = difference(draw(pipeline, inputs), inputs.lora, inputs.base)
    folder = export(inputs, "openvino")
    scheduler = str(Path(inputs / "openvino-fused", "scheduler/scheduler_config.json"))
    files = {"": inputs.base, "pytorch_lora_weights": inputs.lora, "kohya_lora_weights": inputs.lora}
    files["kohya_attention"] = inputs.attention
    for file, ours in files.items():
        with report.row("openvino/" + (f" and {file}.safetensors" if file else "")) as row:
            adapters = openvino_genai.AdapterConfig()
            if file:
                adapters.add(openvino_genai.Adapter(inputs / f"lora/{file}.safetensors"), 1.0)
            settings = {**exact, "adapters": adapters} if file else exact
            pipeline = openvino_genai.Text2ImagePipeline(folder, "CPU", **settings)
            pipeline.set_scheduler(openvino_genai.Scheduler.from_config(scheduler))
            others = inputs.base if file else inputs.lora
            row["picture" if file else "base"] = difference(draw(pipeline, inputs), ours, others)
    report.finish()


if __name__ == "__main__":
    main()
