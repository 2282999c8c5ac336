"""Distribution matching distillation: of a teacher known on paper, through the trainer, and as others draw from it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from diffusers import LCMScheduler, StableDiffusionPipeline
from torch import Tensor, nn

from helpers.adapters import random_batch, randomise, train
from lcm_lightning.callbacks.export import ExportLora
from lcm_lightning.diffusion.distribution_matching import DistributionMatching
from lcm_lightning.diffusion.schedule import alphas_cumprod_from_config
from lcm_lightning.methods.dmd2_lora import Dmd2LoraDistillation
from lcm_lightning.models.adapters import LoraSettings, active_adapters, lora_parameters
from lcm_lightning.models.architectures import SD15_SCHEDULER
from lcm_lightning.models.kinds import KOHYA_FILE, LORA_FILE
from lcm_lightning.models.sampling import make_scheduler, sample
from lcm_lightning.models.stable_diffusion import StableDiffusion, load_stable_diffusion
from lcm_lightning.runs.contents import read_manifest

ALPHAS_CUMPROD = alphas_cumprod_from_config(SD15_SCHEDULER)

# ---- a teacher whose distribution is known -------------------------------------------------------------------------

# Guided by w the score of N(m_c, S), where the unconditional one is N(m_u, S), is that of N(m_c + w (m_c - m_u), S).
MEAN, UNCONDITIONAL_MEAN, GUIDANCE = torch.tensor([0.5, -0.3]), torch.tensor([0.2, 0.1]), 1.0
GUIDED_MEAN = MEAN + GUIDANCE * (MEAN - UNCONDITIONAL_MEAN)
ROOT = torch.tensor([[0.6, 0.0], [0.3, 0.4]])  # S = ROOT ROOT^T
COVARIANCE = ROOT @ ROOT.T


def optimal_epsilon(x_t: Tensor, timesteps: Tensor, mean: Tensor, covariance: Tensor) -> Tensor:
    """E[eps | x_t] for data N(mean, covariance)."""
    a = ALPHAS_CUMPROD[timesteps][:, None]
    precision = torch.linalg.inv(a[..., None] * covariance + (1 - a[..., None]) * torch.eye(2))
    return (1 - a).sqrt() * (precision @ (x_t - a.sqrt() * mean)[..., None])[..., 0]


def teacher(x_t: Tensor, timesteps: Tensor) -> tuple[Tensor, Tensor]:
    conditional, unconditional = (
        optimal_epsilon(x_t, timesteps, mean, COVARIANCE) for mean in (MEAN, UNCONDITIONAL_MEAN)
    )
    return conditional, unconditional


class Critic(nn.Module):
    """The optimal noise prediction of a Gaussian that is learnt; at first the unguided teacher's."""

    def __init__(self) -> None:
        super().__init__()
        self.mean, self.root = nn.Parameter(MEAN.clone()), nn.Parameter(ROOT.clone())

    def forward(self, x_t: Tensor, timesteps: Tensor) -> Tensor:
        return optimal_epsilon(x_t, timesteps, self.mean, self.root @ self.root.T)


class Generator(nn.Module):
    """An affine prediction of ``x_0`` for each of its own timesteps, as noise; at first a constant."""

    def __init__(self, own: Tensor) -> None:
        super().__init__()
        self.own = own
        self.slope, self.shift = nn.Parameter(torch.zeros(len(own), 2, 2)), nn.Parameter(torch.zeros(len(own), 2))

    def forward(self, x_t: Tensor, timesteps: Tensor) -> Tensor:
        number = (timesteps[:, None] == self.own).int().argmax(1)
        a = ALPHAS_CUMPROD[timesteps][:, None]
        x_0 = (self.slope[number] @ x_t[..., None])[..., 0] + self.shift[number]
        return (x_t - a.sqrt() * x_0) / (1 - a).sqrt()


def own_timesteps(method: DistributionMatching) -> Tensor:
    """Of its longest path, which has all."""
    return torch.tensor(method.paths(ALPHAS_CUMPROD)[-1])


