"""Gradient checkpointing (Chen et al. 2016, arXiv 1604.06174) of a network whose adapters come and go within a step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import nn
from torch.utils.checkpoint import checkpoint

AdapterState = tuple[LoraLayer, Any, bool]
"""A layer, the adapters that act in it, and whether none does."""


def checkpointed(module: nn.Module, *arguments: Any) -> Any:
    """What `module` makes of `arguments`; its activations are not kept but computed anew in the backward pass.

    By then others may act than the adapters that do now: a distillation's teacher, critic and discriminator share the
    student's network. They are put back for as long as it computes.
    """
    if torch.compiler.is_compiling():  # what is computed anew is compiled with the adapters of now
        return checkpoint(module.__call__, *arguments, use_reentrant=False)
    states = adapter_states(module)
    return checkpoint(
        module.__call__, *arguments, use_reentrant=False, context_fn=lambda: (nullcontext(), acting(states))
    )


def adapter_states(module: nn.Module) -> list[AdapterState]:
    """Of all layers of `module` that carry adapters."""
    layers = (layer for layer in module.modules() if isinstance(layer, LoraLayer))
    return [(layer, layer._active_adapter, layer._disable_adapters) for layer in layers]


def set_adapter_states(states: Sequence[AdapterState]) -> None:
    """Let the adapters act that acted when these were taken."""
    for layer, active, disabled in states:
        layer._active_adapter, layer._disable_adapters = active, disabled


@contextmanager
def acting(states: Sequence[AdapterState]) -> Iterator[None]:
    """The same for the duration of a block."""
    before = [(layer, layer._active_adapter, layer._disable_adapters) for layer, _, _ in states]
    set_adapter_states(states)
    try:
        yield
    finally:
        set_adapter_states(before)
