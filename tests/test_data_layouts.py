"""Readers: every layout captioned photos come in, from tiny folders made here."""

from __future__ import annotations

import json

import pytest
from PIL import Image

from lcm_lightning.data.caption_tables import read_caption_table
from lcm_lightning.data.images import ImageFault
from lcm_lightning.data.layouts import recognise
from lcm_lightning.data.records import hash_split, sample_key
from lcm_lightning.data.sources import read_source
from lcm_lightning.data.writing import load_bytes
from lcm_lightning.errors import UserError


def photo(path, colour="red"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 40), colour).save(path)


def by_key(source):
    records = {record.key: record for record in source.records}
    assert len(records) == source.samples
    return records


@pytest.mark.parametrize("text_folder", ["", "Flickr8k_text"])
@pytest.mark.parametrize("image_folder", ["Flicker8k_Dataset", "Images"])
def test_flickr8k_of_its_authors(tmp_path, image_folder, text_folder):
    text = tmp_path / text_folder
    text.mkdir(exist_ok=True)
    names = ["1_a.jpg", "2_b.jpg", "3_c.jpg", "4_d.jpg"]
    for name in names:
        photo(tmp_path / image_folder / name)
    lines = [f"{name}#{number}\tCaption {number} of {name} .\n" for name in names for number in (1, 0)]
    (text / "Flickr8k.token.txt").write_text("".join(lines))
    for part, name in {"train": names[0], "dev": names[1], "test": names[2]}.items():
        (text / f"Flickr_8k.{part}Images.txt").write_text(name + "\n")
    source = read_source(str(tmp_path), "flickr8k")
    records = by_key(source)
    assert {key: record.split for key, record in records.items()} == {
        "1_a": "train",
        "2_b": "val",
        "3_c": "test",
        "4_d": None,
    }
    assert records["1_a"].captions == ("Caption 0 of 1_a.jpg .", "Caption 1 of 1_a.jpg .")
    assert load_bytes(records["1_a"].image) == (tmp_path / image_folder / "1_a.jpg").read_bytes()
    assert "authors" in source.split_origin


def kaggle_flickr8k(folder, names=("1_a.jpg", "2_b.jpg")):
    for name in names:
        photo(folder / "Images" / name)
    rows = [f'{name},"A dog , a ""good"" one , runs ."\n{name},Plain .\n' for name in names]
    (folder / "captions.txt").write_text("image,caption\n" + "".join(rows))


def test_flickr8k_of_kaggle_keeps_commas_and_quotes(tmp_path):
    kaggle_flickr8k(tmp_path)
    source = read_source(str(tmp_path), "flickr8k")
    assert by_key(source)["2_b"].captions == ('A dog , a "good" one , runs .', "Plain .")
    assert "none published here" in source.split_origin


def test_a_comma_that_nobody_quoted_stays_in_the_caption(tmp_path):
    (tmp_path / "captions.txt").write_text("image,caption\na.jpg,One , two , three\n")
    assert read_caption_table(tmp_path / "captions.txt") == {"a.jpg": ["One , two , three"]}


def test_flickr30k_table_with_three_comma_columns(tmp_path):
    (tmp_path / "captions.txt").write_text('image_name,comment_number,comment\na.jpg,0,"One , two"\na.jpg,1,Three\n')
    assert read_caption_table(tmp_path / "captions.txt") == {"a.jpg": ["One , two", "Three"]}


def test_kaggle_takes_the_authors_splits_before_karpathys(tmp_path):
    kaggle_flickr8k(tmp_path)
    karpathy = {"images": [{"filename": "1_a.jpg", "split": "restval", "sentences": []}]}
    (tmp_path / "dataset_flickr8k.json").write_text(json.dumps(karpathy))
    records = by_key(read_source(str(tmp_path), "flickr8k"))
    assert (records["1_a"].split, records["2_b"].split) == ("train", None)
    (tmp_path / "Flickr_8k.trainImages.txt").write_text("2_b.jpg\n")
    records = by_key(read_source(str(tmp_path), "flickr8k"))
    assert (records["1_a"].split, records["2_b"].split) == (None, "train")


@pytest.mark.parametrize(
    "folder", ["flickr30k-images", "flickr30k_images", "flickr30k_images/flickr30k_images", "Images"]
)
def test_flickr30k_of_its_authors(tmp_path, folder):
    photo(tmp_path / folder / "1000092795.jpg")
    (tmp_path / "results_20130124.token").write_text("1000092795.jpg#0\tTwo men .\n1000092795.jpg#1\tTwo boys .\n")
    record = by_key(read_source(str(tmp_path), "flickr30k"))["1000092795"]
    assert record.captions == ("Two men .", "Two boys .")
    assert record.image == tmp_path / folder / "1000092795.jpg"


