"""peft's LoRA layers with fewer passes over memory: what a frozen layer and one adapter need, and no more.

peft computes ``W x + s B (A x)`` (Hu et al. 2021, eq. 3) by casting ``x`` to the adapter's float32, letting autocast
cast it back, and scaling, adding and casting the result in passes of their own. Here the input stays what it is, so
that all layers that read it share one copy for the backward pass; ``s B`` is accumulated onto ``W x`` by the matrix
product itself, and so are the two parts of the gradient of ``x``. Weights are cast as autocast would, but once more in
the backward pass instead of being kept for it: at rank 64 the casts of Stable Diffusion's adapter are 135 MB. Where
``x`` is cheap to compute from what is kept anyway, it is not kept either (`applied_to`).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from typing import Any, Protocol, TypeAlias

import torch
import torch.nn.functional as F
from peft.tuners import lora
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

log = logging.getLogger(__name__)

Pullback: TypeAlias = Callable[[Tensor], Tensor]

# First and last (major, minor) with whose own layers those here and in `activations` were compared.
MADE_FOR = {"diffusers": ((0, 40), (0, 42)), "peft": ((0, 20), (0, 21))}


class Inner(Protocol):
    """A cheap function without randomness, and with `weights` that don't train."""

    weights: tuple[Tensor | None, ...]

    def __call__(self, z: Tensor) -> Tensor:
        """Its value."""

    def with_pullback(self, z: Tensor, *weights: Tensor | None) -> tuple[Tensor, Pullback]:
        """Its value with the weights it had, and what makes the gradient of `z` of that of the value.

        Autocast is off.
        """


def fit_installed_versions() -> bool:
    """Whether the layers here stand in for those of the diffusers and peft that are installed; a warning if not."""
    found = {name: version(name) for name in MADE_FOR}
    new = [
        f"{name} {found[name]}"
        for name, (first, last) in MADE_FOR.items()
        if not first <= tuple(map(int, re.findall(r"\d+", found[name])[:2])) <= last
    ]
    if new:
        ranges = (f"{name} {a}.{b} to {c}.{d}" for name, ((a, b), (c, d)) in MADE_FOR.items())
        log.warning(
            "%s: peft's and diffusers' own layers train, slower and with more memory; the faster ones were made for %s",
            " and ".join(new),
            " and ".join(ranges),
        )
    return not new


def applied_to(layer: nn.Module, inner: Inner, z: Tensor) -> Tensor:
    """``layer(inner(z))``, for which the backward pass computes ``inner(z)`` anew from `z` instead of keeping it."""
    fused = isinstance(layer, (LoraLinear, LoraConv2d)) and is_called_plainly(layer)
    if fused and not torch.compiler.is_compiling():
        return layer(z, inner=inner)
    return layer(_anew(inner, z))


def _anew(inner: Inner | None, z: Tensor) -> Tensor:
    """``inner(z)``, of which the backward pass keeps `z` only, if the layer behind does not keep the result."""
    if inner is None:
        return z
    if not torch.is_grad_enabled():
        return inner(z)
    return checkpoint(inner, z, use_reentrant=False, preserve_rng_state=False)


def _single_adapter(layer: lora.LoraLayer, base_type: type[nn.Module]) -> str | None:
    """The adapter that acts alone and plainly on a frozen `base_type`, or None: peft's own forward knows what to do."""
    if layer.disable_adapters or layer.merged or layer.lora_variant:
        return None
    base = layer.base_layer
    if type(base) is not base_type or trains(base):
        return None
    present = [name for name in layer.active_adapters if name in layer.lora_A]
    if len(present) != 1 or not isinstance(layer.lora_dropout[present[0]], nn.Identity):
        return None
    down, up = layer.lora_A[present[0]], layer.lora_B[present[0]]
    if type(down) is not base_type or type(up) is not base_type or down.bias is not None or up.bias is not None:
        return None
    if not all(map(_is_its_weight, (base, down, up))):
        return None
    return present[0]


def _is_its_weight(module: nn.Module) -> bool:
    """Whether its plain weight says all of what calling `module` does."""
    return is_called_plainly(module) and type(module.weight) in (nn.Parameter, Tensor)


def trains(module: nn.Module) -> bool:
    """Whether any weight of `module` does."""
    return any(parameter.requires_grad for parameter in module.parameters())


