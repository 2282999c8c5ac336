"""Silence about what is as intended."""

from __future__ import annotations

import logging
import warnings

from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging


def quiet_known_warnings() -> None:
    """Silence what other libraries say of situations that are as intended here."""
    # The tests of CLIP's image processor for torchvision, which nothing here uses.
    logging.getLogger("transformers").setLevel(logging.ERROR)
    transformers_logging.disable_progress_bar()
    diffusers_logging.disable_progress_bar()
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(_says_something)
    if logging.getLogger().hasHandlers():  # Hydra's, through which everything goes: Lightning's own would say it twice
        for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
            logging.getLogger(name).handlers.clear()
    # Of networks none of whose modules have to be in float32.
    logging.getLogger("diffusers.models.modeling_utils").addFilter(_names_a_module)
    for message in (
        ".*Experiment logs directory .* exists.*",  # metrics.csv belongs in the run folder, which Hydra has made
        ".*Checkpoint directory .* exists and is not empty.*",
        ".*isinstance\\(treespec, LeafSpec\\).*",  # Lightning's own use of torch
        ".*smaller than the logging interval.*",  # which runs on over epochs here
        ".*does not have many workers.*",  # the number of workers is the user's choice, data.num_workers
        ".*module\\(s\\) in eval mode at the start.*",  # the frozen networks
        ".*overridden `transfer_batch_to_device` in `LightningModule`.*",  # to leave the seeds on the host
        ".*Already found a `peft_config` attribute.*",  # a run has several adapters
    ):
        warnings.filterwarnings("ignore", message)


def _names_a_module(record: logging.LogRecord) -> bool:
    """False for diffusers' warning to keep an empty list of modules in float32."""
    return "should be kept in float32: []" not in record.getMessage()


def _says_something(record: logging.LogRecord) -> bool:
    """False for Lightning's tips to install other products of its makers, and for what goes without saying."""
    said = record.getMessage()
    return not any(text in said for text in ("Tip:", "TPU available: False", "(limit_val_batches=1"))
