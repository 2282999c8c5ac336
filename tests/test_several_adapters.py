"""A method of two adapters that take turns, each under its own optimizer settings."""

from __future__ import annotations

import multiprocessing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch.distributed.tensor import DTensor

from lcm_lightning.callbacks.checkpoints import Checkpoints
from lcm_lightning.callbacks.export import ExportLora
from lcm_lightning.callbacks.numerical_faults import NumericalFaults
from lcm_lightning.data.datamodule import CaptionedImages
from lcm_lightning.methods.adapter_training import AdapterTraining
from lcm_lightning.methods.randomness import SampleRandomness
from lcm_lightning.models.adapters import LoraSettings, active_adapters, lora_parameters
from lcm_lightning.models.condition import Condition
from lcm_lightning.models.kinds import AdapterKind
from lcm_lightning.models.lora_files import LORA_FILE
from lcm_lightning.models.stable_diffusion import load_stable_diffusion
from lcm_lightning.runs.checkpoint_files import AtomicCheckpointIO
from lcm_lightning.runs.contents import read_manifest

CRITIC_RATE = 1e-3
CLIP = 1e-3


class Adversaries(AdapterTraining):
    """The student moves away from what its critic predicts; the critic has two steps for one of the student's."""

    kind = AdapterKind("rival", "rival_lora", "rival", "student", steps=2, guidance_scale=1.0)
    helpers = ("critic",)

    def __init__(
        self, folder: Path, *, bad_step: int | None = None, kill_at: int | None = None, **training: Any
    ) -> None:
        super().__init__(load_stable_diffusion(str(folder)), **training)
        self.bad_step, self.kill_at = bad_step, kill_at
        self.moved: list[set[str]] = []
        self.norms: list[float] = []

    def turn(self, step: int) -> str:
        return self.kind.name if step % 3 == 0 else "critic"

    def optimizer_settings(self, adapter: str) -> Mapping[str, Any]:
        return {"lr": CRITIC_RATE} if adapter == "critic" else {}

    def losses(self, latents: Tensor, condition: Condition, randomness: SampleRandomness) -> Tensor:
        return -self.distance(latents, condition, randomness, by=self.kind.name)

    def helper_losses(self, helper: str, latents: Tensor, condition: Condition, randomness: SampleRandomness) -> Tensor:
        bad = torch.nan if self.trainer.global_step == self.bad_step else 1.0
        return bad * self.distance(latents, condition, randomness, by=helper)

    def distance(self, latents: Tensor, condition: Condition, randomness: SampleRandomness, *, by: str) -> Tensor:
        timesteps, noise = randomness.integer(1000), randomness.normal(latents.shape[1:])
        predicted = {}
        for name in self.adapters:
            with active_adapters(self.model.unet, (name,)), torch.set_grad_enabled(name == by):
                predicted[name] = self.model.denoise(latents + noise, timesteps, condition)
        return (predicted[self.kind.name] - predicted["critic"]).square().mean(dim=(1, 2, 3)) + latents.mean()

    def on_train_batch_start(self, batch: Any, batch_index: int) -> None:
        if self.trainer.global_step == self.kill_at:
            raise KeyboardInterrupt  # Lightning ends the run without another checkpoint of ours
        self.before = self.weights()

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        super().configure_gradient_clipping(optimizer, *args, **kwargs)
        gradients = [p.grad for p in self.adapter_parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        self.norms.append(float(norm.full_tensor() if isinstance(norm, DTensor) else norm))

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_index: int) -> None:
        after = self.weights()
        self.moved.append({name for name in self.adapters if not torch.equal(after[name], self.before[name])})

    def weights(self) -> dict[str, Tensor]:
        return {
            name: torch.cat([p.detach().flatten() for p in lora_parameters(self.model.unet, name)])
            for name in self.adapters
        }


def adversaries(pipeline: Path, **options: Any) -> Adversaries:
    torch.manual_seed(0)
    module = Adversaries(
        pipeline,
        lora=LoraSettings(4, 4, "attention"),
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-2, fused=True),
        lr_scheduler="constant",
        **options,
    )
    with torch.no_grad():
        for parameter in module.adapter_parameters():
            parameter.normal_(0, 0.05)
    return module


def fit(module: Adversaries, folder: Path, shards: Path, *, max_steps: int = 6, **options: Any) -> L.Trainer:
    checkpoint = options.pop("checkpoint", None)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        max_epochs=-1,
        gradient_clip_val=CLIP,
        limit_val_batches=0,
        logger=False,
        log_every_n_steps=1,
        callbacks=[
            NumericalFaults(str(folder / "faults")),
            ExportLora(str(folder / "lora")),
            Checkpoints(str(folder / "checkpoints"), every_n_steps=1, keep_last=20),
        ],
        plugins=[AtomicCheckpointIO()],
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
        **options,
    )
    data = CaptionedImages("photos", str(shards), resolution=32, batch_size=2, num_workers=0, val_limit=0)
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
    return trainer


