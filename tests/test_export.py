"""Exported LoRA files mean the same to other programs as to the module that trained them."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lcm_lightning.callbacks.export import TEACHER_FILE, ExportLora
from lcm_lightning.diffusion.consistency import ConsistencyDistillation
from lcm_lightning.diffusion.solver import ode_timesteps
from lcm_lightning.errors import UserError
from lcm_lightning.methods.adapter_training import AdapterTraining
from lcm_lightning.methods.lcm_lora import LCM, LcmLoraDistillation
from lcm_lightning.methods.lora import LoraFinetuning
from lcm_lightning.models.adapters import LoraSettings, active_adapters, add_lora, fuse_lora, load_lora, lora_parameters
from lcm_lightning.models.architectures import SD15_UNET
from lcm_lightning.models.condition import Condition
from lcm_lightning.models.kinds import KOHYA_FILE, LORA_FILE
from lcm_lightning.models.sampling import Sampler, make_scheduler, sample
from lcm_lightning.models.stable_diffusion import StableDiffusion, load_stable_diffusion
from lcm_lightning.runs.contents import read_manifest

GENERATOR_SEED = 5


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    """Latents, timesteps and text embeddings for the tiny UNet."""
    generator = torch.Generator().manual_seed(GENERATOR_SEED)
    x_t, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 16, 32, generator=generator)
    return x_t, torch.tensor([10, 900]), text


@torch.no_grad()
def output(unet: nn.Module) -> Tensor:
    x_t, timesteps, text = inputs()
    return unet(x_t, timesteps, encoder_hidden_states=text).sample


def train_and_export(module: AdapterTraining, folder: Path) -> AdapterTraining:
    """One step from a random adapter, which is what the zero of a new one cannot hide behind."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in module.adapter_parameters():
            parameter.normal_(0, 0.1, generator=generator)
    batch = {
        "pixel_values": torch.rand(2, 3, 32, 32, generator=generator) * 2 - 1,
        "captions": ["a dog", "a cat"],
        "seed": torch.tensor([1, 2]),
        "weight": torch.ones(2),
    }
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ExportLora(str(folder))],
    )
    trainer.fit(module, DataLoader([batch], batch_size=None))
    return module


SGD = partial(torch.optim.SGD, lr=1e-3)


def finetuned(pipeline_folder: Path, folder: Path, **lora: object) -> AdapterTraining:
    settings = LoraSettings(**{"rank": 4, "alpha": 6, "target_modules": "attention", **lora})
    module = LoraFinetuning(load_stable_diffusion(str(pipeline_folder)), lora=settings, optimizer=SGD)
    return train_and_export(module, folder)


def distilled(
    pipeline_folder: Path, folder: Path, teacher_lora: Path | None = None, num_ode_steps: int = 50
) -> AdapterTraining:
    module = LcmLoraDistillation(
        load_stable_diffusion(str(pipeline_folder)),
        distillation=ConsistencyDistillation(num_ode_steps=num_ode_steps),
        teacher_lora=str(teacher_lora) if teacher_lora else None,
        lora=LoraSettings(rank=4, alpha=6, target_modules="lcm_lora"),
        optimizer=SGD,
    )
    return train_and_export(module, folder)


def base_pipeline(pipeline_folder: Path) -> StableDiffusionPipeline:
    return StableDiffusionPipeline.from_pretrained(pipeline_folder, safety_checker=None)


def assert_same_images_to_the_unet(found: Tensor, expected: Tensor, base: Tensor) -> None:
    """1e-4 absolute on outputs of order 1; the adapter itself moves them a hundred times as much."""
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    assert (expected - base).abs().max() > 1e-2


@pytest.mark.parametrize("file", [LORA_FILE, KOHYA_FILE])
@pytest.mark.parametrize("train", [finetuned, distilled])
def test_diffusers_reads_the_exported_file(pipeline_folder: Path, tmp_path: Path, train, file: str):
    module = train(pipeline_folder, tmp_path)
    pipeline = base_pipeline(pipeline_folder)
    base = output(pipeline.unet)
    pipeline.load_lora_weights(tmp_path, weight_name=file)
    assert_same_images_to_the_unet(output(pipeline.unet), output(module.model.unet), base)


