"""One training step against the papers' algorithms written down straight, with diffusers' UNet and peft by hand."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from diffusers import (
    LatentConsistencyModelPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from lightning.pytorch.plugins import MixedPrecision
from peft import LoraConfig, get_peft_model_state_dict, set_peft_model_state_dict
from torch import Tensor, nn

from helpers.adapters import gradients, random_batch, randomise, train
from helpers.pipelines import save_full_lcm
from lcm_lightning.diffusion.consistency import ConsistencyDistillation
from lcm_lightning.diffusion.distribution_matching import DistributionMatching
from lcm_lightning.diffusion.trajectory import TrajectoryDistillation
from lcm_lightning.errors import UserError
from lcm_lightning.methods import adapter_training
from lcm_lightning.methods.adapter_training import AdapterTraining
from lcm_lightning.methods.dmd2_lora import Dmd2LoraDistillation
from lcm_lightning.methods.kd_lora import KdLoraDistillation
from lcm_lightning.methods.lcm import LcmDistillation
from lcm_lightning.methods.lcm_lora import LcmLoraDistillation
from lcm_lightning.methods.lora import LoraFinetuning
from lcm_lightning.methods.pcm_lora import PcmLoraDistillation
from lcm_lightning.methods.randomness import SampleRandomness
from lcm_lightning.methods.tcd_lora import TcdLoraDistillation
from lcm_lightning.models.adapters import LoraSettings, lora_parameters
from lcm_lightning.models.stable_diffusion import load_stable_diffusion

RANK, ALPHA = 4, 6
LAYERS = ["to_q", "to_v", "to_out.0", "proj_in", "ff.net.2", "conv1", "conv_shortcut", "time_emb_proj"]
LORA = LoraSettings(rank=RANK, alpha=ALPHA, target_modules=LAYERS)
CAPTIONS = ["a dog on a beach", "", "two children", "a red car"]  # the second as caption dropout leaves it
W_MIN, W_MAX = 3.0, 9.0
RELATIVE = 1e-5

# sqrt(beta) linear (Rombach et al. 2022), in double precision.
ALPHAS_CUMPROD = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)


class FixedDraws:
    """Stands in for `SampleRandomness`: given draws instead of random ones, each checked for its range."""

    def __init__(self, *, normals: list[Tensor], unit: Tensor, integers: Tensor | dict[int, Tensor]) -> None:
        self.normals, self.unit, self.integers, self.highs = list(normals), unit, integers, []
        self.left = iter(())

    def __call__(self, seeds: Tensor, device: torch.device) -> FixedDraws:
        self.left: Iterator[Tensor] = iter(self.normals)
        return self

    def normal(self, shape: tuple[int, ...]) -> Tensor:
        draw = next(self.left)
        assert draw.shape[1:] == tuple(shape)
        return draw

    def uniform(self, low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * self.unit

    def integer(self, high: int, exponent: float = 1.0) -> Tensor:
        draw = self.integers[high] if isinstance(self.integers, dict) else self.integers
        assert draw.max() < high
        self.highs.append(high)
        return draw


@pytest.fixture
def batch() -> dict[str, object]:
    """Four samples, the last of them padding."""
    pixels = torch.rand(4, 3, 32, 32, generator=torch.Generator().manual_seed(1)) * 2 - 1
    weight = torch.tensor([4 / 3, 4 / 3, 4 / 3, 0.0])
    return {"pixel_values": pixels, "captions": CAPTIONS, "seed": torch.arange(4), "weight": weight}


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


POSTERIOR_NOISE, NOISE, OFFSET = normal(2, 4, 4, 8, 8), normal(3, 4, 4, 8, 8), normal(4, 4, 4, 1, 1)


def adapter_weights(module: AdapterTraining, adapter: str | None = None) -> dict[str, Tensor]:
    state = get_peft_model_state_dict(module.model.unet, adapter_name=adapter or module.kind.name)
    return {key: tensor.detach().clone() for key, tensor in state.items()}


def distance(first: dict[str, Tensor], second: dict[str, Tensor]) -> float:
    """Between two gradients, in units of the second's norm."""
    assert first.keys() == second.keys() and len(second) > 10
    norm = torch.stack([gradient.norm() for gradient in second.values()]).norm()
    return float(torch.stack([(first[name] - second[name]).norm() for name in second]).norm() / norm)


def tolerance(rounding: float) -> float:
    """1e-5, or a few times what float32 itself costs.

    Near t = 0 prediction and target agree in most digits, and the Huber loss turns an error of x in a difference near 0
    into one of x / c in its slope, c = 0.001. How far that takes the straight code in float32 from itself in float64 is
    measured in each test, and granted to the module four times.
    """
    assert rounding < 1e-3
    return max(RELATIVE, 4 * rounding)


def assert_same_loss(found: Tensor, expected: Tensor, expected_in_double: Tensor) -> None:
    rounding = float(abs(expected / expected_in_double - 1))
    assert found.item() == pytest.approx(expected_in_double.item(), rel=tolerance(rounding))


def assert_same_gradients(
    found: dict[str, Tensor], expected: dict[str, Tensor], expected_in_double: dict[str, Tensor]
) -> None:
    """As a whole, in units of the gradient's norm."""
    assert all(torch.any(gradient != 0) for gradient in expected.values())
    assert distance(found, expected_in_double) <= tolerance(distance(expected, expected_in_double))


class Reference:
    """diffusers' pipeline, its UNet with adapters added by peft."""

    def __init__(self, folder: Path, dtype: torch.dtype = torch.float32) -> None:
        self.pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None).to(dtype)
        self.pipeline.text_encoder.requires_grad_(False)
        self.pipeline.vae.requires_grad_(False)
        self.dtype = dtype

    def unet(self, **adapters: tuple[float, dict[str, Tensor]]) -> UNet2DConditionModel:
        """A copy of the UNet under adapters given as (alpha, weights); gradients flow into all of them."""
        unet = copy.deepcopy(self.pipeline.unet).requires_grad_(False)
        for name, (alpha, weights) in adapters.items():
            unet.add_adapter(LoraConfig(r=RANK, lora_alpha=alpha, target_modules=LAYERS), adapter_name=name)
            set_peft_model_state_dict(unet, weights, adapter_name=name)
        if adapters:
            unet.set_adapter(list(adapters))
        return unet.to(self.dtype)

    def text(self, captions: list[str]) -> Tensor:
        tokens = self.pipeline.tokenizer(captions, padding="max_length", return_tensors="pt").input_ids
        return self.pipeline.text_encoder(tokens).last_hidden_state

    def latents(self, pixels: Tensor) -> Tensor:
        posterior = self.pipeline.vae.encode(pixels.to(self.dtype)).latent_dist
        return (posterior.mean + posterior.std * POSTERIOR_NOISE) * self.pipeline.vae.config.scaling_factor


