"""Drawing in the midst of training, shared out over the ranks, and what there is to draw."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor

from lcm_lightning.data.datamodule import CaptionedImages
from lcm_lightning.data.stream import ShardLoader
from lcm_lightning.methods.adapter_training import Training
from lcm_lightning.models.adapters import active_adapters
from lcm_lightning.models.sampling import SamplingSetup, sample


def sample_shared(
    module: Training,
    setup: SamplingSetup,
    prompts: Sequence[str],
    *,
    seed: int,
    resolution: int,
    batch_size: int,
    preview: bool = False,
) -> Tensor:
    """Images [N, 3, H, W] in [0, 1], float32 on the CPU, of `prompts` by `setup`, complete on every rank.

    Image i starts from the noise of ``seed + i``, whoever draws it. All ranks must call it.

    Args:
        batch_size, preview: see `sample`.
    """
    rank, ranks = module.trainer.global_rank, module.trainer.world_size
    # Padded to the same number on each rank: sharded weights are gathered by all ranks together.
    mine = [i % len(prompts) for i in range(rank, -(-len(prompts) // ranks) * ranks, ranks)]
    with active_adapters(module.model, setup.adapters):
        images = sample(
            module.model,
            [prompts[i] for i in mine],
            seeds=[seed + i for i in mine],
            steps=setup.steps,
            guidance_scale=setup.guidance_scale,
            sampler=setup.sampler,
            resolution=resolution,
            batch_size=batch_size,
            preview=preview,
        )
    if ranks == 1:
        return images
    gathered = cast(Tensor, module.all_gather(images.to(module.device)))
    return gathered.transpose(0, 1).flatten(0, 1)[: len(prompts)].cpu()


def held_out_captions(data: CaptionedImages, count: int) -> list[str]:
    """The captions of the first validation samples, at most `count`."""
    captions: list[str] = []
    for batch in cast(ShardLoader, data.val_dataloader()):
        captions += [c for c, weight in zip(batch["captions"], batch["weight"], strict=True) if weight > 0]
        if len(captions) >= count:
            break
    return captions[:count]
