"""Turn a composed configuration into the objects `train.py` hands to Lightning."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

import lightning as L
import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig

from lcm_lightning.errors import UserError, first_line

FROZEN_DTYPES = {
    "32-true": torch.float32,
    "bf16-mixed": torch.bfloat16,
    "16-mixed": torch.float16,
}


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


def build_module(cfg: DictConfig, precision: str) -> L.LightningModule:
    """The method of a composed run, on its model where it takes one, with its optimizer.

    Raises:
        UserError: the model cannot be loaded, or a setting does not fit it.
    """
    optimizer = instantiate_group(cfg, "optimizer")
    if cfg.get("model") is None:
        return instantiate_group(cfg, "method", optimizer=optimizer)
    model = instantiate_group(cfg, "model", dtype=frozen_dtype(precision))
    model.check_resolution(cfg.data.resolution)
    return instantiate_group(cfg, "method", model=model, optimizer=optimizer)


def instantiate_group(cfg: DictConfig, group: str, **arguments: object) -> object:
    """Hydra's `instantiate` of one config group, whose failures name the group.

    Raises:
        UserError: a key the target does not take, or a package that is not installed. Other errors pass through.
    """
    try:
        return instantiate(cfg[group], **arguments)
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, UserError):
            raise cause from None
        if isinstance(cause, TypeError) or cause is None:
            raise UserError(
                f"{group}: {first_line(cause or error)}; `python train.py --cfg job` shows its keys"
            ) from error
        raise


def find_checkpoint(resume: str | None) -> Path | None:
    """The checkpoint file of `resume`: a run folder or a .ckpt file.

    Raises:
        UserError: there is none.
    """
    if resume is None:
        return None
    path = Path(resume).expanduser()
    for candidate in (path, path / "checkpoints" / "last.ckpt"):
        if candidate.is_file():
            return candidate
    raise UserError(f"resume={resume}: neither a .ckpt file nor a run folder with checkpoints/last.ckpt")


def next_commands(run_dir: Path) -> str:
    """What to do with a finished run."""
    shown = run_dir.relative_to(Path.cwd()) if run_dir.is_relative_to(Path.cwd()) else run_dir
    return (
        f"\nrun folder: {shown}\n"
        f"  look at   {shown}/samples/\n"
        f"  evaluate  python evaluate.py run={shown}\n"
        f'  generate  python -m lcm_lightning.generate run={shown} prompt="..."'
    )


def quiet_known_warnings() -> None:
    """Silence what other libraries say of situations that are as intended here."""
    # The tests of CLIP's image processor for torchvision, which nothing here uses.
    logging.getLogger("transformers").setLevel(logging.ERROR)
    for message in (
        ".*Experiment logs directory .* exists.*",  # metrics.csv belongs in the run folder, which Hydra has made
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*isinstance\\(treespec, LeafSpec\\).*",  # Lightning's own use of torch
        ".*does not have many workers.*",  # the number of workers is the user's choice, data.num_workers
    ):
        warnings.filterwarnings("ignore", message)
