"""Adapters in mid-training, and batches to train them on."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader


def randomise(module: torch.nn.Module, seed: int) -> None:
    """An adapter in mid-training: B is no longer 0, so that A has a gradient and student and teacher differ."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if ".lora_" in name and parameter.requires_grad:
                parameter.normal_(0, 0.1, generator=generator)


def gradients(unet: torch.nn.Module, adapter: str) -> dict[str, Tensor]:
    return {name: p.grad for name, p in unet.named_parameters() if ".lora_" in name and f".{adapter}." in name}


def random_batch(seed: int, size: int) -> dict[str, object]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "pixel_values": torch.rand(size, 3, 32, 32, generator=generator) * 2 - 1,
        "captions": [f"photo {seed} {i}" for i in range(size)],
        "seed": torch.randint(2**62, (size,), generator=generator),
        "weight": torch.ones(size),
    }


def train(module: L.LightningModule, batches: list[dict[str, object]], **settings: Any) -> L.Trainer:
    """An epoch of these batches, and nothing else than training."""
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        **settings,
    )
    trainer.fit(module, DataLoader(batches, batch_size=None))
    return trainer