def at(values: np.ndarray, timesteps: Tensor, dtype: torch.dtype) -> Tensor:
    """Entries of a table over timesteps [B, 1, 1, 1]."""
    return torch.tensor(values[timesteps.numpy()], dtype=dtype).reshape(-1, 1, 1, 1)


def to_x_0_and_epsilon(output: Tensor, x: Tensor, a: Tensor, prediction_type: str) -> tuple[Tensor, Tensor]:
    alpha, sigma = a.sqrt(), (1 - a).sqrt()
    if prediction_type == "epsilon":
        return (x - sigma * output) / alpha, output
    return alpha * x - sigma * output, alpha * output + sigma * x


# ---- latent consistency distillation -------------------------------------------------------------------------------


def lcm_loss(
    reference: Reference,
    student: UNet2DConditionModel,
    teacher: UNet2DConditionModel,
    batch: dict[str, object],
    *,
    step_index: Tensor,
    w: Tensor,
    prediction_type: str,
    loss: str,
    k: int = 20,
    table: np.ndarray = ALPHAS_CUMPROD,
) -> Tensor:
    """Algorithm 1 of Luo et al. 2023a with Psi the DDIM solver and theta^- = theta without gradient."""
    dtype = reference.dtype

    def consistency_function(x: Tensor, t: Tensor) -> Tensor:
        output = student(x, t, condition).sample
        x_0, _ = to_x_0_and_epsilon(output, x, at(table, t, dtype), prediction_type)
        s = 10.0 * t.reshape(-1, 1, 1, 1).to(dtype)
        c_skip, c_out = 0.5**2 / (s**2 + 0.5**2), s / (s**2 + 0.5**2) ** 0.5
        return c_skip * x + c_out * x_0

    t_end = k * (step_index + 1) - 1  # t_{n+k}
    t_start = torch.where(t_end < k, 0, t_end - k)  # t_n
    a_end, a_start = at(table, t_end, dtype), at(table, t_start, dtype)
    z = reference.latents(batch["pixel_values"])
    condition, no_condition = reference.text(batch["captions"]), reference.text([""] * 4)
    z_end = a_end.sqrt() * z + (1 - a_end).sqrt() * NOISE
    with torch.no_grad():
        conditional = teacher(z_end, t_end, condition).sample
        unconditional = teacher(z_end, t_end, no_condition).sample
        guided = conditional + w.reshape(-1, 1, 1, 1) * (conditional - unconditional)
        x_0, epsilon = to_x_0_and_epsilon(guided, z_end, a_end, prediction_type)
        target = consistency_function(a_start.sqrt() * x_0 + (1 - a_start).sqrt() * epsilon, t_start)
    difference = consistency_function(z_end, t_end) - target
    distance = (difference**2 + 0.001**2) ** 0.5 - 0.001 if loss == "huber" else difference**2
    return (batch["weight"] * distance.mean((1, 2, 3))).sum() / 4


def teacher_lora_file(reference: Reference, folder: Path) -> tuple[Path, dict[str, Tensor]]:
    """A LoRA as diffusers saves it, and its weights."""
    unet = copy.deepcopy(reference.pipeline.unet).requires_grad_(False)
    unet.add_adapter(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=LAYERS), adapter_name="finetuned")
    randomise(unet, seed=11)
    weights = get_peft_model_state_dict(unet, adapter_name="finetuned")
    StableDiffusionPipeline.save_lora_weights(folder, unet_lora_layers=weights)
    return folder / "pytorch_lora_weights.safetensors", {k: v.detach().clone() for k, v in weights.items()}


def distillation_module(folder: Path, *, teacher_lora: Path | None = None, **settings: object) -> LcmLoraDistillation:
    return LcmLoraDistillation(
        load_stable_diffusion(str(folder)),
        distillation=ConsistencyDistillation(**settings),
        w_min=W_MIN,
        w_max=W_MAX,
        teacher_lora=str(teacher_lora) if teacher_lora else None,
        lora=LORA,
        optimizer=partial(torch.optim.SGD, lr=0.1),
    )


ODE_STEPS = [0, 49, 10, 30]  # of 50: the first (which lands on 0), the last, and two between
NEAR_0 = [1, 2, 3, 0]  # of 1000: so close to 0 that c_skip counts; at t = 19 it is 7e-6


@pytest.mark.parametrize(
    ("prediction_type", "loss", "with_teacher_lora", "num_ode_steps", "steps"),
    [
        *itertools.product(["epsilon", "v_prediction"], ["huber", "l2"], [False, True], [50], [ODE_STEPS]),
        ("epsilon", "huber", False, 1000, NEAR_0),
        ("v_prediction", "l2", True, 1000, NEAR_0),
    ],
)
def test_distillation_step_is_algorithm_1(
    saved_pipeline: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    batch: dict[str, object],
    prediction_type: str,
    loss: str,
    with_teacher_lora: bool,
    num_ode_steps: int,
    steps: list[int],
):
    folder = saved_pipeline(prediction_type=prediction_type)
    file, weights = teacher_lora_file(Reference(folder), tmp_path) if with_teacher_lora else (None, {})
    module = distillation_module(folder, teacher_lora=file, loss=loss, num_ode_steps=num_ode_steps)
    randomise(module, seed=7)
    draws = FixedDraws(
        normals=[POSTERIOR_NOISE, NOISE],
        unit=torch.tensor([0.0, 0.25, 0.5, 0.99]),
        integers=torch.tensor(steps),
    )
    monkeypatch.setattr(adapter_training, "SampleRandomness", draws)
    found = module.training_step(batch, 0)
    found.backward()

    teacher_adapters = {"finetuned": (RANK, weights)} if with_teacher_lora else {}
    expected, expected_gradients = {}, {}
    for dtype in (torch.float32, torch.float64):
        reference = Reference(folder, dtype)
        student = reference.unet(**teacher_adapters, lcm=(ALPHA, adapter_weights(module)))
        expected[dtype] = lcm_loss(
            reference,
            student,
            reference.unet(**teacher_adapters),
            batch,
            step_index=draws.integers,
            w=W_MIN + (W_MAX - W_MIN) * draws.unit,
            prediction_type=prediction_type,
            loss=loss,
            k=1000 // num_ode_steps,
        )
        expected[dtype].backward()
        expected_gradients[dtype] = gradients(student, "lcm")
    assert draws.highs == [num_ode_steps]
    assert_same_loss(found, *expected.values())
    assert_same_gradients(gradients(module.model.unet, "lcm"), *expected_gradients.values())
    frozen = [p for name, p in module.named_parameters() if ".lcm." not in name]
    assert all(p.grad is None and not p.requires_grad for p in frozen)


