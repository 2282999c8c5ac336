"""stable-diffusion.cpp through the wheels of cyllama or inferna, which bind it: the single files and the LoRA.

python with_stable_diffusion_cpp.py INPUTS cyllama|inferna
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import numpy as np
from common import Inputs, Report, difference


def parts_of(name: str) -> Any:
    """The module of stable-diffusion.cpp in a package."""
    return importlib.import_module(f"{name}.sd")


def draw(sd: Any, inputs: Inputs, file: str, lora: str | None = None) -> np.ndarray:
    """Its picture [H, W, 3] in 0..255: sampler LCM, cfg 1, noise of torch's generator on the CPU."""
    settings = sd.SDContextParams(model_path=inputs / file)
    settings.n_threads, settings.wtype = 1, sd.SDType.F32
    settings.rng_type = settings.sampler_rng_type = sd.RngType.CPU
    settings.lora_apply_mode = sd.LoraApplyMode.IMMEDIATELY
    expected = inputs.expected
    wanted = sd.SDImageGenParams(prompt=expected["prompt"], negative_prompt="")
    wanted.width = wanted.height = expected["size"]
    wanted.seed = expected["seed"]
    sampling = sd.SDSampleParams()
    sampling.sample_method, sampling.scheduler = sd.SampleMethod.LCM, sd.Scheduler.SGM_UNIFORM
    sampling.sample_steps, sampling.cfg_scale = expected["steps"], 1.0
    wanted.sample_params = sampling
    if lora is not None:
        wanted.set_loras([{"path": inputs / lora, "multiplier": 1.0}])
    with sd.SDContext(settings) as context:
        return np.asarray(context.generate_with_params(wanted)[0].to_numpy(), dtype=np.float64)


def main() -> None:
    """Draw without, with each layout of the LoRA, and from the fused file."""
    inputs, name = Inputs(sys.argv[1]), sys.argv[2]
    sd = parts_of(name)
    said: list[str] = []
    sd.set_log_callback(lambda level, text: said.append(text.strip()))
    report = Report(f"stable-diffusion.cpp in {name}", name)
    with report.row("base.safetensors") as row:
        row["base"] = difference(draw(sd, inputs, "base.safetensors"), inputs.base, inputs.lora)
    for file in ("kohya_lora_weights", "pytorch_lora_weights"):
        with report.row(f"base.safetensors and {file}.safetensors") as row:
            said.clear()
            row["picture"] = difference(
                draw(sd, inputs, "base.safetensors", f"lora/{file}.safetensors"), inputs.lora, inputs.base
            )
            row["said"] = [line for line in said if "lora" in line.lower()]
    with report.row("fused.safetensors") as row:
        row["picture"] = difference(draw(sd, inputs, "fused.safetensors"), inputs.lora, inputs.base)
    report.finish()


if __name__ == "__main__":
    main()
