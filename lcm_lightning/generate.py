"""`python -m lcm_lightning.generate run=outputs/... prompt="a dog on a beach"`: images from a run or any LoRA."""

from __future__ import annotations

import re
from pathlib import Path

import hydra
import torch
from omegaconf import DictConfig

from lcm_lightning.errors import UserError, report_user_errors
from lcm_lightning.evaluation.contenders import STUDENT
from lcm_lightning.evaluation.subject import load_subject
from lcm_lightning.models.adapters import merged_adapters
from lcm_lightning.models.sampling import sample
from lcm_lightning.pictures import contact_sheet, to_pil
from lcm_lightning.progress import image_progress
from lcm_lightning.resolvers import register_resolvers
from lcm_lightning.training import make_fabric, quiet_known_warnings, resolve

register_resolvers()

GENERATE_KEYS = (
    "run",
    "model",
    "lora",
    "lora_role",
    "prompt",
    "negative_prompt",
    "num_images",
    "steps",
    "guidance_scale",
)
GENERATE_KEYS += ("resolution", "seed", "batch_size", "accelerator", "dtype", "output", "preview")


def write_images(images: torch.Tensor, folder: Path, stem: str, seed: int) -> list[Path]:
    """Write images [N, 3, H, W] as `<stem>-<seed>.png`, and all of them side by side as `<stem>.png`, each whole."""
    folder.mkdir(parents=True, exist_ok=True)
    pictures = {f"{stem}-{seed + i}.png": to_pil(image) for i, image in enumerate(images)}
    if len(images) > 1:
        pictures[f"{stem}.png"] = contact_sheet(images)
    for name, picture in pictures.items():
        picture.save(folder / f".{name}", format="PNG")
        (folder / f".{name}").replace(folder / name)
    return [folder / name for name in pictures]


@hydra.main(config_path="../conf", config_name="generate", version_base="1.3")
@report_user_errors
def main(cfg: DictConfig) -> None:
    """Entry point."""
    quiet_known_warnings()
    resolve(cfg, GENERATE_KEYS)
    if cfg.num_images < 1:
        raise UserError(f"num_images={cfg.num_images}: expected at least 1")
    device = make_fabric(cfg.accelerator, 1).device
    subject = load_subject(cfg)
    model = subject.model.to(device)
    distilled = STUDENT in subject.adapters
    default_steps, default_guidance = (4, 1.0) if distilled else (50, 7.5)
    steps = default_steps if cfg.steps is None else cfg.steps
    guidance_scale = default_guidance if cfg.guidance_scale is None else cfg.guidance_scale
    if cfg.negative_prompt and guidance_scale <= 1:
        raise UserError(f"negative_prompt={cfg.negative_prompt}: acts with guidance_scale above 1 only")
    if cfg.preview and model.preview_vae is None:
        raise UserError("preview=true: needs a small decoder; set model.preview_vae=madebyollin/taesd beside model=...")
    with image_progress() as progress, merged_adapters(model, subject.adapters):
        bar = progress.add_task("drawing", total=cfg.num_images)
        images = sample(
            model,
            [cfg.prompt] * cfg.num_images,
            seeds=range(cfg.seed, cfg.seed + cfg.num_images),
            steps=steps,
            guidance_scale=guidance_scale,
            sampler="lcm" if distilled else "ddim",
            resolution=model.default_resolution if cfg.resolution is None else cfg.resolution,
            negative_prompt=cfg.negative_prompt,
            batch_size=cfg.batch_size,
            on_batch=lambda number: progress.advance(bar, number),
            preview=cfg.preview,
        )
    stem = re.sub(r"[^0-9a-z]+", "-", str(cfg.prompt).lower()).strip("-")[:60] or "image"
    for path in write_images(images, Path(cfg.output), stem, cfg.seed):
        print(path)


if __name__ == "__main__":
    main()
