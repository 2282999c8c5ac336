"""Between steps that are logged, the host does not wait for the device."""

from __future__ import annotations

import json
import traceback
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from helpers.photos import small_batches
from lcm_lightning.callbacks.checkpoints import Checkpoints
from lcm_lightning.callbacks.final_validation import FinalValidation
from lcm_lightning.callbacks.loggers import MetricsFile
from lcm_lightning.callbacks.numerical_faults import NumericalFaults
from lcm_lightning.callbacks.progress_bar import ProgressBar
from lcm_lightning.callbacks.skipped_samples import SkippedSamples
from lcm_lightning.callbacks.throughput import Throughput
from lcm_lightning.diffusion.consistency import ConsistencyDistillation
from lcm_lightning.diffusion.distribution_matching import DistributionMatching
from lcm_lightning.diffusion.trajectory import TrajectoryDistillation
from lcm_lightning.methods.adapter_training import AdapterTraining
from lcm_lightning.methods.dmd2_lora import Dmd2LoraDistillation
from lcm_lightning.methods.lcm_lora import LcmLoraDistillation
from lcm_lightning.methods.lora import LoraFinetuning
from lcm_lightning.methods.pcm_lora import PcmLoraDistillation
from lcm_lightning.methods.tcd_lora import TcdLoraDistillation
from lcm_lightning.models.adapters import LoraSettings
from lcm_lightning.models.stable_diffusion import load_stable_diffusion

LOG_EVERY = 4


class Reads(TorchDispatchMode):
    """Where single numbers are read from tensors (`item`, `int`, `float`, `bool` and `if` of one), by step."""

    def __init__(self) -> None:
        super().__init__()
        self.trainer: L.Trainer | None = None
        self.found: dict[int, list[str]] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten._local_scalar_dense.default and self.trainer is not None:
            lines = [f"{frame.filename}:{frame.lineno}" for frame in traceback.extract_stack()[:-1]]
            self.found.setdefault(self.trainer.global_step, []).append(" ".join(lines[-8:]))
        return function(*args, **(kwargs or {}))


class Watch(L.Callback):
    """Lets `Reads` look from the first batch on: what comes before happens once a run."""

    def __init__(self, reads: Reads) -> None:
        self.reads = reads

    def on_train_batch_start(self, trainer: L.Trainer, *arguments: Any) -> None:
        self.reads.trainer = trainer


def module(method: str, pipeline_folder: Path) -> AdapterTraining:
    model = load_stable_diffusion(str(pipeline_folder), dtype=torch.bfloat16)
    training: dict[str, Any] = {
        "lora": LoraSettings(4, 4, "attention", dropout=0.1),
        "optimizer": lambda parameters: torch.optim.AdamW(parameters, 1e-3, fused=True),
    }
    if method == "lora":
        return LoraFinetuning(model, **training)
    if method == "tcd":
        return TcdLoraDistillation(model, distillation=TrajectoryDistillation(), schedules=[4, 8], **training)
    if method == "pcm":
        return PcmLoraDistillation(model, distillation=TrajectoryDistillation(num_ode_steps=40), **training)
    if method == "dmd2":
        return Dmd2LoraDistillation(model, distillation=DistributionMatching(), critic_steps=1, **training)
    distillation = ConsistencyDistillation(num_ode_steps=50, loss="huber", huber_c=0.001)
    return LcmLoraDistillation(model, distillation=distillation, **training)


@pytest.mark.parametrize("method", ["lora", "lcm", "tcd", "pcm", "dmd2"])
def test_no_number_is_read_from_the_device_in_a_step_that_is_not_logged(
    tmp_path: Path, pipeline_folder: Path, flickr_shards: Path, method: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("lcm_lightning.callbacks.progress_bar.draws_bars", lambda console: True)
    reads = Reads()
    trainer = L.Trainer(
        accelerator="cpu",
        precision="bf16-mixed",
        max_steps=2 * LOG_EVERY - 1,
        max_epochs=-1,
        check_val_every_n_epoch=None,
        limit_val_batches=0,
        log_every_n_steps=LOG_EVERY,
        gradient_clip_val=1.0,
        enable_model_summary=False,
        enable_checkpointing=True,
        logger=MetricsFile(tmp_path),
        callbacks=[
            ProgressBar(refresh_rate=10),
            FinalValidation(),
            NumericalFaults(str(tmp_path)),
            Throughput(),
            SkippedSamples(),
            Checkpoints(str(tmp_path / "checkpoints"), every_n_steps=100, every_n_minutes=10),
            Watch(reads),
        ],
    )
    with reads:
        trainer.fit(module(method, pipeline_folder), datamodule=small_batches(flickr_shards, batch_size=2))
    # Counted from 0: in the 4th batch 3 steps are behind, and the logging after it finds 4.
    logged = {LOG_EVERY - 1, LOG_EVERY, 2 * LOG_EVERY - 1}
    assert json.dumps({step: found for step, found in reads.found.items() if step not in logged}, indent=1) == "{}"
    assert reads.found[LOG_EVERY]  # it would have seen them


def test_seeds_stay_on_the_host(pipeline_folder: Path):
    batch = {"seed": torch.tensor([1, 2]), "weight": torch.ones(2), "captions": ["a", "b"]}
    moved = module("lora", pipeline_folder).transfer_batch_to_device(batch, torch.device("meta"), 0)
    assert moved["seed"].device.type == "cpu" and moved["weight"].device.type == "meta"
    assert moved["captions"] == ["a", "b"] and moved.keys() == batch.keys()
