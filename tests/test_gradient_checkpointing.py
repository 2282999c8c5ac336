"""Activations that are computed anew give the gradients of those that are kept, whatever adapters act by then."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.adapters import random_batch, randomise
from lcm_lightning.diffusion.consistency import ConsistencyDistillation
from lcm_lightning.diffusion.distribution_matching import DistributionMatching
from lcm_lightning.diffusion.trajectory import TrajectoryDistillation
from lcm_lightning.methods.adapter_training import AdapterTraining
from lcm_lightning.methods.dmd2_lora import Dmd2LoraDistillation
from lcm_lightning.methods.lcm_lora import LcmLoraDistillation
from lcm_lightning.methods.lora import LoraFinetuning
from lcm_lightning.methods.pcm_lora import PcmLoraDistillation
from lcm_lightning.methods.tcd_lora import TcdLoraDistillation
from lcm_lightning.models.adapters import LoraSettings, active_adapters
from lcm_lightning.models.stable_diffusion import load_stable_diffusion

tcd = partial(TcdLoraDistillation, distillation=TrajectoryDistillation())
pcm = partial(PcmLoraDistillation, distillation=TrajectoryDistillation(num_ode_steps=40))
dmd2 = partial(Dmd2LoraDistillation, distillation=DistributionMatching(), critic_steps=1)
ADVERSARIAL = {"adversarial_weight": 0.1}
STEPS: dict[str, tuple[Callable[..., AdapterTraining], int]] = {
    "lora": (LoraFinetuning, 0),
    "lcm": (partial(LcmLoraDistillation, distillation=ConsistencyDistillation()), 0),
    "tcd": (tcd, 0),
    "tcd, adversarial": (partial(tcd, **ADVERSARIAL), 0),
    "pcm": (pcm, 0),
    "pcm, adversarial": (partial(pcm, **ADVERSARIAL), 0),
    "dmd2, critic": (dmd2, 2),
    "dmd2, critic, adversarial": (partial(dmd2, **ADVERSARIAL), 2),
    "dmd2, generator": (dmd2, 1),
    "dmd2, generator, adversarial": (partial(dmd2, **ADVERSARIAL), 1),
}


def gradients(method: Callable[..., AdapterTraining], folder: Path, step: int, **options: Any) -> dict[str, Tensor]:
    """Of optimizer step `step`, by parameter; of those alone whose turn it is."""
    torch.manual_seed(0)  # of a discriminator's weights
    module = method(load_stable_diffusion(str(folder), **options), lora=LoraSettings(4, 4), optimizer=torch.optim.SGD)
    randomise(module, seed=7)
    module._trainer = SimpleNamespace(global_step=step, strategy=None)
    module.log = lambda *_, **__: None
    module.training_step(random_batch(1, 2), 0).backward()
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def relative_error(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    assert found.keys() == expected.keys()
    found, expected = (torch.cat([g.flatten() for g in group.values()]) for group in (found, expected))
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("fused", [True, False], ids=["own layers", "peft's layers"])
@pytest.mark.parametrize("name", STEPS)
def test_every_turn_of_every_method_has_the_same_gradients(pipeline_folder: Path, name: str, fused: bool):
    method, step = STEPS[name]
    kept, anew = (
        gradients(method, pipeline_folder, step, fused=fused, gradient_checkpointing=on) for on in (False, True)
    )
    assert relative_error(anew, kept) < 1e-5


def test_a_pass_is_computed_anew_with_its_own_adapters_as_often_as_it_is_asked(pipeline_folder: Path):
    """And those that act by then act again afterwards."""
    module = dmd2(
        load_stable_diffusion(str(pipeline_folder), gradient_checkpointing=True),
        lora=LoraSettings(4, 4),
        optimizer=torch.optim.SGD,
    )
    randomise(module, seed=7)
    x, timesteps, condition = torch.randn(1, 4, 8, 8), torch.tensor([500]), module.model.encode_text(["a dog"])
    of_passes = {}
    for names in ((), ("critic",), ("dmd2",)):
        latents = x.clone().requires_grad_()
        with active_adapters(module.model.unet, names):
            output = module.model.denoise(latents, timesteps, condition).square().sum()
            (expected,) = torch.autograd.grad(output, latents, retain_graph=True)
        for _ in range(2):
            (found,) = torch.autograd.grad(output, latents, retain_graph=True)
            torch.testing.assert_close(found, expected)
        of_passes[names] = expected
    assert not torch.allclose(of_passes[()], of_passes["critic",])
    after = module.model.denoise(x, timesteps, condition)
    with active_adapters(module.model.unet, ("dmd2",)):
        assert torch.equal(after, module.model.denoise(x, timesteps, condition))
