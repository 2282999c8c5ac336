"""Batches as the training sees them: exact, deterministic, and the same under Lightning."""

from __future__ import annotations

import io
import json
import os
import shutil
from collections import Counter
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from lcm_lightning.data import stream
from lcm_lightning.data.datamodule import CaptionedImages
from lcm_lightning.data.records import Record
from lcm_lightning.data.writing import ShardSettings, write_shards
from lcm_lightning.errors import UserError
from lcm_lightning.tracking.data_records import data_record


def noise_png(seed, size=(48, 40)):
    pixels = np.random.default_rng(seed).integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """23 training, 5 validation and 3 test samples in shards of 4."""
    folder = tmp_path_factory.mktemp("shards")
    numbers = {"train": range(23), "val": range(100, 105), "test": range(200, 203)}
    records = [
        Record(f"k{n}", noise_png(n), tuple(f"{n}-{c}" for c in range(3)), split)
        for split, part in numbers.items()
        for n in part
    ]
    write_shards(records, folder, name="noise", settings=ShardSettings(samples_per_shard=4), workers=1)
    return folder


def data(folder, **options):
    defaults = {"resolution": 32, "batch_size": 4, "num_workers": 0, "seed": 3, "shuffle_buffer": 8}
    return CaptionedImages("noise", str(folder), **(defaults | options))


def epoch(loader, number=0):
    loader.set_epoch(number)
    return list(loader)


def valid_keys(batch):
    return [key for key, weight in zip(batch["keys"], batch["weight"], strict=True) if weight > 0]


def by_key(batches):
    """(pixels, caption, seed) of every valid sample."""
    samples = {}
    for batch in batches:
        for row, key in enumerate(batch["keys"]):
            if batch["weight"][row] > 0:
                assert key not in samples
                samples[key] = (batch["pixel_values"][row], batch["captions"][row], int(batch["seed"][row]))
    return samples


def same(first, second):
    return first.keys() == second.keys() and all(
        torch.equal(first[key][0], second[key][0]) and first[key][1:] == second[key][1:] for key in first
    )


def test_a_batch_has_the_promised_shapes_types_and_ranges(shards):
    for batch in epoch(data(shards).train_dataloader()):
        assert set(batch) == {"pixel_values", "captions", "keys", "seed", "weight", "time_ids"}
        assert batch["pixel_values"].shape == (4, 3, 32, 32) and batch["pixel_values"].dtype == torch.float32
        assert -1 <= batch["pixel_values"].min() < -0.9 and 0.9 < batch["pixel_values"].max() <= 1
        assert batch["seed"].shape == (4,) and batch["seed"].dtype == torch.int64 and (batch["seed"] >= 0).all()
        assert batch["weight"].shape == (4,) and batch["weight"].dtype == torch.float32
        assert batch["time_ids"].shape == (4, 6) and batch["time_ids"].dtype == torch.float32
        assert len(batch["captions"]) == len(batch["keys"]) == 4


@pytest.mark.parametrize("num_workers", [0, 1, 2, 3])
def test_an_epoch_visits_every_sample_once_in_len_batches(shards, num_workers):
    loader = data(shards, num_workers=num_workers).train_dataloader()
    for number in range(3):  # the same persistent workers
        batches = epoch(loader, number)
        assert len(batches) == len(loader) == 6
        assert set(by_key(batches)) == {f"k{n}" for n in range(23)}
        assert [float(batch["weight"].mean()) for batch in batches] == pytest.approx([1.0] * 6)


def test_a_samples_randomness_depends_on_neither_workers_nor_batches(shards):
    reference = by_key(epoch(data(shards).train_dataloader(), 5))
    for options in ({"num_workers": 2}, {"batch_size": 7}, {"shuffle_buffer": 1}):
        assert same(by_key(epoch(data(shards, **options).train_dataloader(), 5)), reference)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_share_the_epoch_out_with_equal_steps(shards, monkeypatch, world_size):
    reference = by_key(epoch(data(shards).train_dataloader()))
    ranks = []
    for rank in range(world_size):
        monkeypatch.setattr(stream, "rank_and_world_size", lambda rank=rank: (rank, world_size))
        ranks.append(epoch(data(shards, num_workers=2).train_dataloader()))
    assert len({len(batches) for batches in ranks}) == 1
    assert same(by_key([batch for batches in ranks for batch in batches]), reference)
    for step in zip(*ranks, strict=True):
        assert np.mean([float(batch["weight"].mean()) for batch in step]) == pytest.approx(1.0)


