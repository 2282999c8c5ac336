"""Images as pictures: in files with their settings, and side by side with words."""

from __future__ import annotations

import base64
import io
import json
import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

GAP = 8
HEADING = 30
HEADING_LINE = 18
CAPTION = 200
CAPTION_LINE = 24
SMALLEST_CELL = 128
LARGEST_WHOLE = 128  # px: wider pictures are reduced in a page of many
LARGEST_THUMBNAIL = 256  # px
CELLS = "cells"  # name of the text in a grid's file that says where its images lie


@dataclass(frozen=True)
class GridImage:
    """An image of a grid, with the words of its column and its row."""

    heading: str
    caption: str
    picture: Image.Image


def to_bytes(images: Tensor) -> Tensor:
    """Images in [0, 1] as picture files hold them, uint8."""
    return (images * 255).round().byte()


def to_pil(image: Tensor) -> Image.Image:
    """A [3, H, W] tensor in [0, 1] as a picture."""
    return Image.fromarray(to_bytes(image).permute(1, 2, 0).contiguous().cpu().numpy())


def settings_text(prompt: str, negative_prompt: str, settings: Mapping[str, object]) -> str:
    """How a picture was drawn, as AUTOMATIC1111's web UI writes it and image browsers and ComfyUI read it.

    Prompt, negative prompt where there is one, and a line of names and values. A value with signs of that line's own is
    quoted, as a JSON string.
    """
    lines = [prompt, *([f"Negative prompt: {negative_prompt}"] if negative_prompt else [])]
    quoted = {
        name: json.dumps(str(value), ensure_ascii=False) if set(str(value)) & set(',:\n"') else value
        for name, value in settings.items()
    }
    return "\n".join([*lines, ", ".join(f"{name}: {value}" for name, value in quoted.items())])


def drawing_settings(
    *,
    steps: int,
    sampler: str,
    guidance_scale: float,
    size: tuple[int, int],
    model: str,
    loras: str = "",
    weights: Mapping[str, float] | None = None,
    init_image: str | None = None,
    strength: float | None = None,
) -> dict[str, object]:
    """What a picture was drawn with, under the names of `settings_text`'s format; prompts and seed aside.

    Files by name alone: where they lie is nobody's business whom a picture is sent to.

    Args:
        sampler: its title.
        size: width and height, px.
        model: path or hub id.
        loras, weights: what the adapters are called together, and by name what each was multiplied by.
        init_image, strength: the photo that was changed, and how far.
    """
    said: dict[str, object] = {"Steps": steps, "Sampler": sampler, "CFG scale": guidance_scale}
    said |= {"Size": f"{size[0]}x{size[1]}", "Model": Path(model).name}
    if weights:
        said["LoRAs"] = f"{loras}: " + ", ".join(f"{name} {weight:g}" for name, weight in weights.items())
    if init_image is not None:
        said |= {"Denoising strength": strength, "Init image": Path(init_image).name}
    return said


