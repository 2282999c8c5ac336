"""Image bytes to RGB pixels: decoding that is safe on whatever people keep in folders, and the training transform."""

from __future__ import annotations

import io
import warnings

import numpy as np
from PIL import ExifTags, Image, ImageOps

# A JPEG of a few kilobytes can announce an image of a terabyte; no training photo is near 90 megapixels.
MAX_PIXELS = 90_000_000


class ImageFault(ValueError):
    """An image that cannot be used; the message is the reason, in a few words."""


def open_image(data: bytes, max_side: int | None = None) -> Image.Image:
    """Open and fully decode the first frame of an image.

    Args:
        max_side: what the longer side is going to be reduced to. A JPEG of at least four times that is decoded at a
            half, a quarter or an eighth of its size, never below twice `max_side`: faster, and hardly to be told apart.

    Raises:
        ImageFault: the bytes are no image, are truncated, or announce more than `MAX_PIXELS` pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(data))
            if image.width * image.height > MAX_PIXELS:
                raise ImageFault(f"too large: {image.width}x{image.height} pixels")
            if max_side is not None:
                scale = 2 * max_side / max(image.size)
                image.draft(None, (max(1, int(image.width * scale)), max(1, int(image.height * scale))))
            image.load()
    except ImageFault:
        raise
    except Image.DecompressionBombError as error:
        raise ImageFault(f"too large: {error}") from error
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged bytes
        raise ImageFault(f"undecodable: {error}") from error
    return image


def orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 (upright) to 8; 1 where none is given or the EXIF block is damaged."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # a damaged EXIF block says nothing about the pixels
        return 1


def to_rgb(image: Image.Image) -> Image.Image:
    """Upright RGB image: EXIF orientation applied, transparency laid on white, CMYK, grey and palettes converted."""
    if orientation(image) != 1:
        image = ImageOps.exif_transpose(image)
    if image.mode in ("I;16", "I;16L", "I;16B"):
        return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def decode_image(data: bytes) -> Image.Image:
    """Upright RGB image from encoded bytes. Raises `ImageFault`."""
    return to_rgb(open_image(data))


def resize_shorter_side(image: Image.Image, resolution: int) -> Image.Image:
    """Resize so that the shorter side is `resolution` pixels, the longer one at least that (bicubic, antialiased)."""
    width, height = image.size
    scale = resolution / min(width, height)
    size = (max(resolution, round(width * scale)), max(resolution, round(height * scale)))
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


def crop_square(image: Image.Image, resolution: int, u: float = 0.5, v: float = 0.5) -> Image.Image:
    """Square crop of side `resolution`; u, v in [0, 1] place it from left to right and top to bottom (0.5: centre)."""
    left = round((image.width - resolution) * u)
    top = round((image.height - resolution) * v)
    return image.crop((left, top, left + resolution, top + resolution))


def normalise(image: Image.Image) -> np.ndarray:
    """RGB image to float32 [3, H, W] in [-1, 1]."""
    pixels = np.asarray(image, dtype=np.float32).transpose(2, 0, 1)
    return np.ascontiguousarray(pixels / 127.5 - 1.0)
