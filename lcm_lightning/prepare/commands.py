"""The command line of `prepare`: ``python -m lcm_lightning.prepare data=flickr8k data.source=DIR``.

With ``cache=latents model=sd15`` also to shards of what the model's VAE and text encoder make of them.
"""

from __future__ import annotations

import shlex
import sys

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.console import Console

from lcm_lightning.config.checks import check_types, check_values, interpolate
from lcm_lightning.config.entry import command, configurations
from lcm_lightning.errors import UserError, command_line
from lcm_lightning.prepare.images import prepare_images


@command("prepare")
def main(config: DictConfig) -> None:
    """Entry point."""
    console = Console(file=sys.stdout, markup=False, highlight=False)  # a path may hold [brackets]
    check_command(config)
    if config.get("cache") is None:
        output = prepare_images(config, console)
        place = [f"data.source={output}"] if config.prepare.output else []
    else:
        from lcm_lightning.prepare.latents import prepare_latents

        output = prepare_latents(config, console)
        own = ("model", "data.resolution", "data.bucket", "data.flip_probability")
        place = [f"data.source={output}", *overrides_of(*own)]
    for line in next_lines(config.data.name, place):
        console.print(line, soft_wrap=True)


def check_command(config: DictConfig) -> None:
    """Raise a `UserError` for keys that nothing reads, and for values of a wrong type."""
    for override in HydraConfig.get().overrides.task:
        if override.startswith("+"):
            raise UserError(f"{override}: nothing reads a key that conf/prepare.yaml and conf/data/ do not have")
    interpolate(config, ("data", "prepare", "seed", "model", "cache"))
    texts = {"data.source": str | None, "data.name": str, "prepare.output": str | None}
    groups = {"data": DictConfig, "prepare": DictConfig, "model": DictConfig | None, "cache": DictConfig | None}
    cache = {"cache.crops": int, "cache.flips": bool | None, "cache.batch_size": int}
    check_types(config, {**texts, **groups, **cache})
    if config.get("cache") is not None:
        check_values(config)  # cutting shards needs none of what is checked there


def next_lines(name: str, place: list[str]) -> list[str]:
    """The command that trains on data set `name`, found with the options `place`, and what it takes without a GPU."""
    import torch  # late, as what imports it

    data = choice("data")
    has_its_own = (configurations() / "experiment" / f"lora_{data}.yaml").is_file()
    experiment = data if has_its_own else "flickr8k"
    options = [f"experiment=lora_{experiment}", *([] if data == experiment else [f"data={data}"])]
    if name != experiment:
        options += [f"name=lora_{name}", *overrides_of("data.name")]
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
