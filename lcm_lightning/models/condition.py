"""What a network is told of the image it is to draw."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Condition:
    """Embeddings of captions and, where a network takes them, sizes and guidance.

    Each tensor's first dimension is the batch.

    Attributes:
        text: of each token [B, L, D].
        pooled: of a caption as a whole [B, P]; None where the model takes none.
        time_ids: of each image height and width before it was resized, top and left of its crop, height and width of
            that, in pixels [B, 6], float32 (Podell et al. 2023, arXiv 2307.01952, section 2.2). None where nothing is
            known of them; a model that is told them then takes what is drawn for a whole image.
        guidance_scale: w [B], float32, in LCM's form (`diffusion.solver.guide`), that a full LCM is told; None for
            networks that are not.
    """

    text: Tensor
    pooled: Tensor | None = None
    time_ids: Tensor | None = None
    guidance_scale: Tensor | None = None

    @classmethod
    def of_batch(cls, batch: Mapping[str, Any]) -> Condition:
        """The condition among the parts of a batch of cached embeddings."""
        return cls(**{field.name: batch[field.name] for field in fields(cls) if field.name in batch})

    @staticmethod
    def cat(conditions: Sequence[Condition]) -> Condition:
        """Several batches as one."""
        tensors = [condition.tensors() for condition in conditions]
        return Condition(**{name: torch.cat([parts[name] for parts in tensors]) for name in tensors[0]})

    def tensors(self) -> dict[str, Tensor]:
        """Those that are there, by name."""
        return {f.name: getattr(self, f.name) for f in fields(self) if getattr(self, f.name) is not None}

    def map(self, function: Callable[[Tensor], Tensor]) -> Condition:
        """`function` of each tensor."""
        return Condition(**{name: function(tensor) for name, tensor in self.tensors().items()})

    def to(self, device: torch.device | None = None, dtype: torch.dtype | None = None) -> Condition:
        """All tensors on a device, and the embeddings in a type: sizes and scales are numbers, which it would round."""
        types = {"text": dtype, "pooled": dtype}
        tensors = self.tensors().items()
        return Condition(**{name: tensor.to(device=device, dtype=types.get(name)) for name, tensor in tensors})

    def expand(self, batch_size: int) -> Condition:
        """One condition for each of `batch_size` samples, without a copy."""
        return self.map(lambda tensor: tensor.expand(batch_size, *tensor.shape[1:]))

    def with_caption(self, caption: Condition) -> Condition:
        """The same sizes under one caption, such as the empty one of guidance's unconditional branch."""
        return replace(caption.expand(len(self)), time_ids=self.time_ids)

    def with_sizes(self, time_ids: Tensor | None) -> Condition:
        """The same of images of other sizes."""
        return replace(self, time_ids=time_ids)

    def with_guidance(self, guidance_scale: Tensor) -> Condition:
        """The same, told `guidance_scale` [B] in LCM's form."""
        return replace(self, guidance_scale=guidance_scale)

    def __len__(self) -> int:
        return len(self.text)
