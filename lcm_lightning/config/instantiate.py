"""Turn a composed configuration into objects."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf

from lcm_lightning.config.teacher_lora import check_teacher_lcm, check_teacher_lora
from lcm_lightning.data.buckets import bucket_sizes
from lcm_lightning.errors import SHOW_KEYS, UserError, first_line, innermost, install, missing_package

if TYPE_CHECKING:
    from functools import partial

    import lightning as L
    from lightning.fabric import Fabric
    from torch.optim import Optimizer

    from lcm_lightning.data.datamodule import CaptionedImages
    from lcm_lightning.data.latents import LatentCache
    from lcm_lightning.models.stable_diffusion import StableDiffusion

log = logging.getLogger(__name__)

FROZEN_DTYPES = {
    "32-true": torch.float32,
    "bf16-mixed": torch.bfloat16,
    "16-mixed": torch.float16,
}
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def frozen_dtype(precision: str) -> torch.dtype:
    """What frozen weights are stored in under a Lightning precision: what autocast would cast them to on each pass.

    Raises:
        UserError: for a precision that would put the adapter in half precision too, or is unknown.
    """
    if precision not in FROZEN_DTYPES:
        raise UserError(
            f"trainer.precision={precision}: expected {', '.join(FROZEN_DTYPES)}; adapters and their optimizer state "
            "stay in float32"
        )
    return FROZEN_DTYPES[precision]


def parse_dtype(dtype: str) -> torch.dtype:
    """The type called `dtype`.

    Raises:
        UserError: another name.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype}: expected {', '.join(DTYPES)}")
    return DTYPES[dtype]


def check_settings(cfg: DictConfig) -> None:
    """Raise a `UserError` for settings of method and optimizer that are wrong whatever model and data are.

    Data sets and models take minutes to fetch; a mistake should be told before.
    """
    build_optimizer(cfg)
    check_method(cfg)


def check_method(cfg: DictConfig) -> None:
    """`check_settings` of the method alone."""
    method = instantiate_group(cfg, "method", _partial_=True)
    if (teacher_lora := cfg.method.get("teacher_lora")) is not None:
        check_teacher_lora(teacher_lora, "method.teacher_lora")
    if (teacher_lcm := cfg.method.get("teacher_lcm")) is not None:
        check_teacher_lcm(teacher_lcm, "method.teacher_lcm")
    if hasattr(method.func, "check_settings"):
        method.func.check_settings(**method.keywords)


def build_module(cfg: DictConfig, precision: str, cache: LatentCache | None = None) -> L.LightningModule:
    """The method of a composed run, on its model where it takes one, with its optimizer.

    Args:
        cfg: its ``data.resolution`` and ``data.bucket_step``, where null, become the model's own, and ``data.buckets``
            what the cache has, true for images.
        cache: the cached latents to train on; VAE and text encoder are then not read before they are needed, as where
            the method reads no images.

    Raises:
        UserError: the model cannot be loaded, a setting does not fit it, or the cache was made with another model.
    """
    optimizer = build_optimizer(cfg)
    if cfg.get("model") is None:
        if cache is not None:
            raise UserError(f"data.source={cache.source}: holds cached latents, and method {cfg.name} trains on images")
        if cfg.data.resolution is None:
            raise UserError(
                f"data.resolution=null: method {cfg.name} has no model to take it from; set it, such as to 64"
            )
        cfg.data.buckets = bool(cfg.data.get("buckets"))  # networks of one size
        return instantiate_group(cfg, "method", optimizer=optimizer)
    reads_images = getattr(instantiate_group(cfg, "method", _partial_=True).func, "reads_images", True)
    model = build_model(cfg, frozen_dtype(precision), cache, reads_images)
    return instantiate_group(cfg, "method", model=model, optimizer=optimizer)


def build_model(
    cfg: DictConfig, dtype: torch.dtype, cache: LatentCache | None = None, reads_images: bool = True
) -> StableDiffusion:
    """The frozen model of a composed run.

    Args:
        cfg, cache: see `build_module`.
        dtype: of its weights.
        reads_images: whether the method does.

    Raises:
        UserError: it cannot be loaded, a setting does not fit it, or the cache was made with another one.
    """
    deferred = {} if cache is None and reads_images else {"defer_encoders": True}
    model: StableDiffusion = instantiate_group(cfg, "model", dtype=dtype, **deferred)
    if cfg.data.get("buckets") is None:
        cfg.data.buckets = cache is None or cache.in_buckets
    bucket_step = take_sizes(cfg.data, model, cfg.data.buckets)
    if cfg.data.resolution >= 2 * model.default_resolution:
        log.warning(
            "data.resolution=%d: the model draws images of %d px; data.resolution=%d is that, and faster",
            cfg.data.resolution,
            model.default_resolution,
            model.default_resolution,
        )
    if (drawn := OmegaConf.select(cfg, "callbacks.samples.resolution")) is not None:
        model.check_resolution(drawn, "callbacks.samples.resolution")
    if OmegaConf.select(cfg, "callbacks.samples.teacher_steps") is not None:
        model.check_steps(cfg.callbacks.samples.teacher_steps, "callbacks.samples.teacher_steps")
    if cache is not None:
        from lcm_lightning.models.condition import Condition
        from lcm_lightning.models.identity import cache_key

        key = cache_key(model, cfg.data.resolution, cfg.method.get("teacher_lora"))
        cache.check(key, bucket_step)
        empty = cache.empty_condition(cfg.data.get("cache_dir"))
        model.known_texts[""] = Condition(**{name: torch.from_numpy(tensor)[None] for name, tensor in empty.items()})
    return model


