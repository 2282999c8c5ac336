"""A loss or gradient that is not a number costs one step, and many in a row stop the run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lcm_lightning.callbacks.numerical_faults import NumericalFaults
from lcm_lightning.diffusion.consistency import ConsistencyDistillation
from lcm_lightning.errors import UserError
from lcm_lightning.methods.adapter_training import propagate_faults
from lcm_lightning.methods.clipping import FusedClipping
from lcm_lightning.methods.lcm_lora import LcmLoraDistillation
from lcm_lightning.models.adapters import LoraSettings
from lcm_lightning.models.stable_diffusion import load_stable_diffusion


class Scaled(FusedClipping):
    """The loss is the mean of a weight times the batch's numbers, so these decide what is finite."""

    def __init__(self, fused: bool = False) -> None:
        super().__init__()
        self.fused = fused
        self.weight = nn.Parameter(torch.ones(3))
        self.weights: list[Tensor] = []  # after each batch
        self.figures: list[float] = []

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        return propagate_faults((self.weight * batch["x"]).mean())

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_index: int) -> None:
        self.weights.append(self.weight.detach().clone())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.1, fused=self.fused)


def batches(*numbers: float) -> DataLoader:
    return DataLoader([{"x": torch.full((3,), x), "keys": [f"key {x}"]} for x in numbers], batch_size=None)


def fit(module: L.LightningModule, loader: Any, folder: Path, *, max_in_a_row: int = 3, **options: Any) -> L.Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = L.Trainer(
        accelerator="cpu",
        max_epochs=1,
        enable_model_summary=False,
        gradient_clip_val=1.0,
        **({"log_every_n_steps": 1, "callbacks": [NumericalFaults(str(folder), max_in_a_row)]} | quiet | options),
    )
    trainer.fit(module, loader)
    return trainer


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_bad_step_changes_neither_weights_nor_optimizer(tmp_path: Path, bad: float, precision: str, fused: bool):
    with_fault, without = Scaled(fused), Scaled(fused)
    trainer = fit(with_fault, batches(1.0, bad, 2.0), tmp_path, precision=precision)
    other = fit(without, batches(1.0, 2.0), tmp_path, precision=precision)
    assert torch.equal(with_fault.weights[0], with_fault.weights[1])
    assert torch.equal(with_fault.weight, without.weight)
    assert str(trainer.optimizers[0].state_dict()) == str(other.optimizers[0].state_dict())
    assert trainer.callback_metrics["train/skipped_steps"] == 1 and other.callback_metrics["train/skipped_steps"] == 0
    assert trainer.global_step == 3  # a step, as schedules and intervals count it
    assert not list(tmp_path.iterdir())


def test_one_bad_batch_of_an_accumulated_step_costs_that_step_alone(tmp_path: Path):
    module = Scaled()
    trainer = fit(module, batches(1.0, float("nan"), 2.0, 2.0), tmp_path, accumulate_grad_batches=2)
    assert torch.equal(module.weights[1], torch.ones(3)) and not torch.equal(module.weights[3], torch.ones(3))
    assert trainer.callback_metrics["train/skipped_steps"] == 1


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("log_every_n_steps", [1, 6])
def test_good_steps_between_bad_ones_reset_the_count(tmp_path: Path, fused: bool, log_every_n_steps: int):
    nan = float("nan")
    numbers = (nan, nan, 1.0, nan, nan, 1.0)
    trainer = fit(Scaled(fused), batches(*numbers), tmp_path, log_every_n_steps=log_every_n_steps)
    assert trainer.callback_metrics["train/skipped_steps"] == 4


def test_a_fused_optimizer_s_faults_are_known_a_step_later(tmp_path: Path):
    loader = batches(1.0, *[float("nan")] * 9)
    with pytest.raises(UserError, match=r"3 steps in a row.*step_000004_rank_0.json"):
        fit(module := Scaled(fused=True), loader, tmp_path, log_every_n_steps=100)
    assert len(module.weights) == 4 and all(torch.equal(module.weights[0], weights) for weights in module.weights)


def test_a_checkpoint_counts_the_step_it_follows(tmp_path: Path):
    callback = NumericalFaults(str(tmp_path))
    fit(Scaled(fused=True), batches(1.0, float("nan")), tmp_path, log_every_n_steps=100, callbacks=[callback])
    assert callback.state_dict() == {"skipped": 1, "in_a_row": 1}


def test_too_many_in_a_row_stop_the_run_with_the_samples_of_the_step_named(tmp_path: Path):
    nan = float("nan")
    loader = batches(1.0, 1.0, nan, nan, nan, 5.0, nan, nan, 1.0, 1.0)
    message = r"not finite in 3 steps in a row \(callbacks\.faults\.max_in_a_row\).*step_000004_rank_0.*optimizer\.lr"
    with pytest.raises(UserError, match=message):
        fit(Scaled(), loader, tmp_path, accumulate_grad_batches=2)

    assert json.loads((tmp_path / "step_000004_rank_0.json").read_text()) == [{"keys": ["key nan"]}] * 2
    assert not list(tmp_path.glob(".*"))


