"""Reading a shard by number gives what reading it from its start gives, and starts anywhere at once."""

from __future__ import annotations

import io
import tarfile
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lcm_lightning.data import stream
from lcm_lightning.data.datamodule import CaptionedImages
from lcm_lightning.data.plan import StreamPlan
from lcm_lightning.data.shards import Shard, ShardReader, read_samples
from lcm_lightning.data.stream import ShardStream

Members = list[tuple[str, bytes]]

MEMBERS: Members = [
    ("a.jpg", b"image a"),
    ("a.txt", b"caption a"),
    ("a.cls", b"7"),  # no part of a sample
    ("folder/" + "long" * 40 + ".png", b"x" * 700),  # a name longer than a tar header holds
    ("folder/" + "long" * 40 + ".json", b'{"caption": "b"}'),
    (".hidden.jpg", b"no sample"),
    ("ç.JPG", b""),
    ("ç.txt", b"caption c"),
]


def tar(path: Path, members: Members, format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_every_sample_is_what_reading_in_order_gives(tmp_path: Path, format: int):
    path = tar(tmp_path / "0.tar", MEMBERS, format)
    reader = ShardReader(path)
    expected = list(read_samples(path))
    assert len(expected) == 3
    assert [reader.read(number) for number in (2, 0, 1)] == [expected[2], expected[0], expected[1]]


def test_a_cut_off_shard_gives_the_samples_before_the_cut(tmp_path: Path):
    path = tar(tmp_path / "0.tar", [(f"k{n}.{suffix}", b"y" * 300) for n in range(8) for suffix in ("jpg", "txt")])
    path.write_bytes(path.read_bytes()[: 2048 * 5 - 700])
    reader = ShardReader(path)
    assert [reader.read(number)["__key__"] for number in range(4)] == ["k0", "k1", "k2", "k3"]
    assert "txt" not in reader.read(4)
    assert "damaged" in reader.read(5)["__fault__"]
    with pytest.raises(OSError, match="fewer samples than were counted"):
        reader.read(6)


def test_readers_are_held_no_longer_than_a_shuffle_window_needs_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """40 shards of 10 samples in windows of 20: two shards fill a window."""
    for shard in range(40):
        tar(
            tmp_path / f"train-{shard:02d}.tar",
            [m for n in range(10) for m in ((f"k{n}.png", b""), (f"k{n}.txt", b"a"))],
        )
    opened, alive, most = 0, weakref.WeakSet(), 0

    class Watched(ShardReader):
        def __init__(self, path: Path) -> None:
            nonlocal opened, most
            super().__init__(path)
            alive.add(self)
            opened, most = opened + 1, max(most, len(alive))

    monkeypatch.setattr(ShardStream, "open_shard", Watched)
    options = {"shuffle_buffer": 20, "num_workers": 0, "val_limit": 0, "max_bad_fraction": 1.0}
    data = CaptionedImages("red", str(tmp_path), resolution=32, cache_dir=str(tmp_path / "cache"), **options)
    loader = data.train_dataloader()
    for number in range(2):
        loader.set_epoch(number)
        assert sum(1 for _ in loader) == 50
    assert opened == 2 * 40 and most <= 4


def test_no_more_readers_are_held_than_have_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Rare buckets take samples from all over an epoch; a reader that had to make room is made again."""
    for shard in range(6):
        tar(tmp_path / f"{shard}.tar", [m for n in range(3) for m in ((f"k{n}.png", b"image"), (f"k{n}.txt", b"a"))])
    shards = [Shard(tmp_path / f"{shard}.tar", 3, "") for shard in range(6)]
    alive, most = weakref.WeakSet(), 0

    class Watched(ShardReader):
        def __init__(self, path: Path) -> None:
            nonlocal most
            super().__init__(path)
            alive.add(self)
            most = max(most, len(alive))

    monkeypatch.setattr(stream, "MAX_READERS", 2)
    planned = [(shard, number) for number in range(3) for shard in range(6)]
    plan = StreamPlan(*np.array([(*sample, 0) for sample in planned]).T, batches=())
    samples = list(stream.read_planned(shards, plan, Watched))
    assert [(Path(s["__shard__"]).stem, s["__key__"]) for s in samples] == [(str(a), f"k{b}") for a, b in planned]
    assert most <= 3


@pytest.mark.slow
def test_starting_at_sample_100_000_takes_no_longer_than_starting(tmp_path: Path):
    """200 shards of 600 samples: at most 2 s more, the promise, and as it is, about the same."""
    buffer = io.BytesIO()
    Image.new("RGB", (32, 32), "red").save(buffer, "PNG")
    first = tar(
        tmp_path / "train-000.tar",
        [m for n in range(600) for m in ((f"k{n}.png", buffer.getvalue()), (f"k{n}.txt", b"red"))],
    )
    for shard in range(1, 200):
        (tmp_path / f"train-{shard:03d}.tar").hardlink_to(first)

    def seconds_to_first_batch(start: int) -> float:
        data = CaptionedImages("red", str(tmp_path), resolution=32, num_workers=0, val_limit=0, cache_dir=str(tmp_path))
        assert data.train_samples == 120_000
        loader = data.train_dataloader()
        loader.start = [start]
        before = time.perf_counter()
        next(iter(loader))
        return time.perf_counter() - before

    seconds_to_first_batch(0)  # counts the shards
    assert seconds_to_first_batch(100_000) < seconds_to_first_batch(0) + 2
