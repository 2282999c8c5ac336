"""The command line of `prepare`: ``python -m lcm_lightning.prepare data=flickr8k data.source=DIR``.

With ``cache=latents model=sd15`` also to shards of what the model's VAE and text encoder make of them, and of such
shards with ``cache=teacher model=sd15 method=lcm_lora`` to those that have the teacher's steps too.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf
from rich.console import Console

from lcm_lightning.config.checks import check_types, check_values, interpolate
from lcm_lightning.config.entry import command, configurations
from lcm_lightning.config.wandb_sources import fetch_artifacts
from lcm_lightning.errors import UserError, command_line
from lcm_lightning.prepare.images import prepare_images

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

# Settings that training has to share with a cache of latents, and with one of the teacher's steps.
OF_LATENTS = ("model", "data.resolution", "data.bucket", "data.flip_probability")
OF_DRAWS = ("data.caption_dropout", "data.crop", "data.photo_sizes")


@command("prepare")
def main(config: DictConfig) -> None:
    """Entry point."""
    console = Console(file=sys.stdout, markup=False, highlight=False)  # a path may hold [brackets]
    check_command(config)
    if config.get("logger") is None:
        return prepare(config, console, [])
    from lcm_lightning.config.instantiate import instantiate_each  # late, for it takes seconds
    from lcm_lightning.tracking.tracker import begun

    loggers = instantiate_each(config, "logger")
    with begun(loggers):
        prepare(config, console, loggers)


def prepare(config: DictConfig, console: Console, loggers: Sequence[Logger]) -> None:
    """Write what `cache` says, tell the loggers, and say how to train on it."""
    stage = "lora_"
    if config.get("cache") is None:
        output = prepare_images(config, console)
        place = [f"data.source={output}"] if config.prepare.output else []
    elif choice("cache") == "teacher":
        from lcm_lightning.prepare.teacher_cache import prepare_teacher

        written = prepare_teacher(config, console)
        if written is None:
            return  # the first of several processes says the rest
        place = [f"data.source={written}", *overrides_of("method", *OF_LATENTS, *OF_DRAWS)]
        stage = "lcm_"
    else:
        from lcm_lightning.prepare.latents import prepare_latents

        output = prepare_latents(config, console)
        place = [f"data.source={output}", *overrides_of(*OF_LATENTS)]
    log_shards(config, place, loggers)
    for line in next_lines(config.data.name, place, stage):
        console.print(line, soft_wrap=True)


def log_shards(config: DictConfig, place: list[str], loggers: Sequence[Logger]) -> None:
    """Tell the loggers which shards there are now: what a training on them names as its data."""
    if not loggers:
        return
    from lcm_lightning.data.datamodule import CaptionedImages
    from lcm_lightning.tracking.data_records import data_record
    from lcm_lightning.tracking.tracker import Tracker

    source = place[0].removeprefix("data.source=") if place else None
    record = data_record(CaptionedImages(config.data.name, source))
    for logger in loggers:
        logger.log_hyperparams(cast(dict[str, Any], OmegaConf.to_container(config)))
        if isinstance(logger, Tracker):
            logger.log_data(record)
        logger.finalize("success")


def check_command(config: DictConfig) -> None:
    """Raise a `UserError` for keys that nothing reads, and for values of a wrong type."""
    for override in HydraConfig.get().overrides.task:
        if override.startswith("+"):
            raise UserError(f"{override}: nothing reads a key that conf/prepare.yaml and conf/data/ do not have")
    interpolate(config, ("data", "prepare", "seed", "model", "method", "cache", "logger", "name", "run_dir"))
    texts = {"data.source": str | None, "data.name": str, "prepare.output": str | None}
    groups: dict[str, Any] = {"data": DictConfig, "prepare": DictConfig}
    groups |= dict.fromkeys(("model", "method", "cache", "logger"), DictConfig | None)
    cache = {"cache.crops": int, "cache.flips": bool | None, "cache.batch_size": int}
    cache |= {"cache.draws": int, "cache.seed": int, "cache.devices": int}
    check_types(config, {**texts, **groups, **cache})
    if config.get("method") is not None and choice("cache") != "teacher":
        raise UserError(f"method={choice('method')}: only cache=teacher reads it; leave it out")
    if config.get("cache") is not None:
        check_values(config)  # cutting shards needs none of what is checked there
        fetch_artifacts(config)


def next_lines(name: str, place: list[str], stage: str) -> list[str]:
    """The command that trains on data set `name`, found with the options `place`, and what it takes without a GPU.

    The name of its experiment begins with `stage`, "lora_" or "lcm_".
    """
    import torch  # late, as what imports it

    data = choice("data")
    has_its_own = (configurations() / "experiment" / f"{stage}{data}.yaml").is_file()
    experiment = data if has_its_own else "flickr8k"
    options = [f"experiment={stage}{experiment}", *([] if data == experiment else [f"data={data}"])]
    if name != experiment:
        options += [f"name={stage}{name}", *overrides_of("data.name")]
    options += place
    if torch.cuda.is_available() or torch.backends.mps.is_available():
        return [f"Ready: {command_line('train')} {shlex.join(options)}"]
    lines = [f"Ready: {command_line('train')} {shlex.join([*options, 'trainer=cpu'])}"]
    if not overrides_of("model="):
        lines.append("(no GPU here: model=tiny tries it on the small embedded pipeline)")
    return lines


def choice(group: str) -> str:
    """What this command chose of a config group."""
    return HydraConfig.get().runtime.choices[group]


def overrides_of(*keys: str) -> list[str]:
    """The options of this command that begin with one of `keys`, for the commands that follow it."""
    return [override for override in HydraConfig.get().overrides.task if override.startswith(keys)]