def test_an_infinite_loss_with_a_finite_gradient_is_a_fault_too(tmp_path: Path):
    loss = nn.Parameter(torch.tensor(1.0)) + torch.tensor(float("inf"))
    weight = nn.Parameter(torch.tensor(1.0))
    propagate_faults(weight + loss.detach()).backward()
    assert weight.grad is not None and weight.grad.isnan()
    finite = nn.Parameter(torch.tensor(1.0))
    propagate_faults(3 * finite).backward()
    assert finite.grad == 3


class BadOnOneRank(Scaled):
    """Rank 1 alone meets a bad number, in its second batch."""

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        x = torch.full((3,), float("inf")) if (self.global_rank, batch_index) == (1, 1) else batch["x"]
        return propagate_faults(self.weight.mean() + x.mean() * self.weight.mean().detach())

    def on_train_end(self) -> None:
        assert torch.equal(self.weights[0], self.weights[1]) and not torch.equal(self.weights[1], self.weights[2])
        assert self.trainer.callback_metrics["train/skipped_steps"] == 1
        gathered = self.all_gather(self.weight.detach())
        assert torch.equal(gathered[0], gathered[1])


@pytest.mark.multiprocess
def test_all_ranks_leave_out_the_step_that_is_bad_on_one(tmp_path: Path):
    strategy = DDPStrategy(process_group_backend="gloo", start_method="fork")
    fit(BadOnOneRank(), batches(*[1.0] * 8), tmp_path, devices=2, strategy=strategy, use_distributed_sampler=False)


class Overflowing(Scaled):
    """What fp16 cannot hold becomes infinite in the gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.weight.register_hook(lambda gradient: torch.where(gradient > 65504, torch.inf, gradient))


TOO_LARGE = 3e5  # a gradient of 1e5: too large for fp16 at a scale of 1 too


def test_in_fp16_an_overflow_is_the_scaler_s_until_its_scale_is_one(tmp_path: Path):
    with pytest.raises(UserError, match="3 steps in a row"):
        fit(Overflowing(), batches(1.0, *[TOO_LARGE] * 25), tmp_path, plugins=[fp16_on_the_cpu()])
    (saved,) = tmp_path.glob("*.json")
    # 65536 is halved 16 times by as many overflows; the 3 after those are faults.
    assert saved.name == "step_000020_rank_0.json"


def test_in_fp16_no_fault_takes_the_scale_below_one(tmp_path: Path):
    numbers = [1.0] + [TOO_LARGE] * 25
    trainer = fit(Overflowing(), batches(*numbers), tmp_path, max_in_a_row=100, plugins=[fp16_on_the_cpu()])
    assert trainer.callback_metrics["train/skipped_steps"] == 9
    assert trainer.precision_plugin.scaler.get_scale() == 1


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_in_fp16_a_bad_loss_is_a_fault_at_any_scale(tmp_path: Path, bad: float):
    module = Scaled()
    trainer = fit(module, batches(1.0, bad, 1.0), tmp_path, plugins=[fp16_on_the_cpu()])
    assert trainer.callback_metrics["train/skipped_steps"] == 1
    assert torch.equal(module.weights[0], module.weights[1]) and not torch.equal(module.weights[1], module.weights[2])
    assert trainer.precision_plugin.scaler.get_scale() == 65536


def test_a_lower_limit_than_the_faults_a_run_goes_on_with_stops_it_too(tmp_path: Path):
    callback = NumericalFaults(str(tmp_path), 3)
    callback.load_state_dict({"skipped": 5, "in_a_row": 5})
    with pytest.raises(UserError, match="6 steps in a row"):
        fit(Scaled(), batches(float("nan")), tmp_path, callbacks=[callback])
    assert fit(Scaled(), batches(1.0), tmp_path, callbacks=[callback]).global_step == 1


def fp16_on_the_cpu() -> Any:
    from lightning.pytorch.plugins import MixedPrecision

    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=65536.0))


def test_a_distillation_step_on_a_bad_picture_is_left_out(tmp_path: Path, pipeline_folder: Path):
    def sgd(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, 0.1)

    module = LcmLoraDistillation(
        load_stable_diffusion(str(pipeline_folder)),
        distillation=ConsistencyDistillation(num_ode_steps=50, loss="huber", huber_c=0.001),
        lora=LoraSettings(4, 4, "attention"),
        optimizer=sgd,
    )
    good = {
        "pixel_values": torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1,
        "captions": ["a dog", "a cat"],
        "seed": torch.tensor([1, 2]),
        "weight": torch.ones(2),
    }
    bad = good | {"pixel_values": torch.full((2, 3, 32, 32), float("nan"))}
    trainer = fit(module, DataLoader([good, bad], batch_size=None), tmp_path)
    assert trainer.callback_metrics["train/skipped_steps"] == 1
    assert all(torch.isfinite(parameter).all() for parameter in module.adapter_parameters())
    assert any(parameter.any() for name, parameter in module.named_parameters() if ".lora_B." in name)
