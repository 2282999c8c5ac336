"""Loggers that never ask and never stop a run."""

from __future__ import annotations

import inspect
import netrc
import os
from urllib.parse import urlparse

import wandb
from lightning.pytorch.loggers import WandbLogger

from lcm_lightning.errors import UserError


def has_wandb_key() -> bool:
    """Whether W&B's key is at hand: in `WANDB_API_KEY`, W&B's settings, or the netrc file `wandb login` writes."""
    settings = wandb.Settings()
    if os.environ.get("WANDB_API_KEY") or settings.api_key:
        return True
    try:
        return netrc.netrc().authenticators(urlparse(settings.base_url).hostname or "") is not None
    except (FileNotFoundError, netrc.NetrcParseError):
        return False


def wandb_logger(*, project: str, save_dir: str, name: str, **settings: object) -> WandbLogger:
    """A W&B logger that is online with an API key and offline without, unless `WANDB_MODE` says otherwise.

    An offline run is sent later with ``wandb sync <run folder>/wandb/offline-run-*``. `settings` go to `wandb.init`.

    Raises:
        UserError: for a setting it does not know. W&B would notice on first use, in the middle of Lightning's set-up.
    """
    known = {*inspect.signature(WandbLogger).parameters, *inspect.signature(wandb.init).parameters}
    unknown = sorted(settings.keys() - known)
    if unknown:
        raise UserError(
            f"logger.wandb.{unknown[0]}={settings[unknown[0]]}: no setting of wandb.init; remove it, or see "
            "https://docs.wandb.ai/ref/python/init"
        )
    if wandb.run is not None:
        wandb.finish()  # the jobs of a sweep share a process; each gets a run of its own
    offline = "WANDB_MODE" not in os.environ and not has_wandb_key()
    return WandbLogger(project=project, save_dir=save_dir, name=name, offline=offline, **settings)
