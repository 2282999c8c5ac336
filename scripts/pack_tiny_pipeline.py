"""Pack the networks of the `pretrain_*` experiments into the package, in half precision.

    python scripts/pack_tiny_pipeline.py --pipeline outputs/pretrain_unet/.../pipeline \\
        --clip outputs/pretrain_clip/.../clip --output lcm_lightning/assets
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer

from lcm_lightning.toy.networks import tidy_configs

# [0, 1] pixels to the [-1, 1] both towers were trained on.
IMAGE_PROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "do_resize": True,
    "size": {"shortest_edge": 64},
    "do_center_crop": True,
    "crop_size": {"height": 64, "width": 64},
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_std": [0.5, 0.5, 0.5],
    "do_convert_rgb": True,
}


def main() -> None:
    """Write `tiny/` and `tiny_clip/` into the output folder, each replaced as a whole."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pipeline", type=Path, required=True, help="folder written by experiment=pretrain_unet")
    parser.add_argument("--clip", type=Path, required=True, help="folder written by experiment=pretrain_clip")
    parser.add_argument("--output", type=Path, required=True, help="gets tiny/ and tiny_clip/")
    arguments = parser.parse_args()
    pipeline, clip = arguments.output / "tiny.tmp", arguments.output / "tiny_clip.tmp"
    shutil.copytree(arguments.pipeline, pipeline)
    pack_clip(arguments.clip, clip)
    # Weight averaging rounds frozen weights too: take the text tower from where it was trained.
    CLIPTextModel.from_pretrained(arguments.clip).to(torch.float16).save_pretrained(pipeline / "text_encoder")
    for folder in (pipeline, clip):
        tidy_configs(folder)
        for file in folder.rglob("*.safetensors"):
            file.chmod(0o644)
        target = folder.with_suffix("")
        shutil.rmtree(target, ignore_errors=True)
        folder.rename(target)
        print(target, f"{sum(file.stat().st_size for file in target.rglob('*')) / 1e6:.1f} MB")


def pack_clip(source: Path, folder: Path) -> None:
    """CLIP in half precision with tokenizer and the settings of its image processor."""
    CLIPModel.from_pretrained(source).to(torch.float16).save_pretrained(folder)
    CLIPTokenizer.from_pretrained(source).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(IMAGE_PROCESSOR, indent=2) + "\n")


if __name__ == "__main__":
    main()
