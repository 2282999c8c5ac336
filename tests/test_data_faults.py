"""What can be wrong with data, one by one: the good samples are delivered, the others counted and named."""

from __future__ import annotations

import csv
import http.server
import io
import logging
import pickle
import re
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from helpers.commands import SMALL, in_process
from lcm_lightning.data import downloads, tar
from lcm_lightning.data.datamodule import CaptionedImages
from lcm_lightning.data.downloads import download
from lcm_lightning.data.images import ImageFault, decode_image, resize_shorter_side
from lcm_lightning.data.records import Record
from lcm_lightning.data.shards import count_samples
from lcm_lightning.data.writing import ShardSettings, write_shards
from lcm_lightning.errors import UserError

Members = list[tuple[str | tarfile.TarInfo, bytes]]


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def png(value: int = 0, size: tuple[int, int] = (20, 20)) -> bytes:
    return encoded(Image.new("RGB", size, (value,) * 3), "PNG")


def jpeg(size: tuple[int, int] = (40, 30), mode: str = "RGB", **options: object) -> bytes:
    return encoded(Image.effect_noise(size, 50).convert(mode), "JPEG", **options)


def pair(key: str, image: bytes | None = None, caption: bytes | None = b"a photo", suffix: str = "png") -> Members:
    """The members of one sample; None leaves one out."""
    image = png() if image is None and suffix == "png" else image
    members: Members = [(f"{key}.{suffix}", image)] if image is not None else []
    return members + ([(f"{key}.txt", caption)] if caption is not None else [])


def tar_bytes(members: Members) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.GNU_FORMAT) as archive:
        for name, content in members:
            member = name if isinstance(name, tarfile.TarInfo) else tarfile.TarInfo(name)
            member.size = len(content) if member.isreg() else 0
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def data_set(source: object, tmp_path: Path, **options: object) -> CaptionedImages:
    settings = {"max_bad_fraction": 1.0, "val_limit": 0, "num_workers": 0, "batch_size": 4, "resolution": 16}
    return CaptionedImages("set", str(source), cache_dir=str(tmp_path / "cache"), **{**settings, **options})


def delivered(data: CaptionedImages) -> list[str]:
    """The keys of the samples of an epoch, sorted."""
    batches = list(data.train_dataloader())
    return sorted(
        key for batch in batches for key, w in zip(batch["keys"], batch["weight"].tolist(), strict=True) if w > 0
    )


GOOD = pair("first") + pair("second")


def link(name: str, target: str, kind: bytes) -> tarfile.TarInfo:
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


# ---- one bad sample among good ones --------------------------------------------------------------------------------