def data_address(content: bytes, kind: str) -> str:
    """A picture's file, PNG or another `kind`, as an address that holds it whole."""
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def thumbnail_address(picture: Image.Image) -> str:
    """A picture as a data address: as it is up to `LARGEST_WHOLE` px of width, else reduced and as JPEG."""
    if picture.width <= LARGEST_WHOLE:
        return data_address(png_bytes(picture), "png")
    reduced = picture.convert("RGB")
    reduced.thumbnail((LARGEST_THUMBNAIL, LARGEST_THUMBNAIL), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    reduced.save(buffer, "JPEG", quality=90)
    return data_address(buffer.getvalue(), "jpeg")


def contact_sheet(images: Tensor, columns: int = 4, captions: Sequence[str] = ()) -> Image.Image:
    """Images [N, 3, H, W] in [0, 1] in rows of `columns`, enlarged as in `labelled_grid`, each over its caption."""
    enlarged = max(1, SMALLEST_CELL // images.shape[-1])
    tall, wide = (side * enlarged for side in images.shape[-2:])
    columns = min(columns, len(images))
    rows = -(-len(images) // columns)
    height = tall + (CAPTION_LINE if captions else GAP)
    sheet = Image.new("RGB", (columns * (wide + GAP) + GAP, rows * height + GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for number, image in enumerate(images):
        left, top = GAP + number % columns * (wide + GAP), GAP + number // columns * height
        sheet.paste(to_pil(image).resize((wide, tall), Image.Resampling.NEAREST), (left, top))
        if captions:
            draw.text((left, top + tall), textwrap.shorten(captions[number], wide // 6, placeholder="…"), "black", font)
    return sheet


def labelled_grid(columns: Sequence[Tensor], headings: Sequence[str], captions: Sequence[str]) -> Image.Image:
    """A picture of `columns`, each [N, 3, H, W] in [0, 1], under their headings, row i beside ``captions[i]``.

    Images below 128 px are enlarged by a whole factor, pixel by pixel, so that what is seen is what was drawn.
    `grid_images` takes it apart again.
    """
    enlarged = max(1, SMALLEST_CELL // columns[0].shape[-1])
    tall, wide = (side * enlarged for side in columns[0].shape[-2:])
    font = ImageFont.load_default(14)
    width = CAPTION + len(columns) * (wide + GAP) + GAP
    wrapped = ["\n".join(textwrap.fill(line, max(1, wide // 8)) for line in text.split("\n")) for text in headings]
    top = HEADING + HEADING_LINE * max((heading.count("\n") for heading in wrapped), default=0)
    grid = Image.new("RGB", (width, top + len(captions) * (tall + GAP)), "white")
    draw = ImageDraw.Draw(grid)
    for j, (images, heading) in enumerate(zip(columns, wrapped, strict=True)):
        left = CAPTION + GAP + j * (wide + GAP)
        draw.multiline_text((left + wide // 2, top // 2), heading, "black", font, anchor="mm", align="center")
        for i, image in enumerate(images):
            grid.paste(to_pil(image).resize((wide, tall), Image.Resampling.NEAREST), (left, top + i * (tall + GAP)))
    for i, caption in enumerate(captions):
        lines = "\n".join(textwrap.wrap(caption, 26)[: max(1, tall // 18)])
        draw.multiline_text((GAP, top + i * (tall + GAP) + 4), lines, "black", font)
    places = {"first": [CAPTION + GAP, top], "size": [wide, tall]}
    grid.info[CELLS] = json.dumps({"headings": list(headings), "captions": list(captions), **places})
    return grid


def grid_images(grid: Image.Image) -> list[GridImage]:
    """The images of a `labelled_grid`, or of its file by `png_bytes`, row by row; none where it does not say."""
    if CELLS not in grid.info:
        return []
    cells = json.loads(grid.info[CELLS])
    (left, top), (wide, tall) = cells["first"], cells["size"]
    return [
        GridImage(heading, caption, grid.crop((x, y, x + wide, y + tall)))
        for y, caption in zip(range(top, grid.height, tall + GAP), cells["captions"], strict=True)
        for x, heading in zip(range(left, grid.width - GAP, wide + GAP), cells["headings"], strict=True)
    ]


def without_column(grid: Image.Image, heading: str) -> Image.Image:
    """A `labelled_grid`, or what its file holds, less the images under `heading`, which has to be there."""
    cells = json.loads(grid.info[CELLS])
    place = cells["headings"].index(heading)
    width = cells["size"][0] + GAP
    start = cells["first"][0] + place * width
    rest = Image.new("RGB", (grid.width - width, grid.height), "white")
    rest.paste(grid.crop((0, 0, start, grid.height)), (0, 0))
    rest.paste(grid.crop((start + width, 0, grid.width, grid.height)), (start, 0))
    cells["headings"].pop(place)
    rest.info[CELLS] = json.dumps(cells)
    return rest


def png_bytes(image: Image.Image, settings: str = "") -> bytes:
    """A PNG file: with its `settings_text` under the key ``parameters``, and of a grid with where its images lie."""
    said = PngInfo()
    if settings:
        said.add_itxt("parameters", settings)
    if CELLS in image.info:
        said.add_text(CELLS, image.info[CELLS])
    buffer = io.BytesIO()
    image.save(buffer, "PNG", pnginfo=said)
    return buffer.getvalue()


def figure_bytes(figure: Figure, kind: str = "png") -> bytes:
    """A plot as a "png" or "svg" file, the same bytes for the same plot."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=kind, dpi=130, metadata={"Date": None} if kind == "svg" else None)
    return buffer.getvalue()
