"""The real side of an evaluation: prompts, and the features of the photos they describe."""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from lightning.fabric.utilities.rank_zero import rank_zero_only
from rich.progress import Progress
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lcm_lightning.data.datamodule import iterate_split, locate, locate_images
from lcm_lightning.data.images import crop_square, resize_shorter_side
from lcm_lightning.data.shards import Sample, cache_folder, content_digest, open_split
from lcm_lightning.errors import UserError
from lcm_lightning.evaluation.features import FeatureExtractor, extract_features, weights_digest
from lcm_lightning.evaluation.protocol import Protocol

log = logging.getLogger(__name__)

SHOWN = 16


@dataclass(frozen=True)
class RealImages:
    """Which real photos are the reference.

    Attributes:
        name, source, cache_dir: see `lcm_lightning.data.datamodule.CaptionedImages`.
        split: "train", "val" or "test".
        num_images: so many, drawn with a fixed seed; None for all.
        resolution: they are resized to this shorter side and cropped to a square at the centre, px; None for that of
            the first model they are compared with.
    """

    name: str
    source: str | None
    split: str
    num_images: int | None
    resolution: int | None
    cache_dir: str | None = None

    def samples(self) -> Iterator[Sample]:
        """The photos, decoded, in fixed order."""
        return iterate_split(self.source, self.split, name=self.name, limit=self.num_images, cache_dir=self.cache_dir)

    def square(self, sample: Sample) -> Tensor:
        """The photo as uint8 [3, R, R]."""
        assert self.resolution is not None
        image = crop_square(resize_shorter_side(sample.image, self.resolution), self.resolution)
        return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())

    def digest(self) -> str:
        """Hex digest of everything the pixels depend on."""
        shards = open_split(locate_images(self.name, self.source), self.split, self.cache_dir)
        photos = " ".join(content_digest(shard, self.cache_dir) for shard in shards)
        text = f"{photos} {self.split} {self.num_images} {self.resolution} crop-3"
        return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class Reference:
    """What generated images are held against.

    Attributes:
        captions: of each photo, all of them.
        features: [M, D] of the photos, by extractor name.
        shown: some photos, spread over all of them, uint8 [<= 16, 3, R, R].
        places: which photos `shown` are.
    """

    captions: tuple[tuple[str, ...], ...]
    features: Mapping[str, np.ndarray]
    shown: Tensor
    places: tuple[int, ...]

    def prompts(self, captions_per_image: int | None) -> list[str]:
        """Captions to draw, photo by photo: of each its first so many, or all."""
        return [caption for captions in self.captions for caption in captions[:captions_per_image]]


def fit_size(real: RealImages, protocol: Protocol, usual: int | None) -> tuple[RealImages, Protocol]:
    """The same, or all of a split that holds fewer images than are wanted; named by a number that is not the usual.

    Figures on other numbers of images do not compare: `quick` on 109 is `quick-109`, whoever chose the number.

    Args:
        usual: images of the protocol as its file has it; None for all of the split.

    Raises:
        UserError: the split holds fewer, and the protocol does not take them.
    """
    if real.num_images is None and usual is None:
        return real, protocol
    available = sum(shard.samples for shard in open_split(locate(real.name, real.source), real.split, real.cache_dir))
    wanted = available if real.num_images is None else real.num_images
    if wanted > available and not protocol.takes_fewer:
        raise UserError(
            f"evaluation.num_images={wanted}: {real.name}/{real.split} holds {available} images; set it to "
            "that or less, or null for all, or choose another evaluation.split"
        )
    taken = min(wanted, available)
    name = protocol.name if taken == (usual or available) else f"{protocol.name}-{taken}"
    if taken < wanted:
        rank_zero_only(log.warning)(
            "%s/%s holds %d images, fewer than the %d of %s: all are taken, as protocol %s, whose figures compare with "
            "those of as many images alone",
            *(real.name, real.split, available, wanted, protocol.name, name),
        )
        real, protocol = replace(real, num_images=None), replace(protocol, num_images=None)
    return real, replace(protocol, name=name)


def read_reference(
    real: RealImages, extractors: list[FeatureExtractor], progress: Progress, batch_size: int = 32
) -> Reference:
    """Features of the real photos, computed once and kept under the cache folder by the digest of pixels and networks.

    Raises:
        UserError: no such data, or fewer than two photos.
    """
    named = [f"{extractor.name} {weights_digest(extractor)}" for extractor in extractors]
    digest = hashlib.sha256(" ".join([real.digest(), *named]).encode()).hexdigest()
    file = cache_folder(real.cache_dir) / "references" / f"{digest}.safetensors"
    if not file.is_file():
        _write_reference(real, extractors, progress, batch_size, file)
    with safe_open(file, framework="pt") as stored:
        captions = json.loads(stored.metadata()["captions"])
        features = {extractor.name: stored.get_tensor(extractor.name).numpy() for extractor in extractors}
        shown, places = stored.get_tensor("shown"), stored.get_tensor("places")
    return Reference(tuple(map(tuple, captions)), features, shown, tuple(places.tolist()))


class Spread:
    """Keeps some of a stream of images, evenly spaced whatever its length turns out to be.

    Args:
        count: how many at most.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self.stride = 1
        self.offered = 0
        self.images: list[Tensor] = []  # of the places 0, stride, 2 stride, ...

    def offer(self, image: Tensor) -> None:
        """Take the next image of the stream."""
        if self.offered % self.stride == 0:
            self.images.append(image)
        self.offered += 1
        if len(self.images) > 2 * self.count:
            self.images, self.stride = self.images[::2], 2 * self.stride

    def kept(self) -> list[tuple[int, Tensor]]:
        """Place in the stream and image of at most `count` of those offered."""
        chosen = evenly(len(self.images), self.count)
        return [(index * self.stride, self.images[index]) for index in chosen]


def evenly(length: int, count: int) -> list[int]:
    """At most `count` places among `length`, evenly spaced from the first to the last."""
    return sorted({round(place) for place in np.linspace(0, length - 1, min(length, count)).tolist()})


def _write_reference(
    real: RealImages, extractors: list[FeatureExtractor], progress: Progress, batch_size: int, file: Path
) -> None:
    captions: list[tuple[str, ...]] = []
    shown = Spread(SHOWN)
    found: dict[str, list[Tensor]] = {extractor.name: [] for extractor in extractors}
    bar = progress.add_task(f"real images of {real.name}", total=real.num_images)
    samples = real.samples()
    while chunk := list(islice(samples, batch_size)):
        images = torch.stack([real.square(sample) for sample in chunk])
        captions += [sample.captions for sample in chunk]
        for image in images:
            shown.offer(image)
        features, _ = extract_features(images, extractors)
        for name, parts in found.items():
            parts.append(features[name])
        progress.advance(bar, len(chunk))
    progress.update(bar, total=len(captions))
    if len(captions) < 2:
        raise UserError(
            f"evaluation.split={real.split} of {real.name} holds {len(captions)} readable images: expected at least 2"
        )
    places, photos = zip(*shown.kept(), strict=True)
    tensors = {name: torch.cat(parts) for name, parts in found.items()}
    tensors |= {"shown": torch.stack(photos), "places": torch.tensor(places)}
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{os.getpid()}-{file.name}")
    save_file(tensors, temporary, metadata={"captions": json.dumps(captions)})
    temporary.replace(file)
