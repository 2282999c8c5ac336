"""How much of the real images a model reaches and how real its images are: neighbourhoods in feature space."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from lcm_lightning.evaluation.metrics import Resampling

ROWS = 512  # of a distance matrix at a time: 123 MB where there are 30,000 images
PRECISION_NEIGHBOURS = 3
DENSITY_NEIGHBOURS = 5
CANDIDATES = 32  # neighbours kept: of so many, fewer than 5 are in a given half once in 100,000 times


class Manifold:
    """Precision and recall (Kynkäänniemi et al. 2019, arXiv 1904.06991, eq. 1-2, k = 3), density and coverage (Naeem
    et al. 2020, arXiv 2002.09797, eq. 3-4, k = 5).

    A set's manifold is the union of the balls around its vectors that reach to their k-th neighbour. Precision: share
    of generated images inside the real manifold. Recall: share of real ones inside the generated. Density: in how many
    real balls a generated image lies on average, over k; 1 is what real images would get. Coverage: share of real balls
    that hold a generated image. In a draw, which is a half of either side, balls reach to neighbours in that half.

    Args:
        real: features [M, D].
    """

    def __init__(self, real: np.ndarray, resampling: Resampling) -> None:
        self.real, self.resampling = np.asarray(real, dtype=np.float64), resampling
        self._real_balls = Balls.around(self.real)

    def draws(self, generated: np.ndarray) -> dict[str, np.ndarray]:
        """Draws [R] by name of the metric, NaN where a row counts too few images; without those that have too few
        images for their k in all."""
        x, counts = np.asarray(generated, dtype=np.float64), self.resampling
        balls = Balls.around(x)
        in_real, in_generated = self._inside(x, balls)
        found: dict[str, list[float]] = {}
        for of_x, of_real in zip(counts.generated > 0, counts.real > 0, strict=True):
            row: dict[str, float] = {}
            if min(len(x), len(self.real)) > PRECISION_NEIGHBOURS:
                radii = self._real_balls.radii(PRECISION_NEIGHBOURS, of_real)
                row["precision"] = in_real.share(of_x, of_real, radii)
                row["recall"] = in_generated.share(of_real, of_x, balls.radii(PRECISION_NEIGHBOURS, of_x))
            if len(self.real) > DENSITY_NEIGHBOURS:
                radii = self._real_balls.radii(DENSITY_NEIGHBOURS, of_real)
                row["density"] = in_real.mean_number(of_x, of_real, radii) / DENSITY_NEIGHBOURS
                row["coverage"] = in_real.share_filled(of_x, of_real, radii)
            for name, value in row.items():
                found.setdefault(name, []).append(value)
        return {name: np.array(values) for name, values in found.items()}

    def _inside(self, x: np.ndarray, balls: Balls) -> tuple[Inside, Inside]:
        """Generated images in the widest real balls, and real images in the widest generated ones."""

        def distances(rows: slice) -> np.ndarray:
            return squared_distances(x[rows], self.real)

        return (
            Inside.of(len(x), distances, lambda far, rows: far <= self._real_balls.reach),
            Inside.of(len(x), distances, lambda far, rows: far <= balls.reach[rows, None]).turned(),
        )


@dataclass(frozen=True)
class Balls:
    """The nearest others of each vector of a set of N.

    Attributes:
        neighbours: their places, nearest first, [N, K], K = `CANDIDATES` or all others.
        distances: squared, [N, K].
    """

    neighbours: np.ndarray
    distances: np.ndarray

    @classmethod
    def around(cls, x: np.ndarray) -> Balls:
        """Of the vectors `x` [N, D]."""
        number = min(CANDIDATES, len(x) - 1)
        neighbours, found = np.empty((len(x), number), np.int64), np.empty((len(x), number))
        for rows in _chunks(len(x)):
            distances = squared_distances(x[rows], x)
            distances[np.arange(len(distances)), np.arange(rows.start, rows.start + len(distances))] = np.inf
            near = np.argpartition(distances, number - 1, axis=1)[:, :number]
            far = np.take_along_axis(distances, near, axis=1)
            order = np.argsort(far, axis=1)
            neighbours[rows] = np.take_along_axis(near, order, axis=1)
            found[rows] = np.take_along_axis(far, order, axis=1)
        return cls(neighbours, found)

    @property
    def reach(self) -> np.ndarray:
        """Squared radius that no ball of any half exceeds, [N]."""
        return self.distances[:, -1]

    def radii(self, k: int, counted: np.ndarray) -> np.ndarray:
        """Squared distance of each vector to the k-th neighbour among those `counted` [N]; NaN where they are too few.

        Where so few of the candidates are counted that the k-th lies beyond them, the farthest stands in.
        """
        if counted.sum() <= k:
            return np.full(len(counted), np.nan)
        nearer = np.cumsum(counted[self.neighbours], axis=1) < k
        place = np.minimum(nearer.sum(axis=1), self.distances.shape[1] - 1)
        return self.distances[np.arange(len(place)), place]


@dataclass(frozen=True)
class Inside:
    """Pairs of a vector and a ball that may hold it: places [P] of either, squared distance [P] to the centre."""

    vectors: np.ndarray
    balls: np.ndarray
    distances: np.ndarray

    @classmethod
    def of(
        cls,
        number: int,
        distances: Callable[[slice], np.ndarray],
        near: Callable[[np.ndarray, slice], np.ndarray],
    ) -> Inside:
        """The pairs (i, j) of a matrix of `number` rows, given by chunks of rows, that are `near`."""
        parts = []
        for rows in _chunks(number):
            far = distances(rows)
            i, j = np.nonzero(near(far, rows))
            parts.append((i + rows.start, j, far[i, j]))
        return cls(*(np.concatenate(part) for part in zip(*parts, strict=True)))

    def turned(self) -> Inside:
        """With vectors and balls in each other's place."""
        return Inside(self.balls, self.vectors, self.distances)

    def share(self, vectors: np.ndarray, balls: np.ndarray, radii: np.ndarray) -> float:
        """Of the counted `vectors`, the share that lies in a counted ball."""
        return _share(self.vectors[self._holds(vectors, balls, radii)], vectors, radii)

    def share_filled(self, vectors: np.ndarray, balls: np.ndarray, radii: np.ndarray) -> float:
        """Of the counted `balls`, the share that holds a counted vector."""
        return _share(self.balls[self._holds(vectors, balls, radii)], balls, radii)

    def mean_number(self, vectors: np.ndarray, balls: np.ndarray, radii: np.ndarray) -> float:
        """Of counted balls that hold a counted vector."""
        return float(self._holds(vectors, balls, radii).sum() / vectors.sum()) if _known(radii) else np.nan

    def _holds(self, vectors: np.ndarray, balls: np.ndarray, radii: np.ndarray) -> np.ndarray:
        return vectors[self.vectors] & balls[self.balls] & (self.distances <= radii[self.balls])


def _share(hit: np.ndarray, counted: np.ndarray, radii: np.ndarray) -> float:
    return len(np.unique(hit)) / float(counted.sum()) if _known(radii) else np.nan


def _known(radii: np.ndarray) -> bool:
    return bool(len(radii)) and not np.isnan(radii[0])


def squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """``|x_i - y_j|^2``, [N, M], never negative."""
    distances = x @ y.T
    distances *= -2
    distances += (x * x).sum(axis=1)[:, None]
    distances += (y * y).sum(axis=1)
    return np.maximum(distances, 0, out=distances)


def _chunks(total: int) -> list[slice]:
    return [slice(start, min(start + ROWS, total)) for start in range(0, total, ROWS)]
