"""Train the networks of the embedded pipeline from scratch: autoencoder, CLIP, UNet, in this order."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import CLIPTextModel, CLIPTokenizer

from lcm_lightning.data.datamodule import iterate_split
from lcm_lightning.diffusion.consistency import squared_error
from lcm_lightning.diffusion.schedule import add_noise, alphas_cumprod_from_config, training_target
from lcm_lightning.methods.clipping import FusedClipping
from lcm_lightning.methods.randomness import SampleRandomness
from lcm_lightning.models.condition import Condition
from lcm_lightning.models.stable_diffusion import StableDiffusion
from lcm_lightning.toy.networks import (
    SCHEDULER,
    normalise_latents,
    save_pipeline,
    tiny_clip,
    tiny_unet,
    tiny_vae,
    train_tokenizer,
)

OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]


def trapezoid(step: int, *, warmup: int, decay: int, total: int) -> float:
    """Learning rate factor of step `step`: linear from 0 over `warmup` steps, 1, linear to 0 over the last `decay`.

    Until the decay begins nothing depends on `total`, so a run can be resumed with another one (Hägele et al. 2024,
    arXiv 2405.18392).
    """
    return max(0.0, min(1.0, (step + 1) / max(warmup, 1), (total - step) / max(decay, 1)))


class Pretraining(FusedClipping, ABC):
    """What the three trainings share: optimizer, learning rate, and the folder the finished network is written to.

    Args:
        optimizer: makes the optimizer of the trained parameters.
        warmup_steps: steps over which the learning rate rises from 0.
        decay_steps: last steps, over which it falls to 0.
        folder: where `save` is called at the end of training.
    """

    def __init__(self, *, optimizer: OptimizerFactory, warmup_steps: int, decay_steps: int, folder: str) -> None:
        super().__init__()
        self.make_optimizer = optimizer
        self.warmup_steps = warmup_steps
        self.decay_steps = decay_steps
        self.folder = Path(folder)

    @abstractmethod
    def save(self, folder: Path) -> None:
        """Write what was trained into `folder`."""

    def on_train_end(self) -> None:
        """Write the network, after a weight averaging callback has put its average in place."""
        if self.trainer.is_global_zero:
            self.save(self.folder)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """The optimizer under `trapezoid`."""
        optimizer = self.make_optimizer(p for p in self.parameters() if p.requires_grad)
        total = int(self.trainer.estimated_stepping_batches)

        def factor(step: int) -> float:
            return trapezoid(step, warmup=self.warmup_steps, decay=self.decay_steps, total=total)

        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": LambdaLR(optimizer, factor), "interval": "step"}}


class VaePretraining(Pretraining):
    """Train an autoencoder with a mean absolute error and a small KL term (Rombach et al. 2022, appendix G).

    ``L = mean |x - D(z)| + kl_weight mean KL(q(z|x) || N(0, 1))`` with ``z ~ q(z|x)``. No adversarial or perceptual
    term: flat shapes with sharp edges do not need them.
    """

    def __init__(self, *, kl_weight: float = 1e-4, **training: Any) -> None:
        super().__init__(**training)
        self.vae = tiny_vae()
        self.kl_weight = kl_weight

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        """Loss of a batch."""
        pixel_values = batch["pixel_values"]
        posterior = self.vae.encode(pixel_values).latent_dist
        mean, log_variance = posterior.mean.float(), posterior.logvar.float()
        noise = SampleRandomness(batch["seed"], self.device).normal(mean.shape[1:])
        latents = mean + (0.5 * log_variance).exp() * noise
        error = (self.vae.decode(latents).sample.float() - pixel_values).abs().mean(dim=(1, 2, 3))
        kl = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).mean(dim=(1, 2, 3))
        loss = (batch["weight"] * (error + self.kl_weight * kl)).mean()
        self.log_dict({"train/loss": loss, "train/absolute_error": error.mean(), "train/kl": kl.mean()})
        return loss

    def validation_step(self, batch: dict[str, Any], batch_index: int) -> None:
        """Mean PSNR of the reconstructions of held-out images."""
        held_out = batch["weight"] > 0
        pixel_values = batch["pixel_values"][held_out]
        reconstructed = self.vae.decode(self.vae.encode(pixel_values).latent_dist.mean).sample
        self.log("val/psnr", psnr(reconstructed, pixel_values).mean(), prog_bar=True, batch_size=len(pixel_values))

    @torch.no_grad()
    def save(self, folder: Path) -> None:
        """Write the autoencoder as a diffusers folder, its latents of mean 0 and variance 1 in each channel."""
        loader = self.trainer.datamodule.train_dataloader()  # type: ignore[attr-defined]
        images = (batch["pixel_values"] for batch in loader)
        latents = torch.cat([self.vae.encode(image.to(self.device)).latent_dist.mean for image in images])
        normalise_latents(self.vae, latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3)))
        self.vae.save_pretrained(folder)


def psnr(images: Tensor, references: Tensor) -> Tensor:
    """Peak signal-to-noise ratio [B] in dB, ``10 log10(4 / mean squared error)``, of [B, C, H, W] in [-1, 1]."""
    error = (images.float().clamp(-1, 1) - references.float()).square().mean(dim=(1, 2, 3))
    return 10 * torch.log10(4 / error)


class ClipPretraining(Pretraining):
    """Train a CLIP (Radford et al. 2021, arXiv 2103.00020) and, before it, its tokenizer.

    The softmax over a batch takes every pair of the same key as a match: two styles draw the same emoji.

    Args:
        sources: folders of shards whose training captions the tokenizer learns its merges from.
    """

    def __init__(self, *, sources: Sequence[str], **training: Any) -> None:
        super().__init__(**training)
        self.tokenizer = train_tokenizer(
            caption for source in sources for sample in iterate_split(source, "train") for caption in sample.captions
        )
        self.clip = tiny_clip(self.tokenizer)

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        """Symmetric cross-entropy between images, moved and scaled, and captions."""
        images = shift_and_scale(batch["pixel_values"], SampleRandomness(batch["seed"], self.device))
        logits = self.logits(images, batch["captions"])
        matches = torch.tensor([[a == b for b in batch["keys"]] for a in batch["keys"]], device=self.device).float()
        loss = matching_loss(logits, matches)
        self.log_dict({"train/loss": loss, "train/scale": self.clip.logit_scale.exp()})
        return loss

    def validation_step(self, batch: dict[str, Any], batch_index: int) -> None:
        """How often an image picks the caption of its emoji among a batch of held-out ones."""
        held_out = (batch["weight"] > 0).nonzero().flatten()
        captions = [batch["captions"][index] for index in held_out.tolist()]
        logits = self.logits(batch["pixel_values"][held_out], captions)
        keys = [batch["keys"][index] for index in held_out.tolist()]
        correct = [keys[found] == key for found, key in zip(logits.argmax(dim=1).tolist(), keys, strict=True)]
        self.log("val/retrieval", sum(correct) / len(correct), prog_bar=True, batch_size=len(held_out))

    def logits(self, images: Tensor, captions: Sequence[str]) -> Tensor:
        """Scaled cosine similarities [images, captions]; `images` [B, 3, H, W] in [-1, 1]."""
        tokens = self.tokenizer(list(captions), padding="max_length", truncation=True, return_tensors="pt")
        return self.clip(tokens.input_ids.to(self.device), images).logits_per_image.float()

    def on_before_zero_grad(self, optimizer: Optimizer) -> None:
        """Keep the temperature's inverse at most 100, as CLIP does."""
        self.clip.logit_scale.data.clamp_(max=math.log(100))

    def save(self, folder: Path) -> None:
        """Write network and tokenizer as a transformers folder."""
        self.clip.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)


