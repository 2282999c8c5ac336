"""Checks of a composed configuration before any work is done: its keys, the types of its values, their ranges."""

from __future__ import annotations

import inspect
import math
import types
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Literal, Union, get_args, get_origin

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lcm_lightning.config.signatures import parameters
from lcm_lightning.config.wandb_sources import fetch_artifacts
from lcm_lightning.errors import SHOW_KEYS, UserError, first_line, suggestion

INSTRUCTIONS = ("_target_", "_partial_", "_recursive_", "_convert_", "_args_")
WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text", type(None): "null"}
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")

# Keys outside sections with a `_target_`, whose types no signature tells.
TYPES: Mapping[str, Any] = {
    "name": str,
    "run_dir": str,
    "seed": int,
    "max_steps": int,
    "val_every": int,
    "resume": str | None,
    "print_config": bool,
    "trainer.precision": Literal[PRECISIONS],
    "run": str | None,
    "lora": str | list[str] | None,
    "weights": float | list[float] | None,
    "lora_role": str | list[str | None] | None,
    "student": bool,
    "prompt": str | list[str],
    "negative_prompt": str,
    "num_images": int,
    "sampler": str | None,
    "steps": int | None,
    "guidance_scale": float | None,
    "init_image": str | None,
    "strength": float | None,
    "resolution": int | None,
    "width": int | None,
    "height": int | None,
    "batch_size": int,
    "dtype": str | None,
    "format": str | None,
    "push_to_hub": str | None,
    "private": bool,
    "revision": str | None,
    "commit_message": str | None,
    "create_pr": bool,
    "base_model": str | None,
    "title": str | None,
    "author": str | None,
    "license": str | None,
    "overwrite": bool,
    "accelerator": str,
    "output": str,
    "preview": bool,
    "models": list[str] | None,
    "devices": int,
    "outputs": str,
    "host": str,
    "port": int | None,
    "share": bool,
    "kept_models": int,
}

# Smallest and largest value of numbers that are taken as they are by other libraries, or first used late in a run, and
# an example. Ranges that belong to a method are checked by its class.
RANGES: Mapping[str, tuple[float, float, object]] = {
    "seed": (0, 2**32 - 1, 0),
    "max_steps": (1, math.inf, 1000),
    "val_every": (1, math.inf, 200),
    "num_images": (1, math.inf, 4),
    "steps": (1, 1000, 4),
    "guidance_scale": (0, math.inf, 7.5),
    "weights": (-10, 10, 0.8),
    "strength": (0, 1, 0.5),
    "batch_size": (1, math.inf, 4),
    "port": (1, 65535, 7860),
    "kept_models": (1, math.inf, 2),
    "model.prompt_chunks": (1, math.inf, 3),
    "model.guidance_scale": (0, math.inf, 7.5),
    "data.resolution": (1, math.inf, 512),
    "data.bucket_step": (1, math.inf, 64),
    "data.batch_size": (1, math.inf, 8),
    "data.num_workers": (0, math.inf, 4),
    "data.prefetch_factor": (1, math.inf, 2),
    "data.shuffle_buffer": (1, math.inf, 1000),
    "data.flip_probability": (0, 1, 0.5),
    "data.caption_dropout": (0, 1, 0.1),
    "data.fresh_fraction": (0, 1, 0.25),
    "data.train_limit": (1, math.inf, 4),
    "data.val_limit": (0, math.inf, 64),
    "data.max_bad_fraction": (0, 1, 0.01),
    "method.lora.rank": (1, math.inf, 64),
    "optimizer.lr": (0, math.inf, 1e-4),
    "optimizer.weight_decay": (0, math.inf, 0.01),
    "trainer.max_steps": (-1, math.inf, 1000),
    "trainer.max_epochs": (-1, math.inf, -1),
    "trainer.num_nodes": (1, math.inf, 1),
    "trainer.accumulate_grad_batches": (1, math.inf, 1),
    "trainer.gradient_clip_val": (0, math.inf, 1.0),
    "trainer.log_every_n_steps": (1, math.inf, 10),
    "callbacks.samples.num_prompts": (1, math.inf, 4),
    "callbacks.samples.teacher_steps": (1, 1000, 50),
    "callbacks.samples.guidance_scale": (0, math.inf, 7.5),
    "callbacks.samples.student_steps": (1, 50, [1, 4]),
    "callbacks.samples.batch_size": (1, math.inf, 4),
    "callbacks.student_quality.num_images": (2, math.inf, 64),
    "callbacks.student_quality.steps": (1, 1000, 4),
    "callbacks.student_quality.teacher_steps": (1, 1000, 50),
    "callbacks.student_quality.guidance_scale": (0, math.inf, 7.5),
    "callbacks.student_quality.batch_size": (1, math.inf, 8),
    "callbacks.student_quality.min_photos": (2, math.inf, 32),
    "callbacks.student_quality.bootstrap_samples": (0, math.inf, 100),
    "callbacks.early_stopping.patience": (1, math.inf, 5),
    "evaluation.lineup.guidance_scale": (0, math.inf, 7.5),
}


def resolve(cfg: DictConfig, known: Collection[str]) -> None:
    """`interpolate`, `check_values`, then fetch LoRAs that are named as artifacts."""
    interpolate(cfg, known)
    check_values(cfg)
    fetch_artifacts(cfg)


