"""Image bytes to RGB pixels: decoding that is safe on whatever people keep in folders, and the training transform."""

from __future__ import annotations

import io
import warnings
from functools import lru_cache

import numpy as np
from PIL import ExifTags, Image, ImageCms, UnidentifiedImageError

# A JPEG of a few kilobytes can announce an image of a terabyte; few training photos are near 90 megapixels. Larger
# JPEGs are decoded at a fraction of their size, up to Pillow's own limit (178 megapixels).
MAX_PIXELS = 90_000_000
# Below that an image is smaller than one latent.
MIN_SIDE = 8
# Pillow judges by content: a .jpg may hold PostScript, which it would hand to Ghostscript, and other rarities.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM")

# How to turn an image upright, by its EXIF orientation.
TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

# Modes of pixels that a profile of a colour space speaks of.
PROFILED_MODES = {"RGB ": ("RGB", "RGBA"), "GRAY": ("L",), "CMYK": ("CMYK",)}
# Profiles that say sRGB in other words differ from it by so many of 255 levels.
SAME_COLOUR = 2


class ImageFault(ValueError):
    """An image that cannot be used; the message is the reason, in a few words."""


def open_image(data: bytes, max_side: int | None = None) -> Image.Image:
    """Open and fully decode the first frame of an image; a baseline JPEG above `MAX_PIXELS` reduced.

    Args:
        max_side: what the longer side is going to be reduced to. A JPEG of at least four times that is decoded at a
            half, a quarter or an eighth of its size, never below twice `max_side`: faster, and hardly to be told apart.

    Raises:
        ImageFault: the bytes are no image of `FORMATS`, are truncated, announce more than `MAX_PIXELS` pixels, or are
            smaller than `MIN_SIDE`.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of bombs and of damaged metadata
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            if image.width * image.height > MAX_PIXELS:
                reduce_jpeg(image)
            elif max_side is not None:
                scale = 2 * max_side / max(image.size)
                image.draft(None, (max(1, int(image.width * scale)), max(1, int(image.height * scale))))
            if min(image.size) < MIN_SIDE:
                raise ImageFault(f"too small: {image.width}x{image.height} pixels")
            image.load()
    except ImageFault:
        raise
    except UnidentifiedImageError as error:
        raise ImageFault(f"undecodable: none of {', '.join(FORMATS)}; convert it to one") from error
    except Image.DecompressionBombError as error:
        raise ImageFault(f"too large: {error}") from error
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged bytes
        raise ImageFault(f"undecodable: {error}") from error
    return image


def reduce_jpeg(image: Image.Image) -> None:
    """Let an unread JPEG above `MAX_PIXELS` be decoded at the largest fraction of its size below that.

    Raises:
        ImageFault: it is of another format, or progressive: its coefficients are held at full size.
    """
    width, height = image.size
    if image.format in ("JPEG", "MPO") and not image.info.get("progressive"):
        image.draft(None, (width // 2, height // 2))
    if image.width * image.height > MAX_PIXELS:
        raise ImageFault(f"too large: {width}x{height} pixels")


def announced_size(data: bytes) -> tuple[int, int]:
    """Width and height in pixels that an image's header announces; the image can be opened."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Image.open(io.BytesIO(data), formats=FORMATS).size


def orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 (upright) to 8; 1 where none is given or the EXIF block is damaged."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # a damaged EXIF block says nothing about the pixels
        return 1