def matching_loss(logits: Tensor, matches: Tensor) -> Tensor:
    """Cross-entropy of rows and of columns of `logits` [B, B] with the 0/1 `matches` as targets, each row sharing 1."""
    rows = F.cross_entropy(logits, matches / matches.sum(dim=1, keepdim=True))
    columns = F.cross_entropy(logits.T, matches.T / matches.T.sum(dim=1, keepdim=True))
    return (rows + columns) / 2


def shift_and_scale(images: Tensor, randomness: SampleRandomness) -> Tensor:
    """Images [B, 3, H, W] moved by up to a tenth of their side and scaled by 0.75 to 1.1, on white (1)."""
    zoom, right, down = randomness.uniform(0.75, 1.1), randomness.uniform(-0.2, 0.2), randomness.uniform(-0.2, 0.2)
    zero = torch.zeros_like(zoom)
    rows = torch.stack([torch.stack([1 / zoom, zero, right], 1), torch.stack([zero, 1 / zoom, down], 1)], 1)
    grid = F.affine_grid(rows, list(images.shape), align_corners=False)
    return F.grid_sample(images - 1, grid, align_corners=False) + 1


class UnetPretraining(Pretraining):
    """Train the UNet of a latent diffusion model (Rombach et al. 2022, eq. 3) whose other networks are ready.

    Posteriors and text embeddings are computed once a sample and kept in memory: made for small data sets without
    augmentation.

    Args:
        vae: folder written by `VaePretraining`.
        clip: folder written by `ClipPretraining`; its text tower becomes the text encoder.
        unet: folder of a UNet of the same architecture to go on from; None starts from random weights.
        timestep_exponent: timesteps are ``T u^exponent`` with uniform u; below 1 favours noisy ones, which decide the
            layout.
    """

    alphas_cumprod: Tensor

    def __init__(
        self, *, vae: str, clip: str, unet: str | None = None, timestep_exponent: float = 1.0, **training: Any
    ) -> None:
        super().__init__(**training)
        self.timestep_exponent = timestep_exponent
        self.model = StableDiffusion(
            tokenizer=CLIPTokenizer.from_pretrained(clip),
            text_encoder=CLIPTextModel.from_pretrained(clip),
            vae=AutoencoderKL.from_pretrained(vae),
            unet=tiny_unet() if unet is None else UNet2DConditionModel.from_pretrained(unet),
            scheduler_config=SCHEDULER,
            name_or_path="tiny",
            dtype=torch.float32,
        )
        self.model.unet.requires_grad_(True).train()
        self.register_buffer("alphas_cumprod", alphas_cumprod_from_config(SCHEDULER), persistent=False)
        self.posteriors: dict[str, Tensor] = {}
        self.texts: dict[str, Tensor] = {}

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        """Mean loss of a batch."""
        loss = (batch["weight"] * self.losses(batch)).mean()
        self.log("train/loss", loss, batch_size=len(batch["keys"]))
        return loss

    def validation_step(self, batch: dict[str, Any], batch_index: int) -> None:
        """Mean loss over held-out samples."""
        held_out = batch["weight"] > 0
        self.log("val/loss", self.losses(batch)[held_out].mean(), prog_bar=True, batch_size=int(held_out.sum()))

    def losses(self, batch: dict[str, Any]) -> Tensor:
        """Squared error of the predicted velocity per sample, float32 [B], at a random timestep."""
        randomness = SampleRandomness(batch["seed"], self.device)
        mean, std = self.posterior(batch["keys"], batch["pixel_values"]).unbind(dim=1)
        latents = mean + std * randomness.normal(mean.shape[1:])
        timesteps = randomness.integer(len(self.alphas_cumprod), self.timestep_exponent)
        noise = randomness.normal(mean.shape[1:])
        alpha_cumprod = self.alphas_cumprod[timesteps]
        x_t = add_noise(latents, noise, alpha_cumprod)
        output = self.model.denoise(x_t, timesteps, self.text(batch["captions"])).float()
        return squared_error(output, training_target(latents, noise, alpha_cumprod, self.model.prediction_type))

    @torch.no_grad()
    def posterior(self, keys: Sequence[str], pixel_values: Tensor) -> Tensor:
        """Mean and standard deviation of the latents, [B, 2, C, h, w]; pixels are only looked at for new keys."""
        new = [index for index, key in enumerate(keys) if key not in self.posteriors]
        if new:
            with torch.autocast(self.device.type, enabled=False):
                found = self.model.vae.encode(pixel_values[new]).latent_dist
            self.posteriors.update(zip([keys[i] for i in new], torch.stack([found.mean, found.std], 1), strict=True))
        return torch.stack([self.posteriors[key] for key in keys])

    def text(self, captions: Sequence[str]) -> Condition:
        """Text embeddings [B, L, D]; each caption is encoded once."""
        new = sorted(set(captions) - self.texts.keys())
        if new:
            self.texts.update(zip(new, self.model.encode_text(new).text, strict=True))
        return Condition(torch.stack([self.texts[caption] for caption in captions]))

    def save(self, folder: Path) -> None:
        """Write the whole pipeline as a diffusers folder."""
        save_pipeline(self.model, folder)
