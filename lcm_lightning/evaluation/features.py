"""Networks that turn images into the feature vectors distances are measured between."""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPModel, CLIPTokenizer, ImageProcessingMixin

from lcm_lightning.errors import UserError, first_line, install, short
from lcm_lightning.hub import hub_answers, hub_refusal
from lcm_lightning.models.identity import tensors_digest

log = logging.getLogger(__name__)

INCEPTION_FILE = "weights-inception-2015-12-05-6726825d.pth"


class FeatureExtractor(Protocol):
    """Maps images to vectors.

    Attributes:
        name: what a result calls it; results under different names cannot be compared.
    """

    name: str

    def __call__(self, images: Tensor) -> Tensor:
        """Features float32 [B, D] on the CPU of uint8 `images` [B, 3, H, W]."""
        ...

    def to(self, device: torch.device | str) -> None:
        """Move the network."""
        ...


class InceptionFeatures:
    """The 2,048 pool features of the Inception-v3 that FID is defined on (Heusel et al. 2017, arXiv 1706.08500).

    TensorFlow's network of 2015 as torch-fidelity ported it, by way of torchmetrics. Images are resized to 299 px the
    way TensorFlow did.

    Args:
        weights: a .pth or .safetensors file with torch-fidelity's weights; None takes, or downloads, torch's copy.

    Raises:
        UserError: package or weights are not at hand.
    """

    name = "inception"

    def __init__(self, weights: str | Path | None = None, device: torch.device | str = "cpu") -> None:
        try:
            from torchmetrics.image.fid import NoTrainInceptionV3

            with tempfile.TemporaryDirectory() as folder:
                file = None if weights is None else _as_plain_state_dict(Path(weights).expanduser(), Path(folder))
                network = NoTrainInceptionV3("inception-v3-compat", ["2048"], None if file is None else str(file))
        except ModuleNotFoundError as error:
            raise UserError(
                f"evaluation.features=inception: {first_line(error)}; {install('torch_fidelity')}"
            ) from error
        except OSError as error:
            raise UserError(
                f"evaluation.features=inception: its weights cannot be had ({first_line(error)}). Download "
                f"{INCEPTION_FILE} from torch-fidelity's releases (v0.2.0) elsewhere and set "
                "evaluation.inception_weights=PATH, or set evaluation.features=clip_patches"
            ) from error
        self.network = network.eval()
        self.to(device)

    def to(self, device: torch.device | str) -> None:
        """Move the network."""
        self.device = torch.device(device)
        self.network.to(self.device)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """See `FeatureExtractor`."""
        return self.network(images.to(self.device)).float().cpu()


def _as_plain_state_dict(weights: Path, folder: Path) -> Path:
    """A copy of `weights` that holds tensors only: torch-fidelity unpickles whatever file it is given."""
    try:
        if weights.suffix == ".safetensors":
            state_dict = load_file(weights)
        else:
            state_dict = torch.load(weights, weights_only=True, map_location="cpu")
    except FileNotFoundError:
        raise UserError(f"evaluation.inception_weights={weights}: no such file") from None
    except Exception as error:  # whatever a damaged or hostile file makes the readers raise
        raise UserError(
            f"evaluation.inception_weights={weights}: not a file of weights ({first_line(error)})"
        ) from error
    plain = folder / INCEPTION_FILE
    torch.save(state_dict, plain)
    return plain