def take_sizes(data: DictConfig, model: StableDiffusion, buckets: bool) -> int | None:
    """Give the settings of `data` the model's own resolution and, with buckets, step of their sides where null.

    Returns:
        That step in pixels; None without buckets.

    Raises:
        UserError: the model does not take such sides, or they don't divide the resolution.
    """
    if data.resolution is None:
        data.resolution = model.default_resolution
    model.check_resolution(data.resolution)
    if not buckets:
        return None
    if data.bucket_step is None:
        data.bucket_step = model.resolution_multiple
    model.check_resolution(data.bucket_step, "data.bucket_step")
    bucket_sizes(data.resolution, data.bucket_step)
    return data.bucket_step


def take_teacher_steps(module: L.LightningModule, data: CaptionedImages) -> None:
    """Let a method that follows a teacher's ODE train from the teacher's steps that its cached latents come with.

    Other methods take the latents alone, as does every one under ``data.fresh_fraction=1``.

    Raises:
        UserError: the steps are another teacher's, or of other draws.
    """
    from lcm_lightning.methods.teacher_ode import TeacherOde

    if isinstance(module, TeacherOde) and data.teacher_draws is not None and data.fresh_fraction < 1:
        data.take_teacher_steps(module.teacher_key())


def build_optimizer(cfg: DictConfig) -> partial[Optimizer]:
    """The optimizer, wanting its parameters.

    Raises:
        UserError: a setting it does not take. It would be called, and fail, in the middle of Lightning's set-up.
    """
    optimizer = instantiate_group(cfg, "optimizer")
    try:
        optimizer([torch.nn.Parameter(torch.zeros(1))])
    except (TypeError, ValueError, RuntimeError, IndexError) as error:
        raise UserError(f"optimizer: {first_line(error)}; `{SHOW_KEYS}` shows its keys") from error
    return optimizer


def instantiate_each(cfg: DictConfig, group: str) -> list[Any]:
    """The objects of a group of several, such as `callbacks`; those set to null, or whose `_target_` is, are left out.

    Raises:
        UserError: as `instantiate_group`.
    """

    def left_out(part: object) -> bool:
        return part is None or (isinstance(part, DictConfig) and "_target_" in part and part["_target_"] is None)

    return [instantiate_group(cfg, f"{group}.{name}") for name, part in cfg[group].items() if not left_out(part)]


def instantiate_group(cfg: DictConfig, group: str, **arguments: object) -> Any:
    """Hydra's `instantiate` of one config group (`trainer`) or part (`callbacks.samples`), whose failures name it.

    Raises:
        UserError: a key the target does not take, a package that is not installed, a setting Lightning refuses. Other
            errors pass through.
    """
    part = OmegaConf.select(cfg, group)
    if not isinstance(part, DictConfig) or "_target_" not in part:
        raise UserError(f"{group}={part}: nothing reads this; expected a section with a _target_, or null")
    try:
        return instantiate(part, **arguments)
    except InstantiationException as error:
        cause = innermost(error)
        if isinstance(cause, UserError):
            raise cause from None
        from lightning.fabric.utilities.exceptions import MisconfigurationException  # late: most commands don't need it

        if isinstance(cause, MisconfigurationException):
            remedy = "; trainer=cpu runs without a GPU" if "gpu" in str(cause).lower() else ""
            raise UserError(f"{group}: {first_line(cause)}{remedy}") from error
        if isinstance(cause, ImportError):
            package = missing_package(cause)
            remedy = f"conf/{group.partition('.')[0]}/ says what it needs" if package is None else install(package)
            raise UserError(f"{group}: {first_line(cause)}; {remedy}") from error
        if isinstance(cause, TypeError | ValueError | RuntimeError | OSError | InstantiationException):
            raise UserError(f"{group}: {first_line(cause)}; `{SHOW_KEYS}` shows its keys") from error
        raise


def find_device(accelerator: str) -> torch.device:
    """The device that one of "cpu", "cuda", "mps", "gpu" (a GPU of either kind) and "auto" (one if there is) names.

    Raises:
        UserError: another name, or there is no such device.
    """
    gpus = [name for name, module in (("cuda", torch.cuda), ("mps", torch.backends.mps)) if module.is_available()]
    devices = {name: name for name in (*gpus, "cpu")} | {"auto": (*gpus, "cpu")[0]}
    if gpus:
        devices["gpu"] = gpus[0]
    if accelerator not in devices:
        raise UserError(
            f"accelerator={accelerator} is not here: expected {', '.join(devices)}; accelerator=cpu runs anywhere"
        )
    return torch.device(devices[accelerator])


def make_fabric(accelerator: str, devices: int) -> Fabric:
    """What spreads work outside training over devices.

    Raises:
        UserError: there is no such accelerator, or not so many devices.
    """
    from lightning.fabric import Fabric
    from lightning.fabric.utilities.exceptions import MisconfigurationException

    try:
        return Fabric(accelerator=accelerator, devices=devices)
    except (RuntimeError, ValueError, TypeError, MisconfigurationException) as error:
        raise UserError(
            f"accelerator={accelerator} devices={devices}: {first_line(error)}; accelerator=cpu runs anywhere"
        ) from error
