"""Aspect-ratio buckets: most of each photo, one shape a batch, every sample once, and exactly continued."""

from __future__ import annotations

import io
from collections import Counter
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from PIL import ExifTags, Image
from torch import nn

from helpers.commands import ROOT, SMALL, in_process
from helpers.photos import cached_latents
from lcm_lightning.data import stream
from lcm_lightning.data.buckets import bucket_sizes, kept_shares, nearest_buckets
from lcm_lightning.data.datamodule import CaptionedImages, iterate_split
from lcm_lightning.data.images import resize_to_cover
from lcm_lightning.data.records import Record
from lcm_lightning.data.sizes import UNKNOWN_SIZE, upright_size
from lcm_lightning.data.writing import ShardSettings, write_shards
from lcm_lightning.errors import UserError
from lcm_lightning.methods.lora import LoraFinetuning
from lcm_lightning.models.adapters import LoraSettings
from lcm_lightning.models.identity import cache_key
from lcm_lightning.models.stable_diffusion import StableDiffusion, load_stable_diffusion

RESOLUTION, STEP = 32, 8
IN_BUCKETS = {"bucket_step": STEP, "batch_size": 3}
# Landscape 3:2 and 2:1, portrait, square, and one beyond the most elongated bucket.
SHAPES = ((60, 40), (80, 40), (40, 60), (48, 48), (120, 40))
# float16 keeps 11 binary digits; see tests/test_latents.py.
FLOAT16 = 4 * 2**-11


