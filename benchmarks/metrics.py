"""CPU seconds of the metrics and their intervals: ``python benchmarks/metrics.py --images 5000 --photos 1000``."""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable

import numpy as np

from lcm_lightning.evaluation.frechet import FrechetDistance
from lcm_lightning.evaluation.kernel_distances import kid
from lcm_lightning.evaluation.manifold import Manifold
from lcm_lightning.evaluation.metrics import Resampling


def main() -> None:
    """Time each metric on random features whose spectrum decays as a power law."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=5000)
    parser.add_argument("--photos", type=int, default=1000)
    parser.add_argument("--dimension", type=int, default=2048)
    parser.add_argument("--samples", type=int, default=100, help="bootstrap draws")
    parser.add_argument("--fid-samples", type=int, default=4, help="bootstrap draws of FID, which are all alike")
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    scale = np.arange(1, arguments.dimension + 1) ** -0.7

    def features(number: int) -> np.ndarray:
        return (rng.normal(size=(number, arguments.dimension)) * scale).astype(np.float32)

    generated, real = features(arguments.images), features(arguments.photos)
    photos = np.sort(np.arange(arguments.images) % arguments.photos)
    resampling, few = (
        Resampling.of(photos, arguments.photos, samples) for samples in (arguments.samples, arguments.fid_samples)
    )
    once = np.ones((1, arguments.images)), np.ones((1, arguments.photos))
    distance = FrechetDistance(generated, real)
    cpu_seconds("FID, first value", lambda: distance.draws(*once))
    rows = len(few.real)
    cpu_seconds(f"FID, {rows} draws", lambda: distance.draws(few.generated, few.real), rows)
    cpu_seconds(f"KID with {arguments.samples} draws", lambda: kid(real, resampling).draws(generated))
    cpu_seconds("neighbourhoods", lambda: Manifold(real, resampling).draws(generated))
    print(f"peak memory: {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")


def cpu_seconds(name: str, work: Callable[[], object], times: int = 1) -> None:
    """Print what `work` took, in all and each of its `times`."""
    started = time.process_time()
    work()
    elapsed = time.process_time() - started
    print(f"{name}: {elapsed:.2f} s" + (f", {elapsed / times:.2f} s each" if times > 1 else ""), flush=True)


if __name__ == "__main__":
    main()