@pytest.mark.parametrize("file", [LORA_FILE, KOHYA_FILE])
def test_diffusers_adds_a_distilled_adapter_to_its_teacher_s(pipeline_folder: Path, tmp_path: Path, file: str):
    finetuned(pipeline_folder, tmp_path / "teacher")
    module = distilled(pipeline_folder, tmp_path / "student", tmp_path / "teacher")
    pipeline = base_pipeline(pipeline_folder)
    base = output(pipeline.unet)
    pipeline.load_lora_weights(tmp_path / "student", weight_name=TEACHER_FILE, adapter_name="finetuned")
    teacher = output(pipeline.unet)
    with active_adapters(module.model.unet, ()):
        assert_same_images_to_the_unet(teacher, output(module.model.unet), base)
    pipeline.load_lora_weights(tmp_path / "student", weight_name=file, adapter_name="lcm")
    pipeline.set_adapters(["finetuned", "lcm"])
    assert_same_images_to_the_unet(output(pipeline.unet), output(module.model.unet), teacher)


def merge_kohya(unet: nn.Module, file: Path) -> set[str]:
    """W + alpha / r up down, as kohya's merging script does; returns the layers' names."""
    tensors = load_file(file)
    layers = {"lora_unet_" + name.replace(".", "_"): layer for name, layer in unet.named_modules()}
    names = {key.partition(".")[0] for key in tensors}
    for name in names:
        down, up = tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"]
        update = (up.flatten(1) @ down.flatten(1)).reshape(layers[name].weight.shape)
        layers[name].weight.data += tensors[f"{name}.alpha"] / down.shape[0] * update
    return names


@pytest.mark.parametrize("alpha", [4, 6])
def test_the_kohya_file_merges_by_its_own_alpha(pipeline_folder: Path, tmp_path: Path, alpha: float):
    module = finetuned(pipeline_folder, tmp_path, alpha=alpha, target_modules="lcm_lora")
    unet = base_pipeline(pipeline_folder).unet
    base = output(unet)
    names = merge_kohya(unet, tmp_path / KOHYA_FILE)
    assert_same_images_to_the_unet(output(unet), output(module.model.unet), base)
    assert 2 * len(names) == len(module.adapter_parameters())


def test_readers_that_know_no_alpha_get_the_same_from_the_diffusers_file(pipeline_folder: Path, tmp_path: Path):
    module = finetuned(pipeline_folder, tmp_path, alpha=6)
    tensors = load_file(tmp_path / LORA_FILE)
    assert all(tensor.dtype == torch.float32 for tensor in tensors.values())
    unet = base_pipeline(pipeline_folder).unet
    base = output(unet)
    for key in tensors:
        name, side, _ = key.removeprefix("unet.").rsplit(".", 2)
        if side == "lora_A":
            unet.get_submodule(name).weight.data += tensors[f"unet.{name}.lora_B.weight"] @ tensors[key]
    assert_same_images_to_the_unet(output(unet), output(module.model.unet), base)


def test_our_own_reader_adds_both_adapters_of_the_manifest(pipeline_folder: Path, tmp_path: Path):
    finetuned(pipeline_folder, tmp_path / "teacher")
    module = distilled(pipeline_folder, tmp_path / "student", tmp_path / "teacher")
    manifest = json.loads((tmp_path / "student" / "adapters.json").read_text())
    files = {adapter["name"]: adapter["file"] for adapter in manifest["adapters"]}
    assert files == {"finetuned": TEACHER_FILE, "lcm": LORA_FILE} and list(files) == ["finetuned", "lcm"]
    model = load_stable_diffusion(str(pipeline_folder))
    base = output(model.unet)
    for adapter in manifest["adapters"]:
        load_lora(model, tmp_path / "student" / adapter["file"], adapter["name"])
    with active_adapters(model.unet, ("finetuned", "lcm")):
        assert_same_images_to_the_unet(output(model.unet), output(module.model.unet), base)
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_the_manifest_of_a_run_without_teacher_lora_names_one_file(pipeline_folder: Path, tmp_path: Path):
    distilled(pipeline_folder, tmp_path)
    (adapter,) = json.loads((tmp_path / "adapters.json").read_text())["adapters"]
    assert adapter["name"] == "lcm" and adapter["file"] == LORA_FILE
    assert adapter["sampler"]["scheduler"] == "LCMScheduler" and (adapter["steps"], adapter["guidance_scale"]) == (4, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["adapters.json", LORA_FILE, KOHYA_FILE])


