"""`python -m lcm_lightning.prepare` as a user runs it: layouts to shards, skipped images, second calls, mistakes."""

from __future__ import annotations

import functools
import http.server
import json
import os
import re
import runpy
import shlex
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from PIL import Image

from lcm_lightning.data.datamodule import CaptionedImages, iterate_split
from lcm_lightning.data.writing import write_shard
from lcm_lightning.errors import UserError

ROOT = Path(__file__).parents[1]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run the command in this process and in `tmp_path`; gives exit status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def command(*options, workers=1):
        monkeypatch.setattr(sys, "argv", ["prepare", f"prepare.workers={workers}", *map(str, options)])
        capsys.readouterr()
        status = 0
        try:
            runpy.run_module("lcm_lightning.prepare", run_name="__main__")
        except SystemExit as end:
            status = end.code
        return status, *capsys.readouterr()

    return command


def photo(path, number=0):
    """A 40 px photo whose every pixel is its number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 40), (number, number, number)).save(path)


def read_back(folder):
    """{split: {number painted into the image: captions}} of prepared shards."""
    return {
        split: {round(s.image.getpixel((9, 9))[0], -1): s.captions for s in iterate_split(str(folder), split)}
        for split in json.loads((folder / "index.json").read_text())["splits"]
    }


CAPTIONS = {0: ("A dog , running .", "A brown dog ."), 50: ("Two men .", "Men ."), 100: ("A girl .", "She smiles .")}
SPLITS = {0: "train", 50: "val", 100: "test"}
BY_SPLIT = {SPLITS[number]: {number: captions} for number, captions in CAPTIONS.items()}


def authors_flickr8k(folder):
    for number in CAPTIONS:
        photo(folder / "Flicker8k_Dataset" / f"{number}_ab.jpg", number)
    write_token_file(folder / "Flickr8k.token.txt", "{}_ab.jpg")
    for number, part in {0: "train", 50: "dev", 100: "test"}.items():
        (folder / f"Flickr_8k.{part}Images.txt").write_text(f"{number}_ab.jpg\n")


def write_token_file(path, name):
    lines = [f"{name.format(n)}#{i}\t{caption}\n" for n, pair in CAPTIONS.items() for i, caption in enumerate(pair)]
    path.write_text("".join(lines))


def karpathy(path, name):
    images = [
        {"filename": name.format(number), "split": SPLITS[number], "sentences": [{"raw": text} for text in captions]}
        for number, captions in CAPTIONS.items()
    ]
    path.write_text(json.dumps({"images": images, "dataset": "flickr"}))


def authors_flickr30k(folder):
    for number in CAPTIONS:
        photo(folder / "flickr30k-images" / f"{number}.jpg", number)
    write_token_file(folder / "results_20130124.token", "{}.jpg")
    karpathy(folder / "dataset_flickr30k.json", "{}.jpg")


def kaggle_flickr30k(folder):
    """Kaggle's nested folder, its ` | ` separators and, in the second caption of 50, its row without the second bar."""
    for number in CAPTIONS:
        photo(folder / "flickr30k_images" / "flickr30k_images" / f"{number}.jpg", number)
    rows = ["image_name| comment_number| comment"]
    for number, captions in CAPTIONS.items():
        for i, caption in enumerate(captions):
            bar = "  " if (number, i) == (50, 1) else "|"
            rows.append(f"{number}.jpg| {i}{bar} {caption}")
    (folder / "flickr30k_images" / "results.csv").write_text("\n".join(rows) + "\n")
    karpathy(folder / "dataset_flickr30k.json", "{}.jpg")


def karpathy_alone(folder):
    for number in CAPTIONS:
        photo(folder / "images" / f"{number}.jpg", number)
    karpathy(folder / "dataset_flickr30k.json", "{}.jpg")


def metadata_jsonl(folder):
    for number, captions in CAPTIONS.items():
        photo(folder / SPLITS[number] / "a.png", number)
        row = {"file_name": "a.png", "captions": captions}
        (folder / SPLITS[number] / "metadata.jsonl").write_text(json.dumps(row) + "\n")