@pytest.fixture
def trained(pipeline_folder: Path, flickr_shards: Path, tmp_path: Path) -> tuple[Adversaries, L.Trainer]:
    module = adversaries(pipeline_folder)
    return module, fit(module, tmp_path / "whole", flickr_shards)


def test_each_moves_in_its_turns_alone_by_its_own_rate(trained):
    module, trainer = trained
    assert trainer.global_step == 6
    assert module.moved == [{"rival"}, {"critic"}, {"critic"}] * 2
    optimizer = trainer.optimizers[0]
    assert [group["lr"] for group in optimizer.param_groups] == [1e-2, CRITIC_RATE]
    steps = [{int(optimizer.state[p]["step"]) for p in group["params"]} for group in optimizer.param_groups]
    assert steps == [{2}, {4}]


def test_the_gradient_that_is_clipped_is_that_of_the_turn(trained):
    module, _ = trained
    assert len(module.norms) == 6 and all(norm == pytest.approx(CLIP, rel=1e-3) for norm in module.norms)


def test_the_student_alone_is_exported(trained, tmp_path: Path):
    (adapter,) = read_manifest(tmp_path / "whole")
    assert adapter.kind == Adversaries.kind and adapter.file == LORA_FILE


@pytest.mark.parametrize("kill_at", [1, 2, 3, 5])
def test_killed_in_any_turn_both_go_on_with_the_same_bits(
    kill_at: int, trained, pipeline_folder: Path, flickr_shards: Path, tmp_path: Path
):
    folder = tmp_path / "killed"
    with pytest.raises(SystemExit):
        fit(adversaries(pipeline_folder, kill_at=kill_at), folder, flickr_shards)
    fit(adversaries(pipeline_folder), folder, flickr_shards, checkpoint=folder / "checkpoints" / "last.ckpt")
    ends = [torch.load(run / "checkpoints" / "last.ckpt", weights_only=True) for run in (folder, tmp_path / "whole")]
    assert [end["global_step"] for end in ends] == [6, 6]
    assert len(ends[0]["state_dict"]) == len(trained[0].adapter_parameters())
    assert all(torch.equal(ends[0]["state_dict"][key], tensor) for key, tensor in ends[1]["state_dict"].items())
    assert str(ends[0]["optimizer_states"]) == str(ends[1]["optimizer_states"])


def test_a_fault_of_one_leaves_the_other_its_steps(pipeline_folder: Path, flickr_shards: Path, tmp_path: Path):
    module = adversaries(pipeline_folder, bad_step=4)
    trainer = fit(module, tmp_path, flickr_shards)
    assert module.moved == [{"rival"}, {"critic"}, {"critic"}, {"rival"}, set(), {"critic"}]
    assert trainer.callback_metrics["train/skipped_steps"] == 1


def test_accumulated_batches_belong_to_one_turn(pipeline_folder: Path, flickr_shards: Path, tmp_path: Path):
    module = adversaries(pipeline_folder)
    fit(module, tmp_path, flickr_shards, max_steps=3, accumulate_grad_batches=2)
    assert module.moved == [set(), {"rival"}, set(), {"critic"}, set(), {"critic"}]


@pytest.mark.multiprocess
def test_sharded_adapters_take_turns_too(pipeline_folder: Path, flickr_shards: Path, tmp_path: Path):
    def train() -> None:
        module = adversaries(pipeline_folder)
        module.weights = lambda: {  # type: ignore[method-assign]
            name: torch.cat([p.full_tensor().detach().flatten() for p in lora_parameters(module.model.unet, name)])
            for name in module.adapters
        }
        strategy = ModelParallelStrategy(save_distributed_checkpoint=False, process_group_backend="gloo")
        fit(module, tmp_path, flickr_shards, max_steps=3, strategy=strategy, devices=1)
        assert module.moved == [{"rival"}, {"critic"}, {"critic"}]

    # In a process of its own: one that has had a process group cannot fork ranks any more.
    process = multiprocessing.get_context("fork").Process(target=train)
    process.start()
    process.join(timeout=200)
    assert process.exitcode == 0


class SameOnBothRanks(Adversaries):
    def on_train_end(self) -> None:
        assert self.moved == [{"rival"}, {"critic"}, {"critic"}]
        for weights in self.weights().values():
            first, second = self.all_gather(weights)
            assert torch.equal(first, second)


@pytest.mark.multiprocess
def test_ranks_agree_though_each_step_leaves_parameters_without_a_gradient(
    pipeline_folder: Path, flickr_shards: Path, tmp_path: Path
):
    module = adversaries(pipeline_folder)
    module.__class__ = SameOnBothRanks
    strategy = DDPStrategy(process_group_backend="gloo", start_method="fork")
    fit(module, tmp_path, flickr_shards, max_steps=3, devices=2, strategy=strategy)
