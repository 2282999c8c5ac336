"""What a student is from its teacher: measures equal their definitions, pairs are the right ones."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from scipy.ndimage import gaussian_filter

from lcm_lightning.evaluation.teacher import (
    ALEXNET_FILE,
    ImageBatch,
    Lpips,
    PatchDistance,
    distances,
    perceptual_distance,
)


def picture(seed: int, n: int = 3, side: int = 64) -> ImageBatch:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (n, 3, side, side), dtype=torch.uint8, generator=generator)
    return ImageBatch(images, torch.randn(n, 4, 8, 8, generator=generator), torch.randn(n, 16, 32, generator=generator))


def structural_similarity(a: np.ndarray, b: np.ndarray) -> float:
    """Wang et al. 2004, eq. 13, of images [3, H, W]: Gaussian window of 11 px, where it lies within the image."""

    def blur(image):
        return gaussian_filter(image, 1.5, radius=5, axes=(1, 2))[:, 5:-5, 5:-5]

    mean_a, mean_b, c1, c2 = blur(a), blur(b), (0.01 * 255) ** 2, (0.03 * 255) ** 2
    variance_a, variance_b = blur(a * a) - mean_a**2, blur(b * b) - mean_b**2
    covariance = blur(a * b) - mean_a * mean_b
    likeness = (2 * mean_a * mean_b + c1) * (2 * covariance + c2)
    return float((likeness / ((mean_a**2 + mean_b**2 + c1) * (variance_a + variance_b + c2))).mean())


def test_distances_equal_their_definitions():
    a = picture(0)
    noisy = (a.images.int() + torch.randint(-40, 41, a.images.shape)).clamp(0, 255).to(torch.uint8)
    b = ImageBatch(noisy, picture(1).latents, picture(1).patches)
    found = distances(a, b, PatchDistance("clip:x"))
    first, second = a.images.double().numpy(), b.images.double().numpy()
    errors = ((first - second) ** 2).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(found["psnr"], 20 * np.log10(255 / np.sqrt(errors)), rtol=1e-5)
    np.testing.assert_allclose(
        found["ssim"], [structural_similarity(x, y) for x, y in zip(first, second, strict=True)], rtol=1e-3
    )
    np.testing.assert_allclose(found["latent_mse"], ((a.latents - b.latents) ** 2).flatten(1).mean(1), rtol=1e-5)
    cosines = torch.nn.functional.cosine_similarity(a.patches, b.patches, dim=-1)
    np.testing.assert_allclose(found["perceptual"], (2 - 2 * cosines).mean(1), rtol=1e-4)


def test_a_copy_is_at_no_distance():
    found = distances(picture(0), picture(0), PatchDistance("clip:x"))
    assert {name: values.unique().tolist() for name, values in found.items()} == {
        "latent_mse": [0],
        "psnr": [100],
        "ssim": [pytest.approx(1)],
        "perceptual": [0],
    }


def test_lpips_is_torchmetrics_where_its_weights_are_at_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from torchmetrics.functional.image.lpips import _LPIPS
    from torchvision.models import alexnet

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert perceptual_distance("clip:x").name == "clip-patches:x"
    file = tmp_path / "hub" / "checkpoints" / ALEXNET_FILE
    file.parent.mkdir(parents=True)
    torch.manual_seed(0)
    torch.save(alexnet().state_dict(), file)  # random: the real ones cannot be downloaded by a test
    ours = perceptual_distance("clip:x")
    assert isinstance(ours, Lpips) and ours.name == "lpips-alex"
    a, b = picture(0), picture(1)
    with torch.no_grad():
        theirs = _LPIPS(net="alex")(a.images / 255, b.images / 255, normalize=True).flatten()
    torch.testing.assert_close(ours(a, b), theirs, atol=1e-6, rtol=1e-4)
    assert ours(a, a).abs().max() < 1e-6


def test_weights_of_lpips_are_never_unpickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    class Harmful:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "harm"),))

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    file = tmp_path / "hub" / "checkpoints" / ALEXNET_FILE
    file.parent.mkdir(parents=True)
    torch.save({"weights": Harmful()}, file)
    assert perceptual_distance("clip:x").name == "clip-patches:x"
    assert not (tmp_path / "harm").exists()
