"""What all methods share: a frozen model, and beside it, or in it as adapters, what trains."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from diffusers.optimization import SchedulerType, get_scheduler
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.types import OptimizerLRSchedulerConfig
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from torchmetrics import MeanMetric

from lcm_lightning.diffusion.consistency import Denoiser
from lcm_lightning.errors import UserError
from lcm_lightning.methods.clipping import FusedClipping
from lcm_lightning.methods.randomness import SampleRandomness
from lcm_lightning.models.adapters import LoraSettings, add_lora, lora_parameters, set_active_adapters
from lcm_lightning.models.condition import Condition
from lcm_lightning.models.kinds import AdapterKind
from lcm_lightning.models.latent_diffusion import LatentDiffusionModel
from lcm_lightning.models.lora_layers import fit_installed_versions
from lcm_lightning.models.sampling import DDIM, SamplingSetup

# Piecewise constant ones would need rules of their own.
SCHEDULES = tuple(schedule.value for schedule in SchedulerType if schedule != SchedulerType.PIECEWISE_CONSTANT)

OptimizerFactory = Callable[[Iterable[dict[str, Any]]], Optimizer]


def propagate_faults(loss: Tensor) -> Tensor:
    """`loss` as it is; but if it is not finite, one whose every gradient is NaN, so that all ranks learn of it."""
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan)


class Training(FusedClipping, ABC):
    """Train what `kind` says on a frozen model, and with it what is called `helpers`.

    A batch holds `pixel_values` float32 [B, 3, H, W] in [-1, 1], `captions` (B strings), `seed` int64 [B], `weight`
    float32 [B] and, where they are known, the `time_ids` of a `Condition`; or, in place of `pixel_values`, what VAE and
    text encoder have made of images and captions: `moments` [B, 2, C, h, w] and the tensors of a `Condition`. See
    `lcm_lightning.data`. The mean of weight times loss over all ranks is the mean over the step's samples, each once.

    A method that reads no images (`reads_images`) is given standard normal noise in the place of their latents.

    Those that train take turns, one an optimizer step, as `turn` says. Each has a parameter group of the one optimizer
    with settings of its own: an optimizer leaves parameters without a gradient, and its state of them, as they are.

    Args:
        model: frozen.
        optimizer: makes the optimizer of the parameters that train.
        lr_scheduler: a schedule of `diffusers.optimization.get_scheduler`, such as "constant_with_warmup" or "cosine".
        warmup_steps: optimizer steps over which the learning rate rises from 0.
    """

    alphas_cumprod: Tensor
    kind: AdapterKind  # the class's, or a run's own where its settings decide how it is drawn
    helpers: ClassVar[tuple[str, ...]] = ()
    reads_images: bool = True

    def __init__(
        self,
        model: LatentDiffusionModel,
        *,
        optimizer: OptimizerFactory,
        lr_scheduler: str = "constant_with_warmup",
        warmup_steps: int = 0,
    ) -> None:
        super().__init__()
        Training.check_settings(lr_scheduler=lr_scheduler, warmup_steps=warmup_steps)
        if model.guidance_dimension:
            raise UserError(
                f"model.path={model.name_or_path}: a full LCM, which is trained already; give the Stable Diffusion "
                "model it was distilled from"
            )
        self.strict_loading = False
        self.model = model
        self.make_optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.warmup_steps = warmup_steps
        # Lightning's own mean over ranks rounds the mean count of samples down to a whole number.
        self.val_loss = MeanMetric()
        self.last_losses: dict[str, Tensor] = {}  # logged together: steps that are logged may all be one's turns
        self.dropout_seeds: list[int] = []  # those of the step's samples
        for module in model.unet.modules():
            if type(module) is nn.Dropout:
                module.p = 0.0  # frozen layers are what they are when drawn from
        model.unet.train()
        self.register_buffer("alphas_cumprod", model.alphas_cumprod(), persistent=False)

    @classmethod
    def check_settings(
        cls, *, lr_scheduler: str = "constant_with_warmup", warmup_steps: int = 0, **others: Any
    ) -> None:
        """Raise a `UserError` for a setting that is wrong whatever the model is, before one is loaded."""
        if lr_scheduler not in SCHEDULES:
            raise UserError(f"method.lr_scheduler={lr_scheduler}: expected one of {', '.join(SCHEDULES)}")
        if warmup_steps < 0:
            raise UserError(f"method.warmup_steps={warmup_steps}: expected at least 0, such as 100")

    @abstractmethod
    def trained_by(self, adapter: str) -> list[nn.Parameter]:
        """The parameters that move in the turns of `adapter`, in a fixed order."""

    @abstractmethod
    def losses(self, latents: Tensor, condition: Condition, randomness: SampleRandomness) -> Tensor:
        """Loss of each sample, float32 [B], in what `kind` trains. `latents` [B, C, h, w] float32, B conditions."""

    def helper_losses(self, helper: str, latents: Tensor, condition: Condition, randomness: SampleRandomness) -> Tensor:
        """As `losses`, in the adapter `helper`."""
        raise NotImplementedError(f"{type(self).__name__} trains no {helper}")

    def turn(self, step: int) -> str:
        """Name of the adapter that optimizer step `step`, from 0, trains."""
        return self.kind.name

    def optimizer_settings(self, adapter: str) -> Mapping[str, Any]:
        """What an adapter's parameter group has other than the optimizer's own settings, such as its `lr`."""
        return {}

    @property
    def adapters(self) -> tuple[str, ...]:
        """Names of all that train."""
        return (self.kind.name, *self.helpers)

    @property
    def below(self) -> tuple[AdapterKind, str] | None:
        """The LoRA that is part of the frozen weights, to be kept with the trained one: its kind, and where it lies."""
        return None

    def sampling_setups(
        self, *, teacher_steps: int, guidance_scale: float | None = None, student_steps: Sequence[int]
    ) -> list[SamplingSetup]:
        """The ways of drawing images that show what training has done: with and without the adapter.

        Args:
            guidance_scale: of base, fine-tuned model and teacher; None for the model's own.
        """
        kind, names = self.kind, (self.kind.name,)
        guidance_scale = self.model.guidance_scale if guidance_scale is None else guidance_scale
        if kind.role == "student":
            tried = [
                SamplingSetup(kind.label(steps), names, kind.sampler, steps, kind.guidance_scale)
                for steps in kind.sampler.possible(student_steps) or [kind.steps]
            ]
        else:
            tried = [SamplingSetup(kind.label(teacher_steps), names, kind.sampler, teacher_steps, guidance_scale)]
        before = "teacher" if kind.role == "student" else "base"
        return [SamplingSetup(f"{before}, {teacher_steps} steps", (), DDIM, teacher_steps, guidance_scale), *tried]

    def transfer_batch_to_device(self, batch: dict[str, Any], device: torch.device, dataloader_index: int) -> Any:
        """All but the seeds, which are for generators on the host: to read them back would wait for the device."""
        moved = super().transfer_batch_to_device({**batch, "seed": None}, device, dataloader_index)
        return {**moved, "seed": batch["seed"]}

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        """Weighted mean loss of a batch."""
        self.dropout_seeds[:] = batch["seed"].tolist()
        adapter = self._in_turn()
        losses = self._batch_losses(batch, adapter)
        loss = propagate_faults((batch["weight"] * losses).mean())
        self.last_losses[adapter] = loss.detach()
        for name, last in self.last_losses.items():
            key = "train/loss" if name == self.kind.name else f"train/{name}_loss"
            self.log(key, last, batch_size=len(batch["captions"]))
        if self.helpers and isinstance(self.trainer.strategy, DDPStrategy):  # which waits for a gradient of every one
            loss = sum((0.0 * parameter.sum() for parameter in self._resting_parameters()), loss)
        return loss

    def on_after_backward(self) -> None:
        """Leave those whose turn it is not without a gradient."""
        for parameter in self._resting_parameters():
            parameter.grad = None

    def _in_turn(self) -> str:
        return self.turn(self.trainer.global_step) if self.helpers else self.kind.name

    def _resting_parameters(self) -> list[nn.Parameter]:
        resting = [name for name in self.adapters if name != self._in_turn()]
        return [parameter for name in resting for parameter in self.trained_by(name)]

    def validation_step(self, batch: dict[str, Any], batch_index: int) -> None:
        """Mean loss over the held-out samples. Their seeds do not change, so neither do noise and timesteps."""
        self.val_loss.update(self._batch_losses(batch, self.kind.name), (batch["weight"] > 0).float())
        self.log("val/loss", self.val_loss, prog_bar=True, on_epoch=True)

    def known(self, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Further keywords of `losses`: what a batch knows already of what they would compute."""
        return {}

    def _batch_losses(self, batch: dict[str, Any], adapter: str) -> Tensor:
        if adapter == self.kind.name:
            return self.losses(*self._inputs(batch), **self.known(batch))
        return self.helper_losses(adapter, *self._inputs(batch))

    def _inputs(self, batch: Mapping[str, Any]) -> tuple[Tensor, Condition, SampleRandomness]:
        """Latents, conditions and random numbers of the samples of a batch."""
        randomness = SampleRandomness(batch["seed"], self.device)
        cached = "moments" in batch
        shape = batch["moments"].shape[2:] if cached else self.model.latent_shape(*batch["pixel_values"].shape[2:])
        latents = randomness.normal(shape)
        if self.reads_images and cached:
            mean, std = batch["moments"].float().unbind(dim=1)
            latents = self.model.sample_posterior(mean, std, latents)
        elif self.reads_images:
            latents = self.model.encode_images(batch["pixel_values"], latents)
        if cached:
            return latents, Condition.of_batch(batch).to(dtype=self.model.dtype), randomness
        condition = self.model.encode_text(batch["captions"]).with_sizes(batch.get("time_ids"))
        return latents, condition, randomness

    def optimizer_step(self, epoch: int, batch_index: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        """Step, and free the gradients at once: Lightning would keep them while the next step's activations pile up."""
        super().optimizer_step(epoch, batch_index, optimizer, optimizer_closure)
        optimizer.zero_grad()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Log the norm of the adapter's gradient, before clipping."""
        if (self.trainer.global_step + 1) % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            gradients = [p.grad for p in self.adapter_parameters() if p.grad is not None]
            if gradients:  # else the step is left out
                self.log("train/grad_norm", nn.utils.get_total_norm(gradients))

    def adapter_parameters(self) -> list[nn.Parameter]:
        """The trainable parameters."""
        return [parameter for name in self.adapters for parameter in self.trained_by(name)]

    def configure_optimizers(self) -> OptimizerLRSchedulerConfig:
        """The optimizer and its schedule, stepped once an optimizer step."""
        optimizer = self.make_optimizer(
            [{"params": self.trained_by(name), **self.optimizer_settings(name)} for name in self.adapters]
        )
        schedule = get_scheduler(
            self.lr_scheduler,
            optimizer,
            num_warmup_steps=self.warmup_steps,
            num_training_steps=int(self.trainer.estimated_stepping_batches),
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def on_train_start(self) -> None:
        """Let a resumed run's first step use the schedule of this run.

        A checkpoint holds the learning rate that the schedule of its own `max_steps` gave for the next step: 0 at the
        end of a cosine.
        """
        schedule = self.lr_schedulers()
        if isinstance(schedule, LambdaLR):
            factors = [factor(schedule.last_epoch) for factor in schedule.lr_lambdas]
            for group, base, factor in zip(schedule.optimizer.param_groups, schedule.base_lrs, factors, strict=True):
                group["lr"] = base * factor

    def configure_model(self) -> None:
        """Shard the UNet block by block over all ranks where the strategy is FSDP (Lightning's ModelParallelStrategy).

        In Lightning's own mesh the devices of a machine are for tensor parallelism, over which no gradient is averaged.
        """
        if self.device_mesh is None:
            return
        mesh, unet = init_device_mesh(self.device_mesh.device_type, (self.trainer.world_size,)), self.model.unet
        unet.to(memory_format=torch.contiguous_format)  # FSDP shards no channels_last weights
        for block in (*unet.down_blocks, unet.mid_block, *unet.up_blocks):
            fully_shard(block, mesh=mesh)
        fully_shard(unet, mesh=mesh)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what training changes only: the frozen weights are read from where they came."""
        checkpoint["last_losses"] = dict(self.last_losses)
        kept = self._kept_names()
        checkpoint["state_dict"] = {k: v for k, v in checkpoint["state_dict"].items() if k in kept}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of something else. Raises `UserError`."""
        self.last_losses = dict(checkpoint.get("last_losses", {}))  # an older one has none
        if "state_dict" not in checkpoint:  # ModelParallelStrategy has loaded it, and complained, before
            return
        kept = self._kept_names()
        expected = {name: tuple(p.shape) for name, p in self.named_parameters() if name in kept}
        found = {name: tuple(tensor.shape) for name, tensor in checkpoint["state_dict"].items()}
        if expected != found:
            odd = sorted(set(expected.items()) ^ set(found.items()))[0]
            raise UserError(
                f"resume: the checkpoint's weights differ from this run's, first at {odd[0]} {list(odd[1])}; resume "
                "with the model and method settings it was trained with (config.yaml in its run folder)"
            )

    def _kept_names(self) -> set[str]:
        """Of the parameters that a checkpoint holds."""
        return {name for name, parameter in self.named_parameters() if parameter.requires_grad}


class AdapterTraining(Training):
    """Train LoRAs in a frozen model's UNet: the adapter that `kind` says, and those called `helpers`.

    Args:
        lora: shape of the adapters.
        **training: see `Training`.
    """

    def __init__(self, model: LatentDiffusionModel, *, lora: LoraSettings, **training: Any) -> None:
        super().__init__(model, **training)
        fused = model.fused and fit_installed_versions()
        if fused:
            # Imported here: other versions may have no such blocks to import.
            from lcm_lightning.models.activations import keep_fewer_activations

            keep_fewer_activations(model.unet)
        for name in self.adapters:
            add_lora(model.unet, name, lora, fused=fused, seeds=self.dropout_seeds)
        set_active_adapters(model.unet, [self.kind.name])
        for name in self.adapters:
            for parameter in lora_parameters(model.unet, name):
                parameter.requires_grad_()  # of those that do not act too
        model.unet.train()  # with what is new in it

    def trained_by(self, adapter: str) -> list[nn.Parameter]:
        """Its own."""
        return lora_parameters(self.model.unet, adapter)

    def student(self, condition: Condition) -> Denoiser:
        """The network with what `kind` trains, given the condition."""
        return lambda x_t, timesteps: self.model.denoise(x_t, timesteps, condition)
