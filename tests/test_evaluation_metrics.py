"""Distances between feature sets equal independent computations, and their intervals mean what they say."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torchmetrics.image.fid import _compute_fid
from torchmetrics.image.kid import poly_mmd

from lcm_lightning.errors import UserError
from lcm_lightning.evaluation.metrics import (
    bootstrap_interval,
    clip_score,
    frechet_distance,
    kernel_distance,
    mean_estimate,
)


def features(n, d=32, seed=0, shift=0.0):
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(d, d)) / math.sqrt(d)
    return rng.normal(size=(n, d)) @ mixing + shift


def reference_fid(x, y):
    """Heusel et al. 2017, eq. 6, as its authors compute it: with scipy's matrix square root."""
    s1, s2 = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    root = scipy.linalg.sqrtm(s1 @ s2)
    return ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s1 + s2 - 2 * np.real(root))


@pytest.mark.parametrize("n", [200, 40])
def test_fid_equals_the_authors_formula_and_torchmetrics(n):
    x, y = features(n, seed=1, shift=0.3), features(300, seed=2)
    ours = frechet_distance(x, y)
    assert ours == pytest.approx(reference_fid(x, y), rel=1e-6)
    tx, ty = torch.tensor(x), torch.tensor(y)
    theirs = _compute_fid(tx.mean(0), torch.cov(tx.T), ty.mean(0), torch.cov(ty.T))
    assert ours == pytest.approx(float(theirs), rel=1e-3)


@pytest.mark.parametrize("n, m", [(2, 2), (5, 300), (31, 33), (64, 3)])
def test_covariances_without_full_rank_give_a_number(n, m):
    x, y = features(n, d=64, seed=1), features(m, d=64, seed=2)
    value = frechet_distance(x, y)
    assert math.isfinite(value) and value > 0
    # The same figure from covariances whose null space is filled in a little.
    s1, s2 = (np.cov(f, rowvar=False) + 1e-9 * np.eye(64) for f in (x, y))
    root = np.real(scipy.linalg.sqrtm(s1 @ s2))
    expected = ((x.mean(0) - y.mean(0)) ** 2).sum() + np.trace(s1 + s2 - 2 * root)
    assert value == pytest.approx(expected, rel=1e-3)


def test_a_set_is_at_no_distance_from_itself():
    x = features(100)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-9)
    assert frechet_distance(x, x[::-1]) == pytest.approx(0, abs=1e-9)


def test_constant_features_are_no_accident():
    same = np.ones((10, 8))
    assert frechet_distance(same, same) == 0
    assert frechet_distance(same, same + 1) == pytest.approx(8)


def test_too_few_images_are_named():
    with pytest.raises(UserError, match=r"num_images"):
        frechet_distance(features(1), features(10))
    with pytest.raises(UserError, match=r"num_images"):
        kernel_distance(features(10), features(1))


def test_kid_equals_torchmetrics_unbiased_mmd():
    x, y = features(80, seed=1, shift=0.2), features(80, seed=2)
    xs, ys = torch.tensor(x), torch.tensor(y)

    def kernel(a, b):
        return (a @ b.T / 32 + 1) ** 3

    expected = float(poly_mmd_unbiased(kernel(xs, xs), kernel(xs, ys), kernel(ys, ys)))
    assert kernel_distance(x, y).value == pytest.approx(expected, rel=1e-9)
    assert float(poly_mmd(xs, ys, degree=3, gamma=None, coef=1.0)) == pytest.approx(expected, rel=1e-6)


def poly_mmd_unbiased(k_xx, k_xy, k_yy):
    """Gretton et al. 2012, eq. 3, with sets of unequal size, by loops over pairs."""
    n, m = k_xy.shape
    within_x = sum(k_xx[i, j] for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within_y = sum(k_yy[i, j] for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return within_x + within_y - 2 * k_xy.mean()


def test_kid_of_unequal_sets_and_its_jackknife_equal_recomputation():
    x, y = features(25, seed=1, shift=0.2), features(40, seed=2)
    found = kernel_distance(x, y)
    without_x = np.array([kernel_distance(np.delete(x, i, 0), y).value for i in range(25)])
    without_y = np.array([kernel_distance(x, np.delete(y, i, 0)).value for i in range(40)])
    error = math.sqrt(24 * without_x.var() + 39 * without_y.var())
    assert found.high - found.value == pytest.approx(1.959964 * error, rel=1e-9)
    assert found.value - found.low == pytest.approx(1.959964 * error, rel=1e-9)


def test_kid_is_zero_on_average_between_halves():
    values = [kernel_distance(features(50, seed=2 * i), features(50, seed=2 * i + 1)).value for i in range(200)]
    assert abs(np.mean(values)) < 3 * np.std(values) / math.sqrt(200)


def test_clip_score_is_the_mean_cosine_times_100():
    images, texts = features(6, seed=1), features(6, seed=2)
    cosines = torch.nn.functional.cosine_similarity(torch.tensor(images), torch.tensor(texts))
    assert clip_score(images, texts, np.arange(6)).value == pytest.approx(float((100 * cosines).clamp(min=0).mean()))
    assert clip_score(images, 3 * images, np.arange(6)).value == pytest.approx(100)


@pytest.mark.slow
def test_intervals_cover_what_they_promise():
    """Nominal 95 %: of 300 experiments 90 to 99 % must cover, which chance misses once in 10,000 if 95 % is true."""
    covered = {"mean": 0, "fid": 0, "kid": 0}
    d, n, shift = 4, 400, 0.5
    # The statistic's mean at these numbers of images, which is what the interval is about.
    expected_fid = np.mean([frechet_distance(*gaussians(d, n, shift, 10_000 + i)) for i in range(2000)])
    expected_kid = np.mean([kernel_distance(*gaussians(d, n, shift, 10_000 + i)).value for i in range(1000)])
    for trial in range(300):
        x, y = gaussians(d, n, shift, trial)
        fid = bootstrap_interval(frechet_distance, x, y, np.arange(n), samples=60, seed=trial)
        kid, mean = kernel_distance(x, y), mean_estimate(x[:, 0], np.arange(n))
        covered["fid"] += fid.low <= expected_fid <= fid.high
        covered["kid"] += kid.low <= expected_kid <= kid.high
        covered["mean"] += mean.low <= shift <= mean.high
    assert all(0.90 <= count / 300 <= 0.99 for count in covered.values()), covered


def test_images_of_one_photo_count_as_one_draw():
    values, photos = np.random.default_rng(0).normal(size=20), np.arange(20)
    once = mean_estimate(values, photos)
    thrice = mean_estimate(np.repeat(values, 3), np.repeat(photos, 3))
    assert (once.value, once.low, once.high) == pytest.approx((thrice.value, thrice.low, thrice.high))
    assert once.high - once.value == pytest.approx(1.959964 * values.std(ddof=1) / math.sqrt(20))


def test_a_photo_is_drawn_with_the_images_of_its_captions():
    """Where every image equals its photo, every draw is at no distance, whatever the number of captions."""
    real = features(30, d=4)
    photos = np.repeat(np.arange(30), [1, 2, 3] * 10)
    found = bootstrap_interval(lambda x, y: abs(x[:, 0].max() - y[:, 0].max()), real[photos], real, photos, samples=20)
    assert (found.low, found.value, found.high) == (0, 0, 0)


def gaussians(d, n, shift, seed):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) + shift, rng.normal(size=(n, d))
