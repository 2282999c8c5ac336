"""Turn a composed configuration into the objects `train.py` hands to Lightning."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import torch
from diffusers.utils import logging as diffusers_logging
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.fabric import Fabric
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig, OmegaConf
from torch.optim import Optimizer
from transformers.utils import logging as transformers_logging

from lcm_lightning.caching import cache_key
from lcm_lightning.checkpoints import OVERRIDES
from lcm_lightning.data.latents import LatentCache
from lcm_lightning.errors import SHOW_KEYS, UserError, first_line, innermost
from lcm_lightning.files import write_atomic
from lcm_lightning.models.runs import MANIFEST
from lcm_lightning.resolvers import package_file

log = logging.getLogger(__name__)

FROZEN_DTYPES = {
    "32-true": torch.float32,
    "bf16-mixed": torch.bfloat16,
    "16-mixed": torch.float16,
}
GROUPS = ("model", "method", "optimizer", "data", "trainer", "logger", "callbacks")
TRAIN_KEYS = (*GROUPS, "name", "seed", "max_steps", "val_every", "resume", "run_dir")


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


def check_settings(cfg: DictConfig) -> None:
    """Raise a `UserError` for settings of method and optimizer that are wrong whatever model and data are.

    Data sets and models take minutes to fetch; a mistake should be told before.
    """
    build_optimizer(cfg)
    method = instantiate_group(cfg, "method", _partial_=True)
    if hasattr(method.func, "check_settings"):
        method.func.check_settings(**method.keywords)


def build_module(cfg: DictConfig, precision: str, cache: LatentCache | None = None) -> L.LightningModule:
    """The method of a composed run, on its model where it takes one, with its optimizer.

    Args:
        cache: the cached latents to train on; VAE and text encoder are then not read before they are needed.

    Raises:
        UserError: the model cannot be loaded, a setting does not fit it, or the cache was made with another model.
    """
    optimizer = build_optimizer(cfg)
    if cfg.get("model") is None:
        if cache is not None:
            raise UserError(f"data.source={cache.source}: holds cached latents, and method {cfg.name} trains on images")
        return instantiate_group(cfg, "method", optimizer=optimizer)
    deferred = {"defer_encoders": True} if cache is not None else {}
    model = instantiate_group(cfg, "model", dtype=frozen_dtype(precision), **deferred)
    model.check_resolution(cfg.data.resolution)
    if cfg.data.resolution >= 2 * model.default_resolution:
        log.warning(
            "data.resolution=%d: the model draws images of %d px; data.resolution=%d is that, and faster",
            cfg.data.resolution,
            model.default_resolution,
            model.default_resolution,
        )
    if (drawn := OmegaConf.select(cfg, "callbacks.samples.resolution")) is not None:
        model.check_resolution(drawn, "callbacks.samples.resolution")
    if cache is not None:
        cache.check(cache_key(model, cfg.data.resolution, cfg.method.get("teacher_lora")))
        model.known_texts[""] = torch.from_numpy(cache.empty_text(cfg.data.get("cache_dir")))
    return instantiate_group(cfg, "method", model=model, optimizer=optimizer)


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
    """The objects of a group of several, such as `callbacks`; those set to null are left out.

    Raises:
        UserError: as `instantiate_group`.
    """
    return [instantiate_group(cfg, f"{group}.{name}") for name, part in cfg[group].items() if part is not None]


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
        if isinstance(cause, MisconfigurationException):
            remedy = "; trainer=cpu runs without a GPU" if "gpu" in str(cause).lower() else ""
            raise UserError(f"{group}: {first_line(cause)}{remedy}") from error
        if isinstance(cause, ImportError):
            raise UserError(
                f"{group}: {first_line(cause)}; conf/{group.partition('.')[0]}/ says what it needs"
            ) from error
        if isinstance(cause, TypeError | ValueError | RuntimeError | OSError | InstantiationException):
            raise UserError(f"{group}: {first_line(cause)}; `{SHOW_KEYS}` shows its keys") from error
        raise


def make_fabric(accelerator: str, devices: int) -> Fabric:
    """What spreads work outside training over devices.

    Raises:
        UserError: there is no such accelerator, or not so many devices.
    """
    try:
        return Fabric(accelerator=accelerator, devices=devices)
    except (RuntimeError, ValueError, TypeError, MisconfigurationException) as error:
        raise UserError(
            f"accelerator={accelerator} devices={devices}: {first_line(error)}; accelerator=cpu runs anywhere"
        ) from error


class SettingsRecord(L.Callback):
    """Records a run's settings when training starts: a checkpoint to go on from has been accepted then.

    What a refused command says must not take the place of what the run was made with.
    """

    def __init__(self, cfg: DictConfig, overrides: Sequence[str], run_dir: Path, loggers: Sequence[Logger]) -> None:
        self.settings = (cfg, overrides, run_dir, loggers)

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Record them, on the first rank."""
        if trainer.is_global_zero:
            record_settings(*self.settings)


