"""Gradient checkpointing (Chen et al. 2016, arXiv 1604.06174) of a network whose adapters are switched every pass."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.utils.checkpoint import checkpoint

Switch: TypeAlias = tuple[LoraLayer, str | list[str], bool]


def adapter_switches(module: nn.Module) -> list[Switch]:
    """Each layer of `module` that carries adapters, with those it has active and whether they are off."""
    layers = (layer for layer in module.modules() if isinstance(layer, LoraLayer))
    return [(layer, layer._active_adapter, layer._disable_adapters) for layer in layers]


def set_adapter_switches(switches: Sequence[Switch]) -> None:
    """Let the adapters act that acted when `adapter_switches` was asked."""
    for layer, active, disabled in switches:
        layer._active_adapter, layer._disable_adapters = active, disabled


def checkpointed(block: nn.Module, *inputs: Any) -> Any:
    """``block(*inputs)``, of which the inputs only are kept, and the rest is computed anew in the backward pass.

    With the adapters that act now, that is: when someone goes backward through a pass of the critic or the teacher, it
    is over, and the student's adapter acts again.
    """
    if torch.compiler.is_compiling():  # the graph holds the adapters it was traced with
        return checkpoint(block, *inputs, use_reentrant=False)
    acting = adapter_switches(block)

    def output(*inputs: Any) -> Any:
        before = adapter_switches(block)
        set_adapter_switches(acting)
        try:
            return block(*inputs)
        finally:
            set_adapter_switches(before)

    return checkpoint(output, *inputs, use_reentrant=False)
