"""How far a student's image is from its teacher's, drawn of the same prompt from the same noise.

Distances from photos mix what the student lost with what its teacher never had. These show the former alone.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchmetrics.functional.image import structural_similarity_index_measure

from lcm_lightning.errors import first_line

log = logging.getLogger(__name__)

ALEXNET_FILE = "alexnet-owt-7be5be79.pth"
IDENTICAL_PSNR = 100.0  # dB; equal images have infinitely many, which no mean survives


@dataclass(frozen=True)
class ImageBatch:
    """A batch of generated images in the forms they are compared in.

    Attributes:
        images: uint8 [B, 3, H, W].
        latents: final latents float32 [B, C, h, w].
        patches: last patch tokens of CLIP's image tower [B, P, W].
    """

    images: Tensor
    latents: Tensor
    patches: Tensor


class PerceptualDistance(Protocol):
    """A distance between images that agrees with the eye better than pixels do.

    Attributes:
        name: what a result calls it; results under different names cannot be compared.
    """

    name: str

    def __call__(self, a: ImageBatch, b: ImageBatch) -> Tensor:
        """One number an image pair, [B]."""
        ...


class PatchDistance:
    """Mean over patches of the squared distance of two images' CLIP patch tokens at length 1, from 0 to 4.

    LPIPS's form (Zhang et al. 2018, eq. 1) on one layer of another network, with equal weights.
    """

    def __init__(self, clip_name: str) -> None:
        self.name = clip_name.replace("clip:", "clip-patches:", 1)

    def __call__(self, a: ImageBatch, b: ImageBatch) -> Tensor:
        """See `PerceptualDistance`."""
        squared = (F.normalize(a.patches, dim=-1) - F.normalize(b.patches, dim=-1)).square().sum(dim=-1)
        return squared.mean(dim=-1)


class Lpips:
    """Learned perceptual image patch similarity (Zhang et al. 2018, arXiv 1801.03924) on AlexNet, by torchmetrics.

    Args:
        alexnet: file with torchvision's weights of AlexNet.
    """

    name = "lpips-alex"

    def __init__(self, alexnet: Path, device: torch.device | str = "cpu") -> None:
        from torchmetrics.functional.image.lpips import _LPIPS

        self.network = _LPIPS(net="alex", pnet_rand=True)
        load_alexnet(self.network.net, torch.load(alexnet, weights_only=True, map_location="cpu"))
        self.device = torch.device(device)
        self.network.eval().to(self.device)

    @torch.no_grad()
    def __call__(self, a: ImageBatch, b: ImageBatch) -> Tensor:
        """See `PerceptualDistance`."""
        first, second = (picture.images.to(self.device).float() / 127.5 - 1 for picture in (a, b))
        return self.network(first, second).flatten().cpu()


def load_alexnet(network: nn.Module, state_dict: dict[str, Tensor]) -> None:
    """Put torchvision's AlexNet into the slices LPIPS cuts it into, which keep its layers' numbers."""
    sliced = {key: state_dict["features." + key.split(".", 1)[1]] for key in network.state_dict()}
    network.load_state_dict(sliced)


def perceptual_distance(clip_name: str, device: torch.device | str = "cpu") -> PerceptualDistance:
    """LPIPS where torch's hub folder has its weights, which are not downloaded for this; CLIP's patches otherwise."""
    alexnet = Path(torch.hub.get_dir()) / "checkpoints" / ALEXNET_FILE
    if alexnet.is_file():
        try:
            return Lpips(alexnet, device)
        except Exception as error:  # whatever a damaged file or a missing torchvision raises
            log.warning(
                "%s cannot be read (%s): no LPIPS, but a distance of CLIP's patches", alexnet, first_line(error)
            )
    return PatchDistance(clip_name)


def distances(student: ImageBatch, teacher: ImageBatch, perceptual: PerceptualDistance) -> dict[str, Tensor]:
    """Distances of each image pair, [B] by name.

    latent_mse: of the final latents, in the UNet's units. psnr: dB of 8-bit images, at most `IDENTICAL_PSNR`.
    ssim: structural similarity (Wang et al. 2004), Gaussian window of 11 px, 1 for equal images. perceptual: see the
    distance's own.
    """
    images, targets = student.images.float(), teacher.images.float()
    error = (images - targets).square().mean(dim=(1, 2, 3))
    ssim = structural_similarity_index_measure(images, targets, data_range=255.0, reduction="none")
    assert isinstance(ssim, Tensor)
    return {
        "latent_mse": (student.latents - teacher.latents).square().mean(dim=(1, 2, 3)),
        "psnr": (10 * torch.log10(255.0**2 / error)).clamp(max=IDENTICAL_PSNR),
        "ssim": ssim.reshape(-1),
        "perceptual": perceptual(student, teacher),
    }
