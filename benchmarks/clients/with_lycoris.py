"""lycoris-lora's reader: it makes a network from kohya's file and merges it into diffusers' UNet."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import torch
from common import Inputs, Report, Weights
from diffusers import UNet2DConditionModel
from lycoris import LycorisNetwork, create_lycoris_from_weights


@torch.no_grad()
def main() -> None:
    """Merge kohya's file of the first argument's folder."""
    inputs = Inputs(sys.argv[1])
    report = Report("lycoris-lora", "lycoris-lora", "diffusers", "torch")
    report.listen()
    with report.row("kohya_lora_weights.safetensors") as row:
        unet = UNet2DConditionModel.from_pretrained(inputs / "pipeline", subfolder="unet")
        before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
        LycorisNetwork.LORA_PREFIX = "lora_unet"  # of the keys; "lycoris" unless told
        network, _ = create_lycoris_from_weights(1.0, inputs / "lora/kohya_lora_weights.safetensors", unet)
        row["modules"] = len(network.loras)
        network.merge_to(1.0)
        weights = Weights()
        weights.add_unet(inputs, unet, before)
        row |= weights.row()
    report.finish()


if __name__ == "__main__":
    main()
