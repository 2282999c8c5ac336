"""`python -m lcm_lightning.generate run=outputs/... prompt="a dog on a beach"`: images from a run or any LoRA.

`'prompt=[cat,dog]'` draws several prompts into one sheet.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, count
from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig, OmegaConf
from PIL import Image

from lcm_lightning.config.checks import check_writable, resolve
from lcm_lightning.config.entry import command
from lcm_lightning.data.images import MAX_PIXELS, ImageFault, decode_image, normalise, resize_shorter_side
from lcm_lightning.errors import UserError
from lcm_lightning.methods import adapter_kinds
from lcm_lightning.output.files import held, write_atomic
from lcm_lightning.output.pictures import contact_sheet, drawing_settings, png_bytes, settings_text, to_pil
from lcm_lightning.output.progress import image_progress

if TYPE_CHECKING:
    from torch import Tensor

    from lcm_lightning.models.kinds import AdapterKind
    from lcm_lightning.models.latent_diffusion import LatentDiffusionModel
    from lcm_lightning.models.sampling import Sampler

GENERATE_KEYS: tuple[str, ...] = (
    "run",
    "model",
    "lora",
    "weights",
    "lora_role",
    "student",
    "prompt",
    "negative_prompt",
    "num_images",
    "sampler",
    "steps",
    "guidance_scale",
    "init_image",
    "strength",
)
GENERATE_KEYS += ("resolution", "width", "height", "seed", "batch_size", "accelerator", "dtype", "output", "preview")
LARGEST = 4  # a phone's photo as it is would take days, and a model draws badly far above its own size


def file_stems(prompts: Iterable[str]) -> dict[str, str]:
    """A file name made of the start of each prompt, numbered where two would be the same."""
    stems: dict[str, str] = {}
    for prompt in dict.fromkeys(prompts):
        stem = re.sub(r"[^0-9a-z]+", "-", prompt.lower()).strip("-")[:60] or "image"
        numbered = (f"{stem}-{number}" for number in count(len(stems) + 1))
        stems[prompt] = next(name for name in chain([stem], numbered) if name not in stems.values())
    return stems


def write_pictures(pictures: Mapping[str, Image.Image], settings: Mapping[str, str], folder: Path) -> list[Path]:
    """Write PNG files by name, each whole, with the `settings_text` of those that have one; returns their paths.

    None is written over another picture: where one of an earlier call has a name of these, all get the first number
    that leaves none in the way, `cat-0_2.png`. The same pictures again are the same files. Calls at once take turns.
    """
    contents = {name: png_bytes(picture, settings.get(name, "")) for name, picture in pictures.items()}
    with held(folder):
        for path, content in (files := free_files(contents, folder)).items():
            write_atomic(path, content)
    return list(files)


def free_files(contents: Mapping[str, bytes], folder: Path) -> dict[Path, bytes]:
    """Contents by the paths that they can be written to, with one number in all names where one is taken by another."""
    plain = {folder / name: content for name, content in contents.items()}
    numbered = (
        {path.with_stem(f"{path.stem}_{number}"): content for path, content in plain.items()} for number in count(2)
    )
    return next(
        files
        for files in chain([plain], numbered)
        if all(not path.exists() or path.read_bytes() == content for path, content in files.items())
    )


def picture_names(prompts: Sequence[str], seeds: Sequence[int]) -> list[str]:
    """`<prompt>-<seed>.png` of each image."""
    stems = file_stems(prompts)
    return [f"{stems[prompt]}-{seed}.png" for prompt, seed in zip(prompts, seeds, strict=True)]


def pictures_by_name(images: Tensor, prompts: Sequence[str], seeds: Sequence[int]) -> dict[str, Image.Image]:
    """`<prompt>-<seed>.png` of each of the images [N, 3, H, W], and all of them on one sheet, last.

    The sheet is called after the prompt, or `prompts.png` where there are several: each has a row then and stands below
    its images.
    """
    stems = file_stems(prompts)
    pictures = {name: to_pil(image) for image, name in zip(images, picture_names(prompts, seeds), strict=True)}
    if len(stems) > 1:
        pictures["prompts.png"] = contact_sheet(images, columns=len(set(seeds)), captions=prompts)
    elif len(images) > 1:
        pictures[f"{stems[prompts[0]]}.png"] = contact_sheet(images)
    return pictures


def settings_by_name(
    prompts: Sequence[str], seeds: Sequence[int], negative_prompt: str, shared: Mapping[str, object]
) -> dict[str, str]:
    """How each image was drawn, for its file, by the file's name; `shared` are settings of all of them."""
    names = picture_names(prompts, seeds)
    return {
        name: settings_text(prompt, negative_prompt, {**shared, "Seed": seed})
        for name, prompt, seed in zip(names, prompts, seeds, strict=True)
    }


def read_photo(path: str) -> Image.Image:
    """The photo at `path`, upright and in sRGB.

    Raises:
        UserError: there is none, or nothing that can be decoded whole.
    """
    try:
        return decode_image(Path(path).expanduser().read_bytes())
    except OSError as error:
        raise UserError(f"init_image={path}: cannot be read ({error.strerror}); give the file of a photo") from error
    except ImageFault as fault:
        raise UserError(f"init_image={path}: {fault}; give another photo") from fault


