"""Images side by side with words."""

import torch

from lcm_lightning.generate import pictures_by_name
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