def photo(number: int) -> bytes:
    """A PNG of coarse noise in one of `SHAPES`, half of them in the first."""
    rng = np.random.default_rng(number)
    cells = rng.integers(0, 255, (6, 6, 3), dtype=np.uint8)
    size = SHAPES[min(rng.geometric(0.5) - 1, len(SHAPES) - 1)]
    buffer = io.BytesIO()
    Image.fromarray(cells).resize(size, Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """43 training and 9 validation samples of five shapes in shards of 8."""
    folder = tmp_path_factory.mktemp("photos")
    records = [Record(f"k{n}", photo(n), (f"{n} a", f"{n} b"), "train" if n < 43 else "val") for n in range(52)]
    write_shards(records, folder, name="photos", settings=ShardSettings(samples_per_shard=8), workers=1)
    return folder


@pytest.fixture(scope="module")
def latents(shards: Path, pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the tiny pipeline makes of `shards`."""
    return cached_latents(shards, pipeline_folder, tmp_path_factory.mktemp("latents"), RESOLUTION, **IN_BUCKETS)


@pytest.fixture
def data(tmp_path: Path) -> Any:
    def make(folder: Path, **options: Any) -> CaptionedImages:
        sizes = {"resolution": RESOLUTION, "buckets": True, "bucket_step": STEP, "cache_dir": str(tmp_path / "cache")}
        defaults = {"batch_size": 4, "num_workers": 0, "seed": 3, "shuffle_buffer": 20, "val_limit": None}
        return CaptionedImages("photos", str(folder), **(sizes | defaults | options))

    return make


def epoch(loader: Any, number: int = 0) -> list[dict[str, Any]]:
    loader.set_epoch(number)
    return list(loader)


def valid_keys(batch: dict[str, Any]) -> list[str]:
    return [key for key, weight in zip(batch["keys"], batch["weight"], strict=True) if weight > 0]


def keys_of(batches: list[dict[str, Any]]) -> list[str]:
    return [key for batch in batches for key in valid_keys(batch)]


@pytest.mark.parametrize(("resolution", "step"), [(512, 64), (768, 64), (1024, 64), (64, 32), (64, 8), (32, 32)])
def test_buckets_are_the_tallest_of_each_width_and_these_turned(resolution: int, step: int):
    multiples = range(step, 2 * resolution + 1, step)
    allowed = [(w, h) for w in multiples for h in multiples if w * h <= resolution**2 and w <= 2 * h and h <= 2 * w]
    tallest = [(w, max(h for v, h in allowed if v == w)) for w in multiples if w <= resolution]
    largest = {max(size for size in tallest if size[0] * h == size[1] * w) for w, h in tallest}
    assert bucket_sizes(resolution, step) == tuple(sorted(largest | {(h, w) for w, h in largest}))
    assert (resolution, resolution) in bucket_sizes(resolution, step)


def test_buckets_of_stable_diffusion():
    portraits = [(320, 640), (384, 640), (448, 576)]
    assert set(bucket_sizes(512, 64)) == {(512, 512), *portraits, *((h, w) for w, h in portraits)}


@pytest.mark.parametrize("size", [(500, 333), (333, 500), (500, 375), (200, 200), (1000, 100), (500, 281)])
def test_the_share_kept_is_that_of_the_pixels_left_after_resizing_and_cropping(size: tuple[int, int]):
    buckets = bucket_sizes(512, 64)
    resized = [resize_to_cover(Image.new("RGB", size), *bucket).size for bucket in buckets]
    left = [b[0] * b[1] / (r[0] * r[1]) for b, r in zip(buckets, resized, strict=True)]
    found = kept_shares(np.array([size]), buckets)[0]
    assert found == pytest.approx(left, rel=0.004)  # the resized sides are whole numbers
    assert found[nearest_buckets(np.array([size]), buckets)[0]] == max(found)


def test_of_buckets_that_keep_as_much_the_larger_is_taken():
    sizes = np.array([[30, 20], [20, 30], [7, 7]])
    assert nearest_buckets(sizes, [(10, 10), (24, 36), (36, 16)]).tolist() == [2, 1, 0]


def test_a_step_that_does_not_divide_the_resolution_is_refused():
    with pytest.raises(UserError, match=r"data\.bucket_step=48: expected a divisor of data\.resolution=512"):
        bucket_sizes(512, 48)


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("turn", [1, 3, 6, 8])
def test_a_photo_counts_as_it_is_seen(format: str, turn: int):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = turn
    buffer = io.BytesIO()
    Image.new("RGB", (60, 40)).save(buffer, format, exif=exif)
    assert upright_size(buffer) == ((40, 60) if turn >= 5 else (60, 40))


@pytest.mark.parametrize("content", [b"", b"no image", photo(0)[:20]])
def test_what_cannot_be_read_counts_as_square(content: bytes):
    assert upright_size(io.BytesIO(content)) == UNKNOWN_SIZE


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("source", ["shards", "latents"])
def test_an_epoch_has_every_sample_once_and_batches_of_one_shape(
    data: Any, request: pytest.FixtureRequest, source: str, num_workers: int
):
    loader = data(request.getfixturevalue(source), num_workers=num_workers).train_dataloader()
    field, scale = ("moments", 4) if source == "latents" else ("pixel_values", 1)
    for number in range(2):
        batches = epoch(loader, number)
        assert len(batches) == len(loader)
        assert sorted(keys_of(batches)) == sorted(f"k{n}" for n in range(43))
        assert [float(batch["weight"].mean()) for batch in batches] == pytest.approx([1.0] * len(batches))
        shapes = {tuple(scale * side for side in batch[field].shape[:-3:-1]) for batch in batches}
        assert len(shapes) == 4 and shapes <= set(bucket_sizes(RESOLUTION, STEP))
        assert all(set(batch) == set(batches[0]) and "bucket" not in batch for batch in batches)


def test_each_photo_is_in_the_bucket_that_keeps_most_of_it(data: Any, shards: Path):
    originals = {sample.key: sample.image.size for sample in iterate_split(str(shards), "train")}
    buckets = bucket_sizes(RESOLUTION, STEP)
    for batch in epoch(data(shards).train_dataloader()):
        bucket = tuple(batch["pixel_values"].shape[:-3:-1])
        for key in valid_keys(batch):
            width, height = originals[key]
            aspects = [min(width / height * h / w, w / h * height / width) for w, h in buckets]
            assert aspects[buckets.index(bucket)] == max(aspects)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_take_the_same_shape_in_the_same_step(data: Any, shards: Path, monkeypatch, world_size: int):
    ranks = []
    for rank in range(world_size):
        monkeypatch.setattr(stream, "rank_and_world_size", lambda rank=rank: (rank, world_size))
        ranks.append(epoch(data(shards, num_workers=rank).train_dataloader()))
    assert len({len(batches) for batches in ranks}) == 1
    assert sorted(key for batches in ranks for key in keys_of(batches)) == sorted(f"k{n}" for n in range(43))
    for step in zip(*ranks, strict=True):
        assert len({batch["pixel_values"].shape for batch in step}) == 1
        assert np.mean([float(batch["weight"].mean()) for batch in step]) == pytest.approx(1.0)


def test_validation_is_cropped_at_the_centre_of_its_bucket(data: Any, shards: Path):
    originals = {sample.key: sample.image for sample in iterate_split(str(shards), "val")}
    for module in (data(shards), data(shards, crop="center", flip_probability=0.0)):
        for batch in epoch(module.val_dataloader()):
            height, width = batch["pixel_values"].shape[-2:]
            for row, key in enumerate(valid_keys(batch)):
                resized = resize_to_cover(originals[key], width, height)
                left, top = round((resized.width - width) / 2), round((resized.height - height) / 2)
                pixels = np.asarray(resized.crop((left, top, left + width, top + height)), dtype=np.float32)
                expected = torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1
                torch.testing.assert_close(batch["pixel_values"][row], expected, atol=1e-6, rtol=0)


def test_the_sizes_told_are_of_the_photo_its_crop_and_its_bucket(data: Any, shards: Path):
    """The crop is found in the photo, or in its mirror image, by them alone."""
    originals = {sample.key: sample.image for sample in iterate_split(str(shards), "train")}
    mirrored = 0
    for batch in epoch(data(shards, flip_probability=0.5).train_dataloader()):
        for row, key in enumerate(valid_keys(batch)):
            photo_height, photo_width, top, left, height, width = map(int, batch["time_ids"][row])
            assert (photo_width, photo_height) == originals[key].size
            assert (height, width) == batch["pixel_values"].shape[-2:]
            resized = resize_to_cover(originals[key], width, height)
            found = [
                np.array_equal(np.asarray(side.crop((left, top, left + width, top + height))), pixels_of(batch, row))
                for side in (resized, resized.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
            ]
            assert any(found)
            mirrored += not found[0]
    assert 0 < mirrored < 43


def pixels_of(batch: dict[str, Any], row: int) -> np.ndarray:
    """Bytes [H, W, 3]."""
    return ((batch["pixel_values"][row].permute(1, 2, 0) + 1) * 127.5).round().to(torch.uint8).numpy()


def test_crops_are_the_same_in_every_epoch_at_the_centre_and_others_at_random(data: Any, shards: Path):
    for crop, distinct in (("center", 1), ("random", 6)):
        loader = data(shards, crop=crop, flip_probability=0.0).train_dataloader()
        seen: dict[str, set[bytes]] = {}
        for number in range(6):
            for batch in epoch(loader, number):
                for row, key in enumerate(valid_keys(batch)):
                    seen.setdefault(key, set()).add(batch["pixel_values"][row].numpy().tobytes())
        assert max(map(len, seen.values())) <= distinct
        assert (max(map(len, seen.values())) > 1) == (crop == "random")


class Recorder(pl.LightningModule):
    """Writes down the keys and shapes it is trained on."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.seen: list[Any] = []

    def training_step(self, batch: dict[str, Any], batch_index: int) -> torch.Tensor:
        self.seen.append((valid_keys(batch), batch["seed"].tolist(), batch["pixel_values"].shape))
        return self.weight.sum() * batch["weight"].mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), 0.1)