def test_files_written_in_training_say_what_they_are(pipeline_folder: Path, tmp_path: Path):
    distilled(pipeline_folder, tmp_path)
    for name in (LORA_FILE, KOHYA_FILE):
        with safe_open(tmp_path / name, "pt") as file:
            said = file.metadata()
        assert said["modelspec.architecture"] == "stable-diffusion-v1/lora" and said["step"] == "1"
        assert (said["ss_base_model_version"], said["sampler"], said["steps"]) == ("sd_v1", "LCMScheduler", "4")
    assert said["ss_network_dim"] == said["ss_network_alpha"] == "4"


def walk(sampler: Sampler, steps: int, scheduler_config: Mapping[str, Any]) -> list[int]:
    scheduler: Any = make_scheduler(sampler, scheduler_config)
    scheduler.set_timesteps(steps)
    return scheduler.timesteps.tolist()


@pytest.mark.parametrize("num_ode_steps", [2, 8, 30, 50])
def test_an_lcm_student_is_drawn_at_timesteps_it_was_trained_at(
    pipeline_folder: Path, tmp_path: Path, num_ode_steps: int
):
    module = distilled(pipeline_folder, tmp_path / "lora", num_ode_steps=num_ode_steps)
    (adapter,) = read_manifest(tmp_path)
    kind, trained_at = adapter.kind, set(ode_timesteps(1000, num_ode_steps).tolist())
    assert kind == module.kind and kind.steps == min(4, num_ode_steps)
    for steps in kind.sampler.possible(range(1, 100)):
        timesteps = walk(kind.sampler, steps, module.model.scheduler_config)
        assert len(timesteps) == steps and set(timesteps) <= trained_at
    assert kind.sampler.possible([1, num_ode_steps, num_ode_steps + 1]) == [1, num_ode_steps]
    assert LcmLoraDistillation.kind.sampler == LCM  # of a LoRA that does not say

    pipeline = base_pipeline(pipeline_folder)
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config, original_inference_steps=num_ode_steps)
    pipeline.load_lora_weights(tmp_path / "lora", weight_name=adapter.file)
    size = {"height": 32, "width": 32, "generator": torch.Generator().manual_seed(5), "output_type": "pt"}
    expected = pipeline("a dog", num_inference_steps=kind.steps, guidance_scale=1.0, **size).images
    way = {"steps": kind.steps, "guidance_scale": 1.0, "sampler": kind.sampler, "resolution": 32}
    torch.testing.assert_close(sample(module.model, ["a dog"], seeds=[5], **way), expected, atol=1e-4, rtol=0)
    with pytest.raises(UserError, match=f"the sampler LCM takes 1 to {num_ode_steps}"):
        sample(module.model, ["a dog"], seeds=[5], **way | {"steps": num_ode_steps + 1})


def test_a_manifest_that_does_not_say_the_ode_s_steps_means_fifty():
    former = Sampler("lcm", "LCM", "LCMScheduler", {"timestep_spacing": "leading"}, max_steps=50)
    assert walk(former, 4, {}) == walk(LCM, 4, {}) == [999, 759, 499, 259]


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_fused_weights_are_the_adapter_s_effect(pipeline_folder: Path, tmp_path: Path, scale: float):
    finetuned(pipeline_folder, tmp_path)
    pipeline = base_pipeline(pipeline_folder)
    base = output(pipeline.unet)
    pipeline.load_lora_weights(tmp_path, adapter_name="finetuned")
    pipeline.set_adapters(["finetuned"], [scale])
    model = load_stable_diffusion(str(pipeline_folder))
    before = {name for name, _ in model.named_parameters()}
    fuse_lora(model, tmp_path, scale)
    assert_same_images_to_the_unet(output(model.unet), output(pipeline.unet), base)
    assert {name for name, _ in model.named_parameters()} == before