def metadata_csv_with_byte_order_mark(folder):
    """As a spreadsheet saves it."""
    for number, (first, second) in CAPTIONS.items():
        photo(folder / SPLITS[number] / "a.png", number)
        table = f'file_name,caption_0,caption_1\na.png,"{first}","{second}"\n'
        (folder / SPLITS[number] / "metadata.csv").write_text(table, encoding="utf-8-sig")


def text_beside_images(folder):
    for number, captions in CAPTIONS.items():
        photo(folder / SPLITS[number] / f"{number}.png", number)
        (folder / SPLITS[number] / f"{number}.txt").write_text("\n".join(captions) + "\n")


@pytest.mark.parametrize(
    ("data", "layout"),
    [
        ("flickr8k", authors_flickr8k),
        ("flickr30k", authors_flickr30k),
        ("flickr30k", kaggle_flickr30k),
        ("flickr30k", karpathy_alone),
        ("folder", metadata_jsonl),
        ("folder", metadata_csv_with_byte_order_mark),
        ("folder", text_beside_images),
    ],
)
def test_every_layout_becomes_the_same_shards(run, tmp_path, data, layout):
    layout(tmp_path / "my photos")
    status, out, _ = run(f"data={data}", f"data.source='{tmp_path}/my photos'")
    assert status == 0
    assert read_back(tmp_path / "data" / data) == BY_SPLIT
    composed = next_run(out)
    assert (composed.data.name, composed.data.source, composed.trainer.accelerator) == (data, None, "cpu")
    assert composed.name == f"lora_{data}"


def next_run(out):
    """The configuration of the command that is proposed, given to Hydra as a shell would."""
    (line,) = [line for line in out.splitlines() if line.startswith("Ready: ")]
    program, script, *overrides = shlex.split(line.removeprefix("Ready: "))
    assert (program, script) == ("python", "train.py")
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose("train", overrides=overrides)


def kaggle_flickr8k(folder, numbers=range(0, 250, 10)):
    for number in numbers:
        photo(folder / "Images" / f"{number}_ab.png", number)
    rows = [f'{number}_ab.png,"Says ""{number}"" , twice ."\n' for number in numbers]
    (folder / "captions.txt").write_text("image,caption\n" + "".join(rows))


def test_flickr8k_of_kaggle_gets_splits_of_its_own_and_says_so(run, tmp_path):
    kaggle_flickr8k(tmp_path / "in")
    status, out, _ = run(f"data.source={tmp_path / 'in'}")
    assert status == 0
    assert "splits: none published here: 80/10/10" in out
    splits = read_back(tmp_path / "data" / "flickr8k")
    every = {number: captions for part in splits.values() for number, captions in part.items()}
    assert every == {number: (f'Says "{number}" , twice .',) for number in range(0, 250, 10)}
    assert len(splits["train"]) > len(every) / 2


def test_where_the_next_command_finds_the_shards(run, tmp_path, monkeypatch):
    text_beside_images(tmp_path / "in")
    _, out, _ = run("data=folder", "data.name=cats", f"data.source={tmp_path / 'in'}")
    assert "python train.py experiment=lora_folder name=lora_cats data.name=cats trainer=cpu\n" in out
    assert "(no GPU here: model=tiny tries " in out
    instantiate(next_run(out).data, resolution=32, num_workers=0).prepare_data()
    _, out, _ = run("data=folder", f"data.source={tmp_path / 'in'}", "prepare.output='some where/else'")
    assert next_run(out).data.source == "some where/else"
    instantiate(next_run(out).data, resolution=32, num_workers=0).prepare_data()
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    _, out, _ = run("data=folder", f"data.source={tmp_path / 'in'}")
    assert next_run(out).trainer.accelerator == "gpu" and "no GPU" not in out