def trained(module: CaptionedImages, folder: Path, checkpoint: Path | None = None, **limits: int) -> Recorder:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    trainer = pl.Trainer(default_root_dir=folder, enable_checkpointing=False, **quiet, **limits)
    recorder = Recorder()
    trainer.fit(recorder, datamodule=module, ckpt_path=checkpoint)
    trainer.save_checkpoint(folder / "stopped.ckpt")
    return recorder


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("stop", [1, 5, 9])
def test_a_resumed_run_goes_on_with_exactly_the_steps_that_were_left(
    data: Any, shards: Path, tmp_path: Path, stop: int, num_workers: int
):
    module = partial(data, shards, num_workers=num_workers, val_limit=0)
    whole = trained(module(), tmp_path, max_steps=20)
    first = trained(module(), tmp_path, max_steps=stop)
    second = trained(module(), tmp_path, tmp_path / "stopped.ckpt", max_steps=20)
    assert first.seen + second.seen == whole.seen


def test_an_epoch_goes_on_with_other_batches_and_ranks(data: Any, shards: Path, monkeypatch):
    loader = data(shards).train_dataloader()
    loader.set_epoch(1)
    running = iter(loader)
    seen = keys_of([next(running) for _ in range(4)])
    state = loader.state_dict()
    assert state["consumed"] == len(seen)
    for rank in range(2):
        monkeypatch.setattr(stream, "rank_and_world_size", lambda rank=rank: (rank, 2))
        other = data(shards, batch_size=3).train_dataloader()
        other.load_state_dict(state)
        seen += keys_of(list(other))
    assert Counter(seen) == Counter(f"k{n}" for n in range(43))


