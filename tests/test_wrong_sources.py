"""A `data.source` that is one folder off, or another data set, is answered with the right one."""

from __future__ import annotations

import json
import logging
import shutil
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from lcm_lightning.data.datamodule import CaptionedImages, locate
from lcm_lightning.data.sources import read_source
from lcm_lightning.data.wrong_sources import warn_of_name
from lcm_lightning.errors import UserError

FLICKR8K = ("1000268201_693b08cb0e.jpg", "1001773457_577c3a7d70.jpg")
FLICKR30K = ("1000092795.jpg", "10002456.jpg")


def photos(folder: Path, names: tuple[str, ...]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        Image.new("RGB", (40, 40)).save(folder / name)
    return folder


def kaggle(folder: Path, names: tuple[str, ...] = FLICKR8K) -> Path:
    """As Kaggle has Flickr8k, and another of its uploads Flickr30k."""
    photos(folder / "Images", names)
    (folder / "captions.txt").write_text("image,caption\n" + "".join(f"{name},A dog .\n" for name in names))
    return folder


def of_authors(folder: Path) -> Path:
    photos(folder / "Flicker8k_Dataset", FLICKR8K)
    (folder / "Flickr8k_text").mkdir()
    (folder / "Flickr8k_text" / "Flickr8k.token.txt").write_text("".join(f"{name}#0\tA dog .\n" for name in FLICKR8K))
    return folder


def coco(folder: Path) -> Path:
    photos(folder / "val2014", ("COCO_val2014_000000000042.jpg",))
    (folder / "annotations").mkdir()
    content = {
        "images": [{"id": 1, "file_name": "COCO_val2014_000000000042.jpg"}],
        "annotations": [{"id": 1, "image_id": 1, "caption": "A dog."}],
    }
    (folder / "annotations" / "captions_val2014.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("layout", "name", "inside"),
    [(kaggle, "flickr8k", "Images"), (of_authors, "flickr8k", "Flicker8k_Dataset"), (coco, "coco", "val2014")],
)
def test_the_folder_of_the_photos_alone_stands_for_the_one_around_it(tmp_path: Path, layout, name: str, inside: str):
    whole = layout(tmp_path / "whole")
    for ask in (read_source, lambda source, name: locate(name, source)):
        with pytest.raises(UserError, match=rf"data\.source={whole}(\?|\n)"):
            ask(str(whole / inside), name)
    assert read_source(str(whole), name).samples


def test_captions_of_other_photos_beside_a_folder_are_not_proposed(tmp_path: Path):
    kaggle(tmp_path)
    with pytest.raises(UserError, match="no captioned images recognised"):
        read_source(str(photos(tmp_path / "others", ("a.jpg",))), "flickr8k")


def test_a_folder_far_above_a_data_set_stands_for_it_where_it_is_the_only_one(tmp_path: Path):
    whole = kaggle(tmp_path / "downloads" / "kaggle" / "flickr8k" / "Flickr8k")
    for ask in (read_source, lambda source, name: locate(name, source)):
        with pytest.raises(UserError, match=rf"data\.source={whole}(\?|\n)"):
            ask(str(tmp_path), "flickr8k")
    kaggle(tmp_path / "other" / "kaggle" / "place" / "Flickr8k")
    with pytest.raises(UserError, match="no captioned images recognised"):
        read_source(str(tmp_path), "flickr8k")


def test_a_file_of_captions_stands_for_its_folder_and_an_archive_is_to_be_unpacked(tmp_path: Path):
    whole = kaggle(tmp_path / "Flickr8k")
    with pytest.raises(UserError, match=rf"captions\.txt: a file; did you mean data\.source={whole}\?"):
        read_source(str(whole / "captions.txt"), "flickr8k")
    with zipfile.ZipFile(tmp_path / "archive", "w") as archive:
        archive.writestr("captions.txt", "")
    with pytest.raises(UserError, match="archive: an archive; unpack it; give the folder"):
        read_source(str(tmp_path / "archive"), "flickr8k")


def test_folders_of_prepared_shards_are_named_and_not_mixed(tmp_path: Path, flickr_shards: Path):
    first, second = (shutil.copytree(flickr_shards, tmp_path / "data" / name) for name in ("a", "b"))
    meant = rf"did you mean data\.source={first} or data\.source={second}\?"
    for source in (tmp_path, tmp_path / "data"):
        with pytest.raises(UserError, match=meant):
            locate("flickr8k", str(source))
    with pytest.raises(UserError, match=rf"did you mean data\.source={first}\?"):
        locate("flickr8k", str(first / "index.json"))


def test_shards_of_others_in_folders_with_an_index_of_their_own_are_read(tmp_path: Path, flickr_shards: Path):
    """webdataset's wids writes an `index.json` beside the shards of each split."""
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        shutil.copy(next(flickr_shards.glob("*.tar")), tmp_path / split / "0.tar")
        (tmp_path / split / "index.json").write_text('{"wids_version": 1, "shardlist": [{"url": "0.tar"}]}')
    assert locate("mine", str(tmp_path)).locations.keys() == {"train", "val"}


@pytest.mark.parametrize(
    ("layout", "found", "name"),
    [
        (kaggle, "flickr8k", "flickr30k"),
        (of_authors, "flickr8k", "flickr30k"),
        (of_authors, "flickr8k", "coco"),
        (lambda folder: kaggle(folder, FLICKR30K), "flickr30k", "flickr8k"),
        (coco, "coco", "flickr8k"),
    ],
)
def test_a_published_data_set_is_not_called_by_another_s_name(tmp_path: Path, layout, found: str, name: str):
    folder = str(layout(tmp_path / "set"))
    with pytest.raises(
        UserError, match=rf"holds {found}, and is to be called {name}, .*; set data={found}, or data\.name="
    ):
        read_source(folder, name)
    for own in (found, "mine"):
        assert read_source(folder, own).samples


def test_shards_of_a_published_data_set_are_not_cut_anew_under_another_s_name(flickr_shards: Path):
    with pytest.raises(UserError, match="holds flickr8k, and is to be called flickr30k"):
        read_source(str(flickr_shards), "flickr30k")
    assert read_source(str(flickr_shards), "mine").samples == 32


def test_photos_of_one_s_own_may_go_by_any_name(tmp_path: Path):
    names = tuple(f"{number:07d}.jpg" for number in range(3))
    assert read_source(str(kaggle(tmp_path, names)), "flickr8k").samples == 3


def test_training_on_another_data_set_s_shards_is_warned_of_once(flickr_shards: Path, caplog: pytest.LogCaptureFixture):
    warn_of_name.cache_clear()  # a test before it may have used these shards
    with caplog.at_level(logging.WARNING):
        for name in ("flickr30k", "flickr30k", "flickr8k", "mine"):
            assert CaptionedImages(name, str(flickr_shards)).index
    (said,) = caplog.messages
    assert "holds shards of flickr8k, and runs and figures will say flickr30k; data.name=flickr8k" in said
