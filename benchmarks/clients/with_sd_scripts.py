"""kohya's sd-scripts: its network, made from our file, merged into the UNet by its own code.

python with_sd_scripts.py INPUTS CHECKOUT
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent), sys.argv[2]]
import torch
from common import Inputs, Report, Weights, commit_of
from diffusers import UNet2DConditionModel
from networks.lora import create_network_from_weights


@torch.no_grad()
def main() -> None:
    """Merge kohya's file of the first argument's folder."""
    inputs = Inputs(sys.argv[1])
    report = Report("kohya's sd-scripts", "diffusers", "torch", commit=commit_of(sys.argv[2]))
    report.listen()
    with report.row("kohya_lora_weights.safetensors") as row:
        unet = UNet2DConditionModel.from_pretrained(inputs / "pipeline", subfolder="unet")
        before = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
        file = inputs / "lora/kohya_lora_weights.safetensors"
        network, tensors = create_network_from_weights(1.0, file, None, [], unet, for_inference=True)
        named = {key.partition(".")[0] for key in tensors}
        row["unused"] = sorted(named - {lora.lora_name for lora in network.unet_loras})
        network.merge_to([], unet, tensors, torch.float32, "cpu")
        weights = Weights()
        weights.add_unet(inputs, unet, before)
        row |= weights.row()
    report.finish()


if __name__ == "__main__":
    main()
