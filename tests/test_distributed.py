"""Two processes train what one does with the same global batch."""

from __future__ import annotations

import csv
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from helpers.photos import cached_latents, noise_jpeg
from lcm_lightning.data.records import Record
from lcm_lightning.data.writing import ShardSettings, write_shards

Command = Callable[..., subprocess.CompletedProcess[str]]

STRATEGIES = {
    "ddp_sim": ("trainer=ddp_sim",),
    # The strategy of trainer=fsdp, on what a test machine has.
    "fsdp": ("trainer=fsdp", "trainer.accelerator=cpu", "trainer.devices=2"),
}
COMMON = (
    "logger=csv",
    "trainer.precision=32-true",
    "trainer.accumulate_grad_batches=1",
    "trainer.log_every_n_steps=1",
    "max_steps=5",
    "val_every=5",
    "data.num_workers=0",
    "data.resolution=32",
    "data.val_limit=3",
    "method.lora.rank=4",
    "method.lora.dropout=0.1",
    "method.warmup_steps=0",
    "callbacks.samples.teacher_steps=2",
    "callbacks.samples.num_prompts=2",
    "callbacks.samples.student_steps=[1]",
)

# Plain gradient steps: Adam's do not change when all gradients are twice too large.
SGD = (
    "optimizer._target_=torch.optim.SGD",
    "~optimizer.betas",
    "~optimizer.eps",
    "~optimizer.fused",
)


@pytest.fixture(scope="module")
def seven_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """7 training and 3 validation samples: at a global batch of 8 a step is an epoch, and one rank is short of one.

    Ranks read other samples at each step than one process does, but over an epoch the same ones, and with the same
    random numbers.
    """
    folder = tmp_path_factory.mktemp("seven")
    records = [Record(f"train{n}", noise_jpeg(n), (f"photo {n}", f"picture {n}"), "train") for n in range(7)]
    records += [Record(f"val{n}", noise_jpeg(100 + n), (f"held out {n}",), "val") for n in range(3)]
    write_shards(records, folder, name="seven", settings=ShardSettings(samples_per_shard=2), workers=1)
    return folder


def column(run: Path, name: str) -> list[float]:
    with (run / "metrics.csv").open() as file:
        return [float(row[name]) for row in csv.DictReader(file) if row.get(name)]


@pytest.mark.slow
@pytest.mark.multiprocess
# Rates at which the adapter moves by some hundredths: far more than the tolerance, and not so far that rounding grows.
@pytest.mark.parametrize(
    ("experiment", "lr"), [pytest.param("lora_flickr8k", 2.0, marks=pytest.mark.thorough), ("lcm_flickr8k", 0.1)]
)
def test_two_processes_train_what_one_does(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    pipeline_folder: Path,
    seven_shards: Path,
    train_command: Command,
    experiment: str,
    lr: float,
):
    monkeypatch.chdir(tmp_path)
    common = (f"experiment={experiment}", f"model.path={pipeline_folder}", f"data.source={seven_shards}", *COMMON, *SGD)
    common += (f"optimizer.lr={lr}",)
    runs = {"one": ("trainer=cpu", "data.batch_size=8")}
    runs |= {name: (*strategy, "data.batch_size=4") for name, strategy in STRATEGIES.items()}
    for name, options in runs.items():
        finished = train_command(*common, *options, f"hydra.run.dir={name}")
        assert finished.returncode == 0, finished.stderr
    expected = load_file("one/lora/pytorch_lora_weights.safetensors")
    moved = max(tensor.abs().max() for key, tensor in expected.items() if ".lora_B." in key)
    assert moved > 1e-2  # from 0: a gradient of the wrong size, or of other samples, would show
    for name in STRATEGIES:
        found = load_file(f"{name}/lora/pytorch_lora_weights.safetensors")
        checkpoint = torch.load(f"{name}/checkpoints/last.ckpt", weights_only=True)
        state = {key.replace(f".{name_in(key)}.", "."): tensor for key, tensor in checkpoint["state_dict"].items()}
        assert found.keys() == expected.keys() == {key.removeprefix("model.") for key in state}
        assert checkpoint["global_step"] == 5
        for key, tensor in expected.items():
            torch.testing.assert_close(found[key], tensor, rtol=0, atol=1e-5)
            assert torch.equal(state[f"model.{key}"], found[key])
        # The ranks hold 2 and 1 of the 3 held-out samples; the mean is over samples.
        assert column(Path(name), "val/loss") == pytest.approx(column(Path("one"), "val/loss"), rel=1e-5)
        pictures = [np.asarray(Image.open(f"{run}/samples/step_000005.png"), dtype=int) for run in ("one", name)]
        assert np.abs(pictures[0] - pictures[1]).max() <= 1  # of 255


@pytest.mark.slow
@pytest.mark.multiprocess
@pytest.mark.thorough
def test_two_processes_train_on_cached_latents_what_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pipeline_folder: Path, seven_shards: Path, train_command: Command
):
    monkeypatch.chdir(tmp_path)
    latents = cached_latents(seven_shards, pipeline_folder, tmp_path / "latents")
    common = ("experiment=lora_flickr8k", f"model.path={pipeline_folder}", f"data.source={latents}", *COMMON, *SGD)
    common += ("optimizer.lr=2.0", "callbacks.samples=null")
    for name, options in {
        "one": ("trainer=cpu", "data.batch_size=8"),
        "two": (*STRATEGIES["ddp_sim"], "data.batch_size=4"),
    }.items():
        finished = train_command(*common, *options, f"hydra.run.dir={name}")
        assert finished.returncode == 0, finished.stderr
    expected, found = (load_file(f"{run}/lora/pytorch_lora_weights.safetensors") for run in ("one", "two"))
    assert max(tensor.abs().max() for key, tensor in expected.items() if ".lora_B." in key) > 1e-2
    for key, tensor in expected.items():
        torch.testing.assert_close(found[key], tensor, rtol=0, atol=1e-5)
    assert column(Path("two"), "val/loss") == pytest.approx(column(Path("one"), "val/loss"), rel=1e-5)


def name_in(key: str) -> str:
    """The adapter's name in a parameter's name: `...lora_A.lcm.weight`."""
    return key.split(".")[-2]


@pytest.mark.slow
@pytest.mark.multiprocess
def test_sharded_training_in_bf16_goes_on_from_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pipeline_folder: Path, seven_shards: Path, train_command: Command
):
    """Frozen bf16 and trained float32 weights in one shard, gathered on saving and scattered on loading."""
    monkeypatch.chdir(tmp_path)
    common = ("experiment=lcm_flickr8k", f"model.path={pipeline_folder}", f"data.source={seven_shards}", *COMMON)
    common += (*STRATEGIES["fsdp"], "trainer.precision=bf16-mixed", "data.batch_size=4", "trainer.limit_val_batches=0")
    for run, options in {
        "first": ("trainer.max_steps=2",),
        "second": ("trainer.max_steps=4", "resume=first", "method.lr_scheduler=constant"),
    }.items():
        finished = train_command(*common, *options, f"hydra.run.dir={run}")
        assert finished.returncode == 0, finished.stderr
    weights = {run: load_file(f"{run}/lora/pytorch_lora_weights.safetensors") for run in ("first", "second")}
    assert all(tensor.dtype == torch.float32 for tensor in weights["second"].values())
    assert torch.load("second/checkpoints/last.ckpt", weights_only=True)["global_step"] == 4
    changes = [(weights["second"][key] - tensor).abs().max() for key, tensor in weights["first"].items()]
    assert 1e-6 < max(changes) < 1e-2  # two steps of AdamW at 1e-4