def record_settings(cfg: DictConfig, overrides: Sequence[str], run_dir: Path, loggers: Sequence[Logger]) -> None:
    """Write the resolved configuration as the run's `config.yaml` and give it to loggers of hyperparameters.

    Raises:
        UserError: the run folder cannot be written, on a full disk for example.
    """
    try:
        write_atomic(run_dir / OVERRIDES, OmegaConf.to_yaml(list(overrides)).encode())
        write_atomic(run_dir / "config.yaml", OmegaConf.to_yaml(cfg).encode())
        for logger in loggers:
            logger.log_hyperparams(OmegaConf.to_container(cfg))
    except OSError as error:
        raise UserError(
            f"hydra.run.dir={run_dir}: the run folder cannot be written ({error}); make room there, or set "
            "hydra.run.dir=... to a place with room"
        ) from error


def next_commands(cfg: DictConfig, run_dir: Path) -> str:
    """What to do with a finished run, of what it left: pictures, a LoRA."""
    shown = run_dir.relative_to(Path.cwd()) if run_dir.is_relative_to(Path.cwd()) else run_dir
    lines = [f"\nrun folder: {shown}"]
    if any((run_dir / "samples").glob("*.png")):
        lines.append(f"  look at   {shown}/samples/")
    if (run_dir / "lora" / MANIFEST).is_file():
        protocol = " evaluation=quick" if is_embedded(cfg) else ""
        lines.append(f"  evaluate  python evaluate.py run={shown}{protocol}")
        lines.append(f'  generate  python -m lcm_lightning.generate run={shown} prompt="..."')
    return "\n".join(lines)


def is_embedded(cfg: DictConfig) -> bool:
    """Whether a run is of the embedded pipeline on embedded data, which the protocol `quick` is for."""
    assets = Path(package_file("assets"))
    model_path = OmegaConf.select(cfg, "model.path")
    return Path(model_path or "").is_relative_to(assets) and (assets / "data" / cfg.data.name).is_dir()


def quiet_known_warnings() -> None:
    """Silence what other libraries say of situations that are as intended here."""
    # The tests of CLIP's image processor for torchvision, which nothing here uses.
    logging.getLogger("transformers").setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    diffusers_logging.disable_progress_bar()
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_is_no_advertisement)
    for message in (
        ".*Experiment logs directory .* exists.*",  # metrics.csv belongs in the run folder, which Hydra has made
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*isinstance\\(treespec, LeafSpec\\).*",  # Lightning's own use of torch
        ".*does not have many workers.*",  # the number of workers is the user's choice, data.num_workers
        ".*module\\(s\\) in eval mode at the start.*",  # the frozen networks
        ".*overridden `transfer_batch_to_device` in `LightningModule`.*",  # to leave the seeds on the host
        ".*Already found a `peft_config` attribute.*",  # a run has several adapters
    ):
        warnings.filterwarnings("ignore", message)


def _is_no_advertisement(record: logging.LogRecord) -> bool:
    """False for Lightning's tips to install other products of its makers."""
    return "Tip:" not in record.getMessage()
