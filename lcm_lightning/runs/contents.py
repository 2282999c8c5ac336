"""What a run records of itself: its settings, and what it exported."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from omegaconf import DictConfig, OmegaConf

from lcm_lightning.errors import UserError, first_line
from lcm_lightning.methods import adapter_kinds
from lcm_lightning.models.kinds import LORA_FILE, AdapterKind
from lcm_lightning.output.files import sha256_of, write_atomic
from lcm_lightning.output.versions import package_versions
from lcm_lightning.runs.folders import CONFIG, OVERRIDES, did_you_mean

if TYPE_CHECKING:
    from lightning.pytorch.loggers import Logger

MANIFEST = "adapters.json"
EXPORTS = ("lora", "pipeline")  # where a run's lies, by what its method trains


@dataclass(frozen=True)
class Adapter:
    """What was exported: what it is for, its file in the run's `lora/`, or a whole UNet's folder in `pipeline/`.

    `step` is the optimizer step; None where it is not this run's, or version 0.1 wrote it.
    """

    kind: AdapterKind
    file: str = LORA_FILE
    step: int | None = None


def write_manifest(folder: Path, adapters: list[Adapter]) -> None:
    """Say which files in `folder` (one of a run's `EXPORTS`) make up its model, in the order they were trained.

    And by which versions.
    """
    entries = [{"file": adapter.file, "step": adapter.step, **adapter.kind.to_json()} for adapter in adapters]
    content = {"adapters": entries, "versions": package_versions()}
    write_atomic(folder / MANIFEST, (json.dumps(content, indent=2) + "\n").encode())


def read_config(run: Path) -> DictConfig:
    """The resolved configuration of a run.

    Raises:
        UserError: `run` is no run folder, or what it records is damaged.
    """
    path = run / CONFIG
    if not path.is_file():
        remedy = did_you_mean("run", run, exported) or "give a run folder such as outputs/lcm_flickr8k/<date_time>"
        raise UserError(f"run={run}: no {CONFIG} there; {remedy}")
    try:
        config = OmegaConf.load(path)
    except Exception as error:  # of the disk, of YAML or of OmegaConf
        raise UserError(
            f"run={run}: {CONFIG} is damaged ({first_line(error)}); copy the run again, or train it again"
        ) from error
    if not isinstance(config, DictConfig):
        raise UserError(f"run={run}: {CONFIG} is damaged (no settings); copy the run again, or train it again")
    return config


def exported(run: Path) -> Path | None:
    """The folder in which a run's exports lie; None where it has none."""
    return next((run / name for name in EXPORTS if (run / name / MANIFEST).is_file()), None)


def read_manifest(run: Path) -> list[Adapter]:
    """The adapters of a run, in training order: a teacher's before its student's.

    Raises:
        UserError: the run has exported none, or what says so is damaged.
    """
    folder = exported(run)
    if folder is None:
        raise UserError(f"run={run}: no lora/{MANIFEST} there; the run ended before its first export, train it again")
    return read_adapters(folder / MANIFEST, f"run={run}: {folder.name}/{MANIFEST}")


def read_adapters(manifest: Path, said: str) -> list[Adapter]:
    """The adapters that a manifest lists, in training order.

    Raises:
        UserError: it is damaged; begins with `said`.
    """
    try:
        return [_adapter(entry) for entry in json.loads(manifest.read_text())["adapters"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
        raise UserError(
            f"{said} is damaged, or of another version ({first_line(error)}); copy the run again, or train it again "
            "with this version"
        ) from error


def read_versions(manifest: Path) -> dict[str, str]:
    """What a run was exported with; empty where versions before 0.2 wrote it."""
    return {str(name): str(version) for name, version in json.loads(manifest.read_text()).get("versions", {}).items()}


def exported_step(run: Path) -> int | None:
    """After which optimizer step a run's own LoRA was written; None where there is none, or it does not say."""
    try:
        return read_manifest(run)[-1].step
    except (UserError, IndexError):
        return None


def weights_digest(run: Path) -> str | None:
    """SHA-256 of the weights that a run has exported; None where it has none."""
    folder = exported(run)
    if folder is None:
        return None
    digest = hashlib.sha256()
    for adapter in read_manifest(run):
        place = folder / adapter.file
        for path in sorted(place.glob("*.safetensors")) if place.is_dir() else [place]:
            digest.update(bytes.fromhex(sha256_of(path)))
    return digest.hexdigest()


def _adapter(entry: dict[str, Any]) -> Adapter:
    """What a manifest says of an adapter; version 0.1 wrote its name and file alone."""
    if Path(entry["file"]).name != entry["file"]:
        raise ValueError(f"{entry['file']!r} does not lie beside it")
    step = entry.get("step")
    if not (step is None or (type(step) is int and step >= 0)):
        raise ValueError(f"step {step!r} is none")
    if "role" in entry:
        return Adapter(AdapterKind.from_json(entry), entry["file"], step)
    kinds = adapter_kinds()  # asked only here: it imports every method
    if entry["name"] not in kinds:
        raise ValueError(f"no method here trains {entry['name']!r}")
    return Adapter(kinds[entry["name"]], entry["file"])


def record_settings(cfg: DictConfig, overrides: Sequence[str], run_dir: Path, loggers: Sequence[Logger]) -> None:
    """Write the resolved configuration as the run's `config.yaml` and give it to loggers of hyperparameters.

    Raises:
        UserError: the run folder cannot be written, on a full disk for example.
    """
    try:
        write_atomic(run_dir / OVERRIDES, OmegaConf.to_yaml(list(overrides)).encode())
        write_atomic(run_dir / CONFIG, OmegaConf.to_yaml(cfg).encode())
        for logger in loggers:
            logger.log_hyperparams(cast(dict[str, Any], OmegaConf.to_container(cfg)))
    except OSError as error:
        raise UserError(
            f"hydra.run.dir={run_dir}: the run folder cannot be written ({error}); make room there, or set "
            "hydra.run.dir=... to a place with room"
        ) from error
