#!/usr/bin/env bash
# diffusers 0.42.1: set_adapters with one dict of weights for several LoRAs gives it to the first, and 1.0 to all others.
#
# pipe.set_adapters(["lcm", "style"], 0.3) weighs both with 0.3, and weights by component or block are dicts. One dict for both,
# {"unet": 0.3}, should then do what one number does. It is put into a list once for each name, always the same object, and taken
# apart with pop: the first LoRA empties it, the second finds nothing and gets the default of 1.0. So it goes with a list
# of two names for one dict, the natural way to write weights = {...}; [weights, weights]: the copy that is made keeps them one.
# Two dicts of equal content are fine. No message, and the pictures only have three times the style that was asked for.
#
# Output seen (diffusers 0.42.1, peft 0.21.2, transformers 5.24.0, torch 2.14.1, Python 3.11, Linux, 2026-11-28):
#   0.3: lcm 0.3, style 0.3
#   {'unet': 0.3}: lcm 0.3, style 1.0
#   {'unet': {'mid': 0.3}}: lcm 0.3, style 1.0
#   one dict twice in a list: lcm 0.3, style 1.0
#   two dicts in a list: lcm 0.3, style 0.3
# What helps: a list with a dict of its own for each LoRA.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check diffusers==0.42.1 peft==0.21.2 transformers==5.24.0 torch==2.14.1

cat > "$folder/weigh.py" <<'PYTHON'
from diffusers import DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig

unet = UNet2DConditionModel(
    block_out_channels=(8, 16), layers_per_block=1, sample_size=8, norm_num_groups=4, cross_attention_dim=8,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
for name in ("lcm", "style"):
    unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_v"]), name)
pipe = StableDiffusionPipeline(
    unet=unet, scheduler=DDIMScheduler(), vae=None, text_encoder=None, tokenizer=None, safety_checker=None,
    feature_extractor=None, requires_safety_checker=False)


def weigh(what, weights):
    pipe.set_adapters(["lcm", "style"], weights)
    scaling = unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.scaling
    print(f"{what}: " + ", ".join(f"{name} {value:.1f}" for name, value in scaling.items()))


for weights in (0.3, {"unet": 0.3}, {"unet": {"mid": 0.3}}):
    weigh(weights, weights)
one = {"unet": 0.3}
weigh("one dict twice in a list", [one, one])
weigh("two dicts in a list", [dict(one), dict(one)])
PYTHON

(cd "$folder" && venv/bin/python -W ignore weigh.py 2> err.log) | tee "$folder/out"
diff - "$folder/out" <<'SEEN'
0.3: lcm 0.3, style 0.3
{'unet': 0.3}: lcm 0.3, style 1.0
{'unet': {'mid': 0.3}}: lcm 0.3, style 1.0
one dict twice in a list: lcm 0.3, style 1.0
two dicts in a list: lcm 0.3, style 0.3
SEEN
