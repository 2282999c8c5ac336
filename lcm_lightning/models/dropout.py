"""Dropout that belongs to a sample, as all random numbers of training do."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor, nn


class SampleDropout(nn.Dropout):
    """Dropout (Srivastava et al. 2014) whose mask of a sample depends on that sample's seed and on the layer alone.

    So neither the batch, the number of processes nor an interruption changes it, and whenever the layer sees the sample
    again in a step the mask is the same: where checkpointing computes anew, and in the target pass of distillation.

    Args:
        p: probability of a zero, in [0, 1); what is left is divided by ``1 - p``.
        layer: number of the layer.
        seeds: of the B samples of the step, in a list that all layers share and whoever makes the step fills.
    """

    def __init__(self, p: float, layer: int, seeds: list[int]) -> None:
        super().__init__(p)
        self.layer = layer
        self.seeds = seeds

    def forward(self, x: Tensor) -> Tensor:
        """Of x [B, ...], or [k B, ...] with the samples k times over. Outside training x itself.

        Raises:
            RuntimeError: `seeds` are not those of the samples of `x`.
        """
        if not self.training:
            return x
        dropped = self._dropped(x)
        return x.masked_fill(dropped, 0) / (1 - self.p)

    @torch.compiler.disable  # traces no generator
    def _dropped(self, x: Tensor) -> Tensor:
        """bool, shape of `x`, whatever its memory format: what becomes 0."""
        if not self.seeds or len(x) % len(self.seeds):
            raise RuntimeError(f"dropout of {len(x)} samples with the seeds of {len(self.seeds)}")
        dropped = torch.empty(x.shape, dtype=torch.bool, device=x.device)
        generator = torch.Generator(x.device)  # made here: none can be copied or pickled with the module
        for row, sample in enumerate(dropped):
            seed = self.seeds[row % len(self.seeds)]
            sample.bernoulli_(self.p, generator=generator.manual_seed(mask_seed(seed, self.layer)))
        return dropped


def mask_seed(seed: int, layer: int) -> int:
    """63-bit hash, the same on every machine."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {layer}".encode(), digest_size=8).digest(), "big") >> 1
