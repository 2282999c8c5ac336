"""SDXL by the commands: trained, drawn from, evaluated and inspected."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionXLPipeline
from PIL import Image

from helpers.commands import SMALL, SMALLER, in_process
from lcm_lightning.config.resolvers import package_file
from lcm_lightning.inspect import main as inspect

EVALUATION = (
    "evaluation=quick",
    "evaluation.num_images=4",
    "evaluation.batch_size=2",
    "evaluation.lineup.teacher_steps=2",
    "evaluation.lineup.rivals={ddim:[2],dpmpp:[2]}",
    "evaluation.lineup.undistilled_steps=[1]",
    "evaluation.lineup.student_steps=[1]",
    "evaluation.latency_repeats=1",
    "evaluation.latency_batch_sizes=[1]",
    "evaluation.bootstrap_samples=3",
    "evaluation.shown=2",
)


def test_an_experiment_is_trained_drawn_from_and_evaluated(
    sdxl_folder: Path,
    flickr_shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    places = (f"model.path={sdxl_folder}", f"data.source={flickr_shards}", "hydra.run.dir=run")
    in_process("train", "experiment=lcm_sdxl_flickr30k", *places, *SMALL, "debug=fdr", "logger=csv")
    device = ("accelerator=cpu", "dtype=float32")
    in_process("lcm_lightning.generate", "run=run", "prompt=dog", "num_images=1", "seed=3", *device, "output=drawn")

    pipeline = StableDiffusionXLPipeline.from_pretrained(sdxl_folder, add_watermarker=False)
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config)
    pipeline.load_lora_weights(tmp_path / "run" / "lora", weight_name="kohya_lora_weights.safetensors")
    settings = {"height": 32, "width": 32, "num_inference_steps": 4, "guidance_scale": 1.0}
    expected = pipeline("dog", generator=torch.Generator().manual_seed(3), **settings).images[0]
    with Image.open(tmp_path / "drawn" / "dog-3.png") as drawn:
        difference = np.asarray(drawn, dtype=int) - np.asarray(expected, dtype=int)
    assert np.abs(difference).max() <= 1  # of 255: both sides round

    in_process("evaluate", "run=run", *EVALUATION, *device, "logger=csv")
    metrics = json.loads((tmp_path / "run" / "evaluation" / "quick-4" / "metrics.json").read_text())
    assert {model["role"] for model in metrics["models"]} >= {"base", "undistilled", "student"}
    assert all(model["flops_per_image"]["total"] > 0 for model in metrics["models"])

    capsys.readouterr()
    for place in ("run", str(sdxl_folder)):
        monkeypatch.setattr(sys, "argv", ["inspect", place, "--model", str(sdxl_folder)])
        inspect()
        said = " ".join(capsys.readouterr().out.split())
        assert "refused" not in said
        assert ("lcm (LCM-LoRA)" in said and "unused none" in said) if place == "run" else XL in said


METHODS = {
    "lora": (),
    "lcm_lora": (),
    "lcm": ("method.guidance_dimension=16", "optimizer.lr=1e-4"),
    "kd_lora": ("method.teacher_lcm=teacher",),
    "tcd_lora": (),
    "pcm_lora": ("method.adversarial_weight=0.1",),
    "dmd2_lora": ("method.adversarial_weight=0.1", "method.critic_steps=1"),
}
QUALITY = (
    "callbacks=student_quality",
    f"callbacks.student_quality.clip={package_file('assets/tiny_clip')}",
    "callbacks.student_quality.num_images=4",
    "callbacks.student_quality.teacher_steps=2",
    "callbacks.student_quality.bootstrap_samples=2",
)


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_measures_its_pictures_and_draws(
    method: str, sdxl_folder: Path, flickr_shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def train(name: str, run: str, *more: str) -> None:
        places = (f"model.path={sdxl_folder}", f"data.source={flickr_shards}", f"hydra.run.dir={run}")
        rank = () if name == "lcm" else ("method.lora.rank=4",)
        chosen = ("experiment=lcm_sdxl_flickr30k", f"method={name}", "data.buckets=true", "data.bucket_step=8")
        in_process("train", *chosen, *places, *SMALLER, *rank, *METHODS[name], "debug=fdr", "logger=csv", *more)

    if method == "kd_lora":
        train("lcm", "teacher", "callbacks.samples=null")
    is_student = method != "lora"
    train(method, "run", *(QUALITY if is_student else ()))
    with (tmp_path / "run" / "metrics.csv").open() as file:
        found = {name: float(value) for row in csv.DictReader(file) for name, value in row.items() if value}
    losses = [value for name, value in found.items() if name.startswith("train/") and name.endswith("loss")]
    assert losses and np.isfinite([*losses, found["val/loss"]]).all() and found["step"] == 1
    assert not is_student or np.isfinite(found["val/student_cmmd"])
    assert not (tmp_path / "run" / "faults").exists()  # no step was left out
    size = ("width=48", "height=32", "accelerator=cpu", "dtype=float32")
    in_process("lcm_lightning.generate", "run=run", "prompt=dog", "num_images=1", "output=drawn", *size)
    with Image.open(tmp_path / "drawn" / "dog-0.png") as drawn:
        assert drawn.size == (48, 32) and np.asarray(drawn).std() > 0


XL = "pipeline StableDiffusionXLPipeline"
