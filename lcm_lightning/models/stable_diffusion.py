"""Load a Stable Diffusion pipeline as one module."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from lcm_lightning.diffusion.schedule import PredictionType, unsupported_schedule
from lcm_lightning.errors import UserError, first_line
from lcm_lightning.models.architectures import build_sd15


class StableDiffusion(nn.Module):
    """The networks of a `StableDiffusionPipeline`, frozen, with the three maps training needs.

    Every map runs outside autocast in `dtype`, the type the frozen weights are stored in, so that no weight is cast
    on each pass.
    """

    def __init__(
        self,
        *,
        tokenizer: CLIPTokenizer,
        text_encoder: CLIPTextModel,
        vae: AutoencoderKL,
        unet: UNet2DConditionModel,
        scheduler_config: Mapping[str, Any],
        name_or_path: str,
        dtype: torch.dtype,
        preview_vae: AutoencoderTiny | None = None,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.text_encoder = text_encoder
        self.vae = vae
        self.preview_vae = preview_vae
        self.unet = unet
        self.scheduler_config = dict(scheduler_config)
        self.name_or_path = name_or_path
        self.dtype = dtype
        self.requires_grad_(False).eval()

    @property
    def prediction_type(self) -> PredictionType:
        """What the UNet predicts."""
        return self.scheduler_config.get("prediction_type", "epsilon")

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent along one side."""
        return 2 ** (len(self.vae.config.block_out_channels) - 1)

    @property
    def default_resolution(self) -> int:
        """Side in pixels of the images the UNet was trained on."""
        return self.unet.config.sample_size * self.vae_scale_factor

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return self.unet.conv_in.weight.device

    def check_resolution(self, resolution: int) -> None:
        """Raise a `UserError` unless images of `resolution` px pass through VAE and UNet without remainder."""
        multiple = self.vae_scale_factor * 2 ** (len(self.unet.config.block_out_channels) - 1)
        if resolution <= 0 or resolution % multiple:
            nearest = max(multiple, round(resolution / multiple) * multiple)
            raise UserError(
                f"data.resolution={resolution}: expected a positive multiple of {multiple} (the VAE divides by "
                f"{self.vae_scale_factor}, the UNet by {multiple // self.vae_scale_factor}); try {nearest}"
            )

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> Tensor:
        """Text embeddings [B, L, D] in `dtype`; captions longer than the tokenizer's limit are cut."""
        tokens = self.tokenizer(
            list(captions),
            padding="max_length",
            max_length=self.tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        with self._no_autocast():
            return self.text_encoder(tokens.input_ids.to(self.device, non_blocking=True))[0]

    def denoise(self, x_t: Tensor, timesteps: Tensor, text_embeddings: Tensor) -> Tensor:
        """The UNet's output, shape of `x_t` [B, C, h, w], with whatever adapters are active.

        `timesteps` int64 [B] or scalar, `text_embeddings` [B, L, D]. Runs under the caller's autocast and gradients.
        """
        return self.unet(
            x_t.to(self.dtype),
            timesteps,
            encoder_hidden_states=text_embeddings.to(self.dtype),
            return_dict=False,
        )[0]

    @torch.no_grad()
    def encode_images(self, pixel_values: Tensor, noise: Tensor) -> Tensor:
        """Scaled latents [B, C, h, w], float32: a draw from the VAE's posterior with the given standard `noise`.

        `pixel_values` [B, 3, H, W] in [-1, 1]. ``z = (mean + std noise) s`` with ``s`` the VAE's scaling factor
        (Rombach et al. 2022, appendix G).
        """
        with self._no_autocast():
            posterior = self.vae.encode(pixel_values.to(self.dtype)).latent_dist
        latents = posterior.mean.float() + posterior.std.float() * noise
        return (latents - self._shift) * self.vae.config.scaling_factor

    @torch.no_grad()
    def decode_latents(self, latents: Tensor, *, preview: bool = False) -> Tensor:
        """Images [B, 3, H, W] in [0, 1], float32, of scaled `latents`.

        A `preview` is decoded by the `preview_vae` if there is one. A distilled autoencoder (`AutoencoderTiny`,
        of TAESD) takes scaled latents as they are and loses fine detail.
        """
        vae = self.preview_vae if preview and self.preview_vae is not None else self.vae
        shift = self._shift if vae is self.vae else 0.0
        latents = latents.float() / vae.config.scaling_factor + shift
        with self._no_autocast():
            images = vae.decode(latents.to(self.dtype)).sample
        return (images.float() / 2 + 0.5).clamp(0, 1)

    @property
    def _shift(self) -> float:
        return self.vae.config.get("shift_factor") or 0.0

    def _no_autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, enabled=False)

    def latent_shape(self, resolution: int) -> tuple[int, int, int]:
        """(C, h, w) of the latents of a square image of `resolution` px."""
        side = resolution // self.vae_scale_factor
        return (self.unet.config.in_channels, side, side)


