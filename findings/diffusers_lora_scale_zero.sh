#!/usr/bin/env bash
# diffusers 0.42.1: a picture drawn with a LoRA's scale at 0 sets the LoRA's weight to 1 for all pictures after it.
#
# cross_attention_kwargs={"scale": s} is for one call: the weight that set_adapters gave is multiplied by s before and divided by
# it after. That cannot be undone for 0, the value that draws "without the LoRA" for comparison, so after such a call the weight of
# every active LoRA is set anew, to 1.0, whatever it was. With s=0.001 it is 0.3 again afterwards; with s=0 a LoRA that had been
# set to 0.3 acts at full strength from then on. A grid over scales that begins with 0 has its other columns wrong, and one that
# ends with it is right. fuse_lora(lora_scale=0.5) never puts its scale back: unfuse_lora returns the model's own weights, as it
# should, but the LoRA, now beside them again, acts at half of its weight, and fused and unfused once more at a quarter.
#
# Output seen (diffusers 0.42.1, peft 0.21.2, transformers 5.24.0, torch 2.14.1, Python 3.11, Linux, 2026-11-28):
#   set_adapters 0.3: weight 0.3
#   a call with scale 0.5: weight 0.3, draws as before: True
#   a call with scale 0.001: weight 0.3, draws as before: True
#   a call with scale 0: weight 1.0, draws as before: False
#   set_adapters 1.0: weight 1.0
#   fuse_lora(lora_scale=0.5), unfuse_lora: weight 0.5, draws as before: False
#   fuse_lora(lora_scale=0.5), unfuse_lora: weight 0.25, draws as before: False
# What helps: set_adapters again after either; or disable_lora and enable_lora for a picture without the LoRA.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check diffusers==0.42.1 peft==0.21.2 transformers==5.24.0 torch==2.14.1

cat > "$folder/scale.py" <<'PYTHON'
import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig

torch.manual_seed(0)
unet = UNet2DConditionModel(
    block_out_channels=(8, 16), layers_per_block=1, sample_size=8, norm_num_groups=4, cross_attention_dim=8,
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"))
unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_v"], init_lora_weights=False), "style")
noise, text = torch.randn(1, 4, 8, 8), torch.randn(1, 3, 8)


@torch.no_grad()
def draw(**how):
    return unet(noise, 500, text, cross_attention_kwargs=how or None).sample


def show(what, before=None):
    weight = unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.scaling["style"]
    same = "" if before is None else f", draws as before: {torch.allclose(draw(), before, atol=1e-4)}"
    print(f"{what}: weight {weight:g}{'.0' if weight == 1 else ''}{same}")


unet.set_adapters("style", 0.3)
show("set_adapters 0.3")
before = draw()
for scale in (0.5, 0.001, 0):
    draw(scale=scale)
    show(f"a call with scale {scale}", before)

unet.set_adapters("style", 1.0)
show("set_adapters 1.0")
before = draw()
for _ in range(2):
    unet.fuse_lora(lora_scale=0.5)
    unet.unfuse_lora()
    show("fuse_lora(lora_scale=0.5), unfuse_lora", before)
PYTHON

(cd "$folder" && venv/bin/python -W ignore scale.py 2> err.log) | tee "$folder/out"
diff - "$folder/out" <<'SEEN'
set_adapters 0.3: weight 0.3
a call with scale 0.5: weight 0.3, draws as before: True
a call with scale 0.001: weight 0.3, draws as before: True
a call with scale 0: weight 1.0, draws as before: False
set_adapters 1.0: weight 1.0
fuse_lora(lora_scale=0.5), unfuse_lora: weight 0.5, draws as before: False
fuse_lora(lora_scale=0.5), unfuse_lora: weight 0.25, draws as before: False
SEEN
