#!/usr/bin/env bash
# torchmetrics 1.9.0: KID of images that were seen under autocast is noise, while FID of the very same images is right.
#
# FrechetInceptionDistance makes the features that its network returns double before it adds them up. KernelInceptionDistance keeps
# them as they come and computes its kernel in their type. Under autocast, which is where Lightning's precision="bf16-mixed" runs
# validation_step, that is bfloat16, also from the Inception network that comes with the metric. KID is a difference of 0.001 or
# 0.01 between means near 1, which 8 bits cannot hold: below, two sets from one distribution get the KID that in float32 a plain shift
# has, and more than the shifted set gets. No warning is given; only the standard deviation over subsets, sixty times too large,
# hints at it. In float16 the sums overflow, and KID is NaN.
#
# Output seen (torchmetrics 1.9.0, torch 2.14.1, Python 3.11, Linux, 2026-11-28), for images brighter by the first number:
#   0.00 float32: KID -0.00005 (0.00020), FID 0.081
#   0.00 autocast bfloat16: KID 0.01331 (0.01239), FID 0.081
#   0.00 autocast float16: KID nan (nan), FID 0.081
#   0.02 float32: KID 0.00025 (0.00029), FID 0.101
#   0.02 autocast bfloat16: KID 0.00078 (0.00778), FID 0.101
#   0.02 autocast float16: KID nan (nan), FID 0.101
#   0.10 float32: KID 0.01392 (0.00164), FID 0.884
#   0.10 autocast bfloat16: KID 0.01093 (0.00717), FID 0.883
#   0.10 autocast float16: KID nan (nan), FID 0.884
# What helps: update the metric inside torch.autocast(device, enabled=False).
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check torchmetrics==1.9.0 torch==2.14.1

cat > "$folder/distances.py" <<'PYTHON'
import contextlib

import torch
from torch import nn
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

torch.set_num_threads(1)


class Features(nn.Module):
    """Stands for Inception, whose weights would have to be downloaded: convolutions, then the mean over the picture."""

    num_features = 256

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(3, 64, 4, 4), nn.ReLU(), nn.Conv2d(64, 256, 2, 2), nn.ReLU(),
                                    nn.AdaptiveAvgPool2d(1), nn.Flatten())

    def forward(self, images):
        return 4 * self.layers(images)


def images(seed, brighter=0.0):
    generator = torch.Generator().manual_seed(seed)
    colour = torch.rand(1000, 3, 1, 1, generator=generator)
    return colour + torch.randn(1000, 3, 16, 16, generator=generator) * 0.2 + brighter


seen = {}
for brighter in (0.0, 0.02, 0.1):
    for dtype in (None, torch.bfloat16, torch.float16):
        kid = KernelInceptionDistance(feature=Features(), subsets=20, subset_size=500)
        fid = FrechetInceptionDistance(feature=Features(), input_img_size=(3, 16, 16))
        with torch.no_grad(), torch.autocast("cpu", dtype=dtype) if dtype else contextlib.nullcontext():
            for metric in (kid, fid):
                metric.update(images(1), real=True)
                metric.update(images(2, brighter), real=False)
        torch.manual_seed(0)  # KID draws its subsets
        mean, deviation = map(float, kid.compute())
        seen[brighter, dtype] = mean, float(fid.compute())
        name = f"autocast {str(dtype).removeprefix('torch.')}" if dtype else "float32"
        print(f"{brighter:.2f} {name}: KID {mean:.5f} ({deviation:.5f}), FID {seen[brighter, dtype][1]:.3f}")

for brighter in (0.0, 0.02, 0.1):
    right, half = seen[brighter, None], seen[brighter, torch.bfloat16]
    assert abs(half[1] - right[1]) < 0.005 * right[1] + 0.001, "FID changes now"
    assert seen[brighter, torch.float16][0] != seen[brighter, torch.float16][0], "KID in float16 is a number now"
assert abs(seen[0.0, None][0]) < 0.001, "KID in float32 has changed"
assert abs(seen[0.0, torch.bfloat16][0] - seen[0.0, None][0]) > 0.005, "KID under autocast is about right now"
PYTHON

"$folder/venv/bin/python" -W ignore "$folder/distances.py"
