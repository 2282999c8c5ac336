"""`python -m lcm_lightning.generate run=outputs/... prompt="a dog on a beach"`: images from a run or any LoRA.

`'prompt=[cat,dog]'` draws several prompts into one sheet.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf
from PIL import Image

from lcm_lightning.config.checks import check_writable, resolve
from lcm_lightning.config.entry import command
from lcm_lightning.errors import UserError
from lcm_lightning.methods import adapter_kinds
from lcm_lightning.output.pictures import contact_sheet, to_pil
from lcm_lightning.output.progress import image_progress

if TYPE_CHECKING:
    from torch import Tensor

    from lcm_lightning.models.kinds import AdapterKind
    from lcm_lightning.models.sampling import Sampler

GENERATE_KEYS: tuple[str, ...] = (
    "run",
    "model",
    "lora",
    "lora_role",
    "student",
    "prompt",
    "negative_prompt",
    "num_images",
    "sampler",
    "steps",
    "guidance_scale",
)
GENERATE_KEYS += ("resolution", "seed", "batch_size", "accelerator", "dtype", "output", "preview")


def file_stems(prompts: Iterable[str]) -> dict[str, str]:
    """A file name made of the start of each prompt, numbered where two would be the same."""
    stems: dict[str, str] = {}
    for prompt in dict.fromkeys(prompts):
        stem = re.sub(r"[^0-9a-z]+", "-", prompt.lower()).strip("-")[:60] or "image"
        stems[prompt] = f"{stem}-{len(stems) + 1}" if stem in stems.values() else stem
    return stems


def write_pictures(pictures: Mapping[str, Image.Image], folder: Path) -> None:
    """Write PNG files by name, each whole."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        picture.save(folder / f".{name}", format="PNG")
        (folder / f".{name}").replace(folder / name)


def pictures_by_name(images: Tensor, prompts: Sequence[str], seeds: Sequence[int]) -> dict[str, Image.Image]:
    """`<prompt>-<seed>.png` of each of the images [N, 3, H, W], and all of them on one sheet, last.

    The sheet is called after the prompt, or `prompts.png` where there are several: each has a row then and stands below
    its images.
    """
    stems = file_stems(prompts)
    pictures = {
        f"{stems[prompt]}-{seed}.png": to_pil(image) for image, prompt, seed in zip(images, prompts, seeds, strict=True)
    }
    if len(stems) > 1:
        pictures["prompts.png"] = contact_sheet(images, columns=len(set(seeds)), captions=prompts)
    elif len(images) > 1:
        pictures[f"{stems[prompts[0]]}.png"] = contact_sheet(images)
    return pictures


def find_sampler(name: str, adapters: Sequence[AdapterKind]) -> Sampler:
    """The sampler called `name`: a solver, that of an adapter at hand, or of a method.

    Raises:
        UserError: there is none.
    """
    from lcm_lightning.models.sampling import SOLVERS

    samplers = {kind.sampler.name: kind.sampler for kind in adapters} | SOLVERS
    if name not in samplers:  # asked last: the methods import what trains
        samplers |= {kind.sampler.name: kind.sampler for kind in adapter_kinds().values()}
    if name not in samplers:
        raise UserError(f"sampler={name}: expected one of {', '.join(samplers)}")
    return samplers[name]


@command("generate")
def main(cfg: DictConfig) -> None:
    """Entry point."""
    resolve(cfg, GENERATE_KEYS)
    # Imported once the configuration is right, and what takes five seconds once the model is there.
    from lcm_lightning.config.instantiate import find_device
    from lcm_lightning.config.model_choice import find_models

    device = find_device(cfg.accelerator)
    (source,) = find_models(cfg)
    from lcm_lightning.config.quiet import quiet_known_warnings
    from lcm_lightning.models.adapters import merged_adapters
    from lcm_lightning.models.kinds import BASE
    from lcm_lightning.models.sampling import check_finite, sample

    quiet_known_warnings()
    loaded = source.load()
    model = loaded.model.to(device)
    usual = loaded.adapters[-1] if loaded.adapters else BASE
    sampler = usual.sampler if cfg.sampler is None else find_sampler(cfg.sampler, loaded.adapters)
    steps = usual.steps if cfg.steps is None else cfg.steps
    guidance_scale = usual.guidance_scale if cfg.guidance_scale is None else cfg.guidance_scale
    if cfg.negative_prompt and guidance_scale <= 1:
        raise UserError(f"negative_prompt={cfg.negative_prompt}: acts with guidance_scale above 1 only")
    wanted = list(cfg.prompt) if OmegaConf.is_list(cfg.prompt) else [cfg.prompt]
    if not wanted:
        raise UserError("prompt=[]: expected at least one prompt, such as prompt=cat or 'prompt=[cat,dog]'")
    prompts = [str(prompt) for prompt in wanted for _ in range(cfg.num_images)]
    seeds = list(range(cfg.seed, cfg.seed + cfg.num_images)) * len(wanted)
    resolution = model.default_resolution if cfg.resolution is None else cfg.resolution
    model.check_resolution(resolution, "resolution")
    check_writable("output", Path(cfg.output))
    if cfg.preview and model.preview_vae is None:
        raise UserError("preview=true: needs a small decoder; set model.preview_vae=madebyollin/taesd beside model=...")
    with image_progress() as progress, merged_adapters(model, [kind.name for kind in loaded.adapters]):
        bar = progress.add_task("drawing", total=len(prompts))
        images = sample(
            model,
            prompts,
            seeds=seeds,
            steps=steps,
            guidance_scale=guidance_scale,
            sampler=sampler,
            resolution=resolution,
            negative_prompt=cfg.negative_prompt,
            batch_size=cfg.batch_size,
            on_batch=lambda number: progress.advance(bar, number),
            preview=cfg.preview,
        )
    check_finite(source.spec, images)
    pictures = pictures_by_name(images, prompts, seeds)
    write_pictures(pictures, Path(cfg.output))
    for name in pictures:
        print(Path(cfg.output) / name)


if __name__ == "__main__":
    main()
