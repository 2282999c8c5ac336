"""Blocks of diffusers' UNet that keep less for the backward pass, and take fewer passes over memory."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.activations import GEGLU
from diffusers.models.attention import FeedForward
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from lcm_lightning.models.lora_layers import Pullback, applied_to, is_called_plainly, trains


class Gate:
    """``a gelu(g)`` of [..., 2 D], the halves of which are a and g."""

    weights: tuple[Tensor | None, ...] = ()

    def __call__(self, z: Tensor) -> Tensor:
        """[..., D]."""
        value, gate = z.chunk(2, dim=-1)
        return value * F.gelu(gate)

    def with_pullback(self, z: Tensor, *weights: Tensor | None) -> tuple[Tensor, Pullback]:
        """See `Inner`."""
        value, gate = z.chunk(2, dim=-1)
        activated = F.gelu(gate)

        def pullback(grad: Tensor) -> Tensor:
            return torch.cat([grad * activated, torch.ops.aten.gelu_backward(grad * value, gate)], dim=-1)

        return value * activated, pullback


class SiluOfNorm:
    """``silu(norm(z))`` of [B, C, h, w], for a frozen group norm."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        self.norm = norm
        self.weights: tuple[Tensor | None, ...] = (norm.weight, norm.bias)

    def __call__(self, z: Tensor) -> Tensor:
        """[B, C, h, w]."""
        return F.silu(self.norm(z))

    def with_pullback(self, z: Tensor, *weights: Tensor | None) -> tuple[Tensor, Pullback]:
        """See `Inner`; by the kernels that autograd uses, which are given what it gives them."""
        nhwc = z.device.type == "cpu" and z.is_contiguous(memory_format=torch.channels_last)
        layout = torch.channels_last if nhwc else torch.contiguous_format
        z = z.contiguous(memory_format=layout)
        (batch, channels, *sides), groups = z.shape, self.norm.num_groups
        sizes = (batch, channels, math.prod(sides), groups)
        # Autocast to float32 widens the weights with the input.
        wide = z.dtype == torch.float32
        weight, bias = (p.float() if p is not None and wide else p for p in weights)
        normed, mean, rstd = torch.native_group_norm(z, weight, bias, *sizes, self.norm.eps)

        def pullback(grad: Tensor) -> Tensor:
            grad = torch.ops.aten.silu_backward(grad, normed).contiguous(memory_format=layout)
            wanted = [True, False, False]
            return torch.ops.aten.native_group_norm_backward(grad, z, mean, rstd, weight, *sizes, wanted)[0]

        return F.silu(normed), pullback


class SparingFeedForward(FeedForward):
    """diffusers' FeedForward, ``W2 (a gelu(g)) + b2`` with ``[a, g] = W1 x + b1`` (Shazeer 2020, arXiv 2002.05202),
    which keeps only ``[a, g]``.

    What is elementwise costs next to nothing to compute anew, and both ``gelu(g)`` and its product with ``a`` are as
    large as the block's widest layer: for Stable Diffusion v1-5 at 512 px they are 92 MB an image each.
    """

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[..., in] to [..., out]."""
        gated, dropout, *rest = self.net
        plain = is_called_plainly(gated) and is_called_plainly(dropout) and not _drops(dropout)
        if type(gated) is not GEGLU or len(rest) != 1 or not plain:
            return super().forward(hidden_states, *args, **kwargs)
        return applied_to(rest[0], Gate(), gated.proj(hidden_states))


class SparingResnetBlock2D(ResnetBlock2D):
    """diffusers' ResnetBlock2D, which keeps only the inputs of its two norms where its convolutions have an adapter.

    What these are given, ``silu(norm(x))``, is computed anew: neither that nor ``norm(x)`` is kept, 64 MB an image each
    for Stable Diffusion v1-5 at 512 px. In training diffusers also copies the input of the shortcut, 32 MB,
    from NHWC into NCHW, and divides the sum by 1; neither is done here.
    """

    def forward(self, input_tensor: Tensor, temb: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[B, in, h, w] and, of the timestep, [B, D] to [B, out, h, w]."""
        if not self._is_plain():
            return super().forward(input_tensor, temb, *args, **kwargs)
        hidden = applied_to(self.conv1, SiluOfNorm(self.norm1), input_tensor)
        if self.time_emb_proj is not None:
            temb = self.time_emb_proj(temb if self.skip_time_act else self.nonlinearity(temb))[:, :, None, None]
        if temb is not None:
            hidden = hidden + temb
        hidden = applied_to(self.conv2, SiluOfNorm(self.norm2), hidden)
        shortcut = input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
        total = shortcut + hidden
        return total if self.output_scale_factor == 1 else total / self.output_scale_factor

    def _is_plain(self) -> bool:
        resampled = self.upsample is not None or self.downsample is not None
        known = type(self.nonlinearity) is nn.SiLU and all(type(n) is nn.GroupNorm for n in (self.norm1, self.norm2))
        if self.time_embedding_norm != "default" or resampled or not known or _drops(self.dropout):
            return False
        between = (self.norm1, self.norm2, self.nonlinearity, self.dropout)
        return all(is_called_plainly(part) and not trains(part) for part in between)


def _drops(dropout: nn.Dropout) -> bool:
    return dropout.training and dropout.p > 0


SPARING: dict[type[nn.Module], type[nn.Module]] = {FeedForward: SparingFeedForward, ResnetBlock2D: SparingResnetBlock2D}


def keep_fewer_activations(module: nn.Module) -> None:
    """Let every block within `module` for which there is a sparing one compute as that does, with its weights."""
    for child in module.modules():
        if type(child) in SPARING:
            child.__class__ = SPARING[type(child)]
