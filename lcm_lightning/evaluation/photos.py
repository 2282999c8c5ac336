"""An evaluation's grids without the data set's photos, which are not the run's to show elsewhere."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from lcm_lightning.evaluation.tables import REAL
from lcm_lightning.output.pictures import grid_images, png_bytes, without_column


def without_photos(grid: Path) -> bytes | None:
    """A grid's file as a PNG without its column of photos.

    None for one that does not say where these lie, as versions before 0.2 wrote them. Raises `OSError` where the file
    is no picture.
    """
    with Image.open(grid) as file:
        picture, headings = file.convert("RGB"), {image.heading for image in grid_images(file)}
    if not headings:
        return None
    return png_bytes(without_column(picture, REAL) if REAL in headings else picture)
