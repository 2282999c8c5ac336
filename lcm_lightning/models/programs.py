"""Parts of the programs for diffusers that an export prints and a card shows."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lcm_lightning.models.sampling import Sampler, make_scheduler


def loader(*, is_file: bool, xl: bool) -> tuple[str, str]:
    """Class and method that load a base model: of one file only a pipeline's own class can, of a folder any."""
    if is_file:
        return ("StableDiffusionXLPipeline" if xl else "StableDiffusionPipeline"), "from_single_file"
    return "DiffusionPipeline", "from_pretrained"


def quoted(text: str | Path) -> str:
    """A text or path as a string of Python's, whatever is in it."""
    return json.dumps(str(text), ensure_ascii=False)


def scheduler_settings(
    sampler: Sampler, schedule: Mapping[str, Any], *, from_file: tuple[str, ...] = ()
) -> dict[str, Any]:
    """What makes a base model's own scheduler that of `make_scheduler`.

    Args:
        schedule: what is known of the model's.
        from_file: keys of `schedule` that the base model's own scheduler lacks: one file does not say them.
    """
    config: Mapping[str, Any] = make_scheduler(sampler, schedule).config
    keys = [*sampler.settings, *(["timestep_spacing"] if schedule.get("rescale_betas_zero_snr") else []), *from_file]
    return {key: config[key] for key in dict.fromkeys(keys) if key in config}