def test_samples_before_the_place_of_resumption_are_not_decoded(data: Any, shards: Path, monkeypatch):
    loader = data(shards).train_dataloader()
    running = iter(loader)
    consumed = len(keys_of([next(running) for _ in range(6)]))
    decoded: list[int] = []
    decode = stream.decode_image
    monkeypatch.setattr(stream, "decode_image", lambda content: decoded.append(1) or decode(content))
    other = data(shards).train_dataloader()
    other.load_state_dict(loader.state_dict())
    list(other)
    assert len(decoded) == 43 - consumed


@pytest.mark.parametrize(
    ("before", "now", "message"),
    [
        ({"buckets": False}, {}, r"with data\.buckets=False, now data\.buckets=True .*data\.bucket_step=8"),
        ({}, {"buckets": False}, r"with data\.buckets=True .*, now data\.buckets=False"),
        ({}, {"bucket_step": 16}, r"with data\.bucket_step=8, now data\.bucket_step=16"),
        ({}, {"resolution": 64}, r"with data\.resolution=32, now data\.resolution=64"),
    ],
)
def test_other_buckets_in_mid_epoch_are_refused(data: Any, shards: Path, before, now, message: str):
    loader = data(shards, **before).train_dataloader()
    next(iter(loader))
    state = loader.state_dict()
    if before:  # as checkpoints of before there were buckets have it
        del state["buckets"], state["settings"]["data.buckets"]
        data(shards, **before).train_dataloader().load_state_dict(state)
    with pytest.raises(UserError, match=message):
        data(shards, **now).train_dataloader().load_state_dict(state)


def test_sizes_are_read_once_and_anew_when_a_shard_changes(data: Any, shards: Path, tmp_path: Path, monkeypatch):
    data(shards).train_dataloader()
    monkeypatch.setattr("lcm_lightning.data.datamodule.image_sizes", lambda path: pytest.fail(f"{path} read again"))
    data(shards).train_dataloader()
    with pytest.raises(pytest.fail.Exception, match="read again"):
        data(shards, cache_dir=str(tmp_path / "other")).train_dataloader()


def test_a_damaged_photo_keeps_its_place_among_the_squares(data: Any, tmp_path: Path):
    images = [photo(n) for n in range(20)]
    write_shards([Record(f"k{n}", image, ("a",), "train") for n, image in enumerate(images)], tmp_path, name="p")
    (shard,) = tmp_path.glob("train-*.tar")
    content = shard.read_bytes()
    shard.write_bytes(content.replace(images[3], b"x" * len(images[3])))
    batches = epoch(data(tmp_path, val_limit=0, max_bad_fraction=0.1).train_dataloader())
    assert sorted(keys_of(batches)) == sorted(f"k{n}" for n in range(20) if n != 3)


def test_cached_latents_are_those_of_the_crops_in_the_same_steps(
    data: Any, shards: Path, latents: Path, tiny_model: StableDiffusion
):
    from_images = data(shards, crop="center")
    for images, cached in zip(
        [*epoch(from_images.train_dataloader()), *epoch(from_images.val_dataloader())],
        [*epoch(data(latents).train_dataloader()), *epoch(data(latents).val_dataloader())],
        strict=True,
    ):
        assert images["keys"] == cached["keys"] and images["captions"] == cached["captions"]
        assert torch.equal(images["time_ids"], cached["time_ids"])
        assert torch.equal(images["seed"], cached["seed"]) and torch.equal(images["weight"], cached["weight"])
        moments = torch.stack(tiny_model.posterior(images["pixel_values"]), dim=1)
        torch.testing.assert_close(cached["moments"].float(), moments, rtol=FLOAT16, atol=1e-5)