def load_stable_diffusion(
    path: str,
    *,
    dtype: torch.dtype = torch.float32,
    unet_init: Literal["pretrained", "random"] = "pretrained",
    revision: str | None = None,
    channels_last: bool = False,
    gradient_checkpointing: bool = False,
    compile: bool = False,
    preview_vae: str | None = None,
) -> StableDiffusion:
    """Read a `StableDiffusionPipeline` from a local diffusers folder or the Hugging Face hub.

    Args:
        path: folder with `model_index.json`, or a hub id such as `stable-diffusion-v1-5/stable-diffusion-v1-5`.
        dtype: storage and compute type of the frozen weights.
        unet_init: "random" reads nothing and builds SD v1-5's exact architecture with random weights.
        revision: branch, tag or commit on the hub.
        channels_last: keep convolution weights in NHWC, what tensor cores read.
        gradient_checkpointing: recompute the UNet's activations in the backward pass, for less memory.
        compile: let torch.compile fuse the UNet. One graph for each use (teacher, target, student) and batch size, made
            on first use: minutes at the size of Stable Diffusion, which only long runs win back.
        preview_vae: folder or hub id of an `AutoencoderTiny` for the same latents, such as `madebyollin/taesd`, to
            decode previews with.

    Raises:
        UserError: nothing is found there, it is no Stable Diffusion v1/v2 pipeline, or its schedule cannot be trained.
    """
    if unet_init == "random":
        model = build_sd15(dtype)
    elif unet_init == "pretrained":
        model = _read_pipeline(path, dtype, revision)
    else:
        raise UserError(f"model.unet_init={unet_init}: expected pretrained or random")
    wrapped = StableDiffusion(**model, dtype=dtype, preview_vae=_read_preview_vae(preview_vae, dtype))
    if reason := unsupported_schedule(wrapped.scheduler_config):
        raise UserError(f"model.path={path}: {reason}; give a pipeline whose scheduler config is one of those")
    if channels_last:
        wrapped.unet.to(memory_format=torch.channels_last)
        wrapped.vae.to(memory_format=torch.channels_last)
    if gradient_checkpointing:
        wrapped.unet.enable_gradient_checkpointing()
    if compile:
        wrapped.unet.compile(dynamic=False)
    return wrapped


def _read_preview_vae(path: str | None, dtype: torch.dtype) -> AutoencoderTiny | None:
    if path is None:
        return None
    try:
        return AutoencoderTiny.from_pretrained(path, use_safetensors=True).to(dtype)
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.preview_vae={path}: cannot be loaded ({first_line(error)}); give a folder or hub id of diffusers' "
            "AutoencoderTiny such as madebyollin/taesd, or null"
        ) from error


def _read_pipeline(path: str, dtype: torch.dtype, revision: str | None) -> dict[str, Any]:
    folder = Path(path).expanduser()
    if folder.is_dir():
        _check_pipeline_class(folder, path)
    elif path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise UserError(
            f"model.path={path}: no such folder; give a diffusers pipeline folder (with model_index.json) or a hub id "
            "such as stable-diffusion-v1-5/stable-diffusion-v1-5"
        )
    try:
        pipeline = StableDiffusionPipeline.from_pretrained(
            folder if folder.is_dir() else path,
            revision=revision,
            dtype=dtype,
            use_safetensors=True,
            safety_checker=None,
            requires_safety_checker=False,
            feature_extractor=None,
        )
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.path={path}: cannot be loaded ({first_line(error)}). Without network, give a local copy: "
            "on a machine that has it run `hf download stable-diffusion-v1-5/stable-diffusion-v1-5 --local-dir sd15 "
            "--exclude '*.ckpt' '*.bin'`, copy the folder and set model.path=/path/to/sd15. Gated or private "
            "repositories need `hf auth login`"
        ) from error
    return {
        "tokenizer": pipeline.tokenizer,
        "text_encoder": pipeline.text_encoder,
        "vae": pipeline.vae,
        "unet": pipeline.unet,
        "scheduler_config": pipeline.scheduler.config,
        "name_or_path": path,
    }


def _check_pipeline_class(folder: Path, path: str) -> None:
    index = folder / "model_index.json"
    if not index.is_file():
        raise UserError(f"model.path={path}: holds no model_index.json; give a diffusers pipeline folder")
    name = json.loads(index.read_text()).get("_class_name")
    if name != "StableDiffusionPipeline":
        raise UserError(
            f"model.path={path}: is a {name}; only StableDiffusionPipeline (v1 and v2 architectures) is supported"
        )