def test_a_lora_that_half_precision_would_round_away_is_announced(
    pipeline_folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    finetuned(pipeline_folder, tmp_path)
    small = 1e-3
    for dtype in (torch.float32, torch.bfloat16):
        caplog.clear()
        fuse_lora(load_stable_diffusion(str(pipeline_folder), dtype=dtype), tmp_path, small, "method.teacher_lora")
        said = [record.getMessage() for record in caplog.records if "rounding" in record.getMessage()]
        assert len(said) == (dtype == torch.bfloat16)
    assert said[0].startswith(f"method.teacher_lora={tmp_path}: rounding to bfloat16 loses ")


def test_a_lora_of_another_base_model_is_refused(pipeline_folder: Path, tiny_model: StableDiffusion, tmp_path: Path):
    module = finetuned(pipeline_folder, tmp_path)
    other = copy.deepcopy(module.model.unet.config)
    tiny_model.unet = UNet2DConditionModel.from_config({**other, "block_out_channels": (16, 32)})
    with pytest.raises(UserError, match=r"its shapes do not fit .*; it was made for another base model"):
        load_lora(tiny_model, tmp_path, "finetuned")


# ---- which layers --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sd15_unet() -> UNet2DConditionModel:
    """SD v1-5's UNet without memory behind its 859,520,964 parameters."""
    with torch.device("meta"):
        return UNet2DConditionModel(**SD15_UNET).requires_grad_(False)


def adapter_size(unet: nn.Module, rank: int, endings: tuple[str, ...]) -> int:
    """Parameters of rank-r updates of the layers with these name endings: r (in k^2 + out) each."""
    layers = {name: layer for name, layer in unet.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}
    chosen = [layer for name, layer in layers.items() if name.endswith(tuple("." + ending for ending in endings))]
    return sum(rank * (layer.weight[0].numel() + layer.weight.shape[0]) for layer in chosen)


def test_the_all_layers_preset_has_67_million_parameters_at_rank_64(sd15_unet: UNet2DConditionModel):
    assert sum(parameter.numel() for parameter in sd15_unet.parameters()) == 859_520_964
    unet = copy.deepcopy(sd15_unet)
    add_lora(unet, "lcm", LoraSettings(rank=64, target_modules="lcm_lora"))
    # Luo et al. 2023b, table 1, give 67.5M trainable parameters for SD v1-5.
    assert sum(parameter.numel() for parameter in lora_parameters(unet, "lcm")) == 67_252_224
    trainable = [parameter for parameter in unet.parameters() if parameter.requires_grad]
    assert sum(parameter.numel() for parameter in trainable) == 67_252_224


@pytest.mark.parametrize("target_modules", ["attention", ("to_q", "to_v"), ("conv1",)])
def test_other_choices_adapt_the_layers_they_name(sd15_unet: UNet2DConditionModel, target_modules):
    unet = copy.deepcopy(sd15_unet)
    expected = ("to_q", "to_k", "to_v", "to_out.0") if target_modules == "attention" else target_modules
    size = adapter_size(unet, 16, expected)
    add_lora(unet, "finetuned", LoraSettings(rank=16, alpha=16, target_modules=target_modules))
    assert size > 0 and sum(parameter.numel() for parameter in lora_parameters(unet, "finetuned")) == size


@pytest.mark.parametrize("target_modules", ["everything", ["to_qq"], ["norm1"]])
def test_layers_that_do_not_exist_are_named(sd15_unet: UNet2DConditionModel, target_modules):
    with pytest.raises(UserError, match=r"method\.lora\.target_modules"):
        LoraSettings(target_modules=target_modules).layer_names(sd15_unet)


def test_a_new_adapter_changes_nothing_and_is_float32_over_half_precision(pipeline_folder: Path):
    model = load_stable_diffusion(str(pipeline_folder), dtype=torch.bfloat16)
    x_t, timesteps, text = inputs()
    before = model.denoise(x_t, timesteps, Condition(text))
    add_lora(model.unet, "lcm", LoraSettings(rank=4, alpha=4))
    assert all(parameter.dtype == torch.float32 for parameter in lora_parameters(model.unet, "lcm"))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.denoise(x_t, timesteps, Condition(text)), before)


def test_a_run_started_again_in_its_folder_keeps_the_teacher_s_lora_it_was_given_now(
    pipeline_folder: Path, tmp_path: Path
):
    finetuned(pipeline_folder, tmp_path / "one")
    finetuned(pipeline_folder, tmp_path / "two", rank=2)
    for teacher in ("one", "two"):
        distilled(pipeline_folder, tmp_path / "student", tmp_path / teacher)
        kept, given = (load_file(tmp_path / place) for place in (f"student/{TEACHER_FILE}", f"{teacher}/{LORA_FILE}"))
        assert kept.keys() == given.keys() and all(torch.equal(kept[key], given[key]) for key in given)
