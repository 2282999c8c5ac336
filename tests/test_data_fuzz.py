"""Thousands of damaged archives and images: no crash, no hang, nothing written, and every good sample delivered."""

from __future__ import annotations

import io
import json
import signal
import tarfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import save

from lcm_lightning.data.datamodule import CaptionedImages
from lcm_lightning.data.images import ImageFault, decode_image
from lcm_lightning.errors import UserError

CASES = 2000
FAST = 150
SECONDS = 20  # for a case that takes hundredths of a second
SAMPLES = 6


@contextmanager
def time_limit(seconds: int) -> Iterator[None]:
    """Fail when the block takes longer."""

    def stop(*_: object) -> None:
        pytest.fail(f"still running after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def picture(seed: int, size: tuple[int, int] = (24, 20)) -> Image.Image:
    """Coarse noise."""
    cells = np.random.default_rng(seed).integers(0, 255, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(cells).resize(size, Image.Resampling.BICUBIC)


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


Contents = Callable[[int, np.random.Generator], tuple[tuple[str, bytes], ...]]


def pair(number: int, rng: np.random.Generator) -> tuple[tuple[str, bytes], ...]:
    """The members of a sample of an image."""
    captions = json.dumps({"captions": [f"caption {number}"] * int(rng.integers(1, 60))}).encode()
    return ("jpg", encoded(picture(number), "JPEG")), ("json", captions)


def latents(number: int, rng: np.random.Generator) -> tuple[tuple[str, bytes], ...]:
    """The members of a sample of cached latents."""
    captions = [f"caption {number}"] * int(rng.integers(1, 60))
    tensors = {
        "moments": rng.standard_normal((2, 2, 4, 3, 3)).astype(np.float16),
        "text": rng.standard_normal((len(captions), 5, 6)).astype(np.float16),
    }
    described = json.dumps({"captions": captions, "image_shard": "train-0.tar"}).encode()
    return ("json", described), ("safetensors", save(tensors))


def archive(rng: np.random.Generator, contents: Contents = pair) -> tuple[bytes, dict[str, bytes]]:
    """A shard, and the bytes of each of its samples from the first header to the padding of the last member."""
    buffer, spans = io.BytesIO(), {}
    style = rng.choice([tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
    with tarfile.open(fileobj=buffer, mode="w", format=int(style)) as file:
        for number in range(SAMPLES):
            key, start = f"sample{number}", buffer.tell()
            for suffix, content in contents(number, rng):
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(content)
                file.addfile(member, io.BytesIO(content))
            spans[key] = (start, buffer.tell())
    content = buffer.getvalue()
    return content, {key: content[start:stop] for key, (start, stop) in spans.items()}


def damaged(content: bytes, rng: np.random.Generator) -> bytes:
    """The bytes after one to three accidents."""
    data = bytearray(content)
    for _ in range(int(rng.integers(1, 4))):
        place = int(rng.integers(len(data))) if data else 0
        length = int(rng.choice([1, 7, 100, 512, 1024, 3000]))
        match int(rng.integers(8)):
            case 0:  # bits flip
                for at in rng.integers(0, len(data), int(rng.integers(1, 20))) if data else ():
                    data[at] ^= 1 << int(rng.integers(8))
            case 1:  # the end is missing
                del data[place:]
            case 2:  # a part is missing
                del data[place : place + length]
            case 3:  # something got between
                data[place:place] = rng.bytes(length)
            case 4:  # a part was never written
                data[place : place + length] = bytes(len(data[place : place + length]))
            case 5:  # a part comes twice
                data[place:place] = data[place : place + length]
            case 6:  # another file's bytes
                data[place : place + length] = rng.bytes(len(data[place : place + length]))
            case 7:  # a header is gone
                header = 512 * (place // 512)
                data[header : header + 512] = rng.bytes(len(data[header : header + 512]))
    return bytes(data)


def jumped_over(content: bytes, place: int) -> bool:
    """Whether a tar reader meets two good headers in turn, one before and one behind `place`.

    Whole blocks that are missing from a file's content can move the next header into it, and the one after that to
    where this file should end: without an index nothing tells.
    """
    with suppress(tarfile.TarError), tarfile.open(fileobj=io.BytesIO(content)) as archive:
        offsets = [0]
        for member in archive:
            if offsets[-1] < place < member.offset:
                return True
            offsets.append(member.offset)
    return False


def files_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def write_index(folder: Path, content: bytes) -> None:
    """The index of a cache of one whole shard, as `lcm_lightning.prepare.encoding` leaves it."""
    shard = {"file": "train-0.tar", "samples": SAMPLES, "bytes": len(content), "sha256": "0"}
    described = {"key": {}, "crops": 1, "flips": True, "latent_shape": [4, 3, 3], "images": "nowhere"}
    index = {
        "format": 1,
        "name": "fuzz",
        "splits": {"train": {"samples": SAMPLES, "shards": [shard]}},
        "latents": described | {"empty_caption": "empty.safetensors"},
    }
    (folder / "index.json").write_text(json.dumps(index))
    (folder / "empty.safetensors").write_bytes(save({"text": np.zeros((5, 6), np.float16)}))


def check_archives(cases: range, folder: Path, contents: Contents = pair) -> tuple[int, int]:
    """Deliver every damaged archive's samples; the numbers of good samples and of faults there were."""
    good = faults = 0
    for case in cases:
        rng = np.random.default_rng(case)
        content, samples = archive(rng, contents)
        if contents is latents:
            write_index(folder, content)
        content = damaged(content, rng)
        path = folder / "train-0.tar"
        path.write_bytes(content)
        before = files_below(folder)
        found = {key: content.find(span) for key, span in samples.items() if span in content}
        whole = {key for key, place in found.items() if not jumped_over(content, place)}
        data = CaptionedImages(
            "fuzz",
            str(folder if contents is latents else path),
            resolution=16,
            batch_size=4,
            num_workers=0,
            val_limit=0,
            max_bad_fraction=1.0,
            caption_dropout=0.0,
            cache_dir=str(folder.parent / "cache"),
        )
        with time_limit(SECONDS):
            try:
                data.prepare_data()
            except UserError:
                assert not whole, f"case {case}: {whole}"
                continue
            loader = data.train_dataloader()
            batches = list(loader)
        delivered = {
            (key, caption)
            for batch in batches
            for key, caption, weight in zip(batch["keys"], batch["captions"], batch["weight"], strict=True)
            if weight > 0
        }
        for key in whole:
            assert (key, f"caption {key.removeprefix('sample')}") in delivered, f"case {case}: {key} is whole"
        assert len(batches) == len(loader)
        assert files_below(folder) == before
        good, faults = good + len(whole), faults + loader.faults.total()
    return good, faults


FORMATS = (
    ("JPEG", {}),
    ("JPEG", {"progressive": True}),
    ("PNG", {}),
    ("WEBP", {}),
    ("WEBP", {"lossless": True}),
    ("GIF", {}),
    ("BMP", {}),
    ("TIFF", {"compression": "tiff_lzw"}),
    ("TIFF", {}),
    ("PPM", {}),
)


def check_images(cases: range) -> tuple[int, int]:
    """Decode every damaged image; the numbers that gave an image and that were refused."""
    decoded = refused = 0
    for case in cases:
        rng = np.random.default_rng(case)
        format, options = FORMATS[case % len(FORMATS)]
        mode = str(rng.choice(["RGB", "L", "P", "1"] if format in ("PNG", "TIFF", "GIF", "BMP") else ["RGB", "L"]))
        image = picture(case, (40, 30)).convert(mode if format not in ("PPM", "WEBP") else "RGB")
        exif = Image.Exif()
        exif[0x0112] = int(rng.integers(0, 12))
        options = options | ({"exif": exif} if format in ("JPEG", "PNG", "WEBP") else {})
        data = damaged(encoded(image, format, **options), rng)
        with time_limit(SECONDS):
            try:
                image = decode_image(data)
            except ImageFault:
                refused += 1
                continue
        assert image.mode == "RGB" and min(image.size) >= 8
        decoded += 1
    return decoded, refused


def test_of_damaged_archives_every_good_sample_is_delivered(tmp_path):
    (tmp_path / "shards").mkdir()
    good, faults = check_archives(range(FAST), tmp_path / "shards")
    assert good > FAST and faults > FAST / 2, "the damage is neither total nor none"


def test_of_damaged_caches_every_good_sample_is_delivered(tmp_path):
    (tmp_path / "shards").mkdir()
    good, faults = check_archives(range(FAST), tmp_path / "shards", latents)
    assert good > FAST and faults > FAST / 2, "the damage is neither total nor none"


def test_damaged_images_are_decoded_or_refused():
    decoded, refused = check_images(range(FAST))
    assert decoded > FAST / 20 and refused > FAST / 5


@pytest.mark.faults
def test_of_two_thousand_damaged_archives_every_good_sample_is_delivered(tmp_path):
    (tmp_path / "shards").mkdir()
    check_archives(range(CASES), tmp_path / "shards")


@pytest.mark.faults
def test_of_two_thousand_damaged_caches_every_good_sample_is_delivered(tmp_path):
    (tmp_path / "shards").mkdir()
    check_archives(range(CASES), tmp_path / "shards", latents)


@pytest.mark.faults
def test_two_thousand_damaged_images_are_decoded_or_refused():
    check_images(range(CASES))