def is_called_plainly(module: nn.Module) -> bool:
    """Whether no hook and no wrapper looks at, moves or casts what `module` is given."""
    hooks = module._forward_pre_hooks or module._forward_hooks or module._backward_pre_hooks or module._backward_hooks
    return not hooks and "forward" not in module.__dict__


def _computing_dtype(weight: Tensor) -> torch.dtype:
    """The type autocast gives matrix products, or where it is off, `weight`'s."""
    kind = weight.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if autocast else weight.dtype


def _without_autocast(device: torch.device) -> AbstractContextManager[object]:
    """Products of the types given: a backward pass may run where autocast is not as it was in the forward pass."""
    known = torch.amp.is_autocast_available(device.type)
    return torch.autocast(device.type, enabled=False) if known else nullcontext()


def _cast(dtype: torch.dtype, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(tensor.to(dtype) for tensor in tensors)


def _input(ctx: Any, z: Tensor, inner: Inner | None, dtype: torch.dtype) -> Tensor:
    """The input ``x`` of a layer, in `dtype`: `z` itself, or ``inner(z)``."""
    x = z if inner is None else inner(z)
    ctx.inner, ctx.inner_dtype, ctx.dtype = inner, x.dtype, dtype  # autocast may have changed the type of z
    return x.to(dtype)


def _same(grad: Tensor) -> Tensor:
    return grad


def _input_again(ctx: Any, z: Tensor, weights: Sequence[Tensor | None]) -> tuple[Tensor, Pullback]:
    """In the backward pass: ``x``, and what makes the gradient of `z` of that of ``x``."""
    if ctx.inner is None:
        return z, _same
    x, pullback = ctx.inner.with_pullback(z.to(ctx.inner_dtype), *weights)
    return x.to(ctx.dtype), lambda grad_x: pullback(grad_x.to(ctx.inner_dtype)).to(z.dtype)


class _LinearWithUpdate(torch.autograd.Function):
    """``W x + b + s B A x`` for rows x [N, in], W [out, in], b [out] or None, A [r, in] and B [out, r].

    x is z [N, in], or ``inner(z)``, which is not kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        inner: Inner | None,
        dtype: torch.dtype,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        scaling: float,
    ) -> Tensor:
        x = _input(ctx, z, inner, dtype)
        cast_weight, cast_down, cast_up = _cast(dtype, weight, down, up)
        cast_bias = None if bias is None else bias.to(dtype)
        hidden = F.linear(x, cast_down)
        ctx.save_for_backward(z, weight, down, up, hidden, *(inner.weights if inner else ()))
        ctx.scaling = scaling
        return F.linear(x, cast_weight, cast_bias).addmm_(hidden, cast_up.t(), alpha=scaling)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, weight, down, up, hidden, *inner_weights = ctx.saved_tensors
        grad_z = None
        with _without_autocast(grad.device):
            x, grad_of_z = _input_again(ctx, z, inner_weights)
            cast_weight, cast_down, cast_up = _cast(ctx.dtype, weight, down, up)
            grad_hidden = (grad @ cast_up).mul_(ctx.scaling)
            grad_up = (grad.t() @ hidden).to(up.dtype).mul_(ctx.scaling)
            grad_down = (grad_hidden.t() @ x).to(down.dtype)
            if ctx.needs_input_grad[0]:
                grad_z = grad_of_z((grad @ cast_weight).addmm_(grad_hidden, cast_down))
        return grad_z, None, None, None, None, grad_down, grad_up, None


class LoraLinear(lora.Linear):
    """`peft`'s Linear with the fused sum where one adapter without dropout acts."""

    base_layer: nn.Linear

    def forward(self, x: Tensor, *args: Any, inner: Inner | None = None, **kwargs: Any) -> Tensor:
        """``W x + b + s B A x``, shape [..., out], in autocast's type or the base layer's; of ``inner(x)`` if given."""
        name = _single_adapter(self, nn.Linear)
        if name is None or args or kwargs or x.dim() < 2:
            return super().forward(_anew(inner, x), *args, **kwargs)
        weight, bias = self.base_layer.weight, self.base_layer.bias
        dtype = _computing_dtype(weight)
        rows = x.flatten(0, -2)
        down, up = (side[name].weight for side in (self.lora_A, self.lora_B))
        result = _LinearWithUpdate.apply(
            rows if inner else rows.to(dtype), inner, dtype, weight, bias, down, up, self.scaling[name]
        )
        return result.unflatten(0, x.shape[:-1])


def _pixels(images: Tensor) -> Tensor:
    """[B, C, h, w] as [B h w, C], without a copy where `images` are NHWC in memory."""
    return images.permute(0, 2, 3, 1).flatten(0, 2)


def _images(pixels: Tensor, like: Tensor) -> Tensor:
    """[B h w, C] as [B, C, h, w], NHWC in memory, B, h and w those of `like`."""
    return pixels.unflatten(0, (like.shape[0], *like.shape[2:])).permute(0, 3, 1, 2)


class _Conv2dWithUpdate(torch.autograd.Function):
    """``W * x + b + s B * A * x`` for x [B, in, h, w], W and A of one kernel and stride, B [out, r, 1, 1].

    x is z, or ``inner(z)``, which is not kept. In NHWC a 1 x 1 convolution is a matrix product over the pixels.
    """

    @staticmethod
    def forward(
        ctx: Any,
        z: Tensor,
        inner: Inner | None,
        dtype: torch.dtype,
        weight: Tensor,
        bias: Tensor | None,
        down: Tensor,
        up: Tensor,
        scaling: float,
        stride: tuple[int, int],
        padding: tuple[int, int],
    ) -> Tensor:
        x = _input(ctx, z, inner, dtype)
        cast_weight, cast_down, cast_up = _cast(dtype, weight, down, up)
        cast_bias = None if bias is None else bias.to(dtype)
        result = F.conv2d(x, cast_weight, cast_bias, stride, padding)
        hidden = F.conv2d(x, cast_down, None, stride, padding)
        ctx.save_for_backward(z, weight, down, up, hidden, *(inner.weights if inner else ()))
        ctx.scaling, ctx.stride, ctx.padding = scaling, stride, padding
        if not result.is_contiguous(memory_format=torch.channels_last):
            return result.add_(F.conv2d(hidden, cast_up), alpha=scaling)
        pixels = result.permute(0, 2, 3, 1).view(-1, result.shape[1])
        pixels.addmm_(_pixels(hidden), cast_up.flatten(1).t(), alpha=scaling)
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, weight, down, up, hidden, *inner_weights = ctx.saved_tensors
        with _without_autocast(grad.device):
            x, grad_of_z = _input_again(ctx, z, inner_weights)
            cast_weight, cast_down, cast_up = _cast(ctx.dtype, weight, down, up)
            pixels = _pixels(grad)
            grad_hidden = _images((pixels @ cast_up.flatten(1)).mul_(ctx.scaling), grad)
            grad_up = (pixels.t() @ _pixels(hidden)).to(up.dtype).mul_(ctx.scaling).reshape(up.shape)

            def convolution_backward(of_output: Tensor, kernel: Tensor, wanted: list[bool]) -> list[Any]:
                return torch.ops.aten.convolution_backward(
                    of_output, x, kernel, None, ctx.stride, ctx.padding, [1, 1], False, [0, 0], 1, [*wanted, False]
                )

            of_z = ctx.needs_input_grad[0]
            grad_z, grad_down, _ = convolution_backward(grad_hidden, cast_down, [of_z, True])
            if of_z:
                grad_z = grad_of_z(grad_z.add_(convolution_backward(grad, cast_weight, [True, False])[0]))
        return grad_z, None, None, None, None, grad_down.to(down.dtype), grad_up, None, None, None


def _is_plain(conv: nn.Conv2d) -> bool:
    padded_with_zeros = conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
    return padded_with_zeros and conv.groups == 1 and conv.dilation == (1, 1)


class LoraConv2d(lora.Conv2d):
    """`peft`'s Conv2d with the fused sum where one adapter without dropout acts."""

    base_layer: nn.Conv2d

    def forward(self, x: Tensor, *args: Any, inner: Inner | None = None, **kwargs: Any) -> Tensor:
        """``W * x + b + s B * A * x`` (convolutions, B of 1 x 1), shape [B, out, h, w], else as `LoraLinear`."""
        name, base = _single_adapter(self, nn.Conv2d), self.base_layer
        if name is None or args or kwargs or x.dim() != 4 or not _is_plain(base):
            return super().forward(_anew(inner, x), *args, **kwargs)
        dtype = _computing_dtype(base.weight)
        x = x if inner else x.to(dtype)
        down, up = (side[name].weight for side in (self.lora_A, self.lora_B))
        settings = (self.scaling[name], base.stride, base.padding)
        return _Conv2dWithUpdate.apply(x, inner, dtype, base.weight, base.bias, down, up, *settings)


FUSED_LAYERS: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: LoraLinear, nn.Conv2d: LoraConv2d}
