"""How often 95 % intervals hold what they are about: ``python benchmarks/coverage.py --images 300 --dimension 256``."""

from __future__ import annotations

import argparse

import numpy as np

from lcm_lightning.evaluation.frechet import FrechetDistance, frechet_infinity
from lcm_lightning.evaluation.kernel_distances import Cmmd, kid
from lcm_lightning.evaluation.manifold import Manifold
from lcm_lightning.evaluation.measurement import CORRECTED
from lcm_lightning.evaluation.metrics import Estimate, Resampling, difference, estimate, mean_draws


def main() -> None:
    """Draw images and photos anew in each trial; print mean, its spread, the standard error's mean and coverage.

    Model a draws Gaussian features like the photos', moved by `shift` and stretched by `scale`; model b's are moved by
    half as much. Images of a photo's captions, by either model, share half of their variance.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--images", type=int, default=200, help="of a model, and photos")
    parser.add_argument("--captions", type=int, default=1, help="images of each photo")
    parser.add_argument("--dimension", type=int, default=4)
    parser.add_argument(
        "--decay", type=float, default=0.0, help="standard deviations fall like 1, ..., D to this power"
    )
    parser.add_argument("--shift", type=float, default=0.5)
    parser.add_argument("--scale", type=float, default=1.0)
    parser.add_argument("--trials", type=int, default=300)
    parser.add_argument("--samples", type=int, default=60, help="ways to halve")
    arguments = parser.parse_args()
    found: dict[str, list[Estimate]] = {}
    for trial in range(arguments.trials):
        for name, value in one_trial(arguments, trial).items():
            found.setdefault(name, []).append(value)
    print(f"{'':24}{'mean':>10}{'SD':>10}{'SE':>10}{'covered':>10}")
    for name, estimates in found.items():
        values = np.array([e.value for e in estimates])
        covered = np.mean([e.low <= values.mean() <= e.high for e in estimates])
        error = np.mean([e.standard_error for e in estimates])
        print(f"{name:24}{values.mean():10.4f}{values.std(ddof=1):10.4f}{error:10.4f}{100 * covered:8.0f} %")


def one_trial(arguments: argparse.Namespace, seed: int) -> dict[str, Estimate]:
    """Estimates of model a, and differences a minus b."""
    rng, n, d = np.random.default_rng(seed), arguments.images, arguments.dimension
    spread = np.arange(1, d + 1) ** -arguments.decay
    photos = np.repeat(np.arange(n // arguments.captions), arguments.captions)
    number = photos[-1] + 1
    real = rng.normal(size=(number, d)) * spread
    shared = rng.normal(size=(number, d))[photos]
    resampling = Resampling.of(photos, number, arguments.samples, seed)

    def model(shift: float, scale: float) -> dict[str, np.ndarray]:
        own = (shared + rng.normal(size=(len(photos), d))) / np.sqrt(2)
        return draws_of((own * scale + shift) * spread, real, resampling)

    a, b = model(arguments.shift, arguments.scale), model(arguments.shift / 2, 1.0)
    return {name: estimate(a[name], len(photos), corrected=name in CORRECTED) for name in a} | {
        f"{name}, difference": difference(a[name], b[name], len(photos), corrected=name in CORRECTED) for name in a
    }


def draws_of(x: np.ndarray, real: np.ndarray, resampling: Resampling) -> dict[str, np.ndarray]:
    """Draws of every metric by its name."""
    found = {
        "fid": FrechetDistance(x, real).draws(resampling.generated, resampling.real),
        "kid": kid(real, resampling).draws(x),
        "cmmd": Cmmd(real, resampling).draws(x),
        "mean": mean_draws(x[:, 0], resampling.generated),
        **Manifold(real, resampling).draws(x),
    }
    infinity = frechet_infinity(found["fid"], resampling, real.shape[1])
    return found if infinity is None else found | {"fid_infinity": infinity}


if __name__ == "__main__":
    main()
