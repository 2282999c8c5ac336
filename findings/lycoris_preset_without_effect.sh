#!/usr/bin/env bash
# lycoris-lora 4.1.3: create_lycoris(preset="attn-only") adapts the ResNet blocks too, and so does README's own pattern for attention.
#
# create_lycoris takes a preset's name and refuses one that it does not know, but of a known one it uses next to nothing: the built-in
# presets say `unet_target_module`, which kohya's entry point reads, and the standalone one reads `target_module`. That stays at its
# initial value, every linear, convolution and norm layer of whatever it is given. What is left of a preset is whether convolutions
# with kernels larger than 1 are among them: "attn-only" becomes all linear layers, and "unet-convblock-only", which is to leave
# attention alone, all layers. The recipe in the package's README, apply_preset({"target_name": [".*attn.*"]}), does not narrow
# anything either: names are targets besides those of the classes. The one hint is a warning that no Conv1d was found. A LoRA "of the
# attention" thus has twice the layers that it should have and trains what was to be kept, and an ablation over presets compares two
# networks under four names.
#
# Output seen (lycoris-lora 4.1.3, diffusers 0.42.1, torch 2.14.1, Python 3.11, Linux, 2026-11-28):
#   full: 83 layers, 32 of attention, 29 of ResNet blocks
#   attn-mlp: 63 layers, 32 of attention, 13 of ResNet blocks
#   attn-only: 63 layers, 32 of attention, 13 of ResNet blocks
#   unet-convblock-only: 83 layers, 32 of attention, 29 of ResNet blocks
#   README's pattern: 83 layers, 32 of attention, 29 of ResNet blocks
#   the pattern, and no classes: 32 layers, 32 of attention, 0 of ResNet blocks
# What helps: LycorisNetwork.apply_preset({"target_module": [], "target_name": [...]}) before create_lycoris, and a look at the
# names of its `loras`.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check lycoris-lora==4.1.3 diffusers==0.42.1 torch==2.14.1

cat > "$folder/count.py" <<'PYTHON'
import logging

from diffusers import UNet2DConditionModel
from lycoris import LycorisNetwork, create_lycoris
from lycoris.logging import logger

logger.setLevel(logging.ERROR)


def count(what, **how):
    unet = UNet2DConditionModel(
        block_out_channels=(8, 16), layers_per_block=1, sample_size=8, norm_num_groups=4, cross_attention_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
    names = [lora.lora_name for lora in create_lycoris(unet, 1.0, linear_dim=4, linear_alpha=4, algo="lora", **how).loras]
    attention, resnets = (sum(part in name for name in names) for part in ("_attn", "_resnets_"))
    print(f"{what}: {len(names)} layers, {attention} of attention, {resnets} of ResNet blocks")


for preset in ("full", "attn-mlp", "attn-only", "unet-convblock-only"):
    count(preset, preset=preset)
LycorisNetwork.apply_preset({"target_name": [".*attn.*"]})
count("README's pattern")
LycorisNetwork.apply_preset({"target_module": [], "target_name": [".*attn.*"]})
count("the pattern, and no classes")
PYTHON

(cd "$folder" && venv/bin/python -W ignore count.py 2> err.log) | tee "$folder/out"
diff - "$folder/out" <<'SEEN'
full: 83 layers, 32 of attention, 29 of ResNet blocks
attn-mlp: 63 layers, 32 of attention, 13 of ResNet blocks
attn-only: 63 layers, 32 of attention, 13 of ResNet blocks
unet-convblock-only: 83 layers, 32 of attention, 29 of ResNet blocks
README's pattern: 83 layers, 32 of attention, 29 of ResNet blocks
the pattern, and no classes: 32 layers, 32 of attention, 0 of ResNet blocks
SEEN
