"""LightningModules: thin wrappers of the mathematics, the model and its adapters."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lcm_lightning.models.kinds import AdapterKind


def adapter_kinds() -> dict[str, AdapterKind]:
    """The kind of adapter that each method trains, by name."""
    from lcm_lightning.models.kinds import AdapterKind  # late: it takes torch

    modules = [import_module(f"{__name__}.{module.name}") for module in iter_modules(__path__)]
    found = (getattr(value, "kind", None) for module in modules for value in vars(module).values())
    return {kind.name: kind for kind in found if isinstance(kind, AdapterKind)}