def interpolate(cfg: DictConfig, known: Collection[str]) -> None:
    """Compute the interpolations of a composed configuration in place and refuse keys that nothing would read.

    Args:
        known: the keys at the top that the entry point reads.

    Raises:
        UserError: an unknown key, one without a value, or a value that cannot be computed with.
    """
    for key in map(str, cfg):
        if key not in known:
            raise UserError(f"{key}={cfg[key]}: nothing reads this key; {suggestion(key, known, cfg)}")
    try:
        missing = sorted(OmegaConf.missing_keys(cfg))
        if missing:
            raise UserError(f"{missing[0]}: has no value; set {missing[0]}=... (its meaning is in conf/)")
        OmegaConf.resolve(cfg)
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key or 'configuration'}: {first_line(error)}; `{SHOW_KEYS}` shows it") from error


def check_values(cfg: DictConfig) -> None:
    """Raise a `UserError` for the first value of a resolved configuration of a wrong type or out of range."""
    check_types(cfg, TYPES)
    for key, section in sections(cfg):
        check_section(key, section)
    for key, (low, high, example) in RANGES.items():
        check_range(key, OmegaConf.select(cfg, key), low, high, example)
    if (batches := OmegaConf.select(cfg, "trainer.limit_train_batches")) is not None:
        raise UserError(
            f"trainer.limit_train_batches={batches}: a run of epochs cut short cannot go on exactly; leave it out, "
            "max_steps=... makes a short run"
        )
    if OmegaConf.select(cfg, "trainer.max_steps") == -1 and OmegaConf.select(cfg, "trainer.max_epochs") in (-1, None):
        raise UserError("trainer.max_steps=-1: the run would never end; set it, or trainer.max_epochs")


def check_types(cfg: DictConfig, hints: Mapping[str, Any]) -> None:
    """Raise a `UserError` for the first of the keys `hints` of another type than said there; absent keys pass."""
    for key, hint in hints.items():
        if (value := OmegaConf.select(cfg, key, default=inspect.Parameter.empty)) is not inspect.Parameter.empty:
            check_type(key, value, hint)


def check_type(key: str, value: object, hint: Any) -> None:
    """Raise a `UserError` that names `key` unless `value` is what the type `hint` allows."""
    if not fits(value, hint):
        raise UserError(f"{key}={value}: expected {describe(hint)}")


def check_range(key: str, value: object, low: float, high: float, example: object) -> None:
    """Raise a `UserError` that names `key` unless the number, or each of a list of them, is from `low` to `high`."""
    for number in value if isinstance(value, Sequence) and not isinstance(value, str) else [value]:
        if isinstance(number, int | float) and not low <= number <= high:
            expected = f"at least {low}" if high == math.inf else f"{low} to {high}"
            raise UserError(f"{key}={value}: expected {expected}, such as {key}={example}")


def sections(cfg: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, DictConfig]]:
    """Every section with a `_target_`, under its dotted key, outer ones first."""
    for name, part in cfg.items():
        if isinstance(part, DictConfig):
            if "_target_" in part:
                yield f"{prefix}{name}", part
            yield from sections(part, f"{prefix}{name}.")


def check_section(key: str, section: Mapping[str, Any]) -> None:
    """Raise a `UserError` for a key that the section's target does not take, or takes in another type.

    A target that no source file shows is left to `instantiate`, which says what is missing.
    """
    taken = parameters(str(section["_target_"]))
    if taken is None:
        return
    for name, value in section.items():
        if name in INSTRUCTIONS:
            continue
        if name not in taken.types and not taken.open:
            raise UserError(f"{key}.{name}={value}: nothing reads this key; {suggestion(name, taken.types, {})}")
        if not (isinstance(value, DictConfig) and "_target_" in value):
            check_type(f"{key}.{name}", value, taken.hint(name))


def fits(value: object, hint: Any) -> bool:
    """Whether a value of YAML is one of the type `hint`. A class YAML has no values of takes a section only."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return any(fits(value, argument) for argument in arguments)
    if origin is Literal:
        return value in arguments
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint in WORDS:
        return isinstance(value, hint)
    if is_list(hint):
        inner = [argument for argument in arguments if argument is not ...]
        if not isinstance(value, ListConfig | list | tuple):
            return False
        return not inner or all(any(fits(item, kind) for kind in inner) for item in value)
    if hint is Any or not inspect.isclass(hint):
        return True
    return isinstance(value, str) if hint is Path else isinstance(value, DictConfig)


def is_list(hint: Any) -> bool:
    """True for types of lists, such as `list[int]` and `Sequence[str]`."""
    origin = get_origin(hint)
    return inspect.isclass(origin) and issubclass(origin, Sequence)


def describe(hint: Any) -> str:
    """The type `hint` in words."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(describe(argument) for argument in arguments))
    if origin is Literal:
        return " or ".join(dict.fromkeys(str(argument) for argument in arguments))
    if is_list(hint):
        inner = dict.fromkeys(describe(argument) for argument in arguments if argument is not ...)
        return f"a list ([..., ...]) of {' or '.join(inner)}" if inner else "a list"
    return WORDS.get(hint, "a section")


def check_writable(key: str, folder: Path) -> None:
    """Raise a `UserError` unless the folder that `key` names can be made and written to; nothing is left there."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    try:
        with TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise UserError(f"{key}={folder}: cannot be written ({error}); set it to a folder with room") from error