class XLReference(Reference):
    """diffusers' SDXL pipeline; its conditions are text and what the UNet is told beside it."""

    def __init__(self, folder: Path, dtype: torch.dtype, time_ids: Tensor) -> None:
        self.pipeline = StableDiffusionXLPipeline.from_pretrained(folder, add_watermarker=False).to(dtype)
        for network in (self.pipeline.text_encoder, self.pipeline.text_encoder_2, self.pipeline.vae):
            network.requires_grad_(False)
        self.dtype, self.time_ids = dtype, time_ids

    def text(self, captions: list[str]) -> tuple[Tensor, dict[str, Tensor]]:
        """No caption is zeros, as in the unconditional branch of the pipeline."""
        text, _, pooled, _ = self.pipeline.encode_prompt(captions, do_classifier_free_guidance=False)
        some = torch.tensor([caption != "" for caption in captions])
        told = {"text_embeds": pooled * some[:, None], "time_ids": self.time_ids}
        return text * some[:, None, None], told

    def network(self, unet: UNet2DConditionModel) -> Callable[..., SimpleNamespace]:
        return lambda x, t, condition: unet(x, t, condition[0], added_cond_kwargs=condition[1])


@pytest.mark.parametrize("known", [True, False], ids=["sizes of photos", "whole images"])
def test_distillation_step_of_sdxl_is_algorithm_1(
    sdxl_folder: Path, monkeypatch: pytest.MonkeyPatch, batch: dict[str, object], known: bool
):
    sizes = [[333, 500, 0, 9, 32, 32], [500, 333, 13, 0, 32, 32], [3024, 4032, 0, 2, 32, 32], [32, 32, 0, 0, 32, 32]]
    time_ids = torch.tensor(sizes if known else [[32, 32, 0, 0, 32, 32]] * 4, dtype=torch.float32)
    module = distillation_module(sdxl_folder)
    randomise(module, seed=7)
    draws = FixedDraws(
        normals=[POSTERIOR_NOISE, NOISE], unit=torch.tensor([0.0, 0.25, 0.5, 0.99]), integers=torch.tensor(ODE_STEPS)
    )
    monkeypatch.setattr(adapter_training, "SampleRandomness", draws)
    found = module.training_step(batch | ({"time_ids": time_ids} if known else {}), 0)
    found.backward()

    expected, expected_gradients = {}, {}
    for dtype in (torch.float32, torch.float64):
        reference = XLReference(sdxl_folder, dtype, time_ids)
        student = reference.unet(lcm=(ALPHA, adapter_weights(module)))
        expected[dtype] = lcm_loss(
            reference,
            reference.network(student),
            reference.network(reference.unet()),
            batch,
            step_index=draws.integers,
            w=W_MIN + (W_MAX - W_MIN) * draws.unit,
            prediction_type="epsilon",
            loss="huber",
        )
        expected[dtype].backward()
        expected_gradients[dtype] = gradients(student, "lcm")
    assert_same_loss(found, *expected.values())
    assert_same_gradients(gradients(module.model.unet, "lcm"), *expected_gradients.values())


def test_distillation_of_zero_terminal_snr_steps_from_pure_noise(
    saved_pipeline: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, batch: dict[str, object]
):
    folder = saved_pipeline(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    reference, module = Reference(folder), distillation_module(folder)
    randomise(module, seed=7)
    draws = FixedDraws(
        normals=[POSTERIOR_NOISE, NOISE], unit=torch.full((4,), 0.5), integers=torch.tensor([49, 49, 48, 0])
    )
    monkeypatch.setattr(adapter_training, "SampleRandomness", draws)
    found = module.training_step(batch, 0)
    # Lin et al. 2023, Algorithm 1: shift sqrt(a) so that the last is 0, scale so that the first stays.
    root = np.sqrt(ALPHAS_CUMPROD)
    table = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    assert table[-1] == 0
    expected = lcm_loss(
        reference,
        reference.unet(lcm=(ALPHA, adapter_weights(module))),
        reference.unet(),
        batch,
        step_index=draws.integers,
        w=torch.full((4,), (W_MIN + W_MAX) / 2),
        prediction_type="v_prediction",
        loss="huber",
        table=table,
    )
    assert found.item() == pytest.approx(expected.item(), rel=RELATIVE)


def test_zero_terminal_snr_with_epsilon_prediction_is_refused(saved_pipeline: Callable[..., Path]):
    folder = saved_pipeline(prediction_type="epsilon", rescale_betas_zero_snr=True)
    with pytest.raises(UserError, match=r"model\.path=.*zero terminal SNR with prediction_type=epsilon"):
        load_stable_diffusion(str(folder))


# ---- latent consistency distillation of all parameters -------------------------------------------------------------


def told_of(unet: UNet2DConditionModel, state: dict[str, Tensor], dtype: torch.dtype) -> UNet2DConditionModel:
    """diffusers' own UNet of a full LCM, with these weights."""
    told = UNet2DConditionModel.from_config({**unet.config, "time_cond_proj_dim": 16})
    told.load_state_dict(state)
    return told.to(dtype)


def full_lcm_loss(
    reference: Reference,
    networks: dict[str, UNet2DConditionModel],
    batch: dict[str, object],
    w: Tensor,
    prediction_type: str,
    loss: str,
) -> Tensor:
    """Algorithm 1 of Luo et al. 2023a with k = 20, w told to theta and to its exponential average theta^-."""
    dtype, t_end = reference.dtype, 20 * (torch.tensor(ODE_STEPS) + 1) - 1
    t_start = torch.where(t_end < 20, 0, t_end - 20)
    told = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, w, embedding_dim=16).to(dtype)
    condition, no_condition = reference.text(batch["captions"]), reference.text([""] * 4)

    def consistency_function(network: UNet2DConditionModel, x: Tensor, t: Tensor) -> Tensor:
        output = network(x, t, condition, timestep_cond=told).sample
        x_0, _ = to_x_0_and_epsilon(output, x, at(ALPHAS_CUMPROD, t, dtype), prediction_type)
        s = 10.0 * t.reshape(-1, 1, 1, 1).to(dtype)
        return 0.5**2 / (s**2 + 0.5**2) * x + s / (s**2 + 0.5**2) ** 0.5 * x_0

    a_end, a_start = (at(ALPHAS_CUMPROD, t, dtype) for t in (t_end, t_start))
    z_end = a_end.sqrt() * reference.latents(batch["pixel_values"]) + (1 - a_end).sqrt() * NOISE
    with torch.no_grad():
        conditional, unconditional = (networks["teacher"](z_end, t_end, c).sample for c in (condition, no_condition))
        guided = conditional + w.reshape(-1, 1, 1, 1) * (conditional - unconditional)
        x_0, epsilon = to_x_0_and_epsilon(guided, z_end, a_end, prediction_type)
        z_start = a_start.sqrt() * x_0 + (1 - a_start).sqrt() * epsilon
        target = consistency_function(networks["target"], z_start, t_start)
    difference = consistency_function(networks["student"], z_end, t_end) - target
    distance = (difference**2 + 0.001**2) ** 0.5 - 0.001 if loss == "huber" else difference**2
    return (batch["weight"] * distance.mean((1, 2, 3))).sum() / 4


