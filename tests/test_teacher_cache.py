"""Cached steps of the teacher: the steps of training from latents, without running the teacher."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.fabric import Fabric
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from helpers.adapters import gradients, randomise
from helpers.commands import ROOT, SMALL, in_process
from helpers.photos import cached_latents, spoil_one_sample
from helpers.pipelines import build_tiny_pipeline
from lcm_lightning.config.instantiate import take_teacher_steps
from lcm_lightning.data.datamodule import CaptionedImages
from lcm_lightning.data.records import Record
from lcm_lightning.data.shards import find_shards
from lcm_lightning.data.writing import ShardSettings, write_shards
from lcm_lightning.diffusion.consistency import ConsistencyDistillation
from lcm_lightning.diffusion.distribution_matching import DistributionMatching
from lcm_lightning.diffusion.trajectory import TrajectoryDistillation
from lcm_lightning.errors import UserError
from lcm_lightning.methods.adapter_training import Training
from lcm_lightning.methods.dmd2_lora import Dmd2LoraDistillation
from lcm_lightning.methods.lcm import LcmDistillation
from lcm_lightning.methods.lcm_lora import LcmLoraDistillation
from lcm_lightning.methods.lora import LoraFinetuning
from lcm_lightning.methods.pcm_lora import PcmLoraDistillation
from lcm_lightning.methods.tcd_lora import TcdLoraDistillation
from lcm_lightning.methods.teacher_ode import TeacherOde
from lcm_lightning.models.adapters import LoraSettings
from lcm_lightning.models.condition import Condition
from lcm_lightning.models.identity import cache_key
from lcm_lightning.models.stable_diffusion import StableDiffusion, load_stable_diffusion
from lcm_lightning.prepare import teaching
from lcm_lightning.prepare.encoding import CacheSettings, cache_latents
from lcm_lightning.prepare.teaching import TeacherSettings, cache_teacher

DRAWS, CACHE_SEED, OWN_SEED = 2, 7, 3
STEPS = 10
OPTIMIZER = partial(torch.optim.SGD, lr=0.1)
LORA = {"lora": LoraSettings(rank=4, alpha=4, target_modules="attention"), "optimizer": OPTIMIZER}
# x_s, of magnitude 1, is rounded to float16, by 2^-11 of itself at most, and the target moves by about as much. The
# root of a squared error is a distance, so that moves by no more (triangle inequality).
FLOAT16 = 2**-11
CONSISTENCY = ConsistencyDistillation(num_ode_steps=STEPS, loss="l2")
TRAJECTORY = TrajectoryDistillation(num_ode_steps=STEPS, loss="l2")
METHODS: dict[str, Callable[..., TeacherOde]] = {
    "lcm": partial(LcmLoraDistillation, distillation=CONSISTENCY, **LORA),
    "tcd": partial(TcdLoraDistillation, distillation=TRAJECTORY, **LORA),
    "pcm": partial(PcmLoraDistillation, distillation=TRAJECTORY, phases=2, **LORA),
    "full lcm": partial(LcmDistillation, distillation=CONSISTENCY, optimizer=OPTIMIZER, guidance_dimension=16),
}


def data(source: Path, **options: Any) -> CaptionedImages:
    defaults = {"resolution": 32, "batch_size": 4, "num_workers": 0, "seed": OWN_SEED, "caption_dropout": 0.3}
    return CaptionedImages("photos", str(source), **(defaults | options))


def model_for(source: Path, pipeline: Path) -> StableDiffusion:
    """A model without VAE and text encoder, as a training on cached latents gets it."""
    model = load_stable_diffusion(str(pipeline), defer_encoders=True)
    empty = data(source).cache.empty_condition(None)
    model.known_texts[""] = Condition(**{name: torch.from_numpy(tensor)[None] for name, tensor in empty.items()})
    return model


def method(name: str, source: Path, pipeline: Path, **settings: Any) -> TeacherOde:
    """A method in mid-training."""
    module = METHODS[name](model_for(source, pipeline), **settings)
    randomise(module, seed=5)
    return module


def cache(latents: Path, output: Path, module: TeacherOde, **settings: Any) -> dict[str, Any]:
    """The index of the cache of the steps of a method's teacher."""
    options = {key: settings.pop(key) for key in list(settings) if key in ("batch_size", "on_shard")}
    chosen = TeacherSettings(**{"draws": DRAWS, "seed": CACHE_SEED, "dtype": "float32"} | settings)
    fabric = Fabric(accelerator="cpu", devices=1)
    return cache_teacher(data(latents), output, module, chosen, fabric, **{"batch_size": 5} | options)


