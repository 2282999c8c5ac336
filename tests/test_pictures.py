"""Images side by side with words."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest
import torch
from PIL import Image, ImageColor

from lcm_lightning.generate import file_stems, pictures_by_name, write_pictures
from lcm_lightning.output.pictures import CAPTION, GAP, HEADING, contact_sheet, labelled_grid

IMAGES = torch.rand(2, 3, 128, 128)


def test_a_heading_takes_18_px_for_every_further_line():
    heights = [labelled_grid([IMAGES], [heading], ["a", "b"]).height for heading in ("base", "fine-tuned, 50 steps")]
    assert heights == [HEADING + 2 * (128 + GAP), HEADING + 18 + 2 * (128 + GAP)]


def test_pictures_that_are_not_square_keep_their_sides():
    wide = torch.rand(2, 3, 128, 192)
    assert labelled_grid([wide] * 2, ["a", "b"], ["a", "b"]).size == (
        CAPTION + GAP + 2 * (192 + GAP),
        HEADING + 2 * (128 + GAP),
    )
    assert contact_sheet(wide).size == (2 * (192 + GAP) + GAP, 128 + GAP + GAP)


def test_a_caption_of_a_sheet_takes_24_px():
    assert contact_sheet(IMAGES, captions=["a", "b"]).height == 128 + 24 + GAP
    assert contact_sheet(IMAGES).height == 128 + GAP + GAP


def test_a_sheet_of_several_prompts_has_a_row_for_each():
    pictures = pictures_by_name(torch.rand(6, 3, 128, 128), ["cat"] * 3 + ["dog"] * 3, [0, 1, 2] * 2)
    assert pictures["prompts.png"].size == (3 * (128 + GAP) + GAP, 2 * (128 + 24) + GAP)


def test_prompts_whose_names_are_alike_have_files_of_their_own():
    for prompts in (["cat-3", "cat", "Cat"], ["cat", "Cat", "cat-2", "CAT!"]):
        stems = file_stems(prompts)
        assert len(set(stems.values())) == len(prompts) and stems[prompts[0]] == prompts[0]


@pytest.fixture
def draw(tmp_path: Path):
    """Writes pictures of a colour, as `generate` does; the names that they got."""

    def written(colour: str, *names: str, settings: str = "") -> list[str]:
        pictures = {name: Image.new("RGB", (8, 8), colour) for name in names}
        return [path.name for path in write_pictures(pictures, dict.fromkeys(names, settings), tmp_path)]

    return written


def test_a_picture_of_an_earlier_call_is_never_written_over(draw, tmp_path: Path):
    assert draw("red", "cat-0.png", "cat-1.png", "cat.png") == ["cat-0.png", "cat-1.png", "cat.png"]
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    assert draw("blue", "cat-1.png", "cat-2.png", "cat.png") == ["cat-1_2.png", "cat-2_2.png", "cat_2.png"]
    assert draw("green", "cat-1.png") == ["cat-1_3.png"]
    assert {path: path.read_bytes() for path in before} == before
    assert len(list(tmp_path.iterdir())) == 7


def test_the_same_pictures_again_are_the_same_files(draw, tmp_path: Path):
    for _ in range(2):
        assert draw("red", "cat-0.png") == ["cat-0.png"]
        assert draw("blue", "cat-0.png") == ["cat-0_2.png"]
    assert draw("red", "cat-0.png", settings="cat\nSteps: 4") == ["cat-0_3.png"]


def test_calls_that_end_at_the_same_moment_write_over_no_picture_of_each_other(draw, tmp_path: Path):
    together, colours = Barrier(4), ("red", "green", "blue", "white")

    def call(colour: str) -> list[str]:
        together.wait()
        return draw(colour, "cat-0.png", "cat.png")

    with ThreadPoolExecutor(len(colours)) as pool:
        written = dict(zip(colours, pool.map(call, colours), strict=True))
    assert len(list(tmp_path.iterdir())) == 2 * len(colours)
    for colour, names in written.items():
        for name in names:
            with Image.open(tmp_path / name) as picture:
                assert picture.getpixel((0, 0)) == ImageColor.getrgb(colour)