@pytest.mark.parametrize("model_folder", ["pipeline_folder", "sdxl_folder"])
def test_a_training_step_takes_any_shape_from_images_as_from_latents(
    data: Any, shards: Path, tmp_path: Path, request: pytest.FixtureRequest, model_folder: str
):
    folder = request.getfixturevalue(model_folder)
    latents = cached_latents(shards, folder, tmp_path / "latents", RESOLUTION, **IN_BUCKETS)
    lora = LoraSettings(rank=4, alpha=4, target_modules="attention")
    method = LoraFinetuning(load_stable_diffusion(str(folder)), lora=lora, optimizer=torch.optim.AdamW)
    shapes = set()
    for images, cached in zip(
        epoch(data(shards, crop="center").train_dataloader()), epoch(data(latents).train_dataloader()), strict=True
    ):
        expected, found = (method._batch_losses(batch, method.kind.name) for batch in (images, cached))
        torch.testing.assert_close(found, expected, rtol=FLOAT16, atol=0)
        shapes.add(images["pixel_values"].shape)
    assert len(shapes) == 4


@pytest.mark.parametrize("source", ["shards", "latents"])
def test_a_bucket_of_fewer_photos_than_a_batch_has_a_batch_of_the_same_size(
    data: Any, request: pytest.FixtureRequest, source: str
):
    loader = data(request.getfixturevalue(source), batch_size=32).train_dataloader()
    batches = epoch(loader)
    assert len(batches) == len(loader) == 4 and sorted(keys_of(batches)) == sorted(f"k{n}" for n in range(43))
    for batch in batches:
        assert {len(content) for content in batch.values()} == {32}
        real = len(valid_keys(batch))
        assert real < 32 and batch["weight"].sum() == pytest.approx(32)
        assert torch.equal(batch["weight"][real:], torch.zeros(32 - real))


# ---- what is taken for granted -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def squares(shards: Path, pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Latents of squares of `shards`, as caches were before there were buckets."""
    return cached_latents(shards, pipeline_folder, tmp_path_factory.mktemp("squares"), RESOLUTION)


def test_photos_are_in_buckets_and_emoji_are_squares():
    """Null is for photos, and lets a cache say what it is."""
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        chosen = {
            file.stem: compose("train", overrides=[f"data={file.stem}"]).data.buckets
            for file in (ROOT / "conf" / "data").glob("*.yaml")
        }
    emoji = {"emoji", "noto_emoji", "twemoji", "twemoji_small"}
    assert chosen == dict.fromkeys(["flickr8k", "flickr30k", "coco", "folder", "shards"]) | dict.fromkeys(emoji, False)


@pytest.mark.parametrize(("source", "expected"), [("shards", True), ("latents", True), ("squares", False)])
def test_a_run_is_in_buckets_unless_its_latents_are_of_squares(
    request: pytest.FixtureRequest, pipeline_folder: Path, tmp_path: Path, monkeypatch, source: str, expected: bool
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    places = (f"model.path={pipeline_folder}", f"data.source={request.getfixturevalue(source)}", "hydra.run.dir=run")
    in_process("train", "experiment=lcm_flickr8k", "data=folder", "debug=fdr", "logger=csv", *places, *SMALL)
    config = OmegaConf.load(tmp_path / "run" / "config.yaml")
    assert config.data.buckets is expected and config.data.bucket_step == (STEP if expected else None)


def test_latents_of_squares_are_refused_where_buckets_are_asked_for(
    squares: Path, pipeline_folder: Path, tmp_path: Path, monkeypatch, capfd
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    places = (f"model.path={pipeline_folder}", f"data.source={squares}", "hydra.run.dir=run", "data.buckets=true")
    with pytest.raises(SystemExit):
        in_process("train", "experiment=lcm_flickr8k", "debug=fdr", "logger=csv", *places, *SMALL)
    assert "transform: the cache has shorter side bicubic, square crop" in capfd.readouterr().err


@pytest.mark.parametrize("bucket_step", [None, 16])
def test_latents_of_other_buckets_are_refused(data: Any, latents: Path, tiny_model: StableDiffusion, bucket_step):
    cache = data(latents).cache
    cache.check(cache_key(tiny_model, RESOLUTION, None), STEP)
    with pytest.raises(UserError, match=r"(?s)transform: the cache has .*steps of 8 px.*data\.buckets as they were"):
        cache.check(cache_key(tiny_model, RESOLUTION, None), bucket_step)