@pytest.mark.parametrize(
    ("prediction_type", "loss", "with_teacher_lora"),
    [("epsilon", "huber", False), ("v_prediction", "l2", False), ("v_prediction", "huber", True)],
)
def test_full_distillation_step_is_algorithm_1(
    saved_pipeline: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    batch: dict[str, object],
    prediction_type: str,
    loss: str,
    with_teacher_lora: bool,
):
    folder = saved_pipeline(prediction_type=prediction_type)
    file, weights = teacher_lora_file(Reference(folder), tmp_path) if with_teacher_lora else (None, {})
    module = LcmDistillation(
        load_stable_diffusion(str(folder)),
        distillation=ConsistencyDistillation(loss=loss),
        guidance_dimension=16,
        w_min=W_MIN,
        w_max=W_MAX,
        teacher_lora=str(file) if file else None,
        optimizer=partial(torch.optim.SGD, lr=0.1),
    )
    variants = {"student": module.model.variants["student"], "target": module.model.variants[module.kind.name]}
    for seed, network in enumerate(variants.values()):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():  # in mid-training
            network.time_embedding.cond_proj.weight.normal_(0, 0.5, generator=generator)
            network.conv_out.weight.mul_(1.1 + seed)
    unit = torch.tensor([0.0, 0.25, 0.5, 0.99])
    draws = FixedDraws(normals=[POSTERIOR_NOISE, NOISE], unit=unit, integers=torch.tensor(ODE_STEPS))
    monkeypatch.setattr(adapter_training, "SampleRandomness", draws)
    found = module.training_step(batch, 0)
    found.backward()
    found_gradients = {name: p.grad for name, p in variants["student"].named_parameters()}

    expected, expected_gradients = {}, {}
    for dtype in (torch.float32, torch.float64):
        reference = Reference(folder, dtype)
        networks = {"teacher": reference.unet(**({"finetuned": (RANK, weights)} if file else {}))}
        networks |= {n: told_of(reference.pipeline.unet, v.state_dict(), dtype) for n, v in variants.items()}
        w = W_MIN + (W_MAX - W_MIN) * unit
        expected[dtype] = full_lcm_loss(reference, networks, batch, w, prediction_type, loss)
        expected[dtype].backward()
        expected_gradients[dtype] = {name: p.grad for name, p in networks["student"].named_parameters()}
    assert_same_loss(found, *expected.values())
    assert_same_gradients(found_gradients, *expected_gradients.values())
    assert all(p.grad is None for name, p in module.named_parameters() if ".student." not in name)


# ---- knowledge distillation of a full LCM into a LoRA --------------------------------------------------------------


def imitation_loss(
    reference: Reference,
    networks: dict[str, UNet2DConditionModel],
    batch: dict[str, object],
    w: Tensor,
    prediction_type: str,
    loss: str,
) -> Tensor:
    """c_skip z + c_out x_0' of both at the same (z_t, t, c), the teacher told w: apart by c_out times what x_0' is."""
    dtype, t = reference.dtype, 20 * (torch.tensor(ODE_STEPS) + 1) - 1
    a, condition = at(ALPHAS_CUMPROD, t, dtype), reference.text(batch["captions"])
    told = LatentConsistencyModelPipeline.get_guidance_scale_embedding(None, w, embedding_dim=16).to(dtype)
    z_t = a.sqrt() * reference.latents(batch["pixel_values"]) + (1 - a).sqrt() * NOISE
    with torch.no_grad():
        output = networks["teacher"](z_t, t, condition, timestep_cond=told).sample
    theirs, _ = to_x_0_and_epsilon(output, z_t, a, prediction_type)
    ours, _ = to_x_0_and_epsilon(networks["student"](z_t, t, condition).sample, z_t, a, prediction_type)
    s = 10.0 * t.reshape(-1, 1, 1, 1).to(dtype)
    difference = s / (s**2 + 0.5**2) ** 0.5 * (ours - theirs)
    distance = (difference**2 + 0.001**2) ** 0.5 - 0.001 if loss == "huber" else difference**2
    return (batch["weight"] * distance.mean((1, 2, 3))).sum() / 4


