"""Models to compare, and what identifies them."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

    from lcm_lightning.models.kinds import AdapterKind
    from lcm_lightning.models.stable_diffusion import StableDiffusion


@dataclass(frozen=True)
class LoadedModel:
    """A model with loaded adapters.

    Attributes:
        model: on the CPU, in evaluation mode.
        adapters: their kinds in training order.
        weights: what the changes of each LoRA are multiplied by, by its name; 1 of those not named.
    """

    model: StableDiffusion
    adapters: tuple[AdapterKind, ...]
    weights: Mapping[str, float] = field(default_factory=dict)

    @property
    def taught(self) -> bool:
        """Whether the model without its adapters is a teacher; not where it is what a teacher became: a full LCM."""
        from lcm_lightning.models.adapters import active_adapters  # late, as all that imports diffusers

        with active_adapters(self.model, ()):
            return self.model.guidance_dimension is None

    def identities(self) -> dict[str, str]:
        """Hex digest of the weights without adapters (under the empty name) and of each adapter by name."""
        from lcm_lightning.models.identity import adapter_digest, model_digest  # late too

        names = [kind.name for kind in self.adapters]
        return {"": model_digest(self.model)} | {name: adapter_digest(self.model, name) for name in names}


@dataclass(frozen=True)
class DataChoice:
    """A data set as a configuration names it.

    Attributes:
        name, source, resolution, cache_dir: see `lcm_lightning.data.datamodule.CaptionedImages`.
    """

    name: str
    source: str | None
    resolution: int | None
    cache_dir: str | None = None


@dataclass(frozen=True)
class ModelSource:
    """Where a model comes from; nothing is loaded before `load`.

    Attributes:
        name: short, unique in an evaluation.
        spec: what the user wrote.
        load: reads model and adapters.
        data: of the run it comes from; None for a model without a run.
    """

    name: str
    spec: str
    load: Callable[[], LoadedModel]
    data: DataChoice | None = None


class ModelLoader:
    """Loads models onto a device, one at a time; the last one stays until another is asked for."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._loaded: tuple[ModelSource, LoadedModel] | None = None

    def load(self, source: ModelSource) -> LoadedModel:
        """The model on the device; the one that lay there is dropped before another is read."""
        if self._loaded is None or self._loaded[0] is not source:
            self._loaded = None
            gc.collect()
            self._loaded = source, source.load()
            self._loaded[1].model.to(self.device)
        return self._loaded[1]