def test_skipped_images_are_reported_by_name_with_their_reason(run, tmp_path):
    kaggle_flickr8k(tmp_path / "in")
    (tmp_path / "in" / "Images" / "30_ab.png").write_bytes(b"not a picture")
    whole = (tmp_path / "in" / "Images" / "40_ab.png").read_bytes()
    (tmp_path / "in" / "Images" / "40_ab.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "in" / "Images" / "50_ab.png").unlink()
    Image.new("RGB", (300, 8)).save(tmp_path / "in" / "Images" / "60_ab.png")
    status, out, _ = run(f"data.source={tmp_path / 'in'}")
    assert status == 0
    assert re.search(r"skipped 30_ab\.png: undecodable", out)
    assert re.search(r"skipped 40_ab\.png: undecodable", out)
    assert re.search(r"skipped 50_ab\.png: missing\n", out)
    assert re.search(r"skipped 60_ab\.png: too small 300x8, prepare\.min_side=32", out)
    assert "all 4 skipped images: data/flickr8k/skipped.csv" in out
    numbers = {number for part in read_back(tmp_path / "data" / "flickr8k").values() for number in part}
    assert numbers == set(range(0, 250, 10)) - {30, 40, 50, 60}


def state(folder):
    return {
        path.relative_to(folder): (path.read_bytes(), path.stat().st_mtime_ns if path.suffix == ".tar" else None)
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_a_second_call_writes_no_shard(run, tmp_path):
    kaggle_flickr8k(tmp_path / "in")
    options = (f"data.source={tmp_path / 'in'}", "prepare.samples_per_shard=5")
    run(*options)
    before = state(tmp_path / "data")
    shards = sum(path.suffix == ".tar" for path in before)
    assert shards > 4
    _, out, _ = run(*options)
    assert f"{shards} shards kept" in out
    assert state(tmp_path / "data") == before


def test_a_call_that_was_cut_short_is_taken_up_and_not_trained_on_before(run, tmp_path, monkeypatch):
    kaggle_flickr8k(tmp_path / "in")
    options = (f"data.source={tmp_path / 'in'}", "prepare.samples_per_shard=5")
    run(*options, "prepare.output=whole")
    written = []

    def interrupted(task, output, settings):
        written.append(task.file)
        if len(written) == 3:
            raise KeyboardInterrupt
        return write_shard(task, output, settings)

    monkeypatch.setattr("lcm_lightning.data.writing.write_shard", interrupted)
    assert run(*options)[0] == 130
    assert len(list((tmp_path / "data" / "flickr8k").glob("*.tar"))) == 2
    with pytest.raises(UserError, match=r"(?s)data/flickr8k.*did not finish.*run it again"):
        CaptionedImages("flickr8k").prepare_data()
    _, out, _ = run(*options)
    assert "2 shards kept" in out
    assert {path: content for path, (content, _) in state(tmp_path / "data" / "flickr8k").items()} == {
        path: content for path, (content, _) in state(tmp_path / "whole").items()
    }


def test_a_new_photo_changes_only_what_it_must(run, tmp_path):
    kaggle_flickr8k(tmp_path / "in", range(0, 200, 10))
    run(f"data.source={tmp_path / 'in'}")
    before = read_back(tmp_path / "data" / "flickr8k")
    kaggle_flickr8k(tmp_path / "in", range(0, 250, 10))
    run(f"data.source={tmp_path / 'in'}")
    after = read_back(tmp_path / "data" / "flickr8k")
    for split, numbers in before.items():
        assert numbers.items() <= after[split].items(), "a photo changed its split"
    assert Counter(map(len, after.values())).total() == 3
    assert sum(map(len, after.values())) == 25


def test_photos_may_lie_where_their_shards_go(run, tmp_path):
    text_beside_images(tmp_path / "data" / "folder")
    for _ in range(2):
        assert run("data=folder", "data.source=data/folder")[0] == 0
        assert read_back(tmp_path / "data" / "folder") == BY_SPLIT


def test_shards_are_not_cut_anew_in_place(run, tmp_path):
    text_beside_images(tmp_path / "in")
    run("data=folder", f"data.source={tmp_path / 'in'}")
    before = state(tmp_path / "data")
    status, _, err = run("data=folder", f"data.source={tmp_path / 'data' / 'folder'}")
    assert status == 2 and "prepare.output=data/folder: is data.source too" in err
    assert state(tmp_path / "data") == before
    run("data=folder", "data.source=data/folder", "prepare.output=anew", "prepare.samples_per_shard=1")
    assert read_back(tmp_path / "anew") == BY_SPLIT


def wrong_encoding(folder):
    kaggle_flickr8k(folder)
    (folder / "captions.txt").write_bytes("image,caption\n0_ab.png,Un chien à la plage\n".encode("latin-1"))


def token_without_number(folder):
    (folder / "Flickr8k.token.txt").write_text("0_ab.jpg\tA dog\n")


def karpathy_cut_off(folder):
    (folder / "dataset_flickr8k.json").write_text('{"images": [{"filena')


def karpathy_of_another_kind(folder):
    (folder / "dataset_flickr8k.json").write_text('{"images": [{"name": "a.jpg"}]}')


def jsonl_that_is_none(folder):
    (folder / "metadata.jsonl").write_text("file_name: a.png\n")


def captions_without_rows(folder):
    (folder / "captions.txt").write_text("image,caption\n")


def captions_without_photos(folder):
    kaggle_flickr8k(folder)
    for path in (folder / "Images").iterdir():
        path.unlink()


def photos_without_captions(folder):
    photo(folder / "Images" / "a.jpg")


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (wrong_encoding, r"captions\.txt cannot be read \('utf-8' codec.*UTF-8"),
        (token_without_number, r"Flickr8k\.token\.txt cannot be read .*expected lines of name\.jpg#0"),
        (karpathy_cut_off, r"dataset_flickr8k\.json cannot be read .*expected Karpathy's json"),
        (karpathy_of_another_kind, r"dataset_flickr8k\.json cannot be read \(no 'filename'\)"),
        (jsonl_that_is_none, r"metadata\.jsonl cannot be read .*file_name"),
        (captions_without_rows, r"captions\.txt lists no image; check that the download is complete"),
        (photos_without_captions, r"no captioned images recognised(?s:.*)Flickr8k\.token\.txt"),
    ],
)
def test_a_source_that_cannot_be_used_is_one_message_and_leaves_nothing(run, tmp_path, layout, message):
    source = tmp_path / "in"
    source.mkdir()
    layout(source)
    status, _, err = run(f"data.source={source}")
    assert status == 2
    assert err.count("error:") == 1 and "Traceback" not in err
    assert "data.source" in err and str(source) in err
    assert re.search(message, err), err
    assert not (tmp_path / "data").exists()