UNREADABLE = {
    "corrupt jpeg": (pair("bad", jpeg()[:300] + b"\0" * 300, suffix="jpg"), "sample 'bad': undecodable"),
    "cut off jpeg": (pair("bad", jpeg()[:-100], suffix="jpg"), "sample 'bad': undecodable: image file is truncated"),
    "empty image": (pair("bad", b""), "sample 'bad': undecodable"),
    "html for an image": (pair("bad", b"<html>404 Not Found</html>", suffix="jpg"), "sample 'bad': undecodable"),
    "postscript for an image": (pair("bad", b"%!PS-Adobe-3.0 EPSF-3.0\n", suffix="jpg"), "sample 'bad': undecodable"),
    "no image": (pair("bad", None, suffix="jpg"), "sample 'bad': no image"),
    "no caption": (pair("bad", caption=None), "sample 'bad': no caption"),
    "empty caption": (pair("bad", caption=b""), "sample 'bad': no caption"),
    "blank caption": (pair("bad", caption=b" \n\t\n"), "sample 'bad': no caption"),
    "caption in Latin-1": (pair("bad", caption="à la plage".encode("latin-1")), "'bad': captions are not UTF-8"),
    "caption in UTF-16": (pair("bad", caption="a photo".encode("utf-16")), "'bad': captions are not UTF-8"),
    "json that is none": ([("bad.png", png()), ("bad.json", b"{caption: a}")], "'bad': captions are no JSON"),
    "json without end": ([("bad.png", png()), ("bad.json", b"[" * 100_000)], "'bad': captions are no JSON"),
    "json of 2 MB": (
        [("bad.png", png()), ("bad.json", b'{"caption": "a"' + b" " * (2 << 20) + b"}")],
        "captions too large",
    ),
    "text of 2 MB": (pair("bad", caption=b"a " * (1 << 20)), "sample 'bad': captions too large: 2097152 bytes"),
    "json of another kind": ([("bad.png", png()), ("bad.json", b'{"captions": [{"a": [1]}]}')], "'bad': no caption"),
    "one pixel": (pair("bad", png(size=(1, 1))), "sample 'bad': too small: 1x1"),
    "a hair": (pair("bad", png(size=(8, 500_000))), "sample 'bad': too elongated: 8x500000"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_an_unreadable_sample_is_left_out_counted_and_named(name, tmp_path, caplog):
    members, reason = UNREADABLE[name]
    (tmp_path / "0.tar").write_bytes(tar_bytes(GOOD[:2] + members + GOOD[2:]))
    data = data_set(tmp_path / "0.tar", tmp_path, resolution=256)
    loader = data.train_dataloader()
    weights = [w for batch in loader for w in batch["weight"].tolist()]
    assert sum(w > 0 for w in weights) == 2
    assert dict(loader.faults) == {str(tmp_path / "0.tar"): 1}
    assert reason in caplog.text and str(tmp_path / "0.tar") in caplog.text


def grey_16_bit() -> bytes:
    return encoded(Image.fromarray(np.full((20, 20), 128 << 8, dtype=np.uint16)), "PNG")


def animation() -> bytes:
    frames = [Image.new("RGB", (20, 20), colour) for colour in ("gray", "red")]
    return encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])


def turned() -> bytes:
    exif = Image.Exif()
    exif[0x0112] = 6
    return encoded(Image.new("RGB", (30, 20), "gray"), "JPEG", exif=exif)


READABLE = {
    "CMYK": pair("odd", encoded(Image.new("RGB", (20, 20), "gray").convert("CMYK"), "JPEG"), suffix="jpg"),
    "greyscale": pair("odd", encoded(Image.new("L", (20, 20), 128), "JPEG"), suffix="jpg"),
    "16 bits": pair("odd", grey_16_bit()),
    "animated": pair("odd", animation(), suffix="gif"),
    "EXIF orientation": pair("odd", turned(), suffix="jpg"),
    "jpeg called png": pair("odd", encoded(Image.new("RGB", (20, 20), "gray"), "JPEG")),
    "capital suffixes": [("odd.JPG", encoded(Image.new("RGB", (20, 20), "gray"), "JPEG")), ("odd.TXT", b"a photo")],
    "byte order mark": pair("odd", png(128), b"\xef\xbb\xbfa photo"),
    "half a character in json": [("odd.png", png(128)), ("odd.json", b'{"caption": "a photo \\ud83d"}')],
    "name that is not UTF-8": [(f"od\udcffd{suffix}", c) for suffix, c in ((".png", png(128)), (".txt", b"a photo"))],
    "name of 300 characters": pair("odd/" + "a" * 296, png(128)),
}


@pytest.mark.parametrize("name", READABLE)
def test_an_odd_sample_is_delivered(name, tmp_path):
    (tmp_path / "0.tar").write_bytes(tar_bytes(GOOD + READABLE[name]))
    data = data_set(tmp_path / "0.tar", tmp_path, resolution=16, batch_size=3)
    (batch,) = data.train_dataloader()
    assert all(w > 0 for w in batch["weight"].tolist())
    pixels = [p for key, p in zip(batch["keys"], batch["pixel_values"], strict=True) if key not in ("first", "second")]
    assert len(pixels) == 1
    np.testing.assert_allclose(pixels[0].numpy(), 0.0, atol=0.02)


def test_keys_that_come_twice_are_two_samples(tmp_path):
    (tmp_path / "0.tar").write_bytes(tar_bytes(pair("a", png(1)) + pair("a", png(2)) + pair("b") + pair("a", png(3))))
    assert delivered(data_set(tmp_path / "0.tar", tmp_path)) == ["a", "a", "a", "b"]