def test_flickr30k_of_kaggle_repairs_the_row_without_a_bar(tmp_path):
    folder = tmp_path / "flickr30k_images"
    photo(folder / "flickr30k_images" / "2199200615.jpg")
    (folder / "results.csv").write_text(
        "image_name| comment_number| comment\n"
        '2199200615.jpg| 3| A "happy" dog , running | jumping .\n'
        "2199200615.jpg| 4   A dog runs across the grass .\n"
    )
    record = by_key(read_source(str(tmp_path), "flickr30k"))["2199200615"]
    assert [caption.strip() for caption in record.captions] == [
        'A "happy" dog , running | jumping .',
        "A dog runs across the grass .",
    ]


def test_karpathys_file_alone_gives_captions_and_splits(tmp_path):
    images = [
        {"filename": f"{split}.jpg", "split": split, "sentences": [{"raw": "A ."}, {"raw": "B ."}]}
        for split in ("train", "restval", "val", "test")
    ]
    (tmp_path / "dataset_flickr30k.json").write_text(json.dumps({"images": images}))
    records = by_key(read_source(str(tmp_path), "flickr30k"))
    assert {key: record.split for key, record in records.items()} == {
        "train": "train",
        "restval": "train",
        "val": "val",
        "test": "test",
    }
    assert records["val"].captions == ("A .", "B .")
    with pytest.raises(ImageFault, match="missing"):
        load_bytes(records["val"].image)


def coco_captions(names):
    images = [{"id": 10 + number, "file_name": name} for number, name in enumerate(names)]
    annotations = [
        {
            "id": 2 * image["id"] + number,
            "image_id": image["id"],
            "caption": f"Caption {number} of {image['file_name']}.",
        }
        for number in (1, 0)
        for image in images
    ]
    return json.dumps({"images": images, "annotations": annotations})


def test_coco_of_its_authors_takes_the_splits_whose_photos_are_there(tmp_path):
    names = ["COCO_val2014_000000000042.jpg", "COCO_val2014_000000000073.jpg"]
    photo(tmp_path / "val2014" / names[0])
    photo(tmp_path / "val2014" / names[1])
    (tmp_path / "annotations").mkdir()
    (tmp_path / "annotations" / "captions_val2014.json").write_text(coco_captions(names))
    (tmp_path / "annotations" / "captions_train2014.json").write_text(coco_captions(["COCO_train2014_1.jpg"]))
    source = read_source(str(tmp_path), "coco")
    records = by_key(source)
    assert {record.split for record in records.values()} == {"val"} and len(records) == 2
    record = records["COCO_val2014_000000000042"]
    assert record.captions == (f"Caption 0 of {names[0]}.", f"Caption 1 of {names[0]}.")
    assert load_bytes(record.image) == (tmp_path / "val2014" / names[0]).read_bytes()


def test_a_damaged_coco_file_is_named(tmp_path):
    (tmp_path / "captions_val2014.json").write_text('{"images": []}')
    with pytest.raises(UserError, match=r"captions_val2014.json cannot be read \(no 'annotations'\)"):
        read_source(str(tmp_path), "coco")


def test_folder_with_a_text_file_beside_each_image(tmp_path):
    photo(tmp_path / "cats" / "my cat.v2.png")
    (tmp_path / "cats" / "my cat.v2.txt").write_text("A cat\n\nTwo cats\n")
    photo(tmp_path / "alone.jpg")
    records = list(read_source(str(tmp_path), "folder").records)
    cat = next(record for record in records if "cat" in record.key)
    assert "." not in cat.key and "/" not in cat.key
    assert [caption for caption in cat.captions if caption] == ["A cat", "Two cats"]
    assert next(record for record in records if record.key == "alone").captions == ()


def test_images_that_differ_in_suffix_only_get_keys_of_their_own(tmp_path):
    for name in ("a.jpg", "a.png"):
        photo(tmp_path / name)
    (tmp_path / "a.txt").write_text("A square")
    by_key(read_source(str(tmp_path), "folder"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("metadata.jsonl", '{"file_name": "a.png", "text": "A red square"}\n'),
        ("metadata.jsonl", '{"file_name": "a.png", "captions": ["A red square", "Red"]}\n'),
        ("metadata.csv", "file_name,caption\na.png,A red square\n"),
        ("metadata.csv", "file_name,caption_0,caption_1\na.png,A red square,Red\n"),
    ],
)
def test_folder_with_metadata(tmp_path, name, content):
    for split in ("train", "validation", "test"):
        photo(tmp_path / split / "a.png")
        (tmp_path / split / name).write_text(content)
    source = read_source(str(tmp_path), "folder")
    records = list(source.records)
    assert sorted(record.split for record in records) == ["test", "train", "val"]
    assert {record.captions[0] for record in records} == {"A red square"}
    assert {len(record.captions) for record in records} == ({2} if "captions" in content or "_1" in content else {1})
    assert "train/, val/, test/" in source.split_origin