@pytest.mark.parametrize("lost", [None, "train", "val"])
def test_ranks_with_other_training_or_validation_shards_are_refused(shards, tmp_path, monkeypatch, lost):
    copy = shutil.copytree(shards, tmp_path / "copy")
    if lost is not None:
        (copy / f"{lost}-000000.tar").unlink()
    seen = []

    def gather(found, mine):
        seen.append(mine)
        found[:] = [seen[0], mine]

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    data(shards).train_dataloader()
    second = data(copy, max_bad_fraction=1.0)
    if lost is None:
        second.train_dataloader()
    else:
        with pytest.raises(UserError, match="the machines have different shards"):
            second.train_dataloader()


def test_more_ranks_than_samples_still_get_a_batch_each(shards, monkeypatch):
    monkeypatch.setattr(stream, "rank_and_world_size", lambda: (30, 40))
    (batch,) = epoch(data(shards).train_dataloader())
    assert batch["weight"].sum() == 0 and batch["pixel_values"].shape == (4, 3, 32, 32)


def test_epochs_differ_in_order_and_augmentation_and_seeds_repeat_them(shards):
    loader = data(shards, caption_dropout=0.0).train_dataloader()
    first, second = epoch(loader, 0), epoch(loader, 1)
    assert [batch["keys"] for batch in first] != [batch["keys"] for batch in second]
    assert not same(by_key(first), by_key(second))
    assert same(by_key(first), by_key(epoch(data(shards, caption_dropout=0.0).train_dataloader(), 0)))
    assert not same(by_key(first), by_key(epoch(data(shards, seed=4, caption_dropout=0.0).train_dataloader(), 0)))


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("start", [0, 1, 4, 14, 23])
def test_an_epoch_goes_on_from_a_sample_without_decoding_the_ones_before(shards, monkeypatch, num_workers, start):
    whole = [key for batch in epoch(data(shards).train_dataloader(), 2) for key in valid_keys(batch)]
    decoded = []
    decode = stream.decode_image
    monkeypatch.setattr(stream, "decode_image", lambda content: decoded.append(1) or decode(content))
    loader = data(shards, num_workers=num_workers).train_dataloader()
    loader.start = [start]
    rest = epoch(loader, 2)
    assert [key for batch in rest for key in valid_keys(batch)] == whole[start:]
    if num_workers == 0:
        assert len(decoded) == 23 - start


def test_captions_are_drawn_evenly_and_dropped_at_the_given_rate(shards):
    loader = data(shards, caption_dropout=0.25).train_dataloader()
    captions = [caption for number in range(60) for _, caption, _ in by_key(epoch(loader, number)).values()]
    assert captions.count("") / len(captions) == pytest.approx(0.25, abs=0.04)
    choices = Counter(caption.split("-")[1] for caption in captions if caption)
    assert min(choices.values()) / max(choices.values()) > 0.8


def test_flips_and_crops_vary_as_asked(shards):
    square = data(shards, resolution=40, flip_probability=0.0).train_dataloader()
    crops = {tuple(by_key(epoch(square, number))["k0"][0][:, 0, 0].tolist()) for number in range(150)}
    assert len(crops) == 9  # 48 pixels wide: 9 places for a crop of 40
    mirrored = data(shards, resolution=40, flip_probability=1.0).train_dataloader()
    plain, flipped = by_key(epoch(square))["k0"][0], by_key(epoch(mirrored))["k0"][0]
    assert torch.equal(plain.flip(-1), flipped)


def test_validation_is_the_same_every_time_and_unaugmented(shards):
    module = data(shards, caption_dropout=1.0, flip_probability=1.0, val_limit=None)
    loader = module.val_dataloader()
    first, later = by_key(epoch(loader, 0)), by_key(epoch(loader, 7))
    assert same(first, later)
    assert list(first) == [f"k{n}" for n in range(100, 105)] and module.val_samples == 5
    assert [caption for _, caption, _ in first.values()] == [f"{n}-0" for n in range(100, 105)]
    image = Image.open(io.BytesIO(noise_png(100))).resize((38, 32), Image.Resampling.BICUBIC).crop((3, 0, 35, 32))
    expected = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(first["k100"][0], expected, atol=1e-6, rtol=0)