def test_captions_whose_photos_are_elsewhere_end_without_shards(run, tmp_path):
    (tmp_path / "in").mkdir()
    captions_without_photos(tmp_path / "in")
    status, _, err = run(f"data.source={tmp_path / 'in'}")
    assert status == 2
    assert re.search(r"none of the 25 images listed can be used \(missing: 25\).*data\.source holds the images", err)
    assert [path.name for path in (tmp_path / "data" / "flickr8k").iterdir() if path.is_file()] == ["skipped.csv"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ((), r"data\.source is not set.*kaggle\.com/datasets/adityajn105/flickr8k"),
        (("data.source=/no/such/folder",), r"data\.source=/no/such/folder: no such folder.*kaggle\.com.*data\.source="),
        (("data.source=in/captions.txt",), r"data\.source=in/captions\.txt: a file; did you mean data\.source=in\?"),
        (("data.source=in", "prepare.samples_per_shard=0"), r"prepare\.samples_per_shard=0: .*at least 1; try 500"),
        (("data.source=in", "prepare.quality=101"), r"prepare\.quality=101: .*1 to 100"),
        (("data.source=in", "prepare.min_side=small"), r"prepare\.min_side=small: expected a whole number"),
        (("data.source=in", "prepare.max_side=20"), r"prepare\.max_side=20: .*at least 32"),
        (("data.source=in", "prepare.workers=-1"), r"prepare\.workers=-1: .*at least 1"),
        (
            ("data.source=in", "prepare.output=in/captions.txt"),
            r"prepare\.output=in/captions\.txt: .*cannot be written",
        ),
    ],
)
def test_a_mistake_on_the_command_line_is_one_message_and_leaves_nothing(run, tmp_path, options, message):
    kaggle_flickr8k(tmp_path / "in")
    before = state(tmp_path)
    status, _, err = run(*options)
    assert status == 2
    assert err.count("error:") == 1 and "Traceback" not in err
    assert re.search(message, err), err
    assert state(tmp_path) == before


