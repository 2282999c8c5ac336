"""Aspect-ratio buckets: shapes of training images near those of the photos, so that crops cut little of them away.

After NovelAI (2022, "NovelAI improvements on Stable Diffusion"): sides are multiples of what the network takes, and the
area is at most that of the square, so that a batch of any shape costs no more than one of squares.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from lcm_lightning.errors import UserError

Size = tuple[int, int]
"""Width and height."""

WIDEST = 2  # width to height, and height to width, of the most elongated bucket


def bucket_sizes(resolution: int, step: int) -> tuple[Size, ...]:
    """Sizes of the buckets for squares of `resolution` px, the square itself among them; narrow ones first.

    For each width the greatest height with ``width * height <= resolution^2`` and an aspect between 1:2 and 2:1, and
    these turned by 90 degrees; of the same aspect the largest. All of them are multiples of `step`.

    Raises:
        UserError: `step` does not divide `resolution`.
    """
    if step < 1 or resolution % step:
        raise UserError(
            f"data.bucket_step={step}: expected a divisor of data.resolution={resolution}; null takes the model's own"
        )
    portraits = {}
    for width in range(step, resolution + 1, step):
        height = min(resolution**2 // width, WIDEST * width) // step * step
        portraits[Fraction(width, height)] = (width, height)
    landscapes = {(height, width) for width, height in portraits.values()}
    return tuple(sorted({*portraits.values(), *landscapes}))


def kept_shares(sizes: np.ndarray, buckets: Sequence[Size]) -> np.ndarray:
    """Share of each image's pixels that is left when it is resized to cover a bucket and cropped to it.

    With aspects a of the image and b of the bucket that is ``min(a / b, b / a)``.

    Args:
        sizes: widths and heights of N images, [N, 2], at least 1.
        buckets: K sizes.

    Returns:
        float64 [N, K] in (0, 1].
    """
    widths, heights = np.asarray(sizes, dtype=np.float64).reshape(-1, 2, 1).transpose(1, 0, 2)
    bucket_widths, bucket_heights = np.asarray(buckets, dtype=np.float64).T
    first, second = widths * bucket_heights, heights * bucket_widths
    return np.minimum(first, second) / np.maximum(first, second)


def nearest_buckets(sizes: np.ndarray, buckets: Sequence[Size]) -> np.ndarray:
    """Number of the bucket that keeps most of each image, of two the larger. Int64 [N]; see `kept_shares`."""
    by_area = sorted(range(len(buckets)), key=lambda bucket: -buckets[bucket][0] * buckets[bucket][1])
    return np.array(by_area)[kept_shares(sizes, [buckets[bucket] for bucket in by_area]).argmax(axis=1)]
