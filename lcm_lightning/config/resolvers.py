"""What configuration files may compute."""

from __future__ import annotations

import hashlib
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from lcm_lightning.runs.folders import auto_run_folder, auto_sweep_time

PACKAGE = Path(__file__).parent.parent


def chosen(group: str, *, _root_: DictConfig) -> str:
    """The option that was chosen of a config group.

    Hydra's own `${hydra:runtime.choices...}` has no value where a sweep's folder is named, before the first job.
    """
    settings = _root_.hydra if "hydra" in _root_ else HydraConfig.get()
    return settings.runtime.choices[group]


def fused_adamw(precision: str) -> bool:
    """Whether AdamW's fused kernel can be used: it unscales fp16 gradients itself, after they would be clipped."""
    return precision != "16-mixed"


def made_folder(name: str) -> str:
    """A folder that is made where it is missing: a database makes its file, but not the folder around it."""
    Path(name).mkdir(parents=True, exist_ok=True)
    return name


def mul(a: int, b: int) -> int:
    """Product of two whole numbers."""
    return a * b


def command_name() -> str:
    """The command that runs, such as "train"; composed elsewhere than by one, "train"."""
    return str(HydraConfig.get().job.config_name) if HydraConfig.initialized() else "train"


def sweep_name() -> str | None:
    """What the runs of a sweep (-m) have in common: the last two parts of its folder; None for a run of its own."""
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return None
    return "-".join(Path(HydraConfig.get().sweep.dir).parts[-2:])


def evaluation_folder(run: str | None, protocol: str, name: str, overrides: str) -> str:
    """Where an evaluation is written: `<run>/evaluation/<protocol>`, or else `outputs/<name>/<digest>`.

    The digest is of the command's `overrides`: the same command finds what it drew before it was stopped.
    """
    if run is not None:
        return str(Path(run).expanduser() / "evaluation" / protocol)
    return f"outputs/{name}/{hashlib.sha256(overrides.encode()).hexdigest()[:8]}"


def generated_folder(run: str | None) -> str:
    """Where images are written: into the folder of the run that draws them, or else into `outputs/generate`."""
    return "outputs/generate" if run is None else str(Path(run).expanduser() / "generated")


def exported_folder(run: str | None, format: str) -> str:
    """Where a model is written for other programs: into the folder of its run, or else into `outputs/exports`."""
    return str(Path("outputs/exports" if run is None else Path(run).expanduser() / "exports") / str(format))


def package_file(name: str) -> str:
    """Path of a file or folder that ships inside the package."""
    return str(PACKAGE / name)


def register_resolvers() -> None:
    """Make the resolvers known to OmegaConf; may be called again."""
    # Found once: the folder must not change while the run fills it, nor between the jobs of a sweep.
    OmegaConf.register_new_resolver("auto_run_folder", auto_run_folder, replace=True, use_cache=True)
    OmegaConf.register_new_resolver("auto_sweep_time", auto_sweep_time, replace=True, use_cache=True)
    OmegaConf.register_new_resolver("chosen", chosen, replace=True)
    OmegaConf.register_new_resolver("command_name", command_name, replace=True)
    OmegaConf.register_new_resolver("evaluation_folder", evaluation_folder, replace=True)
    OmegaConf.register_new_resolver("exported_folder", exported_folder, replace=True)
    OmegaConf.register_new_resolver("fused_adamw", fused_adamw, replace=True)
    OmegaConf.register_new_resolver("generated_folder", generated_folder, replace=True)
    OmegaConf.register_new_resolver("made_folder", made_folder, replace=True)
    OmegaConf.register_new_resolver("mul", mul, replace=True)
    OmegaConf.register_new_resolver("package_file", package_file, replace=True)
    OmegaConf.register_new_resolver("sweep_name", sweep_name, replace=True)