def test_shards_that_nothing_is_validated_on_are_not_opened_for_a_tracker(shards, tmp_path):
    without = shutil.copytree(shards, tmp_path / "without_val")
    for file in without.glob("val-*.tar"):
        file.unlink()
    assert {*data_record(data(without, val_limit=0)).shards} == {"train"}
    assert {*data_record(data(shards, val_limit=1)).shards} == {"train", "val"}
    with pytest.raises(UserError, match="val-"):
        data_record(data(without, val_limit=1))


def test_val_limit_keeps_the_first_samples(shards):
    module = data(shards, val_limit=3)
    assert module.val_samples == 3
    assert list(by_key(epoch(module.val_dataloader()))) == ["k100", "k101", "k102"]
    assert data(shards, val_limit=0).val_dataloader() == []


def test_the_test_split_is_read_whole(shards):
    assert list(by_key(epoch(data(shards).test_dataloader()))) == ["k200", "k201", "k202"]
    assert [sample.key for sample in data(shards).iterate_split("test")] == ["k200", "k201", "k202"]


def damaged(folder, faults, file="train-0.tar"):
    """40 training samples in one shard; those in `faults` get the given image bytes."""
    path = folder / file
    import tarfile

    with tarfile.open(path, "w") as archive:
        for number in range(40):
            image, caption = faults.get(number, (noise_png(number), b"caption"))
            for suffix, content in (("png", image), ("txt", caption)):
                member = tarfile.TarInfo(f"k{number}.{suffix}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    return path


def test_unreadable_samples_keep_the_steps_and_weigh_nothing(tmp_path, caplog):
    damaged(tmp_path, {3: (b"no image", b"caption"), 9: (noise_png(9), b"\n")})
    module = data(tmp_path, max_bad_fraction=0.1, num_workers=2, cache_dir=str(tmp_path / "cache"))
    batches = epoch(module.train_dataloader())
    assert len(batches) == 10 and all(batch["pixel_values"].shape == (4, 3, 32, 32) for batch in batches)
    assert set(by_key(batches)) == {f"k{n}" for n in range(40)} - {"k3", "k9"}
    assert sum(int((batch["weight"] > 0).sum()) for batch in batches) == 38
    assert "train-0.tar, sample 'k3': undecodable" in caplog.text and "sample 'k9': no caption" in caplog.text


@pytest.mark.parametrize("num_workers", [0, 2])
def test_too_many_unreadable_samples_stop_the_run_and_name_the_shard(tmp_path, num_workers):
    damaged(tmp_path, dict.fromkeys(range(6), (b"no image", b"caption")))
    module = data(tmp_path, max_bad_fraction=0.1, num_workers=num_workers, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UserError, match=r"data\.max_bad_fraction=0\.1: [56] of 40 .*train-0\.tar"):
        epoch(module.train_dataloader())


@pytest.mark.parametrize("allowed", [0.1, 0.2])
def test_of_many_ranks_none_stops_by_itself_and_all_stop_by_the_sum(tmp_path, monkeypatch, allowed):
    damaged(tmp_path, dict.fromkeys(range(6), (b"no image", b"caption")))
    loaders = []
    for rank in range(8):
        monkeypatch.setattr(stream, "rank_and_world_size", lambda rank=rank: (rank, 8))
        module = data(tmp_path, max_bad_fraction=allowed, cache_dir=str(tmp_path / "cache"))
        loaders.append(module.train_dataloader())
        assert len(epoch(loaders[-1])) == len(loaders[-1])
    total = sum(loader.bad_samples for loader in loaders)
    assert total == 6
    for loader in loaders:
        if total <= allowed * 40:
            loader.check_bad(total)
            continue
        known = "train-0.tar" if loader.bad_samples else "the logs of the others"
        with pytest.raises(UserError, match=rf"data\.max_bad_fraction=0\.1: 6 of 40 samples .*{known}"):
            loader.check_bad(total)


def test_each_epoch_and_each_resumption_counts_its_bad_samples_anew(tmp_path):
    damaged(tmp_path, dict.fromkeys(range(6), (b"no image", b"caption")))
    loader = data(tmp_path, max_bad_fraction=0.2, cache_dir=str(tmp_path / "cache")).train_dataloader()
    for number in range(3):
        epoch(loader, number)
        assert loader.bad_samples == 6 and loader.faults.total() == 6 * (number + 1)
    loader.start = [36]
    epoch(loader)
    assert loader.bad_samples < 6


def test_an_unreadable_validation_sample_is_counted_and_named_and_stops_nothing(tmp_path, caplog):
    damaged(tmp_path, {})
    damaged(tmp_path, {2: (b"no image", b"caption")}, "val-0.tar")
    module = data(tmp_path, max_bad_fraction=0.01, val_limit=64, cache_dir=str(tmp_path / "cache"))
    loader = module.val_dataloader()
    assert set(by_key(epoch(loader))) == {f"k{n}" for n in range(40)} - {"k2"}
    assert dict(loader.faults) == {str(tmp_path / "val-0.tar"): 1}
    assert "val-0.tar, sample 'k2': undecodable" in caplog.text


def test_a_shard_cut_off_after_counting_keeps_the_steps(tmp_path):
    path = damaged(tmp_path, {})
    module = data(tmp_path, max_bad_fraction=1.0, cache_dir=str(tmp_path / "cache"))
    assert module.train_samples == 40
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    batches = epoch(module.train_dataloader())
    assert len(batches) == 10
    assert 15 <= len(by_key(batches)) <= 21


def test_every_epoch_of_a_limited_training_is_of_the_first_few_which_validation_can_be_too(shards):
    module = data(shards, train_limit=6, val_split="train", val_limit=6)
    module.prepare_data()
    loader = module.train_dataloader()
    seen = [Counter(key for batch in epoch(loader, number) for key in valid_keys(batch)) for number in range(3)]
    assert seen == [Counter(f"k{n}" for n in range(6))] * 3
    validated = [key for batch in epoch(module.val_dataloader()) for key in valid_keys(batch)]
    assert validated == [f"k{n}" for n in range(6)]


class Recorder(pl.LightningModule):
    """Writes down what it is trained on."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.seen = []
        self.validated = []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, batch_idx, valid_keys(batch), batch["seed"].tolist()))
        return self.weight.sum() * batch["weight"].mean()

    def validation_step(self, batch, batch_idx):
        self.validated.append((batch["keys"], batch["seed"].tolist()))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def trainer(folder, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
    return pl.Trainer(default_root_dir=folder, **({"enable_checkpointing": False} | quiet | options))


@pytest.mark.parametrize("limit", [{"max_epochs": 3}, {"max_steps": 18}])
def test_lightning_advances_the_epoch_of_persistent_workers(shards, tmp_path, limit):
    module = Recorder()
    trainer(tmp_path, **limit).fit(module, datamodule=data(shards, num_workers=2))
    epochs = {}
    for number, _, keys, seeds in module.seen:
        epochs.setdefault(number, []).append((tuple(keys), tuple(seeds)))
    assert sorted(epochs) == [0, 1, 2] and all(len(steps) == 6 for steps in epochs.values())
    for number, steps in epochs.items():
        assert sorted(key for keys, _ in steps for key in keys) == sorted(f"k{n}" for n in range(23))
        direct = epoch(data(shards, num_workers=2).train_dataloader(), number)
        assert [seeds for _, seeds in steps] == [tuple(batch["seed"].tolist()) for batch in direct]
    passes = [module.validated[start : start + 2] for start in range(2, len(module.validated), 2)]
    assert len(passes) == 3 and passes[0] == passes[1] == passes[2]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("stop", [2, 6, 8])
def test_a_checkpoint_takes_the_epoch_up_at_the_next_batch(shards, tmp_path, num_workers, stop):
    whole = Recorder()
    trainer(tmp_path, max_steps=15).fit(whole, datamodule=data(shards, num_workers=num_workers))
    first = Recorder()
    stopped = trainer(tmp_path, max_steps=stop)
    stopped.fit(first, datamodule=data(shards, num_workers=num_workers))
    stopped.save_checkpoint(tmp_path / "mid.ckpt")
    second = Recorder()
    again = trainer(tmp_path, max_steps=15)
    again.fit(second, datamodule=data(shards, num_workers=num_workers), ckpt_path=str(tmp_path / "mid.ckpt"))
    assert [seen[2:] for seen in first.seen + second.seen] == [seen[2:] for seen in whole.seen]


@pytest.mark.parametrize("change", [{"batch_size": 2}, {"num_workers": 2}, {"batch_size": 7, "num_workers": 1}])
def test_a_state_goes_on_with_other_workers_and_batches(shards, change):
    whole = [key for batch in epoch(data(shards).train_dataloader()) for key in valid_keys(batch)]
    loader = data(shards).train_dataloader()
    running = iter(loader)
    first = [key for _ in range(3) for key in valid_keys(next(running))]
    other = data(shards, **change).train_dataloader()
    other.load_state_dict(loader.state_dict())
    assert first + [key for batch in epoch(other) for key in valid_keys(batch)] == whole


@pytest.mark.parametrize(("change", "said"), [({"seed": 4}, r"data\.seed=3, now data\.seed=4"), ({}, "shards=")])
def test_resuming_in_mid_epoch_in_another_order_is_refused(shards, tmp_path, change, said):
    loader = data(shards).train_dataloader()
    next(iter(loader))
    other = data(shards, **change)
    if not change:
        damaged(tmp_path, {})
        other = data(tmp_path, cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UserError, match=said):
        other.train_dataloader().load_state_dict(loader.state_dict())


def test_validation_falls_back_on_test_and_then_says_what_to_do(tmp_path):
    path = damaged(tmp_path, {})
    options = {"val_limit": 2, "cache_dir": str(tmp_path / "cache")}
    with pytest.raises(UserError, match=r"data\.val_limit=0"):
        data(tmp_path, **options).val_dataloader()
    path.with_name("test-0.tar").write_bytes(path.read_bytes())
    assert list(by_key(epoch(data(tmp_path, **options).val_dataloader()))) == ["k0", "k1"]


def test_a_raw_data_set_names_the_prepare_command(tmp_path):
    (tmp_path / "captions.txt").write_text("image,caption\na.jpg,A dog .\n")
    with pytest.raises(UserError, match=rf"python -m lcm_lightning\.prepare data=flickr8k data\.source={tmp_path}"):
        CaptionedImages("flickr8k", str(tmp_path)).prepare_data()


def test_without_data_the_download_prepare_and_ready_shards_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        UserError, match=r"(?s)kaggle.*lcm_lightning\.prepare.*data\.source=clip-benchmark/wds_flickr8k"
    ):
        CaptionedImages("flickr8k").prepare_data()


def test_prepared_data_is_found_by_its_name(shards, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "noise").symlink_to(shards)
    monkeypatch.chdir(tmp_path)
    module = CaptionedImages("noise")
    assert module.train_samples == 23
    assert module.fingerprint == data(shards).fingerprint and len(module.fingerprint) == 64


def test_constructing_opens_nothing():
    assert CaptionedImages("flickr8k", "/nowhere").batch_size == 8


@pytest.mark.parametrize("name", ["flickr8k", "flickr30k", "folder", "shards"])
def test_every_configuration_builds_the_data_module(shards, name):
    from hydra import compose, initialize_config_dir
    from hydra.utils import instantiate

    with initialize_config_dir(str(Path(__file__).parents[1] / "conf"), version_base="1.3"):
        config = compose("prepare", [f"data={name}", f"data.source={shards}", "seed=5"])
    module = instantiate(config.data)
    assert isinstance(module, CaptionedImages) and module.seed == 5 and module.resolution is None
    assert module.train_samples == 23


def test_num_workers_defaults_to_the_cores_at_most_four():
    assert CaptionedImages("flickr8k").num_workers == min(4, os.cpu_count() or 1)


def test_the_index_holds_no_trace_of_the_machine(shards):
    assert str(shards) not in json.dumps(json.loads((shards / "index.json").read_text()))