def test_as_a_program_with_several_processes(tmp_path):
    kaggle_flickr8k(tmp_path / "in")
    command = [sys.executable, "-m", "lcm_lightning.prepare", "data=flickr8k", "prepare.samples_per_shard=5"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, f"data.source={tmp_path / 'in'}", "prepare.workers=2"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(r"25 images in [\d.]+ s \([\d.]+ images/s\); 0 shards kept", done.stdout)
    assert sum(map(len, read_back(tmp_path / "data" / "flickr8k").values())) == 25
    assert sorted(path.name for path in tmp_path.iterdir()) == ["data", "in"], "nothing else is left behind"
    failed = subprocess.run(
        [*command, "data.source=/no/such/folder"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert failed.returncode == 2 and failed.stderr.startswith("error: data.source=/no/such/folder")
    assert failed.stderr.count("\n") == 1


def test_shards_from_a_web_server_train_a_whole_epoch(run, tmp_path):
    kaggle_flickr8k(tmp_path / "in")
    run(f"data.source={tmp_path / 'in'}", "prepare.samples_per_shard=10")
    folder = tmp_path / "data" / "flickr8k"
    index = json.loads((folder / "index.json").read_text())
    last = len(index["splits"]["train"]["shards"]) - 1
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        address = f"http://127.0.0.1:{server.server_port}"
        source = f"{address}/train-{{000000..{last:06d}}}.tar {address}/val-000000.tar"
        data = CaptionedImages(
            "web", source, resolution=32, batch_size=4, num_workers=0, cache_dir=str(tmp_path / "cache")
        )
        data.prepare_data()
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
    seen = Counter()
    for batch in data.train_dataloader():
        seen.update(key for key, weight in zip(batch["keys"], batch["weight"], strict=True) if weight > 0)
    assert set(seen.values()) == {1}
    assert len(seen) == index["splits"]["train"]["samples"] == data.train_samples


FLICKR8K = Path(os.environ.get("FLICKR8K_DIR") or ROOT.parent / "shared" / "flickr8k")


@pytest.mark.skipif(not FLICKR8K.is_dir(), reason="needs Flickr8k: set FLICKR8K_DIR to its folder")
def test_real_photos_are_stored_as_they_are(run, tmp_path):
    status, _, _ = run(f"data.source={FLICKR8K}")
    assert status == 0
    index = json.loads((tmp_path / "data" / "flickr8k" / "index.json").read_text())
    photos = {path.stem: path for path in (FLICKR8K / "Images").iterdir()}
    assert sum(part["samples"] for part in index["splits"].values()) == len(photos) and index["skipped"] == {}
    for sample in iterate_split("data/flickr8k", "val", limit=20):
        with Image.open(photos[sample.key]) as original:
            assert sample.image.tobytes() == original.convert("RGB").tobytes()
        assert len(sample.captions) == 5


@pytest.mark.parametrize(
    ("options", "said"),
    [
        # 3:2 in 640 x 384 keeps 0.9, in a square 2/3; at 64 px in steps of 16 there is 80 x 48, also 5:3.
        (
            (),
            "of a photo 90.0% is kept in 2 buckets of data.resolution=512 data.bucket_step=64, 66.7% in squares",
        ),
        (
            ("data.resolution=64", "data.bucket_step=16"),
            "90.0% is kept in 2 buckets of data.resolution=64",
        ),
        (("data.buckets=false",), None),
        (("data.resolution=100",), None),
    ],
)
def test_the_share_of_the_photos_that_training_sees_is_said(run, tmp_path, options, said):
    for number, size in enumerate([(60, 40), (40, 60), (600, 400)]):
        (tmp_path / "in").mkdir(exist_ok=True)
        Image.new("RGB", size).save(tmp_path / "in" / f"{number}.png")
        (tmp_path / "in" / f"{number}.txt").write_text("A dog .")
    status, out, _ = run("data=folder", "data.source=in", *options)
    assert status == 0
    assert (said in out) if said else ("is kept" not in out)