@pytest.fixture(scope="module")
def latents(flickr_shards: Path, pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 training and 4 validation samples of five captions, each mirrored too."""
    return cached_latents(flickr_shards, pipeline_folder, tmp_path_factory.mktemp("latents"))


@pytest.fixture(scope="module")
def teacher(latents: Path, pipeline_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`latents` with the teacher's steps."""
    output = tmp_path_factory.mktemp("teacher")
    cache(latents, output, method("lcm", latents, pipeline_folder))
    return output


def batches(module: TeacherOde, of: CaptionedImages, epoch: int) -> Iterator[dict[str, Any]]:
    """An epoch of training, as `module` trains on it."""
    of.prepare_data()
    take_teacher_steps(module, of)
    loader = of.train_dataloader()
    loader.set_epoch(epoch)
    yield from loader


def by_sample(module: Training, of: Iterator[dict[str, Any]]) -> dict[str, Tensor]:
    """The root of the loss of each sample, by its key."""
    return {
        key: loss.detach().sqrt()
        for batch in of
        for key, loss in zip(batch["keys"], module._batch_losses(batch, module.kind.name), strict=True)
    }


# ---- training ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_one_cache_gives_every_method_the_losses_of_the_latents_under_its_own_seed(
    name: str, latents: Path, teacher: Path, pipeline_folder: Path
):
    module = method(name, latents, pipeline_folder)
    for epoch in range(DRAWS):
        expected = by_sample(module, batches(module, data(latents, seed=CACHE_SEED), epoch))
        found = by_sample(module, batches(module, data(teacher), epoch))
        assert found.keys() == expected.keys() and len(found) == 24
        assert len(set(map(float, expected.values()))) == 24
        torch.testing.assert_close(found, {key: expected[key] for key in found}, rtol=0, atol=FLOAT16)


@pytest.mark.parametrize("name", ["lcm", "tcd", "pcm"])
def test_so_are_the_gradients(name: str, latents: Path, teacher: Path, pipeline_folder: Path):
    module, found = method(name, latents, pipeline_folder), []
    for source in (data(latents, seed=CACHE_SEED), data(teacher)):
        module.zero_grad()
        for batch in batches(module, source, 1):
            module._batch_losses(batch, module.kind.name).sum().backward()
        found.append(torch.cat([g.flatten() for g in gradients(module.model.unet, module.kind.name).values()]))
    assert 0 < (found[0] - found[1]).norm() < 4 * FLOAT16 * found[0].norm()


def test_samples_come_in_the_order_of_the_run(latents: Path, teacher: Path, pipeline_folder: Path):
    module = method("lcm", latents, pipeline_folder)
    ordered = [
        [(batch["keys"], batch["weight"].tolist()) for batch in batches(module, of, 1)]
        for of in (data(latents), data(teacher))
    ]
    assert ordered[0] == ordered[1]


def test_the_draws_come_again_in_later_epochs(latents: Path, teacher: Path, pipeline_folder: Path):
    module = method("lcm", latents, pipeline_folder)

    def steps(epoch: int) -> dict[str, tuple[int, str, bytes]]:
        return {
            key: (seed, caption, x_s.numpy().tobytes())
            for batch in batches(module, data(teacher), epoch)
            for key, seed, caption, x_s in zip(
                batch["keys"], batch["seed"].tolist(), batch["captions"], batch["teacher"], strict=True
            )
        }

    assert steps(0) == steps(DRAWS) and steps(1) == steps(2 * DRAWS + 1)
    assert all(steps(0)[key][0] != steps(1)[key][0] for key in steps(0))


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(teacher: Path, pipeline_folder: Path, workers: int):
    module = method("lcm", teacher, pipeline_folder)
    alone, shared = (
        [(batch["keys"], batch["seed"].tolist(), batch["teacher"].tolist()) for batch in batches(module, of, 1)]
        for of in (data(teacher), data(teacher, num_workers=workers))
    )
    assert alone == shared


