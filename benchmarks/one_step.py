"""Whether an optimisation step on this device, in each precision, is the step that the CPU takes in float32.

Both train the small pipeline of `benchmarks.inputs` through Lightning's Trainer on the same batch. Weights, adapters
and all random numbers of a step come from the CPU's generators, so that they are the same on both.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning as L
import torch
from torch import Tensor
from torch.optim import Optimizer

from benchmarks.agreement import METHODS, PRECISIONS, REFERENCE, Method, verdict
from benchmarks.child import composed
from benchmarks.inputs import SIZES, random_shards, saved_pipeline
from lcm_lightning.config.instantiate import build_module, instantiate_group
from lcm_lightning.methods.adapter_training import AdapterTraining

# Tried one after the other until no gradient overflows, as the loss scaler would over the steps of a run.
LOSS_SCALES = (2.0**16, 2.0**10, 2.0**4)


class Steps(L.Callback):
    """What the optimisation steps of a run did.

    Attributes:
        losses: of each step.
        gradients: of all adapter weights that moved in each step, unclipped and unscaled, flat float32 on the CPU.
        update: what all adapter weights have changed by in the end, flat.
        loss_scale: of the first step; 1 where the precision needs none.
    """

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.gradients: list[Tensor] = []
        self.update = torch.zeros(0)
        self.loss_scale = 1.0

    def on_train_start(self, trainer: L.Trainer, module: AdapterTraining) -> None:
        """Note the weights before."""
        self.update = -flat(module.adapter_parameters())

    def on_before_optimizer_step(self, trainer: L.Trainer, module: AdapterTraining, optimizer: Optimizer) -> None:
        """Note the gradients; Lightning has unscaled them."""
        self.gradients.append(flat([p.grad for p in module.adapter_parameters() if p.grad is not None]))

    def on_train_batch_end(self, trainer: L.Trainer, module: AdapterTraining, outputs: Any, *_: Any) -> None:
        """Note the loss."""
        self.losses.append(float(outputs["loss"]))

    def on_train_end(self, trainer: L.Trainer, module: AdapterTraining) -> None:
        """Compare with the weights before."""
        self.update = self.update + flat(module.adapter_parameters())

    @property
    def finite(self) -> bool:
        """Whether every loss, gradient and weight is a number."""
        numbers = [*self.gradients, self.update, torch.tensor(self.losses)]
        return bool(self.losses) and all(torch.isfinite(tensor).all().item() for tensor in numbers)


def flat(tensors: list[Tensor]) -> Tensor:
    """All numbers of `tensors` one after the other, float32 on the CPU."""
    return torch.cat([tensor.detach().float().cpu().flatten() for tensor in tensors])


def compare_methods(folder: Path) -> Iterator[dict[str, Any]]:
    """Rows of method and precision on this device against the CPU in float32, as they come; inputs go to `folder`."""
    size = SIZES["small"]
    pipeline = saved_pipeline(size.build, folder / "pipeline")
    shards = random_shards(folder / "shards", samples=32, side=size.resolution)
    places = (f"model.path={pipeline}", f"data.source={shards}", f"data.resolution={size.resolution}")
    device = "gpu" if torch.cuda.is_available() else "cpu"
    rows: list[dict[str, Any]] = []
    for method in METHODS:
        reference = take_steps(method, REFERENCE, "cpu", places)
        for precision in PRECISIONS:
            if precision == "16-mixed" and device == "cpu":  # for which Lightning takes bfloat16
                continue
            row: dict[str, Any] = {"method": method.name, "precision": precision}
            try:
                row |= compare(reference, first_finite(method, precision, device, places))
                row["verdict"] = verdict(row)
            except Exception as error:  # one that fails must not hide the others
                row["verdict"] = f"failed: {type(error).__name__}: {error}"
            rows.append(row)
            yield {"rows": rows}


def first_finite(method: Method, precision: str, device: str, places: tuple[str, ...]) -> Steps:
    """The steps at the largest of `LOSS_SCALES` at which they are finite; where there is no loss to scale, at 1."""
    for loss_scale in LOSS_SCALES:
        steps = take_steps(method, precision, device, places, loss_scale)
        if steps.finite or steps.loss_scale == 1:
            break
    return steps


def take_steps(
    method: Method, precision: str, device: str, places: tuple[str, ...], loss_scale: float = LOSS_SCALES[0]
) -> Steps:
    """Train for the steps of `method` on the trainer called `device`, one batch a step."""
    cfg = composed(
        [
            "data=shards",
            "data.buckets=false",
            *places,
            f"method={method.name}",
            *method.overrides,
            f"trainer={device}",
            f"trainer.precision={precision}",
            f"max_steps={method.steps}",
            "data.batch_size=4",
            "data.num_workers=0",
            "method.lora.rank=8",
            "method.warmup_steps=0",
        ]
    )
    L.seed_everything(cfg.seed, verbose=False)
    steps = Steps()
    quiet = {"enable_checkpointing": False, "enable_progress_bar": False}
    trainer = instantiate_group(cfg, "trainer", logger=False, callbacks=[steps], **quiet)
    scaler = getattr(trainer.precision_plugin, "scaler", None)
    if scaler is not None:
        scaler.load_state_dict({**scaler.state_dict(), "scale": loss_scale})
        steps.loss_scale = loss_scale
    module = build_module(cfg, trainer.precision)
    fill_zeros(module)
    trainer.fit(module, datamodule=instantiate_group(cfg, "data"))
    return steps


@torch.no_grad()
def fill_zeros(module: AdapterTraining) -> None:
    """Give the half of a fresh adapter that is 0, and behind which all gradients are 0, numbers of its own."""
    generator = torch.Generator().manual_seed(0)
    for parameter in module.adapter_parameters():
        if not parameter.any():
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))


def compare(reference: Steps, found: Steps) -> dict[str, Any]:
    """How far `found` is from `reference`, of several steps the worst; what is no number is None."""
    if len(reference.losses) != len(found.losses):
        raise ValueError(f"{len(found.losses)} steps instead of {len(reference.losses)}")
    pairs = list(zip(reference.gradients, found.gradients, strict=True))
    ratios = [float(b.norm() / a.norm()) for a, b in pairs]
    measured = {
        "loss_difference": max(abs(b - a) / abs(a) for a, b in zip(reference.losses, found.losses, strict=True)),
        "gradient_cosine": min(cosine(a, b) for a, b in pairs),
        "gradient_norm_ratio": max(ratios, key=lambda ratio: abs(ratio - 1)),
        "update_cosine": cosine(reference.update, found.update),
    }
    numbers = {name: value if math.isfinite(value) else None for name, value in measured.items()}
    return {"finite": found.finite and None not in numbers.values(), "loss_scale": found.loss_scale, **numbers}


def cosine(a: Tensor, b: Tensor) -> float:
    """Of the angle between two vectors."""
    return float(torch.nn.functional.cosine_similarity(a.double(), b.double(), dim=0))