class Clip:
    """Both towers of a CLIP (Radford et al. 2021, arXiv 2103.00020): image features, and how well a caption fits.

    Args:
        source: local transformers folder or hub id, such as openai/clip-vit-large-patch14.

    Raises:
        UserError: it cannot be loaded.
    """

    def __init__(self, source: str, device: torch.device | str = "cpu") -> None:
        try:
            place: dict[str, Any] = {"local_files_only": Path(source).is_dir() or not hub_answers()}
            network = CLIPModel.from_pretrained(source, use_safetensors=True, dtype=torch.float32, **place)
            self.model: CLIPModel = network.eval()
            self.tokenizer = CLIPTokenizer.from_pretrained(source, **place)
            settings, _ = ImageProcessingMixin.get_image_processor_dict(source, **place)
        except (OSError, ValueError) as error:
            reason = first_line(error)[:80] if Path(source).is_dir() else hub_refusal(error)
            raise UserError(
                f"evaluation.clip={short(source, 80)}: cannot be loaded ({reason}); give a local CLIP "
                "folder, check id and network, or take the embedded CLIP with evaluation=quick"
            ) from error
        self.name = f"clip:{Path(source).name}"
        self.to(device)
        self.size = self.model.config.vision_config.image_size
        self.mean = torch.tensor(settings["image_mean"]).view(3, 1, 1)
        self.std = torch.tensor(settings["image_std"]).view(3, 1, 1)

    def to(self, device: torch.device | str) -> None:
        """Move both towers."""
        self.device = torch.device(device)
        self.model.to(self.device)  # type: ignore[arg-type]

    def __call__(self, images: Tensor) -> Tensor:
        """Projected image features [B, D] of length sqrt(D); see `FeatureExtractor`.

        CLIP knows directions only. With this length numbers are about 1, which KID's kernel is made for.
        """
        return self.image_outputs(images)[0]

    @torch.no_grad()
    def image_outputs(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """What one pass of the image tower gives: projected features [B, D], and the last layer's patches [B, P, W].

        Both are float32, on the CPU; `images` are uint8 [B, 3, H, W].
        """
        outputs = self.model.get_image_features(self._pixels(images))
        projected = outputs.pooler_output.float().cpu()
        patches = outputs.last_hidden_state[:, 1:].float().cpu()
        return F.normalize(projected, dim=1) * math.sqrt(projected.shape[1]), patches

    def _pixels(self, images: Tensor) -> Tensor:
        pixels = images.float() / 255
        if pixels.shape[-1] != self.size:
            pixels = F.interpolate(pixels, (self.size, self.size), mode="bicubic", antialias=True).clamp(0, 1)
        return ((pixels - self.mean) / self.std).to(self.device)

    @torch.no_grad()
    def text_features(self, captions: Sequence[str]) -> Tensor:
        """Projected text features [B, D], float32 on the CPU; captions beyond the tokenizer's limit are cut."""
        tokens = self.tokenizer(
            list(captions),
            padding="max_length",
            max_length=self.model.config.text_config.max_position_embeddings,  # type: ignore[union-attr]
            truncation=True,
            return_tensors="pt",
        )
        return self.model.get_text_features(tokens.input_ids.to(self.device)).pooler_output.float().cpu()


class ClipPatches:
    """The mean over the patch tokens, without CLS, of the last layer of a CLIP's image tower, before projection.

    The counterpart of Inception's features, which are the average of its last map. The projected embedding is trained
    to agree with a caption, hence to ignore how a thing is drawn; the patches still know it.
    """

    def __init__(self, clip: Clip) -> None:
        self.clip = clip
        self.name = clip.name.replace("clip:", "clip-patches:", 1)

    def to(self, device: torch.device | str) -> None:
        """Move the CLIP, both towers."""
        self.clip.to(device)

    def __call__(self, images: Tensor) -> Tensor:
        """Features [B, width of the tower]; see `FeatureExtractor`."""
        return self.clip.image_outputs(images)[1].mean(dim=1)


def extract_features(
    images: Tensor, extractors: Sequence[FeatureExtractor]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Features [B, D] of uint8 `images` [B, 3, H, W] by extractor's name, in one pass of each network.

    Returns:
        The features, and the last patch tokens [B, P, W] of each CLIP among the extractors by its name.
    """
    found: dict[str, Tensor] = {}
    patches: dict[str, Tensor] = {}
    for clip in {e.clip if isinstance(e, ClipPatches) else e for e in extractors}:
        if isinstance(clip, Clip):
            found[clip.name], patches[clip.name] = clip.image_outputs(images)
    for extractor in extractors:
        if isinstance(extractor, ClipPatches):
            found[extractor.name] = patches[extractor.clip.name].mean(dim=1)
        elif extractor.name not in found:
            found[extractor.name] = extractor(images)
    return found, patches


def make_extractor(features: str, clip: Clip, inception_weights: str | None, device: torch.device) -> FeatureExtractor:
    """The extractor of FID and KID.

    Args:
        features: "inception", "clip_patches", "clip" (projected), or "auto": Inception where it can be had, patches of
            CLIP otherwise.

    Raises:
        UserError: another name, or Inception was asked for and cannot be had.
    """
    if features == "clip":
        return clip
    if features == "clip_patches":
        return ClipPatches(clip)
    if features == "inception":
        return InceptionFeatures(inception_weights, device)
    if features == "auto":
        try:
            return InceptionFeatures(inception_weights, device)
        except UserError as error:
            if inception_weights is not None:
                raise
            patches = ClipPatches(clip)
            log.warning("FID and KID on features of %s, which no published FID used: %s", patches.name, error)
            return patches
    raise UserError(f"evaluation.features={features}: expected inception, clip_patches, clip or auto")


def weights_digest(extractor: FeatureExtractor) -> str:
    """Hex digest of an extractor's weights, which tells two networks of the same name apart."""
    if isinstance(extractor, ClipPatches):
        return weights_digest(extractor.clip)
    network = extractor.model if isinstance(extractor, Clip) else extractor.network  # type: ignore[attr-defined]
    return tensors_digest(sorted(network.state_dict().items()))