def test_neither_teacher_nor_encoders_run(teacher: Path, pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch):
    module = method("lcm", teacher, pipeline_folder)
    calls: list[int] = []
    denoise = module.model.denoise
    monkeypatch.setattr(module.model, "denoise", lambda x_t, *rest: calls.append(len(x_t)) or denoise(x_t, *rest))
    for batch in batches(module, data(teacher), 0):
        module._batch_losses(batch, module.kind.name)
    assert calls == [4] * 2 * 6  # target and student; the teacher's guided passes would be of 8
    assert set(module.model.deferred) == {"vae", "text_encoder"}
    calls.clear()
    for batch in data(teacher).val_dataloader():  # of which no steps are cached
        assert "teacher" not in batch
        module._batch_losses(batch, module.kind.name)
    assert calls == [8, 4, 4]


def test_an_unguided_teacher_has_steps_of_its_own(latents: Path, pipeline_folder: Path, tmp_path: Path):
    module = method("tcd", latents, pipeline_folder, student_guidance=4.0)
    cache(latents, tmp_path, module)
    expected = by_sample(module, batches(module, data(latents, seed=CACHE_SEED), 1))
    found = by_sample(module, batches(module, data(tmp_path), 1))
    torch.testing.assert_close(found, {key: expected[key] for key in found}, rtol=0, atol=FLOAT16)
    with pytest.raises(UserError, match=r"guidance: the cache has none, this run w from 5.0 to 15.0"):
        take_teacher_steps(method("lcm", latents, pipeline_folder), data(tmp_path))


# ---- fresh draws ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["lcm", "tcd"])
def test_with_fresh_draws_only_it_is_training_from_the_latents(
    name: str, latents: Path, teacher: Path, pipeline_folder: Path
):
    module = method(name, latents, pipeline_folder)
    alike = [data(latents), data(teacher, fresh_fraction=1.0), data(teacher, fresh_fraction=1.0)]
    alike[2].take_teacher_steps(module.teacher_key())  # also where each sample is told so
    losses = [by_sample(module, batches(module, of, 1)) for of in alike]
    assert losses[0] == losses[1] == losses[2]


def test_a_share_of_the_samples_takes_fresh_draws_and_the_teacher_runs_for_those(
    latents: Path, teacher: Path, pipeline_folder: Path
):
    module = method("lcm", latents, pipeline_folder)
    fresh, cached = (by_sample(module, batches(module, of, 1)) for of in (data(latents), data(teacher)))
    mixed = list(batches(module, data(teacher, fresh_fraction=0.4), 1))
    flags = {key: flag for batch in mixed for key, flag in zip(batch["keys"], batch["fresh"], strict=True)}
    assert 3 <= sum(flags.values()) <= 18
    expected = {key: (fresh if flag else cached)[key] for key, flag in flags.items()}
    torch.testing.assert_close(by_sample(module, iter(mixed)), expected, rtol=1e-4, atol=1e-6)
    other_epoch = {k for batch in batches(module, data(teacher, fresh_fraction=0.4), 3) for k in fresh_keys(batch)}
    assert other_epoch != {key for key, flag in flags.items() if flag}


def test_what_the_cache_holds_is_not_computed_afresh(teacher: Path, pipeline_folder: Path):
    """With the cache's own seed the run's draws are the cache's, in the epochs that it has."""
    module, of = method("lcm", teacher, pipeline_folder), data(teacher, seed=CACHE_SEED, fresh_fraction=0.4)
    found = [[key for batch in batches(module, of, epoch) for key in fresh_keys(batch)] for epoch in range(DRAWS + 1)]
    assert found[:DRAWS] == [[]] * DRAWS and found[DRAWS]


