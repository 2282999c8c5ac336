"""Which steps `benchmarks.one_step` takes, and how near to the CPU's in float32 they have to be."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Method:
    """One to compare: its name under `method=`, what is set beside it, and how many optimisation steps it takes."""

    name: str
    overrides: tuple[str, ...] = ()
    steps: int = 1


METHODS = (
    Method("lora"),
    Method("lcm_lora"),
    Method("tcd_lora"),
    Method("pcm_lora"),
    Method("dmd2_lora", ("method.critic_steps=1",), steps=2),  # one of the critic, one of the generator
)
REFERENCE = "32-true"
PRECISIONS = ("bf16-mixed", "16-mixed", "32-true")


@dataclass(frozen=True)
class Bound:
    """What counts as the same step.

    Attributes:
        loss: largest ``|b - a| / |a|`` of the losses a of the CPU in float32 and b.
        cosine: smallest cosine of the angle between their gradients with respect to all adapter weights.
        norm: largest distance from 1 of the ratio of the gradients' norms.
    """

    loss: float
    cosine: float
    norm: float


BOUNDS = {
    "bf16-mixed": Bound(loss=0.05, cosine=0.95, norm=0.05),
    "16-mixed": Bound(loss=0.01, cosine=0.99, norm=0.01),
    "32-true": Bound(loss=0.01, cosine=0.99, norm=0.01),  # cuDNN convolves in TF32, which has float16's 11 bits
}


def verdict(row: Mapping[str, Any]) -> str:
    """ "agrees", or what of a comparison is out of the `BOUNDS` of its precision."""
    bound = BOUNDS[row["precision"]]
    if not row["finite"]:
        return "not finite"
    out = []
    if row["loss_difference"] > bound.loss:
        out.append(f"loss differs by {row['loss_difference']:.2g}, more than {bound.loss:g}")
    if row["gradient_cosine"] < bound.cosine:
        out.append(f"cosine of the gradients {row['gradient_cosine']:.4f}, less than {bound.cosine:g}")
    if abs(row["gradient_norm_ratio"] - 1) > bound.norm:
        out.append(f"gradient longer by {row['gradient_norm_ratio'] - 1:+.2g}, more than {bound.norm:g}")
    return "; ".join(out) or "agrees"