@pytest.mark.parametrize(("prediction_type", "loss"), [("epsilon", "huber"), ("v_prediction", "l2")])
def test_knowledge_step_holds_the_student_against_the_full_lcm(
    saved_pipeline: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    batch: dict[str, object],
    prediction_type: str,
    loss: str,
):
    folder = saved_pipeline(prediction_type=prediction_type)
    teacher = save_full_lcm(Reference(folder).pipeline, tmp_path / "lcm")
    module = KdLoraDistillation(
        load_stable_diffusion(str(folder)),
        teacher_lcm=str(tmp_path / "lcm"),
        distillation=ConsistencyDistillation(loss=loss),
        w_min=W_MIN,
        w_max=W_MAX,
        lora=LORA,
        optimizer=partial(torch.optim.SGD, lr=0.1),
    )
    randomise(module, seed=7)
    unit = torch.tensor([0.0, 0.25, 0.5, 0.99])
    draws = FixedDraws(normals=[POSTERIOR_NOISE, NOISE], unit=unit, integers=torch.tensor(ODE_STEPS))
    monkeypatch.setattr(adapter_training, "SampleRandomness", draws)
    found = module.training_step(batch, 0)
    found.backward()

    expected, expected_gradients = {}, {}
    for dtype in (torch.float32, torch.float64):
        reference = Reference(folder, dtype)
        student = reference.unet(kd=(ALPHA, adapter_weights(module)))
        networks = {"teacher": told_of(teacher, teacher.state_dict(), dtype), "student": student}
        w = W_MIN + (W_MAX - W_MIN) * unit
        expected[dtype] = imitation_loss(reference, networks, batch, w, prediction_type, loss)
        expected[dtype].backward()
        expected_gradients[dtype] = gradients(student, "kd")
    assert draws.highs == [50]
    assert_same_loss(found, *expected.values())
    assert_same_gradients(gradients(module.model.unet, "kd"), *expected_gradients.values())
    assert all(p.grad is None for name, p in module.named_parameters() if ".kd." not in name)
    draws.unit = 1 - unit  # another w, another target
    with torch.no_grad():
        assert module.training_step(batch, 0).item() != pytest.approx(found.item(), rel=1e-3)


# ---- adversarial losses ---------------------------------------------------------------------------------------------

ADVERSARIAL_WEIGHT, ADVERSARIAL_NOISE = 0.5, normal(30, 4, 4, 8, 8)
ADVERSARIAL_TIMESTEPS = torch.tensor([0, 959, 100, 500])