def to_rgb(image: Image.Image) -> Image.Image:
    """Upright sRGB image: EXIF orientation and colour profile applied, transparency laid on white.

    Raises:
        ImageFault: the pixels are floating-point or 32-bit numbers, whose range nobody knows, or cannot be converted.
    """
    try:
        return _to_rgb(image)
    except ImageFault:
        raise
    except Exception as error:  # a palette or a transparency that its mode cannot have
        raise ImageFault(f"unconvertible: {error}") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "F" or (image.mode == "I" and image.format == "TIFF"):  # of PNG and PGM it means 16 bits
        raise ImageFault("pixels of 32 bits")
    turn = TURNS.get(orientation(image))
    if turn is not None:
        image = image.transpose(turn)
    if image.mode == "I" or image.mode.startswith("I;16"):
        pixels = np.asarray(image) >> 8  # in the type they have: such images can be large
        return Image.fromarray(np.clip(pixels, 0, 255, out=pixels).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        image = in_srgb(image.convert("RGBA"))
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return in_srgb(image if image.mode in ("L", "CMYK") else image.convert("RGB")).convert("RGB")


def in_srgb(image: Image.Image) -> Image.Image:
    """The image with its embedded colour profile applied; as it is without one, or with one nobody can read."""
    profile = image.info.get("icc_profile")
    transform = to_srgb_transform(profile, image.mode) if profile else None
    return image if transform is None else ImageCms.applyTransform(image, transform) or image


@lru_cache(maxsize=32)
def to_srgb_transform(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """From pixels of `mode` with an ICC profile to sRGB; None where that changes nothing, or the profile is damaged.

    Cached: the photos of a camera share their profile, and to read it costs more than to apply it.
    """
    wanted = "RGBA" if mode == "RGBA" else "RGB"
    try:
        source = ImageCms.getOpenProfile(io.BytesIO(profile))
        if mode not in PROFILED_MODES[source.profile.xcolor_space]:
            return None
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, wanted)
        if mode == "CMYK":
            return transform
        levels = np.linspace(0, 255, 9).astype(np.uint8)
        cube = np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(27, 27, 3)
        probe = Image.fromarray(cube).convert(mode)
        changed = np.asarray(ImageCms.applyTransform(probe, transform), dtype=int) - np.asarray(probe.convert(wanted))
        return transform if np.abs(changed).max() > SAME_COLOUR else None
    except Exception:  # a damaged profile says nothing about the pixels
        return None


def decode_image(data: bytes) -> Image.Image:
    """Upright RGB image from encoded bytes. Raises `ImageFault`."""
    return to_rgb(open_image(data))


def resize_to_cover(image: Image.Image, width: int, height: int) -> Image.Image:
    """Resize, keeping the aspect, to the least size that covers `width` x `height` pixels (bicubic, antialiased).

    Raises:
        ImageFault: the result would have more than `MAX_PIXELS`: a hair of 8 x 100,000 pixels, say.
    """
    scale = max(width / image.width, height / image.height)
    if image.width * image.height * scale**2 > MAX_PIXELS:
        raise ImageFault(f"too elongated: {image.width}x{image.height} pixels")
    size = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


def crop(image: Image.Image, width: int, height: int, u: float = 0.5, v: float = 0.5) -> Image.Image:
    """Crop of `width` x `height`; u, v in [0, 1] place it from left to right and top to bottom (0.5: centre)."""
    left = round((image.width - width) * u)
    top = round((image.height - height) * v)
    return image.crop((left, top, left + width, top + height))


def resize_shorter_side(image: Image.Image, resolution: int) -> Image.Image:
    """Resize so that the shorter side is `resolution` pixels; see `resize_to_cover`."""
    return resize_to_cover(image, resolution, resolution)


def crop_square(image: Image.Image, resolution: int, u: float = 0.5, v: float = 0.5) -> Image.Image:
    """Square crop of side `resolution`; see `crop`."""
    return crop(image, resolution, resolution, u, v)


def time_ids(
    photo: tuple[int, int], resized: tuple[int, int], crop: tuple[int, int], u: float, v: float, *, mirrored: bool
) -> tuple[int, ...]:
    """What SDXL is told of a crop, in pixels: height and width of the photo, top and left of the crop in what the photo
    was resized to, height and width of the crop (Podell et al. 2023, arXiv 2307.01952, section 2.2).

    A mirror image is a crop of the mirrored photo. Sizes are (width, height); u and v as in `crop_square`.
    """
    left, top = round((resized[0] - crop[0]) * u), round((resized[1] - crop[1]) * v)
    if mirrored:
        left = resized[0] - crop[0] - left
    return (*photo[::-1], top, left, *crop[::-1])


def normalise(image: Image.Image) -> np.ndarray:
    """RGB image to float32 [3, H, W] in [-1, 1]."""
    pixels = np.asarray(image, dtype=np.float32).transpose(2, 0, 1)
    return np.ascontiguousarray(pixels / 127.5 - 1.0)