def test_metadata_row_without_file_name_is_named(tmp_path):
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "x"}\n{"text": "x"}\n')
    with pytest.raises(UserError, match="row 2"):
        read_source(str(tmp_path), "folder")


def test_a_folder_with_nothing_known_says_what_was_looked_for(tmp_path):
    photo(tmp_path / "a.jpg")
    assert recognise(tmp_path) is None
    with pytest.raises(UserError, match=r"(?s)Flickr8k\.token\.txt.*metadata\.jsonl.*parquet.*tar"):
        read_source(str(tmp_path), "folder")


@pytest.mark.parametrize("source", [None, "nowhere", "/no/such/folder"])
def test_a_missing_source_is_a_user_error(source):
    with pytest.raises(UserError, match=r"data\.source"):
        read_source(source, "flickr8k")


def test_hash_splits_are_stable_and_near_80_10_10():
    splits = [hash_split(f"{number}.jpg") for number in range(5000)]
    assert splits == [hash_split(f"{number}.jpg") for number in range(5000)]
    assert splits.count("train") / 5000 == pytest.approx(0.8, abs=0.02)
    assert splits.count("val") / 5000 == pytest.approx(0.1, abs=0.015)


def test_keys_never_meet_and_have_no_dot():
    names = ["a/b", "a_b", "a.b", "a b", "猫", "犬", "x" * 300, "x" * 299 + "é"]
    keys = [sample_key(name) for name in names]
    assert len(set(keys)) == len(names)
    assert not any("." in key or "/" in key for key in keys)
    assert max(map(len, keys)) <= 80


def parquet_folder(folder, captions, splits=("train", "validation")):
    datasets = pytest.importorskip("datasets")
    for number, split in enumerate(splits):
        photo(folder / "images" / f"{split}.png", (number, 0, 0))
        rows = {"image": [str(folder / "images" / f"{split}.png")] * 2, **captions}
        part = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
        (folder / "set").mkdir(parents=True, exist_ok=True)
        part.to_parquet(folder / "set" / f"{split}-00000-of-00001.parquet")
    return folder / "set"


@pytest.mark.parametrize(
    "captions",
    [{"text": ["a", "b"]}, {"captions": [["a", "c"], ["b", "d"]]}, {"caption_0": ["a", "b"], "caption_1": ["c", "d"]}],
)
def test_hugging_face_data_set_from_local_parquet(tmp_path, monkeypatch, captions):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    source = read_source(str(parquet_folder(tmp_path, captions)), "folder")
    records = list(source.records)
    assert source.samples == 4 and source.split_origin == "the data set's own"
    assert [record.split for record in records] == ["train", "train", "val", "val"]
    assert [record.captions[0] for record in records] == ["a", "b", "a", "b"]
    assert load_bytes(records[0].image) == (tmp_path / "images" / "train.png").read_bytes()


@pytest.mark.parametrize("damage", ["cut", "in the middle", "no parquet"])
def test_a_damaged_parquet_file_is_named_with_its_remedy(tmp_path, monkeypatch, damage):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    file = parquet_folder(tmp_path, {"text": ["a", "b"]}) / "train-00000-of-00001.parquet"
    content = file.read_bytes()
    middle = content[:4] + bytes(len(content) // 2) + content[4 + len(content) // 2 :]
    file.write_bytes({"cut": content[:-20], "in the middle": middle, "no parquet": b"<html>404</html>"}[damage])
    with pytest.raises(UserError, match=r"train-00000-of-00001\.parquet is damaged \(.*\); copy or download it again$"):
        read_source(str(file.parent), "folder")


def test_hugging_face_data_set_without_caption_column_names_its_columns(tmp_path):
    folder = parquet_folder(tmp_path, {"label": [0, 1]})
    with pytest.raises(UserError, match="found image, label"):
        read_source(str(folder), "folder")


def test_without_the_datasets_package_the_remedy_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_bytes(b"")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'lcm-lightning\[hub-datasets\]'"):
        read_source(str(tmp_path), "folder")