def test_weights_in_shards_want_all_ranks_to_run_the_teacher_or_none(
    teacher: Path, pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    module = method("tcd", teacher, pipeline_folder)
    monkeypatch.setattr(type(module), "device_mesh", object())
    monkeypatch.setattr(type(module), "trainer", SimpleNamespace(datamodule=data(teacher, fresh_fraction=0.25)))
    with pytest.raises(UserError, match=r"^data\.fresh_fraction=0\.25: .*take trainer=ddp"):
        module.configure_model()


def fresh_keys(batch: dict[str, Any]) -> list[str]:
    return [key for key, flag in zip(batch["keys"], batch["fresh"], strict=True) if flag]


def test_a_share_of_fresh_draws_wants_cached_ones(latents: Path):
    with pytest.raises(UserError, match=r"data.fresh_fraction=0.5: .*holds no teacher's steps"):
        data(latents, fresh_fraction=0.5).prepare_data()


# ---- what a cache is good for --------------------------------------------------------------------------------------


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    """A LoRA on the UNet."""
    down = torch.randn(4, 64, generator=torch.Generator().manual_seed(0))
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    path = tmp_path / "style.safetensors"
    save_file({f"{layer}.lora_A.weight": down, f"{layer}.lora_B.weight": down.T.contiguous()}, path)
    return path


@pytest.mark.parametrize(
    ("part", "settings"),
    [
        ("guidance", {"w_min": 4.0}),
        ("num_ode_steps", {"distillation": ConsistencyDistillation(num_ode_steps=20)}),
        (
            "solver, solver_steps",
            {"distillation": ConsistencyDistillation(num_ode_steps=STEPS, solver="dpmpp", solver_steps=2)},
        ),
        ("teacher_lora", {"teacher_lora": "style.safetensors"}),
    ],
)
def test_it_is_refused_by_what_the_method_does_otherwise(
    part: str, settings: dict[str, Any], teacher: Path, pipeline_folder: Path, lora: Path
):
    if "teacher_lora" in settings:
        settings = {"teacher_lora": str(lora)}
    assert refused(method("lcm", teacher, pipeline_folder, **settings), data(teacher)) == part


@pytest.mark.parametrize(
    ("part", "options"),
    [("caption_dropout", {"caption_dropout": 0.0}), ("flip_probability", {"flip_probability": 0.0})],
)
def test_it_is_refused_by_what_the_data_does_otherwise(
    part: str, options: dict[str, Any], teacher: Path, pipeline_folder: Path
):
    assert refused(method("lcm", teacher, pipeline_folder), data(teacher, **options)) == part


@pytest.mark.parametrize(
    ("part", "scheduler"),
    [("unet", {}), ("noise_schedule", {"beta_end": 0.013}), ("prediction_type", {"prediction_type": "v_prediction"})],
)
def test_it_is_refused_by_what_the_model_has_otherwise(
    part: str, scheduler: dict[str, Any], teacher: Path, tmp_path: Path
):
    build_tiny_pipeline(seed=0 if scheduler else 1, **scheduler).save_pretrained(tmp_path)
    assert refused(method("lcm", teacher, tmp_path), data(teacher)) == part


def refused(module: TeacherOde, of: CaptionedImages) -> str:
    """The parts that a refusal names."""
    of.prepare_data()
    with pytest.raises(UserError, match=r"its teacher's steps are others than this run's") as refusal:
        take_teacher_steps(module, of)
    assert "data.fresh_fraction=1" in str(refusal.value) and "cache=teacher" in str(refusal.value)
    return ", ".join(re.findall(r"^  (\w+): the cache has .+, this run .+$", str(refusal.value), re.MULTILINE))


def test_a_copy_of_the_model_under_other_crops_of_one_is_not_refused(
    teacher: Path, pipeline_folder: Path, tmp_path: Path
):
    copied = Path(shutil.copytree(pipeline_folder, tmp_path / "copy"))
    take_teacher_steps(method("lcm", teacher, copied), data(teacher, crop="center"))


@pytest.mark.parametrize("trained", [LoraFinetuning, Dmd2LoraDistillation])
def test_methods_that_follow_no_ode_take_its_latents(
    trained: type[Training], latents: Path, teacher: Path, pipeline_folder: Path
):
    settings = {} if trained is LoraFinetuning else {"distillation": DistributionMatching(num_steps=2)}
    module = trained(model_for(teacher, pipeline_folder), **LORA, **settings)
    first, second = (list(batches(module, of, 1)) for of in (data(latents), data(teacher)))
    for plain, found in zip(first, second, strict=True):
        assert plain.keys() == found.keys() and plain["captions"] == found["captions"]
        assert all(torch.equal(plain[name], found[name]) for name in ("moments", "text", "seed", "weight"))


@pytest.mark.parametrize("change", [{"draws": 0}, {"draws": "two"}, {"key": None}, {"colour": 1}])
def test_an_index_of_others_is_one_message(teacher: Path, tmp_path: Path, change: dict[str, Any]):
    folder = Path(shutil.copytree(teacher, tmp_path / "copy"))
    index = json.loads((folder / "index.json").read_text())
    index["latents"]["teacher"] |= change
    (folder / "index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"data\.source=.*its index\.json is none of a teacher's steps"):
        data(folder, fresh_fraction=0.5).prepare_data()


def test_it_can_be_evaluated_and_cached_again_as_the_latents_it_is(latents: Path, teacher: Path):
    assert data(teacher).cache.key == data(latents).cache.key
    assert find_shards(str(teacher)).latents["images"] == find_shards(str(latents)).latents["images"]


# ---- preparing -----------------------------------------------------------------------------------------------------


def test_an_interrupted_cache_goes_on_where_it_stopped(
    latents: Path, teacher: Path, pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def until_the_third(task, *arguments):
        if task.file == "train-000002.tar":
            raise KeyboardInterrupt
        return write(task, *arguments)

    write, module = teaching.write_latents, method("lcm", latents, pipeline_folder)
    monkeypatch.setattr(teaching, "write_latents", until_the_third)
    with pytest.raises(KeyboardInterrupt):
        cache(latents, tmp_path, module)
    with pytest.raises(UserError, match="did not finish"):
        find_shards(str(tmp_path))
    before = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.tar")}
    assert len(before) == 2
    monkeypatch.undo()
    kept = []
    cache(latents, tmp_path, module, on_shard=lambda shard, was_kept: kept.append(was_kept))
    assert kept.count(True) == 2
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in before} == before
    assert contents(tmp_path) == contents(teacher)
    assert not list(tmp_path.rglob("*.tmp"))


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_held_out_shards_are_copied(latents: Path, teacher: Path):
    (held_out,) = latents.glob("val-*.tar")
    assert (teacher / held_out.name).read_bytes() == held_out.read_bytes()


def test_the_adapter_that_trains_has_no_part_in_it(latents: Path, teacher: Path, pipeline_folder: Path, tmp_path: Path):
    cache(latents, tmp_path, METHODS["pcm"](model_for(latents, pipeline_folder)))
    assert contents(tmp_path) == contents(teacher)


@pytest.mark.parametrize("settings", [{"draws": 3}, {"seed": 8}])
def test_a_cache_of_other_draws_is_not_overwritten(
    settings: dict[str, Any], latents: Path, teacher: Path, pipeline_folder: Path, tmp_path: Path
):
    folder = Path(shutil.copytree(teacher, tmp_path / "copy"))
    before = contents(folder)
    with pytest.raises(UserError, match=rf"cache.output=.*made with another {next(iter(settings))};"):
        cache(latents, folder, method("lcm", latents, pipeline_folder), **settings)
    assert contents(folder) == before


def test_latents_and_steps_do_not_overwrite_each_other(
    latents: Path, teacher: Path, flickr_shards: Path, pipeline_folder: Path, tmp_path: Path
):
    module = method("lcm", latents, pipeline_folder)
    other = Path(shutil.copytree(latents, tmp_path / "latents"))
    with pytest.raises(UserError, match=r"cache.output=.*the shards of latents themselves"):
        cache(latents, latents, module)
    with pytest.raises(UserError, match=r"cache.output=.*made with another .*num_ode_steps"):
        cache(latents, other, module)
    with pytest.raises(UserError, match=r"cache.output=.*made with another .*num_ode_steps"):
        cached_latents(flickr_shards, pipeline_folder, Path(shutil.copytree(teacher, tmp_path / "teacher")))


def test_a_sample_whose_steps_are_no_numbers_is_left_out(latents: Path, pipeline_folder: Path, tmp_path: Path):
    spoilt = Path(shutil.copytree(latents, tmp_path / "spoilt"))
    spoil_one_sample(spoilt / "train-000000.tar")
    index = cache(spoilt, tmp_path / "teacher", method("lcm", latents, pipeline_folder))
    assert index["splits"]["train"]["samples"] == 23 and index["skipped"] == {"teacher's steps not finite": 1}


# ---- buckets -------------------------------------------------------------------------------------------------------


def test_steps_have_the_shapes_of_their_buckets(pipeline_folder: Path, tmp_path: Path):
    records = [
        Record(f"k{n}", photo(n, SHAPES[n % len(SHAPES)]), (f"{n} a", f"{n} b"), "train" if n < 15 else "val")
        for n in range(18)
    ]
    write_shards(records, tmp_path / "shards", name="photos", settings=ShardSettings(samples_per_shard=8), workers=1)
    model = load_stable_diffusion(str(pipeline_folder))
    cache_latents(
        find_shards(str(tmp_path / "shards")),
        tmp_path / "latents",
        images=str(tmp_path / "shards"),
        model=model,
        key=cache_key(model, 32, None),
        settings=CacheSettings(crops=2, flips=True, dtype="float32"),
        bucket_step=8,
        workers=1,
    )
    module = method("lcm", tmp_path / "latents", pipeline_folder)
    cache(tmp_path / "latents", tmp_path / "teacher", module)
    options = {"buckets": True, "bucket_step": 8}
    expected = by_sample(module, batches(module, data(tmp_path / "latents", seed=CACHE_SEED, **options), 1))
    of_cache = list(batches(module, data(tmp_path / "teacher", **options), 1))
    assert all(batch["teacher"].shape[1:] == batch["moments"].shape[2:] for batch in of_cache)
    assert len({batch["teacher"].shape[2:] for batch in of_cache}) == 3
    found = by_sample(module, iter(of_cache))
    assert len(found) == 15
    torch.testing.assert_close(found, {key: expected[key] for key in found}, rtol=0, atol=FLOAT16)


SHAPES = ((60, 40), (40, 60), (48, 48))


def photo(number: int, size: tuple[int, int]) -> bytes:
    """A PNG of coarse noise."""
    cells = np.random.default_rng(number).integers(0, 255, (6, 6, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(cells).resize(size, Image.Resampling.BICUBIC).save(buffer, "PNG")
    return buffer.getvalue()


# ---- commands ------------------------------------------------------------------------------------------------------


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Runs a program in this process and in `tmp_path`; returns what it said, after a status other than 0."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")

    def run(program: str, *options: object) -> str:
        capfd.readouterr()
        status = ""
        try:
            in_process(program, *map(str, options))
        except SystemExit as end:
            status = f"{end.code} "
        return status + "".join(capfd.readouterr())

    return run


PREPARE = "lcm_lightning.prepare.commands"


def test_from_latents_to_a_run_on_the_teachers_steps(
    command: Callable[..., str], latents: Path, pipeline_folder: Path, tmp_path: Path
):
    model = ("model=sd15", f"model.path={pipeline_folder}")
    small = ("method.lora.rank=4", "data.num_workers=0")
    options = ("data=flickr8k", f"data.source={latents}", "cache=teacher", "cache.dtype=float32", "cache.draws=3")
    said = command(PREPARE, *options, *model, "method=tcd_lora", *small)
    assert "3 steps of the teacher" in said and "for each of 24 images: about 0.00 GB" in said
    assert "experiment=lcm_flickr8k data.source=data/flickr8k-teacher model=sd15" in said and "method=tcd_lora" in said
    assert "5 shards kept" in command(PREPARE, *options, *model, "method=lcm_lora", *small)

    run = (
        "experiment=lcm_flickr8k",
        "data.source=data/flickr8k-teacher",
        "debug=fdr",
        "logger=csv",
        *SMALL,
        *model,
    )
    said = command("train", *run, "hydra.run.dir=run", "max_steps=2", "callbacks.samples=null")
    assert "run folder: run" in said
    assert (tmp_path / "run" / "lora" / "pytorch_lora_weights.safetensors").is_file()
    said = command("train", *run, "hydra.run.dir=other", "method.w_max=9", "data.fresh_fraction=0.5")
    assert said.startswith("2 ") and "guidance: the cache has w from 5.0 to 15.0, this run w from 5.0 to 9.0" in said
    said = command("train", *run, "hydra.run.dir=fresh", "method.w_max=9", "data.fresh_fraction=1", "max_steps=1")
    assert "run folder: fresh" in said


def test_latents_without_held_out_ones_will_do(
    command: Callable[..., str], latents: Path, pipeline_folder: Path, tmp_path: Path
):
    folder = Path(shutil.copytree(latents, tmp_path / "copy"))
    index = json.loads((folder / "index.json").read_text())
    del index["splits"]["val"]
    (folder / "index.json").write_text(json.dumps(index))
    model = ("model=sd15", f"model.path={pipeline_folder}", "method=lcm_lora", "method.lora.rank=4")
    said = command(PREPARE, "data=flickr8k", f"data.source={folder}", "cache=teacher", "cache.draws=1", *model)
    assert "24 images in" in said and "Ready" in said


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("method=lcm_lora",), "error: cache=teacher: whose steps? give the model"),
        (("model=tiny",), "error: cache=teacher: which steps? give the method"),
        (("model=tiny", "method=lora"), "error: cache=teacher: LoraFinetuning follows no teacher's ODE"),
        (("model=tiny", "method=dmd2_lora"), "error: cache=teacher: Dmd2LoraDistillation follows no teacher's ODE"),
        (("model=tiny", "method=lcm_lora", "method.w_min=-1"), "error: method.w_min=-1"),
        (("model=tiny", "method=lcm_lora", "cache.draws=0"), "error: cache.draws=0: expected a whole number"),
        (("model=tiny", "method=lcm_lora", "cache.seed=-1"), "error: cache.seed=-1: expected a whole number"),
        (("model=tiny", "method=lcm_lora", "cache.dtype=int8"), "error: dtype=int8"),
        (("model=tiny", "method=lcm_lora", "cache.accelerator=abacus"), "error: accelerator=abacus"),
        (("model=tiny", "method=lcm_lora", "data.caption_dropout=2"), "error: data.caption_dropout=2"),
        (("model=tiny", "method=lcm_lora"), "resolution: the cache has 32, this run 64"),
    ],
)
def test_a_mistake_is_one_message(command: Callable[..., str], latents: Path, options: tuple[str, ...], message: str):
    said = command(PREPARE, "data=flickr8k", f"data.source={latents}", "cache=teacher", *options)
    assert said.startswith("2 ") and message in said and "Traceback" not in said
    assert not Path("data").exists()


