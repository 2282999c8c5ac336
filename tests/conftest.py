"""Fixtures shared by all tests. What is no fixture is in helpers/."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from helpers.commands import ROOT
from helpers.photos import cached_latents, cached_teacher_steps, noise_jpeg, spoil_one_sample
from helpers.pipelines import build_tiny_pipeline, build_tiny_sdxl, save_full_lcm
from helpers.stoppable import COMMON, LORA, SETTINGS, Command, Start
from lcm_lightning.data.records import Record
from lcm_lightning.data.writing import ShardSettings, write_shards
from lcm_lightning.models.stable_diffusion import StableDiffusion, load_stable_diffusion

# Networks this small gain nothing from more threads, and lose much where other programs use the cores, as other
# tests do.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def saved_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Makes saved `StableDiffusionPipeline` folders that differ in their scheduler's config, each once."""
    folders: dict[tuple, Path] = {}

    def saved(**scheduler_config: object) -> Path:
        key = tuple(sorted(scheduler_config.items()))
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("pipeline")
            build_tiny_pipeline(**scheduler_config).save_pretrained(folders[key])
        return folders[key]

    return saved


@pytest.fixture(scope="session")
def pipeline_folder(saved_pipeline: Callable[..., Path]) -> Path:
    """A saved `StableDiffusionPipeline` folder (epsilon prediction)."""
    return saved_pipeline()


@pytest.fixture(scope="session")
def sdxl_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved `StableDiffusionXLPipeline` folder."""
    folder = tmp_path_factory.mktemp("sdxl")
    build_tiny_sdxl().save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_model(pipeline_folder: Path) -> StableDiffusion:
    """A fresh float32 model of `pipeline_folder`."""
    return load_stable_diffusion(str(pipeline_folder))


@pytest.fixture(scope="session")
def flickr_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Shards as `prepare` makes them of Flickr8k, five captions an image: 24 train, 4 val and 4 test samples."""
    folder = tmp_path_factory.mktemp("flickr8k")
    records = [
        Record(f"{split}{n}", noise_jpeg(seed), tuple(f"photo {seed}, caption {c}" for c in range(5)), split)
        for part, (split, samples) in enumerate((("train", 24), ("val", 4), ("test", 4)))
        for n, seed in enumerate(range(100 * part, 100 * part + samples))
    ]
    write_shards(records, folder, name="flickr8k", settings=ShardSettings(samples_per_shard=6), workers=1)
    return folder


@pytest.fixture
def train_command() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Runs `python train.py ...` as a process of its own, without standard input: a prompt would fail."""

    def run(*overrides: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, str(ROOT / "train.py"), *overrides],
            capture_output=True,
            text=True,
            timeout=240,
            stdin=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=False,
        )

    return run


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pipeline_folder: Path, flickr_shards: Path) -> Start:
    """Starts a run of `SETTINGS` in a folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    cached_latents(flickr_shards, pipeline_folder, tmp_path / "latents")
    cached_teacher_steps(tmp_path / "latents", pipeline_folder, tmp_path / "teacher", draws=1)
    save_full_lcm(build_tiny_pipeline(), tmp_path / "full_lcm")
    spoil_one_sample(shutil.copytree(tmp_path / "latents", tmp_path / "spoilt") / "train-000000.tar")

    def run(setting: str, folder: Path, *overrides: str) -> Command:
        ranks, options = SETTINGS[setting]
        places = (f"model.path={pipeline_folder}", f"data.source={flickr_shards}", f"hydra.run.dir={folder}")
        adapter = () if "experiment=full_lcm_flickr8k" in options else LORA
        command = Command((*places, *COMMON, *adapter, *options, *overrides), ranks, tmp_path / f"{folder.name}.log")
        command.start()
        return command

    return run