def fit_photo(photo: Image.Image, model: LatentDiffusionModel, resolution: int | None, path: str) -> Image.Image:
    """The photo with a shorter side of `resolution` px, or as large as it is, its edges cut to sides the model takes.

    Raises:
        UserError: it is smaller than the model takes, or of more than `LARGEST` times the pixels of a square image of
            that resolution, or of the model's own.
    """
    side = model.default_resolution if resolution is None else resolution
    scale = 1.0 if resolution is None else resolution / min(photo.size)
    size = f"init_image={path}: {photo.width}x{photo.height} pixels"
    if photo.width * photo.height * scale**2 > min(LARGEST * side**2, MAX_PIXELS):
        remedy = "crop it" if resolution else f"set resolution={side}, which its shorter side becomes"
        raise UserError(f"{size}, more than {LARGEST} times as many as {side}x{side}; {remedy}")
    resized = photo if resolution is None else resize_shorter_side(photo, resolution)
    multiple = model.resolution_multiple
    width, height = (length - length % multiple for length in resized.size)
    if not width * height:
        raise UserError(f"{size}, and the model takes at least {multiple}x{multiple}; set resolution={side}")
    left, top = (resized.width - width) // 2, (resized.height - height) // 2
    return resized.crop((left, top, left + width, top + height))


def check_sides(cfg: DictConfig) -> None:
    """Raise a `UserError` where `width` and `height` are given beside what says the size too."""
    for key in ("width", "height"):
        if cfg[key] is not None and cfg.init_image is not None:
            raise UserError(
                f"{key}={cfg[key]}: a picture from init_image has the photo's aspect; give resolution alone"
            )
        if cfg[key] is not None and cfg.resolution is not None:
            raise UserError(f"{key}={cfg[key]}: beside resolution={cfg.resolution}; give width and height alone")


def drawn_size(cfg: DictConfig, model: LatentDiffusionModel) -> tuple[int, int]:
    """Height and width of what is drawn: as given, where not the model's own. Raises `UserError`."""
    for key in ("resolution", "width", "height"):
        if cfg[key] is not None:
            model.check_resolution(cfg[key], key)
    side = model.default_resolution if cfg.resolution is None else cfg.resolution
    height, width = (side if cfg[key] is None else cfg[key] for key in ("height", "width"))
    return height, width


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
    if cfg.strength is not None and cfg.init_image is None:
        raise UserError(f"strength={cfg.strength}: acts with a photo only; add init_image=photo.jpg")
    check_sides(cfg)
    photo = None if cfg.init_image is None else read_photo(cfg.init_image)
    # Imported once the configuration is right, and what takes five seconds once the model is there.
    from lcm_lightning.config.instantiate import find_device
    from lcm_lightning.config.model_choice import find_models

    (source,) = find_models(cfg)
    device = find_device(cfg.accelerator)
    import torch

    from lcm_lightning.config.quiet import quiet_known_warnings
    from lcm_lightning.models.adapters import merged_adapters
    from lcm_lightning.models.kinds import usual_kind
    from lcm_lightning.models.sampling import InitialImage, check_finite, sample

    quiet_known_warnings()
    loaded = source.load()
    model = loaded.model.to(device)
    usual = usual_kind(loaded.adapters, model.guidance_scale)
    sampler = usual.sampler if cfg.sampler is None else find_sampler(cfg.sampler, loaded.adapters)
    steps = usual.steps if cfg.steps is None else cfg.steps
    guidance_scale = usual.guidance_scale if cfg.guidance_scale is None else cfg.guidance_scale
    if cfg.negative_prompt and sampler.passes(guidance_scale) == 1:
        where = "on no full LCM" if sampler.tells_guidance else "with guidance_scale above 1 only"
        raise UserError(f"negative_prompt={cfg.negative_prompt}: acts {where}")
    wanted = list(cfg.prompt) if OmegaConf.is_list(cfg.prompt) else [cfg.prompt]
    if not wanted:
        raise UserError("prompt=[]: expected at least one prompt, such as prompt=cat or 'prompt=[cat,dog]'")
    prompts = [str(prompt) for prompt in wanted for _ in range(cfg.num_images)]
    seeds = list(range(cfg.seed, cfg.seed + cfg.num_images)) * len(wanted)
    size = drawn_size(cfg, model)
    init_image = None
    if photo is not None:
        pixel_values = torch.from_numpy(normalise(fit_photo(photo, model, cfg.resolution, cfg.init_image)))
        init_image = InitialImage(pixel_values, 0.8 if cfg.strength is None else cfg.strength)
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
            resolution=size if init_image is None else None,
            init_image=init_image,
            negative_prompt=cfg.negative_prompt,
            batch_size=cfg.batch_size,
            on_batch=lambda number: progress.advance(bar, number),
            preview=cfg.preview,
        )
    check_finite(source.spec, images)
    pictures = pictures_by_name(images, prompts, seeds)
    said = drawing_settings(
        steps=steps,
        sampler=sampler.title,
        guidance_scale=guidance_scale,
        size=(images.shape[-1], images.shape[-2]),
        model=model.name_or_path,
        loras=source.name,
        weights={kind.name: loaded.weights.get(kind.name, 1.0) for kind in loaded.adapters},
        init_image=cfg.init_image,
        strength=None if init_image is None else init_image.strength,
    )
    try:
        files = write_pictures(pictures, settings_by_name(prompts, seeds, cfg.negative_prompt, said), Path(cfg.output))
    except OSError as error:
        remedy = "make room there, or set output=..."
        raise UserError(f"output={cfg.output}: cannot be written ({error}); {remedy}") from error
    for path in files:
        print(path)


if __name__ == "__main__":
    main()
