"""Writing shards: the same bytes every time, resumable, nothing lost without a reason."""

from __future__ import annotations

import csv
import io
import json
import shutil
import tarfile
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from helpers.profiles import DISPLAY_P3
from lcm_lightning.data.images import ImageFault, open_image
from lcm_lightning.data.records import Record
from lcm_lightning.data.shards import find_shards, fingerprint, iterate_shards, open_split
from lcm_lightning.data.writing import ShardSettings, encode_image, write_shard, write_shards
from lcm_lightning.errors import UserError


def image_bytes(format="PNG", size=(48, 40), mode="RGB", seed=0, **options):
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(buffer, format, **options)
    return buffer.getvalue()


def some_records(number=11, **changes):
    splits = ["train"] * (number - 4) + ["val"] * 2 + ["test"] * 2
    return [
        Record(f"key{n}", changes.get(f"key{n}", image_bytes(seed=n)), (f"caption {n}", "", f"other {n}"), split)
        for n, split in enumerate(splits)
    ]


def content(folder):
    """Bytes of all files but the notes for a next run."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


SMALL = ShardSettings(samples_per_shard=3)


def write(records, output, **options):
    return write_shards(records, output, name="squares", **({"settings": SMALL, "workers": 1} | options))


def members(path):
    with tarfile.open(path) as archive:
        return {member.name: archive.extractfile(member).read() for member in archive}


def test_shards_hold_the_very_image_bytes_and_all_captions(tmp_path):
    records = some_records()
    index = write(records, tmp_path)
    assert {split: [s["samples"] for s in part["shards"]] for split, part in index["splits"].items()} == {
        "train": [3, 3, 1],
        "val": [2],
        "test": [2],
    }
    assert index == json.loads((tmp_path / "index.json").read_text())
    first = members(tmp_path / "train-000000.tar")
    assert list(first) == ["key0.png", "key0.json", "key1.png", "key1.json", "key2.png", "key2.json"]
    assert first["key1.png"] == records[1].image
    assert json.loads(first["key1.json"]) == {"captions": ["caption 1", "other 1"]}


def test_the_index_agrees_with_the_files(tmp_path):
    index = write(some_records(), tmp_path)
    shards = open_split(find_shards(str(tmp_path)), "train")
    assert [shard.samples for shard in shards] == [3, 3, 1]
    samples = list(iterate_shards(shards))
    assert [sample.key for sample in samples] == [f"key{n}" for n in range(7)]
    assert samples[3].captions == ("caption 3", "other 3") and samples[3].image.size == (48, 40)
    for part in index["splits"].values():
        for shard in part["shards"]:
            assert shard["bytes"] == (tmp_path / shard["file"]).stat().st_size


def test_the_same_records_give_the_same_bytes_with_any_number_of_processes(tmp_path):
    records = some_records(key5=image_bytes("BMP"))
    write(records, tmp_path / "one")
    write(records, tmp_path / "two", workers=2)
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_other_pixels_give_another_fingerprint(tmp_path):
    first = write(some_records(), tmp_path / "one")
    second = write(some_records(key3=image_bytes(seed=99)), tmp_path / "two")
    assert first["fingerprint"] != second["fingerprint"]
    assert fingerprint(open_split(find_shards(str(tmp_path / "one")), "train")) != fingerprint(
        open_split(find_shards(str(tmp_path / "two")), "train")
    )


def test_an_interrupted_run_goes_on_with_the_missing_shards(tmp_path, monkeypatch):
    write(some_records(), tmp_path / "whole")

    def interrupted(task, output, settings):
        if task.file == "train-000002.tar":
            raise KeyboardInterrupt
        return write_shard(task, output, settings)

    monkeypatch.setattr("lcm_lightning.data.writing.write_shard", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write(some_records(), tmp_path / "cut")
    assert not (tmp_path / "cut" / "index.json").exists()
    monkeypatch.undo()
    kept = []
    write(some_records(), tmp_path / "cut", on_shard=lambda shard, was_kept: kept.append((shard.file, was_kept)))
    assert dict(kept) == {
        "train-000000.tar": True,
        "train-000001.tar": True,
        "train-000002.tar": False,
        "val-000000.tar": False,
        "test-000000.tar": False,
    }
    assert content(tmp_path / "cut") == content(tmp_path / "whole")


def test_a_shard_whose_bytes_changed_is_written_again(tmp_path):
    write(some_records(), tmp_path)
    before = content(tmp_path)
    (tmp_path / "train-000001.tar").write_bytes(b"\0" * 100)
    write(some_records(), tmp_path)
    assert content(tmp_path) == before


@pytest.mark.parametrize(
    ("note", "workers"),
    [(note, 1) for note in (b'{"file": "tra', b"[]", b"{}", b'{"skipped": [1]}', b"\xff\xfe", b"[" * 9999)]
    + [(b"", 2)],
)
def test_a_shard_whose_note_is_damaged_is_written_again(tmp_path, caplog, note, workers):
    write(some_records(), tmp_path)
    before = content(tmp_path)
    damaged = tmp_path / ".parts" / "train-000001.tar.json"
    whole = damaged.read_bytes()
    damaged.write_bytes(note)
    kept = {}
    write(
        some_records(), tmp_path, workers=workers, on_shard=lambda shard, was_kept: kept.update({shard.file: was_kept})
    )
    assert [file for file, was_kept in kept.items() if not was_kept] == ["train-000001.tar"]
    assert content(tmp_path) == before and damaged.read_bytes() == whole
    assert "train-000001.tar is written again" in caplog.text


@pytest.mark.parametrize("name", ["train-000000.tar", "0.tar", "index.json", "skipped.csv"])
def test_a_folder_with_files_of_others_is_left_as_it_is(tmp_path, name):
    (tmp_path / name).write_bytes(b"of someone else")
    with pytest.raises(UserError, match=rf"prepare\.output=.*: holds {name}, .*another folder"):
        write(some_records(), tmp_path)
    assert content(tmp_path) == {name: b"of someone else"} and not (tmp_path / ".parts").exists()


def test_cached_latents_are_not_written_over(tmp_path):
    (tmp_path / ".parts").mkdir()
    (tmp_path / ".parts" / "cache.json").write_text("{}")
    (tmp_path / "train-000000.tar").write_bytes(b"latents")
    with pytest.raises(UserError, match=r"prepare\.output=.*: holds train-000000\.tar"):
        write(some_records(), tmp_path)
    assert content(tmp_path) == {"train-000000.tar": b"latents"}


def test_shards_are_made_anew_without_the_notes_of_the_former_run(tmp_path):
    write(some_records(), tmp_path)
    before = content(tmp_path)
    shutil.rmtree(tmp_path / ".parts")
    write(some_records(), tmp_path)
    assert content(tmp_path) == before


def test_other_settings_leave_no_shard_of_the_former_run(tmp_path):
    write(some_records(), tmp_path)
    write(some_records(), tmp_path, settings=ShardSettings(samples_per_shard=100))
    assert sorted(path.name for path in tmp_path.glob("*.tar")) == [
        "test-000000.tar",
        "train-000000.tar",
        "val-000000.tar",
    ]
    assert sum(1 for _ in (tmp_path / ".parts").iterdir()) == 3


def test_every_skipped_image_is_reported_with_its_reason(tmp_path):
    records = [
        *some_records(),
        Record("gone", tmp_path / "gone.jpg", ("c",), "train"),
        Record("broken", b"no image", ("c",), "train"),
        Record("tiny", image_bytes(size=(8, 90)), ("c",), "val"),
        Record("silent", image_bytes(), ("", "  "), "test"),
        Record("homeless", image_bytes(), ("c",), None),
    ]
    index = write(records, tmp_path / "out")
    with (tmp_path / "out" / "skipped.csv").open(newline="") as file:
        rows = {row["key"]: (row["split"], row["image"], row["reason"]) for row in csv.DictReader(file)}
    assert rows == {
        "gone": ("train", "gone.jpg", "missing"),
        "broken": ("train", "", "undecodable"),
        "tiny": ("val", "", "too small"),
        "silent": ("test", "", "no caption"),
        "homeless": ("", "", "in no published split"),
    }
    assert index["skipped"] == dict.fromkeys(sorted(reason for *_, reason in rows.values()), 1)
    assert sum(part["samples"] for part in index["splits"].values()) == 11


def test_nothing_but_unusable_images_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match=r"skipped\.csv"):
        write([Record("broken", b"no image", ("c",), "train")], tmp_path)
    assert not list(tmp_path.glob("*.tar"))


@pytest.mark.parametrize("workers", [1, 2])
@pytest.mark.parametrize("notes", [True, False], ids=["notes", "no notes"])
def test_shards_outlive_photos_that_are_out_of_reach(tmp_path, workers, notes):
    photos = tmp_path / "photos"
    photos.mkdir()
    for record in some_records():
        (photos / record.key).write_bytes(record.image)
    records = [replace(record, image=photos / record.key) for record in some_records()]
    write(records, tmp_path / "out")
    if not notes:
        shutil.rmtree(tmp_path / "out" / ".parts")
    before = content(tmp_path / "out")
    photos.rename(tmp_path / "unmounted")
    with pytest.raises(UserError, match=r"none of the 11 images listed can be used \(missing: 11\)"):
        write(records, tmp_path / "out", workers=workers)
    after = content(tmp_path / "out")
    assert after.pop("skipped.csv") != before["skipped.csv"]
    assert after == {name: data for name, data in before.items() if name != "skipped.csv"}
    (tmp_path / "unmounted").rename(photos)
    kept = []
    write(records, tmp_path / "out", on_shard=lambda shard, was_kept: kept.append(was_kept))
    assert content(tmp_path / "out") == before and kept == [notes] * 5


@pytest.mark.parametrize("notes", [True, False], ids=["notes", "no notes"])
def test_a_shard_whose_photos_are_all_gone_goes_with_them_where_others_are_left(tmp_path, notes):
    write(some_records(), tmp_path)
    if not notes:
        shutil.rmtree(tmp_path / ".parts")
    index = write(some_records(**dict.fromkeys(("key3", "key4", "key5"), b"")), tmp_path)
    assert [shard["file"] for shard in index["splits"]["train"]["shards"]] == ["train-000000.tar", "train-000002.tar"]
    assert {path.name for path in tmp_path.glob("train-*.tar")} == {"train-000000.tar", "train-000002.tar"}
    assert not (tmp_path / ".parts" / "train-000001.tar.json").exists()


def test_a_key_that_comes_twice_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="key0"):
        write([*some_records(), some_records()[0]], tmp_path)


@pytest.mark.parametrize(
    ("data", "suffix", "kept"),
    [
        (image_bytes("JPEG"), "jpg", True),
        (image_bytes("JPEG", mode="L"), "jpg", True),
        (image_bytes("WEBP", lossless=True, size=(64, 64)), "webp", True),
        (image_bytes("JPEG", mode="CMYK"), "jpg", False),
        (image_bytes("PNG", mode="RGBA"), "png", False),
        (image_bytes("BMP"), "png", False),
        (image_bytes("GIF"), "png", False),
    ],
)
def test_images_are_encoded_again_only_where_needed(tmp_path, data, suffix, kept):
    write([Record("a", data, ("c",), "train")], tmp_path)
    stored = members(tmp_path / "train-000000.tar")
    assert (stored[f"a.{suffix}"] == data) is kept
    image = Image.open(io.BytesIO(stored[f"a.{suffix}"]))
    assert image.mode in ("RGB", "L")


def test_large_images_are_reduced_to_the_longest_side(tmp_path):
    records = [
        Record("large", image_bytes("JPEG", size=(400, 200)), ("c",), "train"),
        Record("small", image_bytes("JPEG", size=(100, 50)), ("c",), "train"),
    ]
    write(records, tmp_path, settings=ShardSettings(max_side=200))
    stored = members(tmp_path / "train-000000.tar")
    assert Image.open(io.BytesIO(stored["large.jpg"])).size == (200, 100)
    assert stored["small.jpg"] == records[1].image


def test_a_large_jpeg_is_decoded_at_a_fraction_of_its_size_and_looks_the_same():
    waves = [
        np.add.outer(np.sin(np.arange(1500) / a), np.sin(np.arange(2000) / b)) for a, b in ((9, 40), (70, 8), (20, 5))
    ]
    photo = Image.fromarray((np.stack(waves, -1) * 60 + 128).astype(np.uint8))
    buffer = io.BytesIO()
    photo.save(buffer, "JPEG", quality=95)
    assert open_image(buffer.getvalue(), 200).size == (500, 375)
    stored = encode_image(buffer.getvalue(), ShardSettings(max_side=200))[1]
    expected = open_image(buffer.getvalue()).resize((200, 150), Image.Resampling.LANCZOS)
    error = np.asarray(Image.open(io.BytesIO(stored)), float) - np.asarray(expected, float)
    assert np.abs(error).mean() < 1.5


def test_the_shorter_side_is_judged_before_large_images_are_reduced():
    buffer = io.BytesIO()
    Image.new("RGB", (3000, 60)).save(buffer, "JPEG")
    assert encode_image(buffer.getvalue(), ShardSettings(max_side=200, min_side=60))[0] == "jpg"
    with pytest.raises(ImageFault, match="too small: 3000x60"):
        encode_image(buffer.getvalue(), ShardSettings(max_side=200, min_side=61))


def test_a_photo_stored_as_it_is_keeps_its_profile_and_comes_out_in_srgb(tmp_path):
    photo = image_bytes("JPEG", icc_profile=DISPLAY_P3)
    write([Record("a", photo, ("one",), "train")], tmp_path)
    (written,) = (content for name, content in members(tmp_path / "train-000000.tar").items() if name == "a.jpg")
    assert written == photo
    shards = open_split(find_shards(str(tmp_path)), "train")
    (sample,) = iterate_shards(shards)
    with_profile, without = np.asarray(sample.image, int), np.asarray(Image.open(io.BytesIO(photo)), int)
    assert np.abs(with_profile - without).max() > 20


@pytest.mark.parametrize("format", ["JPEG", "PNG"])
def test_a_photo_encoded_again_is_in_srgb_and_has_no_profile(format):
    buffer = io.BytesIO()
    Image.new("RGB", (80, 80), (60, 200, 60)).save(buffer, format, icc_profile=DISPLAY_P3)
    _, data = encode_image(buffer.getvalue(), replace(SMALL, max_side=40))
    image = Image.open(io.BytesIO(data))
    assert image.getpixel((20, 20)) == pytest.approx((0, 203, 11), abs=4) and "icc_profile" not in image.info
