"""Random numbers that belong to a sample, not to a process.

Every draw of a training step comes from a generator seeded by the sample it is for. So results do not change with the
number of processes or workers, the batch a sample lands in, or where a run was interrupted.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class SampleRandomness:
    """One CPU generator for each sample of a batch. Draws must be made in a fixed order.

    Args:
        seeds: int64 [B] on the CPU, each at least 0.
        device: where draws are put.
    """

    def __init__(self, seeds: Tensor, device: torch.device) -> None:
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds.tolist()]
        self.device = device

    def normal(self, shape: Sequence[int]) -> Tensor:
        """Standard normal float32 [B, *shape]."""
        return self._put([torch.randn(*shape, generator=generator) for generator in self.generators])

    def uniform(self, low: float = 0.0, high: float = 1.0) -> Tensor:
        """Uniform float32 [B] in [low, high)."""
        unit = self._put([torch.rand((), generator=generator) for generator in self.generators])
        return low + (high - low) * unit

    def integer(self, high: int, exponent: float = 1.0) -> Tensor:
        """``floor(high u^exponent)`` with uniform u: int64 [B] in [0, high), uniform where the exponent is 1."""
        if exponent != 1:
            return (high * self.uniform() ** exponent).long().clamp(max=high - 1)
        return self._put([torch.randint(high, (), generator=generator) for generator in self.generators])

    def _put(self, draws: list[Tensor]) -> Tensor:
        stacked = torch.stack(draws)
        if self.device.type == "cuda":
            stacked = stacked.pin_memory()
        return stacked.to(self.device, non_blocking=True)