def realness(unet: UNet2DConditionModel, discriminator: nn.Module, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
    """Logits [B, P] of all pixels of the maps of the UNet's encoder, with noise on `x`."""
    a = at(ALPHAS_CUMPROD, t, x.dtype)
    embedding = unet.time_embedding(unet.time_proj(t).to(x.dtype))
    maps = [unet.conv_in(a.sqrt() * x + (1 - a).sqrt() * ADVERSARIAL_NOISE)]
    for block in unet.down_blocks:
        caption = {"encoder_hidden_states": text} if getattr(block, "has_cross_attention", False) else {}
        maps.append(block(maps[-1], embedding, **caption)[0])
    maps.append(unet.mid_block(maps[-1], embedding, encoder_hidden_states=text))
    pairs = zip(discriminator.heads, maps[1:], strict=True)
    return torch.cat([head(feature).flatten(1) for head, feature in pairs], dim=1)


# ---- trajectory consistency distillation ---------------------------------------------------------------------------


def trajectory_loss(
    reference: Reference,
    student: UNet2DConditionModel,
    teacher: UNet2DConditionModel,
    batch: dict[str, object],
    *,
    t: list[int],
    reached: list[int],
    s: list[int],
    w: Tensor | None,
    prediction_type: str,
    loss: str,
    discriminator: nn.Module | None = None,
) -> tuple[Tensor, Tensor]:
    """Zheng et al. 2024, section 4.1, with Phi the DDIM solver and theta^- = theta without gradient.

    The loss's value, and what has its gradient: with a discriminator the student's `x_0` is moved by the GAN's too.
    """
    dtype = reference.dtype
    a_t, a_reached, a_s = (at(ALPHAS_CUMPROD, torch.tensor(places), dtype) for places in (t, reached, s))
    condition, no_condition = reference.text(batch["captions"]), reference.text([""] * 4)

    def jump(x: Tensor, places: list[int], a: Tensor) -> tuple[Tensor, Tensor]:
        output = student(x, torch.tensor(places), condition).sample
        x_0, epsilon = to_x_0_and_epsilon(output, x, a, prediction_type)
        return a_s.sqrt() * x_0 + (1 - a_s).sqrt() * epsilon, x_0

    z_t = a_t.sqrt() * reference.latents(batch["pixel_values"]) + (1 - a_t).sqrt() * NOISE
    with torch.no_grad():
        output = teacher(z_t, torch.tensor(t), condition).sample
        if w is not None:
            output = output + w.reshape(-1, 1, 1, 1) * (output - teacher(z_t, torch.tensor(t), no_condition).sample)
        x_0, epsilon = to_x_0_and_epsilon(output, z_t, a_t, prediction_type)
        z_reached = a_reached.sqrt() * x_0 + (1 - a_reached).sqrt() * epsilon
        target, _ = jump(z_reached, reached, a_reached)
        # Where the jump ends where the teacher's step has, there is none.
        there = (torch.tensor(reached) == torch.tensor(s)).reshape(-1, 1, 1, 1)
        target = torch.where(there, z_reached, target)
    jumped, x_0 = jump(z_t, t, a_t)
    difference = jumped - target
    distance = (difference**2 + 0.001**2) ** 0.5 - 0.001 if loss == "huber" else difference**2
    losses, weight = distance.mean((1, 2, 3)), batch["weight"] / 4
    if discriminator is None:
        return (weight * losses).sum(), (weight * losses).sum()
    deceived = copy.deepcopy(discriminator).requires_grad_(False)
    logits = realness(teacher, deceived, x_0, ADVERSARIAL_TIMESTEPS, condition)
    deceiving = ADVERSARIAL_WEIGHT * torch.log1p(torch.exp(-logits)).mean(1)
    (slope,) = torch.autograd.grad(deceiving.sum(), x_0, retain_graph=True)
    moved = ((slope * x_0[0].numel()) ** 2).mean((1, 2, 3)) / 2
    photos = reference.latents(batch["pixel_values"])
    pictures = (photos, x_0.detach())
    real, drawn = (realness(teacher, discriminator, z, ADVERSARIAL_TIMESTEPS, condition) for z in pictures)
    own = torch.log1p(torch.exp(-real)).mean(1) + torch.log1p(torch.exp(drawn)).mean(1)
    return (weight * (losses + moved + own)).sum(), (weight * (losses + deceiving + own)).sum()


# Of 40 ODE steps of 25 timesteps: the first, the last, two between; where the teacher gets to; and where the student
# goes, by 4 phases, by a unit draw of 0.5 among all up to there, and by schedules of 4, 5, 6 and 8 steps.
STEP_INDEX, T, REACHED = [0, 39, 30, 12], [24, 999, 774, 324], [0, 974, 749, 299]
PHASED, ANYWHERE, SCHEDULED = [0, 749, 749, 249], [0, 487, 375, 150], [0, 799, 674, 249]


@pytest.mark.parametrize(
    ("method", "settings", "s", "guidance"),
    [
        (PcmLoraDistillation, {}, PHASED, 1.0),
        (PcmLoraDistillation, {}, PHASED, 4.0),
        (TcdLoraDistillation, {}, ANYWHERE, 1.0),
        (TcdLoraDistillation, {"schedules": [4, 8]}, SCHEDULED, 1.0),
    ],
    ids=["pcm", "pcm that keeps guidance", "tcd", "tcd of schedules"],
)
@pytest.mark.parametrize(
    ("prediction_type", "loss", "with_teacher_lora", "adversarial"),
    [
        ("epsilon", "huber", False, False),
        ("v_prediction", "l2", False, False),
        ("v_prediction", "huber", True, False),
        ("epsilon", "l2", False, True),
        ("v_prediction", "huber", True, True),
    ],
)
def test_trajectory_step_is_its_papers_algorithm(
    saved_pipeline: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    batch: dict[str, object],
    method: type[PcmLoraDistillation] | type[TcdLoraDistillation],
    settings: dict[str, object],
    s: list[int],
    guidance: float,
    prediction_type: str,
    loss: str,
    with_teacher_lora: bool,
    adversarial: bool,
):
    folder = saved_pipeline(prediction_type=prediction_type)
    file, weights = teacher_lora_file(Reference(folder), tmp_path) if with_teacher_lora else (None, {})
    module = method(
        load_stable_diffusion(str(folder)),
        distillation=TrajectoryDistillation(num_ode_steps=40, loss=loss),
        w_min=W_MIN,
        w_max=W_MAX,
        student_guidance=guidance,
        adversarial_weight=ADVERSARIAL_WEIGHT if adversarial else 0.0,
        teacher_lora=str(file) if file else None,
        lora=LORA,
        optimizer=partial(torch.optim.SGD, lr=0.1),
        **settings,
    )
    randomise(module, seed=7)
    draws = FixedDraws(
        normals=[POSTERIOR_NOISE, NOISE, ADVERSARIAL_NOISE],
        unit=torch.full((4,), 0.5),
        integers={40: torch.tensor(STEP_INDEX), 5: torch.tensor([0, 1, 2, 4]), 1000: ADVERSARIAL_TIMESTEPS},
    )
    monkeypatch.setattr(adapter_training, "SampleRandomness", draws)
    found = module.training_step(batch, 0)
    found.backward()

    teacher_adapters = {"finetuned": (RANK, weights)} if with_teacher_lora else {}
    expected, expected_gradients = {}, {}
    for dtype in (torch.float32, torch.float64):
        reference, judge = Reference(folder, dtype), copy.deepcopy(module.discriminator)
        if judge is not None:
            judge.to(dtype).zero_grad()
        student = reference.unet(**teacher_adapters, trained=(ALPHA, adapter_weights(module)))
        expected[dtype], surrogate = trajectory_loss(
            reference,
            student,
            reference.unet(**teacher_adapters),
            batch,
            t=T,
            reached=REACHED,
            s=s,
            w=None if guidance > 1 else torch.full((4,), (W_MIN + W_MAX) / 2),
            prediction_type=prediction_type,
            loss=loss,
            discriminator=judge,
        )
        surrogate.backward()
        expected_gradients[dtype] = gradients(student, "trained")
        if judge is not None:
            expected_gradients[dtype] |= {name: p.grad for name, p in judge.named_parameters()}
    assert_same_loss(found, *expected.values())
    found_gradients = gradients(module.model.unet, module.kind.name)
    named = {name.replace(f".{module.kind.name}.", ".trained."): g for name, g in found_gradients.items()}
    if adversarial:
        named |= {name: p.grad for name, p in module.discriminator.named_parameters()}
    assert_same_gradients(named, *expected_gradients.values())


# ---- LoRA fine-tuning ----------------------------------------------------------------------------------------------


def denoising_loss(
    reference: Reference,
    unet: UNet2DConditionModel,
    batch: dict[str, object],
    t: Tensor,
    prediction_type: str,
    gamma: float | None,
    noise_offset: float,
) -> Tensor:
    """Ho et al. 2020, eq. 14, or its velocity form, weighted as in Hang et al. 2023, section 3.4."""
    a = at(ALPHAS_CUMPROD, t, reference.dtype)
    noise = NOISE + noise_offset * OFFSET
    z = reference.latents(batch["pixel_values"])
    z_t = a.sqrt() * z + (1 - a).sqrt() * noise
    target = noise if prediction_type == "epsilon" else a.sqrt() * noise - (1 - a).sqrt() * z
    losses = ((unet(z_t, t, reference.text(batch["captions"])).sample - target) ** 2).mean((1, 2, 3))
    if gamma is not None:
        snr = (a / (1 - a)).flatten()
        losses = losses * snr.clamp(max=gamma) / (snr if prediction_type == "epsilon" else snr + 1)
    return (batch["weight"] * losses).sum() / 4


@pytest.mark.parametrize("noise_offset", [0.0, 0.1], ids=["plain", "offset"])
@pytest.mark.parametrize("gamma", [None, 5.0], ids=["uniform", "min_snr"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_finetuning_step_is_the_denoising_loss(
    saved_pipeline: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    batch: dict[str, object],
    prediction_type: str,
    gamma: float | None,
    noise_offset: float,
):
    folder = saved_pipeline(prediction_type=prediction_type)
    module = LoraFinetuning(
        load_stable_diffusion(str(folder)),
        min_snr_gamma=gamma,
        noise_offset=noise_offset,
        lora=LORA,
        optimizer=partial(torch.optim.SGD, lr=0.1),
    )
    randomise(module, seed=7)
    t = torch.tensor([0, 999, 100, 500])  # SNR 1175, 0.005, 7.7 and 0.4: on both sides of gamma
    draws = FixedDraws(normals=[POSTERIOR_NOISE, NOISE, OFFSET], unit=torch.zeros(4), integers=t)
    monkeypatch.setattr(adapter_training, "SampleRandomness", draws)
    found = module.training_step(batch, 0)
    found.backward()

    expected, expected_gradients = {}, {}
    for dtype in (torch.float32, torch.float64):
        reference = Reference(folder, dtype)
        unet = reference.unet(finetuned=(ALPHA, adapter_weights(module)))
        expected[dtype] = denoising_loss(reference, unet, batch, t, prediction_type, gamma, noise_offset)
        expected[dtype].backward()
        expected_gradients[dtype] = gradients(unet, "finetuned")
    assert draws.highs == [1000]
    assert_same_loss(found, *expected.values())
    assert_same_gradients(gradients(module.model.unet, "finetuned"), *expected_gradients.values())


@pytest.mark.parametrize("exponent", [1.0, 0.5, 1e-9])
def test_timesteps_of_finetuning_follow_the_exponent(
    pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch, exponent: float
):
    """P(t < s) = (s / T)^(1 / exponent); t stays below T where u^exponent rounds to 1."""
    model = load_stable_diffusion(str(pipeline_folder))
    module = LoraFinetuning(model, timestep_exponent=exponent, lora=LORA, optimizer=partial(torch.optim.SGD, lr=0.1))
    seen = []
    monkeypatch.setattr(model, "denoise", lambda x_t, timesteps, condition: seen.append(timesteps) or x_t)
    randomness = SampleRandomness(torch.arange(4000), torch.device("cpu"))
    module.losses(torch.zeros(4000, 1, 1, 1), model.encode_text([""]), randomness)
    assert seen[0].min() >= 0 and seen[0].max() == 999
    assert (seen[0] < 500).float().mean().item() == pytest.approx(0.5 ** (1 / exponent), abs=0.025)


# ---- distribution matching distillation ----------------------------------------------------------------------------

# Of the steps that a generator of 4 steps is drawn in 1 to 4 of them by; 2 of 4 are 999 and 499.
PATHS = [[999], [999, 499], [999, 749], [999, 749, 499], [999, 749, 499, 249]]
WALK_NOISES = [normal(20 + number, 4, 4, 8, 8) for number in range(4)]


def generated(
    generator: UNet2DConditionModel, path: list[int], condition: Tensor, prediction_type: str, dtype: torch.dtype
) -> Tensor:
    """What the generator draws on a path, with gradient in the last step (Yin et al. 2024, section 4.5)."""
    x, last = WALK_NOISES[0].to(dtype), len(path) - 1
    for number in range(len(path)):
        t = torch.full((4,), path[number])
        with torch.set_grad_enabled(number == last):
            x, _ = to_x_0_and_epsilon(
                generator(x, t, condition).sample, x, at(ALPHAS_CUMPROD, t, dtype), prediction_type
            )
        if number < last:
            a = at(ALPHAS_CUMPROD, torch.tensor([path[number + 1]]), dtype)
            x = a.sqrt() * x + (1 - a).sqrt() * WALK_NOISES[number + 1]
    return x


def distribution_matching_loss(
    reference: Reference,
    generator: UNet2DConditionModel,
    critic: UNet2DConditionModel,
    discriminator: nn.Module | None,
    batch: dict[str, object],
    draws: FixedDraws,
    path: list[int],
    prediction_type: str,
) -> tuple[Tensor, Tensor]:
    """The loss's value, and what has its gradient: ``g dx/dtheta`` (Yin et al. 2023, eqs. 7 and 8), and the GAN's."""
    t, w, teacher = 20 + draws.integers, W_MIN + (W_MAX - W_MIN) * draws.unit, reference.unet()
    dtype = reference.dtype
    condition, no_condition = reference.text(batch["captions"]), reference.text([""] * 4)
    x = generated(generator, path, condition, prediction_type, dtype)
    with torch.no_grad():
        a = at(ALPHAS_CUMPROD, t, dtype)
        x_t = a.sqrt() * x + (1 - a).sqrt() * NOISE
        conditional, unconditional = teacher(x_t, t, condition).sample, teacher(x_t, t, no_condition).sample
        guided = conditional + w.reshape(-1, 1, 1, 1) * (conditional - unconditional)
        real, _ = to_x_0_and_epsilon(guided, x_t, a, prediction_type)
        fake, _ = to_x_0_and_epsilon(critic(x_t, t, condition).sample, x_t, a, prediction_type)
        g = (fake - real) / (x - real).abs().mean((1, 2, 3), keepdim=True)
    weight = batch["weight"] / 4
    share = weight.reshape(-1, 1, 1, 1) / x[0].numel()
    surrogate = (share * g * x).sum()
    if discriminator is not None:
        logits = realness(teacher, discriminator, x, draws.integers, condition)
        deceiving = ADVERSARIAL_WEIGHT * torch.log1p(torch.exp(-logits)).mean(1)
        (slope,) = torch.autograd.grad(deceiving.sum(), x, retain_graph=True)
        g, surrogate = g + slope * x[0].numel(), surrogate + (weight * deceiving).sum()
    return (share * g**2 / 2).sum(), surrogate


def critic_loss(
    reference: Reference,
    generator: UNet2DConditionModel,
    critic: UNet2DConditionModel,
    discriminator: nn.Module | None,
    batch: dict[str, object],
    t: Tensor,
    path: list[int],
    prediction_type: str,
) -> Tensor:
    """Denoising what the generator draws (Yin et al. 2023, eq. 6, or its velocity form), and telling it from photos."""
    a = at(ALPHAS_CUMPROD, t, reference.dtype)
    condition = reference.text(batch["captions"])
    x = generated(generator, path, condition, prediction_type, reference.dtype).detach()
    target = NOISE if prediction_type == "epsilon" else a.sqrt() * NOISE - (1 - a).sqrt() * x
    output = critic(a.sqrt() * x + (1 - a).sqrt() * NOISE, t, condition).sample
    losses = ((output - target) ** 2).mean((1, 2, 3))
    if discriminator is not None:
        photos = reference.latents(batch["pixel_values"])
        real, drawn = (realness(reference.unet(), discriminator, z, t, condition) for z in (photos, x))
        losses = losses + torch.log1p(torch.exp(-real)).mean(1) + torch.log1p(torch.exp(drawn)).mean(1)
    return (batch["weight"] * losses).sum() / 4


@pytest.mark.parametrize("adversarial", [False, True], ids=["", "adversarial"])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize(
    ("step", "trained", "path"),
    [
        (0, "critic", PATHS[0]),
        (1, "dmd2", PATHS[1]),
        (2, "critic", PATHS[1]),
        (5, "dmd2", PATHS[3]),
        (7, "dmd2", PATHS[4]),
        (9, "dmd2", PATHS[0]),
    ],
)
def test_distribution_matching_steps_are_those_of_the_paper(
    saved_pipeline: Callable[..., Path],
    monkeypatch: pytest.MonkeyPatch,
    batch: dict[str, object],
    step: int,
    trained: str,
    path: list[int],
    prediction_type: str,
    adversarial: bool,
):
    folder = saved_pipeline(prediction_type=prediction_type)
    module = Dmd2LoraDistillation(
        load_stable_diffusion(str(folder)),
        distillation=DistributionMatching(num_steps=4),
        critic_steps=1,
        adversarial_weight=ADVERSARIAL_WEIGHT if adversarial else 0.0,
        w_min=W_MIN,
        w_max=W_MAX,
        lora=LORA,
        optimizer=partial(torch.optim.SGD, lr=0.1),
    )
    randomise(module, seed=7)
    draws = FixedDraws(
        normals=[POSTERIOR_NOISE, *WALK_NOISES[: len(path)], NOISE, ADVERSARIAL_NOISE],
        unit=torch.tensor([0.0, 0.25, 0.5, 0.99]),
        integers=torch.tensor([0, 959, 100, 500]),
    )
    monkeypatch.setattr(adapter_training, "SampleRandomness", draws)
    monkeypatch.setattr(Dmd2LoraDistillation, "trainer", SimpleNamespace(global_step=step, strategy=None))
    monkeypatch.setattr(module, "log", lambda *_, **__: None)
    found = module.training_step(batch, 0)
    found.backward()

    values, expected_gradients = {}, {}
    for dtype in (torch.float32, torch.float64):
        reference, judge = Reference(folder, dtype), copy.deepcopy(module.discriminator)
        judge = judge.to(dtype) if judge is not None else None
        generator = reference.unet(dmd2=(ALPHA, adapter_weights(module)))
        critic = reference.unet(critic=(ALPHA, adapter_weights(module, "critic")))
        if trained == "critic":
            if judge is not None:
                judge.zero_grad()
            values[dtype] = critic_loss(
                reference, generator, critic, judge, batch, draws.integers, path, prediction_type
            )
            values[dtype].backward()
        else:
            values[dtype], surrogate = distribution_matching_loss(
                reference, generator, critic, judge, batch, draws, path, prediction_type
            )
            surrogate.backward()
        expected_gradients[dtype] = gradients(critic if trained == "critic" else generator, trained)
        if trained == "critic" and judge is not None:
            expected_gradients[dtype] |= {name: p.grad for name, p in judge.named_parameters()}
    assert draws.highs == [1000 if trained == "critic" else 960, *[1000] * adversarial]
    assert_same_loss(found, *values.values())
    found_gradients = gradients(module.model.unet, trained)
    if trained == "critic" and adversarial:
        found_gradients |= {name: p.grad for name, p in module.discriminator.named_parameters()}
    assert_same_gradients(found_gradients, *expected_gradients.values())
    moving = {id(parameter) for parameter in module.trained_by(trained)}
    assert all(parameter.grad is None for parameter in module.parameters() if id(parameter) not in moving)


# ---- through Lightning's Trainer -----------------------------------------------------------------------------------


def rows(batch: dict[str, object], chosen: slice) -> dict[str, object]:
    return {key: value[chosen] for key, value in batch.items()}


def test_two_batches_of_4_accumulated_are_a_batch_of_8(pipeline_folder: Path):
    batches = [random_batch(seed, 8) for seed in range(5)]
    halves = [rows(batch, half) for batch in batches for half in (slice(0, 4), slice(4, 8))]
    weights = []
    for data, accumulate in ((batches, 1), (halves, 2)):
        module = distillation_module(pipeline_folder)
        randomise(module, seed=7)
        before = adapter_weights(module)
        trainer = train(module, data, accumulate_grad_batches=accumulate, gradient_clip_val=1.0)
        assert trainer.global_step == 5
        weights.append(adapter_weights(module))
        # Plain gradient steps of 0.1: a gradient of the wrong size would show.
        assert max((weights[-1][key] - before[key]).abs().max() for key in before) > 1e-2
    for key in weights[0]:
        torch.testing.assert_close(weights[0][key], weights[1][key], rtol=0, atol=1e-5)


def precision_settings(precision: str) -> dict[str, object]:
    """Lightning turns 16-mixed on a CPU into bf16-mixed, so fp16 is put in by hand."""
    if precision != "16-mixed":
        return {"precision": precision}
    return {"plugins": MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=256.0))}


@pytest.mark.parametrize("method", ["lora", "lcm"])
@pytest.mark.parametrize(
    ("precision", "dtype"),
    [("32-true", torch.float32), ("bf16-mixed", torch.bfloat16), ("16-mixed", torch.float16)],
)
def test_every_precision_trains_a_float32_adapter_over_frozen_weights(
    pipeline_folder: Path, precision: str, dtype: torch.dtype, method: str
):
    model = load_stable_diffusion(str(pipeline_folder), dtype=dtype)
    settings = {"lora": LORA, "optimizer": partial(torch.optim.AdamW, lr=1e-3)}
    if method == "lora":
        module: AdapterTraining = LoraFinetuning(model, **settings)
    else:
        module = LcmLoraDistillation(model, distillation=ConsistencyDistillation(), **settings)
    frozen = {name: p.detach().clone() for name, p in module.named_parameters() if not p.requires_grad}
    adapter = {name: p.detach().clone() for name, p in module.named_parameters() if p.requires_grad}
    losses = []

    class Record(L.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, index):
            losses.append(outputs["loss"])

    trainer = train(
        module,
        [random_batch(seed, 2) for seed in range(3)],
        gradient_clip_val=1.0,
        callbacks=[Record()],
        **precision_settings(precision),
    )
    assert trainer.precision == precision
    assert len(losses) == 3 and all(torch.isfinite(loss) and loss.dtype == torch.float32 for loss in losses)
    now = dict(module.named_parameters())
    assert all(now[name].dtype == dtype and torch.equal(now[name], weight) for name, weight in frozen.items())
    assert all(now[name].dtype == torch.float32 for name in adapter)
    # B starts at 0 and must move everywhere; A moves from the second step on.
    assert all(torch.any(now[name] != weight) for name, weight in adapter.items())
    assert len(adapter) == len(lora_parameters(model.unet, module.kind.name)) > 10
    (optimizer,) = trainer.optimizers
    states = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    assert states and all(value.dtype == torch.float32 for value in states)
