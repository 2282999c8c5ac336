"""What a card may say of the model that a run began with, and where it may be told from."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, try_to_load_from_cache

from lcm_lightning.errors import UserError
from lcm_lightning.hub import is_hub_id, is_repo_id
from lcm_lightning.models.single_file import read_header
from lcm_lightning.sharing.redaction import last_name

EMBEDDED = re.compile(r"lcm_lightning[/\\]assets[/\\]tiny$")  # Apache-2.0, as all that ships with this package
CACHED = re.compile(r"models--([^/\\]+?)--([^/\\]+)[/\\]snapshots[/\\]")  # a folder in the hub's cache
LICENSES = {  # of the models that conf/model names, as their cards on the hub say
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "creativeml-openrail-m",
    "stabilityai/stable-diffusion-xl-base-1.0": "openrail++",
}


@dataclass(frozen=True)
class BaseModel:
    """The model that adapters act on.

    Attributes:
        name: its hub id, or the name of a folder or file; no path.
        hub_id: None for what lies on a machine only.
        license: as cards say it; None where it is not known.
        embedded: whether it is the pipeline that ships with this package.
        zero_terminal_snr: whether its noise schedule ends in noise alone.
    """

    name: str
    hub_id: str | None
    license: str | None = None
    embedded: bool = False
    zero_terminal_snr: bool = False

    @property
    def is_file(self) -> bool:
        """Whether it is a checkpoint in one file."""
        return self.name.endswith(".safetensors")


def base_model(
    model: Mapping[str, Any], hub_id: str | None = None, known_ids: Collection[str] | None = None
) -> BaseModel:
    """What is known of the model that a run's `model` section names.

    Args:
        hub_id: where a local folder came from, if someone says so.
        known_ids: see `was_hub_id`.

    Raises:
        UserError: `hub_id` is none.
    """
    if hub_id is not None and not is_repo_id(hub_id):
        raise UserError(f"base_model={hub_id}: expected an id on the hub, such as {next(iter(LICENSES))}")
    path = str(model["path"])
    if model.get("unet_init", "pretrained") != "pretrained":
        return BaseModel("random weights", None)
    if hub_id is None and (cached := CACHED.search(path)):
        hub_id = f"{cached[1]}/{cached[2]}"
    if hub_id is None and was_hub_id(path, None if known_ids is None else {*known_ids, *LICENSES}):
        hub_id = path
    embedded = hub_id is None and EMBEDDED.search(path) is not None
    known = "apache-2.0" if embedded else LICENSES.get(hub_id or "")
    return BaseModel(
        hub_id or last_name(path),
        hub_id,
        license=_own_license(path, hub_id) or known,
        embedded=embedded,
        zero_terminal_snr=_is_zero_terminal_snr(path, hub_id),
    )


def was_hub_id(text: str, known_ids: Collection[str] | None) -> bool:
    """Whether a run's setting names a repository of the hub, where it may be read in another folder, or much later.

    Args:
        known_ids: those that a card says which was written where model and data lay; None for that card itself, to
            which what is no place here is an id (`is_hub_id`).
    """
    return is_hub_id(text) and (known_ids is None or text in known_ids)


def _file(path: str, hub_id: str | None, name: str) -> Path | None:
    """A file of the model, from its folder or from the hub's cache; nothing is downloaded."""
    local = Path(path).expanduser() / name
    if local.is_file():
        return local
    cached = try_to_load_from_cache(hub_id, name) if hub_id else None
    return Path(cached) if isinstance(cached, str) else None


def _own_license(path: str, hub_id: str | None) -> str | None:
    """The licence that the model's own card names."""
    file = _file(path, hub_id, "README.md")
    if file is None:
        return None
    try:
        license = ModelCard.load(file, ignore_metadata_errors=True).data.license
    except (OSError, ValueError):  # no YAML, or none that can be read
        return None
    return license if isinstance(license, str) and license != "other" else None


def _is_zero_terminal_snr(path: str, hub_id: str | None) -> bool:
    checkpoint = Path(path).expanduser()
    if checkpoint.suffix == ".safetensors" and checkpoint.is_file():
        return "ztsnr" in read_header(checkpoint, path).keys
    file = _file(path, hub_id, "scheduler/scheduler_config.json")
    try:
        return file is not None and bool(json.loads(file.read_text()).get("rescale_betas_zero_snr"))
    except (OSError, ValueError, AttributeError):
        return False