# ---- huge images ---------------------------------------------------------------------------------------------------


def test_a_photo_of_100_megapixels_is_reduced_while_it_is_decoded():
    tile = Image.effect_noise((100, 75), 60).convert("RGB").resize((400, 300))
    photo = tile.resize((11_600, 8_700), Image.Resampling.NEAREST)
    data = encoded(photo, "JPEG", quality=60)
    image = decode_image(data)
    assert image.size == (5_800, 4_350)
    difference = np.abs(np.asarray(image.resize((400, 300)), float) - np.asarray(tile, float))
    assert difference.mean() < 8


def announcing(data: bytes, width: int, height: int) -> bytes:
    """A JPEG whose header announces another size."""
    place = re.search(rb"\xff[\xc0\xc2]\x00\x11\x08", data).end()
    return data[:place] + height.to_bytes(2, "big") + width.to_bytes(2, "big") + data[place + 4 :]


@pytest.mark.parametrize(("progressive", "size"), [(True, (12_000, 9_000)), (False, (65_000, 65_000))])
def test_what_would_take_gigabytes_is_refused_at_once(progressive, size):
    started = time.process_time()
    with pytest.raises(ImageFault, match="too large"):
        decode_image(announcing(jpeg((64, 48), progressive=progressive), *size))
    assert time.process_time() - started < 1


def test_an_elongated_image_is_refused_before_it_is_enlarged():
    with pytest.raises(ImageFault, match="too elongated: 8x100000"):
        resize_shorter_side(Image.new("RGB", (8, 100_000)), 512)


def test_preparation_stores_a_huge_photo_reduced(tmp_path, monkeypatch):
    monkeypatch.setattr("lcm_lightning.data.images.MAX_PIXELS", 5_000)
    records = [Record("huge", jpeg((160, 120)), ("a photo",), "train"), Record("small", jpeg(), ("b",), "train")]
    write_shards(records, tmp_path, name="set", settings=ShardSettings(min_side=8), workers=1)
    with tarfile.open(tmp_path / "train-000000.tar") as archive:
        stored = Image.open(io.BytesIO(archive.extractfile("huge.jpg").read()))
        assert stored.size == (80, 60)
        assert archive.extractfile("small.jpg").read() == records[1].image


# ---- archives that mean harm ---------------------------------------------------------------------------------------


class Trap:
    """Unpickling this would end the test run."""

    def __reduce__(self):
        return (pytest.exit, ("unpickled",))


