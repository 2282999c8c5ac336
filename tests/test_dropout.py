"""LoRA dropout of a sample depends on that sample's seed and the layer, and on nothing else."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial, partialmethod
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from helpers.adapters import gradients, random_batch, randomise
from helpers.forks import in_a_fork
from lcm_lightning.diffusion.consistency import ConsistencyDistillation
from lcm_lightning.diffusion.trajectory import TrajectoryDistillation
from lcm_lightning.methods.adapter_training import AdapterTraining
from lcm_lightning.methods.lcm_lora import LcmLoraDistillation
from lcm_lightning.methods.lora import LoraFinetuning
from lcm_lightning.methods.pcm_lora import PcmLoraDistillation
from lcm_lightning.methods.tcd_lora import TcdLoraDistillation
from lcm_lightning.models.adapters import LoraSettings, active_adapters, add_lora, lora_layers
from lcm_lightning.models.condition import Condition
from lcm_lightning.models.dropout import SampleDropout
from lcm_lightning.models.sampling import DDIM, sample
from lcm_lightning.models.stable_diffusion import StableDiffusion, load_stable_diffusion

P = 0.3
METHODS = [
    LoraFinetuning,
    partial(LcmLoraDistillation, distillation=ConsistencyDistillation(loss="l2")),
    partial(TcdLoraDistillation, distillation=TrajectoryDistillation(loss="l2")),
    partial(PcmLoraDistillation, distillation=TrajectoryDistillation(num_ode_steps=40, loss="l2")),
]
# The same sums over batches of other sizes are rounded otherwise.
CLOSE = {"rtol": 1e-4, "atol": 1e-6}

each_method = pytest.mark.parametrize("method", METHODS, ids=["lora", "lcm", "tcd", "pcm"])


def module(method: Callable[..., AdapterTraining], folder: Path, p: float = P, **options: object) -> AdapterTraining:
    lora = LoraSettings(rank=4, alpha=4, dropout=p)
    made = method(load_stable_diffusion(str(folder), **options), lora=lora, optimizer=torch.optim.SGD)
    made.log = lambda *_, **__: None
    randomise(made, seed=7)
    return made


def gradient(trained: AdapterTraining, batch: dict[str, object], chosen: list[int]) -> Tensor:
    """Of the sum of the losses of some samples of a batch, all parameters in one row."""
    trained.zero_grad()
    part = {key: [v[i] for i in chosen] if isinstance(v, list) else v[chosen] for key, v in batch.items()}
    (trained.training_step(part, 0) * len(chosen)).backward()
    return torch.cat([g.flatten() for g in gradients(trained.model.unet, trained.kind.name).values()])


@each_method
def test_neither_batch_nor_place_in_it_changes_a_sample_s_gradient(
    pipeline_folder: Path, method: Callable[..., AdapterTraining]
):
    trained, batch = module(method, pipeline_folder), random_batch(1, 3)
    alone = [gradient(trained, batch, [i]) for i in range(3)]
    for order in ([0, 1, 2], [2, 0, 1]):
        for i in range(3):
            only = batch | {"weight": (torch.arange(3) == i).float()}
            torch.testing.assert_close(gradient(trained, only, order), alone[i], **CLOSE)
    plain = module(method, pipeline_folder, p=0.0)
    assert (gradient(plain, batch, [0]) - alone[0]).norm() > 0.1 * alone[0].norm()


@each_method
def test_two_ranks_of_half_a_batch_are_one_of_the_whole(pipeline_folder: Path, method: Callable[..., AdapterTraining]):
    trained, batch = module(method, pipeline_folder), random_batch(1, 4)
    halves = gradient(trained, batch, [0, 2]) + gradient(trained, batch, [1, 3])
    torch.testing.assert_close(halves, gradient(trained, batch, [0, 1, 2, 3]), **CLOSE)


@each_method
def test_checkpointing_computes_the_same_masks_anew(pipeline_folder: Path, method: Callable[..., AdapterTraining]):
    batch = random_batch(1, 2)
    kept, anew = (
        gradient(module(method, pipeline_folder, gradient_checkpointing=on), batch, [0, 1]) for on in (False, True)
    )
    torch.testing.assert_close(anew, kept, **CLOSE)


def test_student_and_target_pass_have_the_same_mask_and_a_teacher_pass_has_none(pipeline_folder: Path):
    trained = module(METHODS[1], pipeline_folder)
    trained.dropout_seeds[:] = [1, 2]
    x, text = torch.randn(2, 4, 8, 8), Condition(torch.randn(2, 16, 32))
    t = torch.tensor([3, 500])
    student = trained.model.denoise(x, t, text)
    with torch.no_grad():
        torch.testing.assert_close(trained.model.denoise(x, t, text), student, **CLOSE)
        with active_adapters(trained.model.unet, ()):
            teacher = trained.model.denoise(x, t, text)
            torch.testing.assert_close(trained.eval().model.denoise(x, t, text), teacher, **CLOSE)
    assert not torch.allclose(student, teacher)


def test_the_same_step_again_has_the_same_gradient_whatever_was_drawn_before(pipeline_folder: Path):
    trained, batch = module(METHODS[0], pipeline_folder), random_batch(1, 2)
    first = gradient(trained, batch, [0, 1])
    torch.manual_seed(11)
    gradient(trained, random_batch(2, 2), [0, 1])
    torch.testing.assert_close(gradient(trained, batch, [0, 1]), first, **CLOSE)


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_share_p_becomes_0_and_the_mean_stays(p: float, dtype: torch.dtype):
    n = 200_000
    found = SampleDropout(p, 0, [1, 2, 3, 4])(torch.ones(4, n // 4, dtype=dtype))
    assert found.dtype == dtype
    assert set(found.unique().tolist()) == {0.0, float(torch.tensor(1.0, dtype=dtype) / (1 - p))}
    assert (found == 0).float().mean().item() == pytest.approx(p, abs=5 * (p * (1 - p) / n) ** 0.5)


def test_masks_of_other_samples_and_layers_are_independent():
    n, seeds = 10_000, [5, 6]
    masks = [SampleDropout(0.5, layer, seeds)(torch.ones(2, n)) == 0 for layer in range(2)]
    rows = torch.cat(masks).float() - 0.5
    correlation = rows @ rows.T / (n / 4)
    torch.testing.assert_close(correlation, torch.eye(4), rtol=0, atol=5 / n**0.5)


def test_a_mask_is_the_same_in_any_layout_and_for_samples_that_come_twice():
    dropout, x = SampleDropout(0.5, 3, [1, 2]), torch.randn(2, 8, 4, 4)
    expected = dropout(x)
    assert torch.equal(dropout(x.to(memory_format=torch.channels_last)), expected)
    assert torch.equal(dropout(torch.cat([x, x])), torch.cat([expected, expected]))


def test_outside_training_nothing_is_dropped():
    x = torch.randn(3, 5)
    assert SampleDropout(0.5, 0, []).eval()(x) is x


@pytest.mark.parametrize("seeds", [[], [1, 2]])
def test_seeds_of_another_batch_are_refused(seeds: list[int]):
    with pytest.raises(RuntimeError, match=f"dropout of 3 samples with the seeds of {len(seeds)}"):
        SampleDropout(0.5, 0, seeds)(torch.ones(3, 5))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_copied_unet_drops_alike_by_a_list_of_its_own(tiny_model: nn.Module, copied: Callable[..., object]):
    seeds: list[int] = []
    add_lora(tiny_model.unet, "a", LoraSettings(rank=4, alpha=4, dropout=P), seeds=seeds)
    randomise(tiny_model, seed=7)
    seeds[:] = [1]
    unet, its_seeds = copied((tiny_model.unet.train(), seeds))
    x, text = torch.randn(1, 4, 8, 8), torch.randn(1, 16, 32)

    def same(network: nn.Module, expected: Tensor) -> bool:
        return torch.allclose(network(x, 3, text).sample, expected, rtol=1e-4, atol=1e-5)

    before = tiny_model.unet(x, 3, text).sample
    assert same(unet, before)
    seeds[:] = [2]
    assert same(unet, before) and not same(tiny_model.unet, before)
    its_seeds[:] = [2]
    assert not same(unet, before) and same(unet, tiny_model.unet(x, 3, text).sample)


def test_every_layer_has_a_mask_of_its_own_and_adds_nothing_to_the_state(pipeline_folder: Path):
    trained = module(METHODS[0], pipeline_folder)
    layers = [layer.lora_dropout["finetuned"] for layer in lora_layers(trained.model.unet)]
    assert all(isinstance(dropout, SampleDropout) for dropout in layers)
    assert len({dropout.layer for dropout in layers}) == len(layers) > 10
    assert trained.state_dict().keys() == module(METHODS[0], pipeline_folder, p=0.0).state_dict().keys()


@pytest.mark.slow
@pytest.mark.thorough
@in_a_fork
def test_a_compiled_unet_drops_alike(pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(UNet2DConditionModel, "compile", partialmethod(nn.Module.compile, backend="eager"))
    batch = random_batch(1, 2)
    compiled, plain = (gradient(module(METHODS[0], pipeline_folder, compile=on), batch, [0, 1]) for on in (True, False))
    torch.testing.assert_close(compiled, plain, **CLOSE)


def test_drawing_in_the_midst_of_training_has_no_dropout(pipeline_folder: Path):
    trained = module(METHODS[1], pipeline_folder)
    trained.dropout_seeds[:] = [1, 2, 3]  # of a step of another size
    trained.train()
    drawing = {"seeds": [0, 1], "steps": 2, "guidance_scale": 1.0, "sampler": DDIM, "resolution": 32}
    images = sample(trained.model, ["a", "b"], **drawing)
    assert all(layer.training for layer in trained.model.unet.modules())
    trained.eval()
    torch.testing.assert_close(sample(trained.model, ["a", "b"], **drawing), images, rtol=0, atol=1e-5)


def test_a_frozen_network_s_own_dropout_is_off(tiny_model: StableDiffusion):
    tiny_model.unet.mid_block.resnets[0].dropout.p = 0.5
    trained = METHODS[0](tiny_model, lora=LoraSettings(rank=4, alpha=4), optimizer=torch.optim.SGD)
    x, t, condition = torch.randn(2, 4, 8, 8), torch.tensor([3, 500]), Condition(torch.randn(2, 16, 32))
    with torch.no_grad():
        assert torch.equal(trained.model.denoise(x, t, condition), trained.model.denoise(x, t, condition))
