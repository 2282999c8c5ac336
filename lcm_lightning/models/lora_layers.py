"""peft's LoRA layers with fewer passes over memory: what a frozen layer and one adapter need, and no more.

peft computes ``W x + s B (A x)`` (Hu et al. 2021, eq. 3) by casting ``x`` to the adapter's float32, letting autocast
cast it back, and scaling, adding and casting the result in passes of their own. Here the input stays what it is, so
that all layers that read it share one copy for the backward pass, and ``s B`` is accumulated onto ``W x`` by the matrix
product itself. Weights are cast as autocast would.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners import lora
from torch import Tensor, nn


def _single_adapter(layer: lora.LoraLayer) -> str | None:
    """The adapter that acts alone and plainly in `layer`, or None: peft's own forward then knows what to do."""
    if layer.disable_adapters or layer.merged or layer.lora_variant:
        return None
    present = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(present) != 1 or not isinstance(layer.lora_dropout[present[0]], nn.Identity):
        return None
    return present[0]


class LoraLinear(lora.Linear):
    """`peft`'s Linear with the fused sum where one adapter without dropout acts."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``W x + b + s B A x``, shape [..., out], in the base layer's type."""
        name = _single_adapter(self)
        if name is None or args or kwargs:
            return super().forward(x, *args, **kwargs)
        rows = x.flatten(0, -2)
        result = self.base_layer(rows)
        down, up = (side[name].weight.to(result.dtype) for side in (self.lora_A, self.lora_B))
        # A frozen layer needs nothing of its output for the backward pass, so the sum may take its place.
        result = result.addmm_(F.linear(rows.to(result.dtype), down), up.t(), alpha=self.scaling[name])
        return result.unflatten(0, x.shape[:-1])


class LoraConv2d(lora.Conv2d):
    """`peft`'s Conv2d with the fused sum where one adapter without dropout acts."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``W * x + b + s B * A * x`` (convolutions, B of 1 x 1), shape [B, out, h, w], in the base layer's type."""
        name = _single_adapter(self)
        if name is None or args or kwargs:
            return super().forward(x, *args, **kwargs)
        result = self.base_layer(x)
        down, up = (side[name].weight.to(result.dtype) for side in (self.lora_A, self.lora_B))
        hidden = self.lora_A[name]._conv_forward(x.to(result.dtype), down, None)
        if not result.is_contiguous(memory_format=torch.channels_last):
            return torch.add(result, F.conv2d(hidden, up), alpha=self.scaling[name])
        # In NHWC a 1 x 1 convolution is a matrix product over the pixels.
        pixels = torch.addmm(
            result.permute(0, 2, 3, 1).flatten(0, 2),
            hidden.permute(0, 2, 3, 1).flatten(0, 2),
            up.flatten(1).t(),
            alpha=self.scaling[name],
        )
        return pixels.unflatten(0, (result.shape[0], *result.shape[2:])).permute(0, 3, 1, 2)


FUSED_LAYERS: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: LoraLinear, nn.Conv2d: LoraConv2d}