def test_images_are_refused_with_the_command_that_makes_latents(command: Callable[..., str], flickr_shards: Path):
    said = command(PREPARE, "cache=teacher", "model=tiny", "method=lcm_lora", f"data.source={flickr_shards}")
    assert said.startswith("2 ") and "holds images; cache their latents first" in said and "cache=latents" in said


def test_a_method_means_nothing_to_other_preparations(command: Callable[..., str], flickr_shards: Path):
    said = command(PREPARE, "method=lcm_lora", f"data.source={flickr_shards}")
    assert said.startswith("2 ") and "method=lcm_lora: only cache=teacher reads it" in said


@pytest.mark.multiprocess
def test_two_processes_write_the_same_bytes(latents: Path, pipeline_folder: Path, tmp_path: Path):
    def prepared(devices: int) -> Path:
        output = tmp_path / f"by_{devices}"
        options = (
            *("data=flickr8k", f"data.source={latents}", "cache=teacher", f"cache.output={output}", "cache.draws=2"),
            *("model=sd15", f"model.path={pipeline_folder}", "method=lcm_lora", "method.lora.rank=4"),
            *("cache.accelerator=cpu", f"cache.devices={devices}", "cache.dtype=float32"),
        )
        subprocess.run(
            [sys.executable, "-m", "lcm_lightning.prepare", *options],
            cwd=ROOT,
            check=True,
            timeout=240,
            env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )
        return output

    assert contents(prepared(1)) == contents(prepared(2))
