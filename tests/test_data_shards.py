"""Finding, counting, fetching and reading shards, ours and other people's."""

from __future__ import annotations

import functools
import hashlib
import http.server
import io
import json
import pickle
import tarfile
import threading

import numpy as np
import pytest
from PIL import Image

from lcm_lightning.data import downloads
from lcm_lightning.data.datamodule import iterate_split
from lcm_lightning.data.records import Record
from lcm_lightning.data.shards import (
    content_digest,
    count_samples,
    find_shards,
    group_by_split,
    open_split,
    read_samples,
    sample_captions,
    split_of,
)
from lcm_lightning.data.sources import read_source
from lcm_lightning.data.writing import ShardSettings, write_shards
from lcm_lightning.errors import UserError


def png(value=0):
    buffer = io.BytesIO()
    Image.fromarray(np.full((40, 40, 3), value, dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def clip_benchmark_shard(path, numbers):
    """A shard as on the hub: five captions, one a line, and the class as .cls."""
    captions = "\n".join(f"caption {n}" for n in range(5)).encode()
    members = {}
    for number in numbers:
        members |= {f"s{number:07d}.cls": b"0", f"s{number:07d}.png": png(number), f"s{number:07d}.txt": captions}
    return write_tar(path, members)


@pytest.fixture
def cache(tmp_path):
    return tmp_path / "cache"


@pytest.mark.parametrize(
    ("location", "split"),
    [
        ("train/0.tar", "train"),
        ("hf://datasets/a/b/test/4.tar", "test"),
        ("https://host/data/val-000001.tar", "val"),
        ("/d/test/validation_3.tar", "val"),
        ("/contest/00001.tar", "train"),
        ("0.tar", "train"),
    ],
)
def test_the_split_is_read_off_the_path(location, split):
    assert split_of(location) == split


def test_shards_are_in_natural_order():
    assert group_by_split(f"train/{n}.tar" for n in (10, 9, 1)) == {
        "train": ("train/1.tar", "train/9.tar", "train/10.tar")
    }


def test_ready_shards_of_a_folder_are_counted_once(tmp_path, cache, monkeypatch):
    clip_benchmark_shard(tmp_path / "set" / "train" / "0.tar", range(5))
    clip_benchmark_shard(tmp_path / "set" / "train" / "1.tar", range(3))
    clip_benchmark_shard(tmp_path / "set" / "test" / "0.tar", range(2))
    index = find_shards(str(tmp_path / "set"))
    assert [shard.samples for shard in open_split(index, "train", cache)] == [5, 3]
    monkeypatch.setattr("lcm_lightning.data.shards.count_samples", lambda path: pytest.fail(f"{path} counted again"))
    assert [shard.samples for shard in open_split(index, "train", cache)] == [5, 3]
    with pytest.raises(UserError, match="no split 'val'; it has test, train"):
        open_split(index, "val", cache)


def test_a_shard_without_an_index_is_known_by_its_bytes_read_once(tmp_path, cache, monkeypatch):
    """A tar file is padded: with other captions it is as long, and holds as many samples."""
    path = clip_benchmark_shard(tmp_path / "set" / "0.tar", range(3))

    def opened():
        (shard,) = open_split(find_shards(str(tmp_path / "set")), "train", cache)
        return shard

    before, size = content_digest(opened(), cache), path.stat().st_size
    assert before == hashlib.sha256(path.read_bytes()).hexdigest()
    path.write_bytes(path.read_bytes().replace(b"caption 1", b"picture 1"))
    assert path.stat().st_size == size and opened().samples == 3
    after = content_digest(opened(), cache)
    assert after == hashlib.sha256(path.read_bytes()).hexdigest() != before
    monkeypatch.setattr("lcm_lightning.data.shards.sha256_of", lambda path: pytest.fail(f"{path} read again"))
    assert content_digest(opened(), cache) == after


def test_the_digest_of_a_prepared_shard_is_that_of_its_index(tmp_path, cache):
    write_shards([Record("k", png(), ("c",), "train")], tmp_path / "set", name="set", workers=1)
    (shard,) = open_split(find_shards(str(tmp_path / "set")), "train", cache)
    assert content_digest(shard, cache) == shard.identity == hashlib.sha256(shard.path.read_bytes()).hexdigest()
    assert not cache.exists()


def test_braces_stand_for_several_shards(tmp_path, cache):
    for number in range(3):
        clip_benchmark_shard(tmp_path / f"{number}.tar", range(number + 1))
    index = find_shards(f"{tmp_path}/{{0..2}}.tar")
    assert [shard.samples for shard in open_split(index, "train", cache)] == [1, 2, 3]
    with pytest.raises(UserError, match=r"no shard .*3\.tar \(1 of 4 missing\)"):
        find_shards(f"{tmp_path}/{{0..3}}.tar")


def test_captions_come_from_text_lines_or_json(tmp_path):
    path = write_tar(
        tmp_path / "0.tar",
        {
            "a.png": png(),
            "a.txt": b"one\n\ntwo\n",
            "b.png": png(),
            "b.json": b'{"captions": ["one", "two"]}',
            "c.png": png(),
            "c.json": b'{"caption": "one"}',
        },
    )
    assert [sample_captions(sample) for sample in read_samples(path)] == [("one", "two"), ("one", "two"), ("one",)]


class Trap:
    """Unpickling this would end the test run."""

    def __reduce__(self):
        return (pytest.exit, ("unpickled",))


def test_samples_whose_names_are_alike_before_a_dot_are_all_read(tmp_path):
    members = {}
    for number in range(6):
        members |= {f"photo.v{number}.png": png(number), f"photo.v{number}.txt": f"caption {number}".encode()}
    path = write_tar(tmp_path / "0.tar", {**members, "other.png": png(), "other.txt": b"other"})
    samples = list(read_samples(path))
    assert [sample["__key__"] for sample in samples] == [*(f"photo.v{number}" for number in range(6)), "other"]
    assert [sample_captions(sample) for sample in samples[:6]] == [(f"caption {number}",) for number in range(6)]
    assert all(sample["png"] == png(number) for number, sample in enumerate(samples[:6]))
    assert count_samples(path).samples == 7


@pytest.mark.parametrize("more", [{"a.seg.png": png(1)}, {"a.seg.png": png(1), "a.seg.json": b"{}"}])
def test_other_members_of_a_sample_make_none_of_their_own(tmp_path, more):
    path = write_tar(tmp_path / "0.tar", {"a.png": png(), "a.txt": b"one", **more})
    (sample,) = read_samples(path)
    assert sample["__key__"] == "a" and sample["png"] == png()


def test_members_that_hold_pickles_are_never_read(tmp_path):
    trap = pickle.dumps(Trap())
    members = {f"a.{suffix}": trap for suffix in ("pyd", "pth", "pkl", "npy", "ten")}
    path = write_tar(tmp_path / "0.tar", {"a.png": png(7), "a.txt": b"one", **members, "b.pyd": trap})
    assert count_samples(path).samples == 1
    (sample,) = read_samples(path)
    assert {suffix for suffix in sample if not suffix.startswith("__")} == {"png", "txt"}
    (decoded,) = iterate_split(str(path), "train", cache_dir=str(tmp_path / "cache"))
    assert decoded.image.getpixel((0, 0)) == (7, 7, 7)


def test_reading_from_a_later_sample_gives_the_same_samples(tmp_path):
    path = clip_benchmark_shard(tmp_path / "0.tar", range(10))
    every = list(read_samples(path))
    for start in (0, 1, 9, 10):
        assert list(read_samples(path, start)) == every[start:]


def test_a_cut_off_shard_is_named(tmp_path, cache):
    path = clip_benchmark_shard(tmp_path / "0.tar", range(5))
    path.write_bytes(path.read_bytes()[:3000])
    with pytest.raises(UserError, match=r"0\.tar: not a complete tar file"):
        open_split(find_shards(str(tmp_path)), "train", cache)


def test_evaluation_reads_a_split_in_order_and_leaves_out_what_it_cannot_read(tmp_path, caplog):
    write_tar(tmp_path / "test-0.tar", {"a.png": png(1), "a.txt": b"A", "b.png": b"x", "b.txt": b"B"})
    write_tar(tmp_path / "test-1.tar", {"c.png": png(3), "c.txt": b"C\nCC"})
    samples = list(iterate_split(str(tmp_path), "test", cache_dir=str(tmp_path / "cache")))
    assert [(s.key, s.captions, s.image.size) for s in samples] == [
        ("a", ("A",), (40, 40)),
        ("c", ("C", "CC"), (40, 40)),
    ]
    assert "sample b: undecodable" in caplog.text


def test_a_limited_split_is_an_even_draw_that_is_always_the_same(tmp_path):
    write_tar(
        tmp_path / "test-0.tar",
        {f"{i:02d}.{kind}": png(i) if kind == "png" else b"x" for i in range(40) for kind in ("png", "txt")},
    )
    keys, again = ([s.key for s in iterate_split(str(tmp_path), "test", limit=10)] for _ in range(2))
    assert keys == again == sorted(keys) and len(set(keys)) == 10
    assert keys != [f"{i:02d}" for i in range(10)]


@pytest.fixture
def server(tmp_path):
    folder = tmp_path / "www"
    folder.mkdir()
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield folder, f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_shards_on_a_web_server_are_fetched_once(server, cache):
    folder, address = server
    for number in range(2):
        clip_benchmark_shard(folder / "train" / f"{number}.tar", range(3 + number))
    index = find_shards(f"{address}/train/{{0..1}}.tar")
    assert [shard.samples for shard in open_split(index, "train", cache)] == [3, 4]
    for number in range(2):
        (folder / "train" / f"{number}.tar").unlink()
    assert [shard.samples for shard in open_split(index, "train", cache)] == [3, 4]


def test_prepared_shards_on_a_web_server_need_no_counting(server, cache, monkeypatch):
    folder, address = server
    records = [Record(f"k{n}", png(n), ("c",), "train") for n in range(5)]
    write_shards(records, folder, name="web", settings=ShardSettings(3), workers=1)
    monkeypatch.setattr("lcm_lightning.data.shards.count_samples", lambda path: pytest.fail("counted"))
    index = find_shards(f"{address}/")
    assert [shard.samples for shard in open_split(index, "train", cache)] == [3, 2]


def test_a_shard_that_is_not_that_of_the_index_is_refused(server, cache):
    folder, address = server
    write_shards([Record("k", png(), ("c",), "train")], folder, name="web", workers=1)
    clip_benchmark_shard(folder / "train-000000.tar", range(2))
    with pytest.raises(UserError, match="sha256"):
        open_split(find_shards(f"{address}/index.json"), "train", cache)
    assert not list((cache / "shards").iterdir())


def test_a_missing_address_is_a_user_error_and_leaves_nothing(server, cache):
    _, address = server
    with pytest.raises(UserError, match="download failed"):
        open_split(find_shards(f"{address}/0.tar"), "train", cache)
    assert not list((cache / "shards").iterdir())


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder that stands in for the hub's data set clip-benchmark/wds_tiny."""
    folder = tmp_path / "hub"
    clip_benchmark_shard(folder / "train" / "0.tar", range(6))
    clip_benchmark_shard(folder / "test" / "0.tar", range(2))

    class Api:
        def list_repo_files(self, repo, repo_type):
            assert (repo, repo_type) == ("clip-benchmark/wds_tiny", "dataset")
            return ["README.md", "train/nshards.txt", "train/0.tar", "test/0.tar"]

    def fetch(repo, file, *, repo_type, revision, local_files_only):
        assert (repo, repo_type) == ("clip-benchmark/wds_tiny", "dataset")
        return str(folder / file)

    monkeypatch.setattr(downloads, "HfApi", Api)
    monkeypatch.setattr(downloads, "hf_hub_download", fetch)
    monkeypatch.setattr(downloads, "hub_answers", lambda: True)
    return folder


@pytest.mark.parametrize(
    "source", ["clip-benchmark/wds_tiny", "hf://datasets/clip-benchmark/wds_tiny/train/{0..0}.tar"]
)
def test_shards_of_a_hub_data_set(hub, cache, source):
    (shard,) = open_split(find_shards(source), "train", cache)
    assert (shard.path, shard.samples) == (hub / "train" / "0.tar", 6)
    assert next(iter(read_samples(shard.path)))["__key__"] == "s0000000"


def test_ready_shards_can_be_cut_anew(hub, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    source = read_source("clip-benchmark/wds_tiny", "tiny")
    index = write_shards(source.records, tmp_path / "out", name="tiny", settings=ShardSettings(2), workers=1)
    assert {split: len(part["shards"]) for split, part in index["splits"].items()} == {"train": 3, "test": 1}
    sample = next(iter(iterate_split(str(tmp_path / "out"), "test")))
    assert sample.captions == tuple(f"caption {n}" for n in range(5))


def test_a_hub_that_has_no_such_data_set_is_a_user_error(monkeypatch):
    class Api:
        def list_repo_files(self, repo, repo_type):
            raise ConnectionError("401, no such repository")

    monkeypatch.setattr(downloads, "HfApi", Api)
    for module in ("data.downloads", "hub"):
        monkeypatch.setattr(f"lcm_lightning.{module}.hub_answers", lambda: True)
    with pytest.raises(UserError, match=r"data\.source=owner/name: .*the hub refuses it: 401, no such repository"):
        find_shards("owner/name")


def test_a_shard_missing_beside_its_index_is_named(tmp_path):
    write_shards([Record("k", png(), ("c",), "train")], tmp_path, name="set", workers=1)
    (tmp_path / "train-000000.tar").unlink()
    with pytest.raises(UserError, match=r"train-000000\.tar of the index is missing"):
        open_split(find_shards(str(tmp_path)), "train")
    assert json.loads((tmp_path / "index.json").read_text())["name"] == "set"
