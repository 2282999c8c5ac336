"""Image bytes to pixels: whatever people keep in folders comes out upright, RGB and on white, or is refused."""

from __future__ import annotations

import io
import struct
import tracemalloc
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from helpers.profiles import DISPLAY_P3, LIKE_SRGB, LINEAR_GREY, cmyk_profile
from lcm_lightning.data.images import (
    ImageFault,
    crop_square,
    decode_image,
    normalise,
    resize_shorter_side,
    time_ids,
    to_rgb,
    to_srgb_transform,
)


def encoded(image, format="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def test_exif_orientation_is_applied():
    image = Image.new("RGB", (60, 40), "white")
    image.paste("black", (0, 0, 30, 40))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: rotate by 90 degrees clockwise to see it upright
    upright = decode_image(encoded(image, "JPEG", exif=exif, quality=95))
    assert upright.size == (40, 60)
    assert upright.getpixel((20, 5)) < (50, 50, 50) and upright.getpixel((20, 55)) > (200, 200, 200)


@pytest.mark.parametrize("mode", ["L", "CMYK", "P", "1", "I;16", "LA", "RGBA"])
def test_every_mode_becomes_rgb_of_the_same_brightness(mode):
    if mode == "I;16":
        image = Image.fromarray(np.full((40, 40), 128 << 8, dtype=np.uint16))
    else:
        image = Image.new("RGB", (40, 40), (128, 128, 128) if mode != "1" else "white")
        image = image.convert(mode, palette=Image.Palette.ADAPTIVE)
    data = encoded(image, "TIFF" if mode in ("CMYK", "I;16") else "PNG")
    pixel = decode_image(data).getpixel((20, 20))
    assert pixel == pytest.approx((255,) * 3 if mode == "1" else (128,) * 3, abs=1)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_pixels_of_32_bits_are_left_out_as_nobody_knows_their_range(mode):
    data = encoded(Image.new(mode, (40, 40), 128), "TIFF")
    with pytest.raises(ImageFault, match="pixels of 32 bits"):
        decode_image(data)


@pytest.mark.parametrize(("mode", "dtype"), [("I;16", "<u2"), ("I;16B", ">u2"), ("I", "<i4")])
def test_high_bit_depths_keep_their_upper_bits_without_a_wide_copy(mode, dtype):
    values = np.linspace(0, 65535, 1_000_000).astype(dtype).reshape(1000, 1000)
    image = Image.frombytes(mode, (1000, 1000), values.tobytes())
    tracemalloc.start()
    rgb = to_rgb(image)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert np.array_equal(np.asarray(rgb)[..., 0], values // 256)
    assert peak < 2.5 * values.nbytes  # the pixels and what is made of them


def test_sixteen_bits_out_of_range_are_clipped():
    values = np.array([[-70_000, -1, 256, 65_535, 65_536, 2**31 - 1]] * 8, dtype=np.int32)
    assert np.asarray(to_rgb(Image.fromarray(values)))[0, :, 0].tolist() == [0, 0, 1, 255, 255, 255]


def test_transparent_pixels_are_white():
    image = Image.new("RGBA", (40, 40), (255, 0, 0, 0))
    image.paste((255, 0, 0, 255), (0, 0, 20, 40))
    rgb = decode_image(encoded(image))
    assert rgb.getpixel((10, 10)) == (255, 0, 0) and rgb.getpixel((30, 10)) == (255, 255, 255)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_colours_of_a_phone_become_srgb(format):
    image = Image.new("RGB", (40, 40), (60, 200, 60))
    options = {"quality": 100, "lossless": True} if format in ("JPEG", "WEBP") else {}
    pixel = decode_image(encoded(image, format, icc_profile=DISPLAY_P3, **options)).getpixel((20, 20))
    assert pixel == pytest.approx((0, 203, 11), abs=4)
    assert decode_image(encoded(image, format, **options)).getpixel((20, 20)) == pytest.approx((60, 200, 60), abs=2)


@pytest.mark.parametrize("mode", ["RGBA", "P"])
def test_colours_are_converted_before_they_are_laid_on_white(mode):
    image = Image.new("RGBA", (40, 40), (60, 200, 60, 255)).convert(mode)
    pixel = decode_image(encoded(image, icc_profile=DISPLAY_P3)).getpixel((20, 20))
    assert pixel == pytest.approx((0, 203, 11), abs=4)
    clear = Image.new("RGBA", (40, 40), (60, 200, 60, 0))
    assert decode_image(encoded(clear, icc_profile=DISPLAY_P3)).getpixel((20, 20)) == (255, 255, 255)


def test_grey_and_cmyk_have_profiles_too():
    grey = decode_image(encoded(Image.new("L", (40, 40), 128), icc_profile=LINEAR_GREY))
    assert grey.getpixel((20, 20)) == pytest.approx((188, 188, 188), abs=1)
    cyan = decode_image(encoded(Image.new("CMYK", (40, 40), (255, 0, 0, 0)), "TIFF", icc_profile=cmyk_profile()))
    assert max(cyan.getpixel((20, 20))) - min(cyan.getpixel((20, 20))) <= 2 and cyan.getpixel((20, 20))[0] > 180


@pytest.mark.parametrize("profile", [LIKE_SRGB, ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()])
def test_pixels_in_srgb_stay_as_they_are(profile):
    image = Image.effect_noise((40, 40), 90).convert("RGB")
    assert to_srgb_transform(profile, "RGB") is None
    assert np.array_equal(decode_image(encoded(image, icc_profile=profile)), image)


@pytest.mark.parametrize(
    "profile", [b"", b"none", DISPLAY_P3[:200], DISPLAY_P3[:128] + b"\xff" * 300, LINEAR_GREY, cmyk_profile()]
)
def test_a_profile_that_is_damaged_or_of_other_pixels_is_ignored(profile):
    image = Image.new("RGB", (40, 40), (60, 200, 60))
    assert decode_image(encoded(image, icc_profile=profile)).getpixel((20, 20)) == (60, 200, 60)


def test_of_an_animation_the_first_frame_is_taken():
    frames = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert decode_image(data).getpixel((0, 0)) == pytest.approx((255, 0, 0), abs=2)


def png_header(width, height):
    """A PNG that announces a size and holds almost no pixels."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 9)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "undecodable"),
        (b"no image at all", "undecodable"),
        (encoded(Image.effect_noise((80, 80), 50), "JPEG")[:600], "undecodable"),
        (png_header(10_000, 10_000), "too large"),
        (png_header(60_000, 60_000), "too large"),
    ],
)
def test_damaged_and_huge_images_are_refused_with_the_reason(data, reason):
    with pytest.raises(ImageFault, match=reason):
        decode_image(data)


@pytest.mark.parametrize("size", [(500, 375), (375, 500), (64, 64), (31, 999), (512, 512)])
def test_the_shorter_side_gets_the_resolution_and_the_crop_is_square(size):
    image = resize_shorter_side(Image.new("RGB", size), 128)
    assert min(image.size) == 128
    assert max(image.size) / 128 == pytest.approx(max(size) / min(size), rel=0.01)
    for place in (0.0, 0.5, 1.0):
        assert crop_square(image, 128, place, place).size == (128, 128)


def test_crops_reach_both_ends():
    image = Image.new("RGB", (100, 50), "white")
    image.putpixel((0, 0), (0, 0, 0))
    image.putpixel((99, 49), (0, 0, 0))
    assert crop_square(image, 50, 0.0, 0.0).getpixel((0, 0)) == (0, 0, 0)
    assert crop_square(image, 50, 1.0, 1.0).getpixel((49, 49)) == (0, 0, 0)


def test_pixels_are_normalised_to_minus_one_to_one_channels_first():
    image = Image.new("RGB", (4, 2), (0, 255, 51))
    pixels = normalise(image)
    assert pixels.dtype == np.float32 and pixels.shape == (3, 2, 4)
    np.testing.assert_allclose(pixels[:, 0, 0], [-1.0, 1.0, -0.6], atol=1e-6)


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("size", [(50, 33), (33, 50), (40, 40)])
def test_the_sizes_told_are_those_of_the_photo_and_where_the_crop_lies_in_it(size, mirrored):
    """Each pixel of the resized photo says in its colours where it is: so does the first of the crop."""
    resized = tuple(20 * side // min(size) for side in size)
    places = np.stack([*np.meshgrid(range(resized[0]), range(resized[1])), np.zeros(resized[::-1])], axis=-1)
    image = Image.fromarray(places.astype(np.uint8))
    crop = crop_square(image, 16, 0.3, 0.9)
    found = time_ids(size, resized, crop.size, 0.3, 0.9, mirrored=mirrored)
    if mirrored:  # the same crop, cut out of the mirrored photo
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        crop = crop.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    height, width, top, left, *target = found
    assert (width, height) == size and target == [16, 16]
    assert np.array_equal(np.asarray(image)[top : top + 16, left : left + 16], np.asarray(crop))
