"""The adversarial losses of few-step students (Goodfellow et al. 2014, arXiv 1406.2661; in DMD2, Yin et al. 2024).

Logits [B, P] are of P parts of each picture, above 0 for real.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def discriminator_losses(real: Tensor, drawn: Tensor) -> Tensor:
    """``mean(softplus(-real)) + mean(softplus(drawn))`` of logits, [B]: -log of being right about both."""
    return F.softplus(-real).mean(1) + F.softplus(drawn).mean(1)


def generator_losses(drawn: Tensor) -> Tensor:
    """``mean(softplus(-drawn))`` of logits, [B]: -log of being taken for real (non-saturating)."""
    return F.softplus(-drawn).mean(1)


def adversarial_direction(logits: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Gradient of the generator's loss in the pictures `x` [B, ...], times the number of elements of one; float32.

    So scaled, it adds to the direction ``g`` of a loss ``mean(1/2 (x - sg(x - g))^2)`` as that loss does to this one.

    The backward pass is that of the sum over logits, and float32 is divided by their number. No loss scaler guards it,
    and the mean's gradient, of some thousand logits, is partly below what float16 tells from 0.
    """
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        drawn = logits(x)
        number = drawn.shape[1]
        (gradient,) = torch.autograd.grad(number * generator_losses(drawn).sum(), x)
    return gradient.float() * (x[0].numel() / number)