def test_nothing_is_written_outside_nothing_followed_and_nothing_unpickled(tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    (tmp_path / "secret.png").write_bytes(png(9))
    trap = pickle.dumps(Trap())
    members = pair("../escape") + pair(f"{tmp_path}/absolute") + pair("..//..//deep/../x") + pair("good")
    members += [(link("good2.png", str(tmp_path / "secret.png"), tarfile.SYMTYPE), b""), ("good2.txt", b"a photo")]
    members += [(link("good3.png", "../secret.png", tarfile.LNKTYPE), b""), ("good3.txt", b"a photo")]
    members += [(link("dev.png", "", tarfile.CHRTYPE), b""), (link("pipe.png", "", tarfile.FIFOTYPE), b"")]
    members += [(f"good.{suffix}", trap) for suffix in ("pyd", "pth", "pkl", "pickle", "npy", "npz", "ten", "pt")]
    (folder / "0.tar").write_bytes(tar_bytes(members))
    before = sorted(tmp_path.rglob("*"))
    data = data_set(folder / "0.tar", tmp_path)
    data.prepare_data()
    keys = delivered(data)
    assert keys == sorted(["../escape", f"{tmp_path}/absolute", "..//..//deep/../x", "good"])
    assert [path for path in sorted(tmp_path.rglob("*")) if "cache" not in path.parts] == before


def test_a_header_that_announces_a_terabyte_or_less_than_nothing_is_survived(tmp_path):
    def with_size(size: bytes) -> bytes:
        member = bytearray(tarfile.TarInfo("bad.png").tobuf(tarfile.GNU_FORMAT))
        member[124:136] = size
        member[148:156] = b" " * 8
        member[148:156] = f"{sum(member):06o}\0 ".encode()
        return bytes(member)

    for size in (b"\x80" + (1 << 40).to_bytes(11, "big"), b"\xff" * 12, b"\xff" * 10 + b"\xfc\x00"):
        path = tmp_path / "0.tar"
        path.write_bytes(tar_bytes(GOOD)[:4096] + with_size(size) + tar_bytes(pair("third")))
        assert {"first", "second", "third"} <= set(delivered(data_set(path, tmp_path)))


def test_a_shard_of_nothing_but_magic_does_not_keep_the_reader_busy(tmp_path):
    path = tmp_path / "0.tar"
    path.write_bytes(tar_bytes(GOOD)[:4096] + b"ustar" * 2_000_000)
    started = time.process_time()
    assert delivered(data_set(path, tmp_path)) == ["first", "second"]
    assert time.process_time() - started < 10


def test_stretches_of_magic_between_samples_share_one_budget(tmp_path, monkeypatch):
    looked_at = []
    monkeypatch.setattr(tar, "MAX_CANDIDATES", 1000)
    monkeypatch.setattr(tar, "parse", lambda header, parse=tar.parse: looked_at.append(header) or parse(header))
    members = [tar_bytes(pair(str(n)))[: -tarfile.RECORDSIZE + 2048] for n in range(50)]
    stretch = b"\1" * 512 + b"ustar" * 512
    (tmp_path / "0.tar").write_bytes(stretch.join(members))
    count = count_samples(tmp_path / "0.tar")
    # Two samples and two stretches.
    assert count.samples == 4 and count.cut_off.startswith("damaged from byte")
    assert len(looked_at) < 1100


# ---- shards as a whole ---------------------------------------------------------------------------------------------


def ten_shards(folder: Path) -> None:
    """Ready shards of four samples each, without an index."""
    folder.mkdir(parents=True, exist_ok=True)
    for shard in range(10):
        members = [member for n in range(4) for member in pair(f"s{shard}-{n}", png(n))]
        (folder / f"train-{shard}.tar").write_bytes(tar_bytes(members))


@pytest.mark.parametrize(("bytes_left", "left"), [(0, 0), (700, 0), (4096, 2), (4500, 2), (5632, 2), (8192, 4)])
def test_a_cut_off_shard_gives_what_is_whole(bytes_left, left, tmp_path, caplog):
    ten_shards(tmp_path / "set")
    path = tmp_path / "set" / "train-3.tar"
    path.write_bytes(path.read_bytes()[:bytes_left])
    data = data_set(tmp_path / "set", tmp_path, max_bad_fraction=0.5)
    keys = delivered(data)
    assert len(keys) == 36 + left and len(set(keys)) == len(keys)
    assert f"samples of shard {path}: not a complete tar file" in caplog.text
    assert data.train_dataloader().faults[str(path)] >= 1
    with pytest.raises(UserError, match=rf"data\.max_bad_fraction=0\.01: shard {path}: not a complete tar file"):
        data_set(tmp_path / "set", tmp_path, max_bad_fraction=0.01).prepare_data()


def test_of_prepared_shards_it_is_known_how_many_are_lost(tmp_path, caplog):
    records = [Record(f"k{n}", jpeg(), ("a photo",), "train") for n in range(40)]
    write_shards(records, tmp_path / "set", name="set", settings=ShardSettings(10, min_side=8), workers=1)
    cut, gone = tmp_path / "set" / "train-000000.tar", tmp_path / "set" / "train-000001.tar"
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    gone.unlink()
    data = data_set(tmp_path / "set", tmp_path, max_bad_fraction=0.5)
    keys = delivered(data)
    assert 20 < len(keys) < 30
    loader = data.train_dataloader()
    assert loader.faults[str(gone)] == 10
    assert "about 10 samples of shard" in caplog.text and "is missing" in caplog.text
    with pytest.raises(UserError, match=r"train-000001\.tar of the index is missing.* of 40 samples"):
        data_set(tmp_path / "set", tmp_path, max_bad_fraction=0.2).prepare_data()


def test_skipped_samples_are_in_the_metrics(tmp_path, monkeypatch, pipeline_folder):
    monkeypatch.chdir(tmp_path)
    ten_shards(tmp_path / "set")
    bad = pair("bad1", b"") + pair("bad2", caption=None)
    (tmp_path / "set" / "train-10.tar").write_bytes(tar_bytes(GOOD + bad)[:-5000])
    options = (
        f"model.path={pipeline_folder}", f"data.source={tmp_path / 'set'}", *SMALL, "debug=fdr", "logger=csv",
        "data.val_limit=0", "data.batch_size=20", "data.max_bad_fraction=0.5", "hydra.run.dir=run",
        "callbacks.samples=null", "method=lora", f"data.cache_dir={tmp_path / 'cache'}",
    )  # fmt: skip
    in_process("train", *options)
    counts = skipped_samples(Path("run"))
    assert counts == sorted(counts) and counts[0] >= 2
    in_process("train", *options, "resume=auto", "trainer.max_steps=6", "trainer.val_check_interval=6")
    in_process("train", *options, "hydra.run.dir=whole", "trainer.max_steps=6", "trainer.val_check_interval=6")
    assert skipped_samples(Path("run")) == skipped_samples(Path("whole"))
    assert skipped_samples(Path("run"))[:2] == counts and skipped_samples(Path("run"))[-1] > counts[-1]


def skipped_samples(run):
    """The count at each step."""
    with (run / "metrics.csv").open() as file:
        return [float(row["train/skipped_samples"]) for row in csv.DictReader(file) if row["train/skipped_samples"]]


# ---- servers that misbehave ----------------------------------------------------------------------------------------

Answer = Callable[[http.server.BaseHTTPRequestHandler, bytes], None]


def status(code: int, **headers: str) -> Answer:
    def answer(request: http.server.BaseHTTPRequestHandler, content: bytes) -> None:
        request.send_response(code)
        for name, value in headers.items():
            request.send_header(name.replace("_", "-"), value)
        request.send_header("Content-Length", "0")
        request.end_headers()

    return answer


def whole(request: http.server.BaseHTTPRequestHandler, content: bytes) -> None:
    send(request, content, len(content), ranges=False)


def with_ranges(request: http.server.BaseHTTPRequestHandler, content: bytes) -> None:
    send(request, content, len(content), ranges=True)


def etagged(tag: str, after: int | None = None) -> Answer:
    """A server that keeps to RFC 9110: a part only of the version the client has begun with."""

    def answer(request: http.server.BaseHTTPRequestHandler, content: bytes) -> None:
        content = content if tag == '"new"' else content[::-1]
        same = request.headers.get("If-Range") in (None, tag)
        send(request, content, len(content) if after is None else after, ranges=same, tag=tag)

    return answer


def dropping(after: int, ranges: bool = False) -> Answer:
    return lambda request, content: send(request, content, after, ranges)


def silent(request: http.server.BaseHTTPRequestHandler, content: bytes) -> None:
    """Announces the file, then says nothing."""
    send(request, content, 100, ranges=False, pause=1.0)


def trickling(request: http.server.BaseHTTPRequestHandler, content: bytes) -> None:
    """A byte now and then, each before a time-out."""
    request.send_response(200)
    request.send_header("Content-Length", str(len(content)))
    request.end_headers()
    try:
        for byte in content[:200]:
            request.wfile.write(bytes([byte]))
            request.wfile.flush()
            time.sleep(0.02)
    except OSError:
        pass


def babbling(request: http.server.BaseHTTPRequestHandler, content: bytes) -> None:
    """A byte of a header now and then, each before a time-out."""
    request.send_response(200)
    request.flush_headers()
    with suppress(OSError):
        for byte in b"X-Padding: " + b"a" * 500:
            request.wfile.write(bytes([byte]))
            time.sleep(0.02)


def redirecting_without_end(request: http.server.BaseHTTPRequestHandler, content: bytes) -> None:
    """Says where to go, and then goes on."""
    request.send_response(302)
    request.send_header("Location", "/there.tar")
    request.end_headers()
    with suppress(OSError):
        for _ in range(500):
            request.wfile.write(bytes(1000))
            time.sleep(0.02)


def send(
    request: http.server.BaseHTTPRequestHandler,
    content: bytes,
    length: int,
    ranges: bool,
    pause: float = 0.0,
    tag: str | None = None,
) -> None:
    """Send `length` of the bytes that were announced, from where the client asks if `ranges`."""
    wish = re.fullmatch(r"bytes=(\d+)-", request.headers.get("Range", ""))
    start = int(wish.group(1)) if wish and ranges else 0
    request.send_response(206 if start else 200)
    if start:
        request.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
    request.send_header("Content-Length", str(len(content) - start))
    if tag is not None:
        request.send_header("ETag", tag)
    request.end_headers()
    request.wfile.write(content[start : start + length])
    request.wfile.flush()
    time.sleep(pause)
    request.close_connection = True


class Server:
    """A web server that answers each request for a path with the next of its answers, the last one for ever."""

    def __init__(self) -> None:
        self.contents: dict[str, bytes] = {}
        self.answers: dict[str, list[Answer]] = {}
        self.requests: list[tuple[str, str | None]] = []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                outer.requests.append((self.path, self.headers.get("Range")))
                answers = outer.answers.get(self.path, [whole])
                answer = answers.pop(0) if len(answers) > 1 else answers[0]
                answer(self, outer.contents.get(self.path, b""))

            def log_message(self, *_: object) -> None:
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def add(self, path: str, content: bytes, *answers: Answer) -> str:
        """Serve `content` at `path`; its address."""
        self.contents[path], self.answers[path] = content, list(answers or [whole])
        return self.address + path


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    """The server, and a client in a hurry."""
    monkeypatch.setattr(downloads, "FIRST_PAUSE", 0.01)
    monkeypatch.setattr(downloads, "TIMEOUT", 0.5)
    monkeypatch.setattr(downloads, "ANSWER", 1.0)
    server = Server()
    thread = threading.Thread(target=server.server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    yield server
    server.server.shutdown()
    thread.join()
    server.server.server_close()


CONTENT = np.random.default_rng(0).bytes(100_000)


@pytest.mark.parametrize(
    ("answers", "ranges"),
    [
        ([status(503), status(500), whole], [None, None, None]),
        ([status(429, Retry_After="0"), whole], [None, None]),
        ([dropping(30_000), whole], [None, "bytes=30000-"]),
        ([dropping(30_000), dropping(20_000, ranges=True), with_ranges], [None, "bytes=30000-", "bytes=50000-"]),
        ([dropping(0), dropping(99_999), with_ranges], [None, None, "bytes=99999-"]),
        ([silent, with_ranges], [None, "bytes=100-"]),
    ],
    ids=["5xx", "too many requests", "drop, no ranges", "two drops, ranges", "drop at the edges", "silence"],
)
def test_a_download_that_fails_is_tried_again_from_where_it_broke(server, tmp_path, caplog, answers, ranges):
    caplog.set_level(logging.WARNING)
    path = download(server.add("/0.tar", CONTENT, *answers), tmp_path)
    assert path.read_bytes() == CONTENT
    assert [wish for _, wish in server.requests] == ranges
    assert caplog.text.count("trying again in") == len(answers) - 1
    assert [file.name for file in (tmp_path / "shards").iterdir()] == [path.name]


def test_a_redirection_is_followed_whatever_comes_with_it(server, tmp_path):
    address = server.add("/0.tar", b"", redirecting_without_end)
    server.add("/there.tar", CONTENT)
    started = time.monotonic()
    assert download(address, tmp_path).read_bytes() == CONTENT
    assert time.monotonic() - started < 5  # the server says something for ten seconds
    assert [path for path, _ in server.requests] == ["/0.tar", "/there.tar"]


@pytest.mark.parametrize("second", ['"new"', '"old"'])
def test_a_download_never_joins_parts_of_two_versions(server, tmp_path, second):
    address = server.add("/0.tar", CONTENT, etagged('"old"', after=30_000), etagged(second))
    assert download(address, tmp_path).read_bytes() == (CONTENT if second == '"new"' else CONTENT[::-1])
    assert [wish for _, wish in server.requests] == [None, "bytes=30000-"]


@pytest.mark.parametrize(
    ("answer", "requests", "message"),
    [
        (status(404), 1, r"download failed \(HTTP Error 404"),
        (status(401), 1, r"download failed \(HTTP Error 401"),
        (status(500), 5, r"download failed after 5 attempts \(HTTP Error 500"),
        (dropping(10), 5, r"download failed after 5 attempts \(the connection closed after 10 of 100000 bytes"),
        (trickling, 5, r"download failed after 5 attempts \(slower than 1024 bytes/s"),
        (silent, 5, r"download failed after 5 attempts \(.*timed out"),
        (babbling, 5, r"download failed after 5 attempts \(no complete answer in 1 s"),
    ],
    ids=["not found", "no access", "5xx", "drops", "slow", "silence", "headers without end"],
)
def test_a_server_that_does_not_recover_is_given_up(server, tmp_path, answer, requests, message):
    address = server.add("/0.tar", CONTENT, answer)
    with pytest.raises(UserError, match=rf"data\.source={address}: {message}"):
        download(address, tmp_path)
    assert len(server.requests) == requests
    assert not list((tmp_path / "shards").iterdir())


def test_a_shard_that_cannot_be_had_is_left_out_or_stops_the_run(server, tmp_path, caplog):
    ten_shards(tmp_path / "set")
    for number in range(10):
        answers = [status(500)] if number == 7 else [whole]
        server.add(f"/train-{number}.tar", (tmp_path / "set" / f"train-{number}.tar").read_bytes(), *answers)
    source = f"{server.address}/train-{{0..9}}.tar"
    data = data_set(source, tmp_path, max_bad_fraction=0.1)
    assert len(delivered(data)) == 36
    assert re.search(r"left out: about 4 samples of shard http:/.*/train-7\.tar: .*HTTP Error 500", caplog.text)
    with pytest.raises(UserError, match=r"data\.max_bad_fraction=0\.05: shard .*train-7\.tar.*about 4 of 40 samples"):
        data_set(source, tmp_path, max_bad_fraction=0.05).prepare_data()


def publish(server: Server, folder: Path, caption: str) -> None:
    """Prepare one sample with a caption and serve its shard and index at the root."""
    write_shards([Record("only", png(size=(40, 40)), (caption,), "train")], folder, name="set", workers=1)
    for name in ("index.json", "train-000000.tar"):
        server.add(f"/{name}", (folder / name).read_bytes())


@pytest.mark.parametrize("caption", ["a cat", "a longer caption " * 1000], ids=["same size", "another size"])
def test_shards_published_anew_at_the_same_address_are_fetched_anew(server, tmp_path, caption):
    for version in ("a dog", caption, caption):
        publish(server, tmp_path / "set", version)
        batches = list(data_set(f"{server.address}/", tmp_path, caption_dropout=0.0).train_dataloader())
        assert batches[0]["captions"][0] == version.strip()
    assert [path for path, _ in server.requests].count("/train-000000.tar") == 2


def test_a_full_disk_is_no_fault_of_the_server(server, tmp_path):
    address = server.add("/0.tar", CONTENT)
    (tmp_path / "shards").write_text("a file where a folder is wanted")
    with pytest.raises(UserError, match=r"data\.cache_dir=.*: cannot be written"):
        download(address, tmp_path)


def test_the_name_of_a_downloaded_file_stays_in_the_cache(server, tmp_path):
    for path in ("/a/..", "/0.tar?key=/../../x", "/%2e%2e%2fx.tar"):
        file = download(server.add(path, CONTENT), tmp_path / "cache")
        assert file.parent == tmp_path / "cache" / "shards" and file.read_bytes() == CONTENT
    assert [path.name for path in tmp_path.iterdir()] == ["cache"]