def distil(method: DistributionMatching, critic_steps: int, rounds: int = 700) -> Generator:
    """A generator trained against its critic in turns, or against the critic as it began."""
    torch.manual_seed(0)
    generator, critic, paths = Generator(own_timesteps(method)), Critic(), method.paths(ALPHAS_CUMPROD)
    optimizers = {
        network: torch.optim.Adam(network.parameters(), lr=rate)
        for network, rate in ((generator, 1e-2), (critic, 2e-2))
    }
    schedules = [torch.optim.lr_scheduler.CosineAnnealingLR(optimizers[generator], rounds)]
    schedules.append(torch.optim.lr_scheduler.CosineAnnealingLR(optimizers[critic], rounds * max(critic_steps, 1)))
    low, high = method.compared_timesteps(ALPHAS_CUMPROD).start, method.compared_timesteps(ALPHAS_CUMPROD).stop
    for step in range(rounds * (critic_steps + 1)):
        trained = generator if step % (critic_steps + 1) == critic_steps else critic
        path = paths[step // (critic_steps + 1) % len(paths)]
        noises = [torch.randn(256, 2) for _ in path]
        noise, timesteps = torch.randn(256, 2), torch.randint(low, high, (256,))
        if trained is generator:
            settings = (noise, timesteps, torch.full((256,), GUIDANCE), ALPHAS_CUMPROD)
            direction = partial(method.direction, teacher, critic)
            losses = method.losses(generator, lambda x, g=direction, s=settings: g(x, *s), noises, path, ALPHAS_CUMPROD)
        else:
            x = method.drawn(generator, noises, path, ALPHAS_CUMPROD)
            losses = method.critic_losses(critic, x, noise, timesteps, ALPHAS_CUMPROD)
        optimizers[trained].zero_grad()
        losses.mean().backward()
        optimizers[trained].step()
        schedules[trained is critic].step()
    return generator


@torch.no_grad()
def error(method: DistributionMatching, generator: Generator) -> float:
    """The farther of mean and covariance from the guided teacher's, relative to its deviation and its covariance.

    Of what is predicted on all paths, together: the critic, and so the method, knows of no more.
    """
    dice = torch.Generator().manual_seed(1)
    drawn = []
    for path in method.paths(ALPHAS_CUMPROD):
        noises = [torch.randn(100_000, 2, generator=dice) for _ in path]
        drawn.append(method.drawn(generator, noises, path, ALPHAS_CUMPROD))
    x = torch.cat(drawn)
    of_mean = (x.mean(0) - GUIDED_MEAN).norm() / COVARIANCE.trace().sqrt()
    of_covariance = (x.T.cov() - COVARIANCE).norm() / COVARIANCE.norm()
    return max(of_mean.item(), of_covariance.item())


BOUND = 0.05


@pytest.mark.parametrize("num_steps", [1, 2, 4])
def test_the_generator_s_distribution_is_the_guided_teacher_s(num_steps: int):
    method = DistributionMatching(num_steps=num_steps)
    assert error(method, distil(method, critic_steps=2)) < BOUND
    assert error(method, Generator(own_timesteps(method))) > 10 * BOUND


def test_a_critic_that_does_not_follow_its_generator_is_caught():
    method = DistributionMatching(num_steps=1)
    assert error(method, distil(method, critic_steps=0)) > 4 * BOUND


# ---- drawing -------------------------------------------------------------------------------------------------------


def module(folder: Path, *, num_steps: int = 4, critic_steps: int = 1, **options: Any) -> Dmd2LoraDistillation:
    return Dmd2LoraDistillation(
        load_stable_diffusion(str(folder), defer_encoders=True),
        distillation=DistributionMatching(num_steps=num_steps),
        critic_steps=critic_steps,
        lora=LoraSettings(rank=4, alpha=6, target_modules="lcm_lora"),
        optimizer=partial(torch.optim.SGD, lr=1e-3),
        **options,
    )


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 8, 30])
def test_every_step_of_every_draw_is_trained_after_the_steps_before_it_and_nothing_else_is(
    pipeline_folder: Path, num_steps: int
):
    trained = module(pipeline_folder, num_steps=num_steps)
    scheduler = make_scheduler(trained.kind.sampler, trained.model.scheduler_config)
    assert (trained.kind.steps, trained.kind.sampler.max_steps) == (num_steps, num_steps)
    drawn = set()
    for steps in range(1, num_steps + 1):
        scheduler.set_timesteps(steps)
        drawn |= {tuple(scheduler.timesteps[:end].tolist()) for end in range(1, steps + 1)}
    assert len(trained.paths) == len(drawn) and set(trained.paths) == drawn
    assert trained.paths[-1] == tuple(scheduler.timesteps.tolist())


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@torch.no_grad()
def test_training_draws_as_the_sampler_does(saved_pipeline: Callable[..., Path], prediction_type: str, steps: int):
    """Up to each of the sampler's `steps`, of 4 that there are at most."""
    trained = module(saved_pipeline(prediction_type=prediction_type))
    randomise(trained, seed=7)
    seen: list[tuple[int, Tensor]] = []
    options = {"steps": steps, "guidance_scale": 1.0, "sampler": trained.kind.sampler, "resolution": 32}

    def look(module: nn.Module, arguments: Any, output: tuple[Tensor]) -> None:
        """At what the sampler has in each step, before the noise of the next."""
        x_t, t = arguments[0], torch.as_tensor(arguments[1]).reshape(1)
        x_0 = trained.distillation.denoised(lambda *_: output[0], x_t, t, trained.alphas_cumprod)
        seen.append((t.item(), x_0))

    watch = trained.model.unet.register_forward_hook(look)
    sample(trained.model, ["a dog"], seeds=[3], **options)
    watch.remove()
    dice = torch.Generator().manual_seed(3)
    noises = [torch.randn(1, 4, 8, 8, generator=dice) for _ in range(steps)]
    generator = trained.student(trained.model.encode_text(["a dog"]))
    assert len(seen) == steps
    for end in range(1, steps + 1):
        path = tuple(t for t, _ in seen[:end])
        assert path in trained.paths
        found = trained.distillation.drawn(generator, noises[:end], path, trained.alphas_cumprod)
        torch.testing.assert_close(seen[end - 1][1], found, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("file", [LORA_FILE, KOHYA_FILE])
def test_the_exported_student_gives_the_same_picture_in_diffusers(pipeline_folder: Path, tmp_path: Path, file: str):
    trained = module(pipeline_folder)
    randomise(trained, seed=7)
    train(trained, [random_batch(0, 2)], callbacks=[ExportLora(str(tmp_path / "lora"))])
    (adapter,) = read_manifest(tmp_path)
    assert adapter.kind == trained.kind and adapter.kind.sampler.scheduler == "LCMScheduler"
    pipeline = StableDiffusionPipeline.from_pretrained(pipeline_folder, safety_checker=None)
    pipeline.scheduler = LCMScheduler.from_config(pipeline.scheduler.config, original_inference_steps=4)
    pipeline.set_progress_bar_config(disable=True)
    kind = adapter.kind
    options = {"num_inference_steps": kind.steps, "guidance_scale": kind.guidance_scale, "height": 32, "width": 32}

    def draw() -> Tensor:
        return pipeline("a dog", generator=torch.Generator().manual_seed(5), output_type="pt", **options).images

    base = draw()
    pipeline.load_lora_weights(tmp_path / "lora", weight_name=file)
    settings = {"steps": kind.steps, "guidance_scale": kind.guidance_scale, "sampler": kind.sampler, "resolution": 32}
    found = sample(trained.model, ["a dog"], seeds=[5], **settings)
    torch.testing.assert_close(draw(), found, atol=1e-4, rtol=0)
    assert (base - found).abs().max() > 1e-2


# ---- through Lightning's Trainer -----------------------------------------------------------------------------------


class Watch(L.Callback):
    """Who moved in each step, and on which path the generator drew."""

    def __init__(self) -> None:
        self.moved: list[str] = []
        self.paths: list[tuple[int, ...]] = []

    def weights(self, trained: Dmd2LoraDistillation) -> dict[str, Tensor]:
        unet = trained.model.unet
        return {n: torch.cat([p.detach().flatten() for p in lora_parameters(unet, n)]) for n in trained.adapters}

    def on_train_batch_start(self, trainer: L.Trainer, module: Any, *rest: Any) -> None:
        self.before = self.weights(module)
        self.paths.append(module._path())

    def on_train_batch_end(self, trainer: L.Trainer, module: Any, *rest: Any) -> None:
        after = self.weights(module)
        self.moved += [name for name in after if not torch.equal(after[name], self.before[name])]


def test_the_critic_takes_its_steps_before_each_of_the_generator_s_and_all_draw_on_every_path(
    pipeline_folder: Path,
):
    trained, watch = module(pipeline_folder, critic_steps=2, num_steps=3, critic_lr=1e-2), Watch()
    randomise(trained, seed=7)
    trainer = train(trained, [random_batch(seed, 2) for seed in range(9)], callbacks=[watch])
    assert watch.moved == ["critic", "critic", "dmd2"] * 3
    for place in range(3):
        assert sorted(watch.paths[place::3]) == [(998,), (998, 665), (998, 665, 332)]
    assert [group["lr"] for group in trainer.optimizers[0].param_groups] == [1e-3, 1e-2]


def test_no_picture_is_read(pipeline_folder: Path):
    losses = []
    for seed in (0, 1):
        trained, pictures = module(pipeline_folder), random_batch(seed, 2)["pixel_values"]
        trainer = train(trained, [{**random_batch(0, 2), "pixel_values": pictures}])
        losses.append(trainer.callback_metrics["train/critic_loss"])
        assert isinstance(trained.model, StableDiffusion) and trained.model.vae is None
    assert losses[0] == losses[1]


def test_in_validation_it_draws_in_all_steps(pipeline_folder: Path):
    trained = module(pipeline_folder)
    trained.eval()
    assert trained._path() == (999, 749, 499, 249)


@torch.no_grad()
def test_a_new_critic_is_the_unguided_teacher(pipeline_folder: Path):
    trained = module(pipeline_folder)
    x_t, timesteps = torch.randn(2, 4, 8, 8), torch.tensor([10, 900])
    condition = trained.model.encode_text(["a dog", "a cat"])
    conditional, _ = trained.teacher(condition)(x_t, timesteps)
    torch.testing.assert_close(trained.critic(condition)(x_t, timesteps), conditional)
    randomise(trained, seed=7)
    with active_adapters(trained.model.unet, ("critic",)):
        expected = trained.model.denoise(x_t, timesteps, condition)
    assert torch.equal(trained.critic(condition)(x_t, timesteps), expected)
    assert (expected - conditional).abs().max() > 1e-2
