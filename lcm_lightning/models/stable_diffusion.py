"""Load a pipeline of Stable Diffusion or SDXL as one module."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lcm_lightning.diffusion.consistency import guidance_embedding
from lcm_lightning.diffusion.schedule import PredictionType, unsupported_schedule
from lcm_lightning.errors import UserError, first_line, short
from lcm_lightning.hub import hub_answers
from lcm_lightning.models.architectures import build_sd15, build_sdxl
from lcm_lightning.models.captions import padded_ids, split_captions, tell_of_cut
from lcm_lightning.models.checkpointing import checkpointed
from lcm_lightning.models.condition import Condition
from lcm_lightning.models.deferred import Deferred, deferred_encoders, deferred_random_encoders
from lcm_lightning.models.latent_diffusion import GUIDANCE_SCALE, LatentDiffusionModel
from lcm_lightning.models.other_vae import check_vae, open_vae
from lcm_lightning.models.pipeline_files import (
    SAMPLE_SIZE,
    TIME_IDS,
    XL_PIPELINE,
    XL_SAMPLE_SIZE,
    NetworkFiles,
    locate_pipeline,
    model_path,
    open_folder,
)
from lcm_lightning.models.single_file import open_single_file

log = logging.getLogger(__name__)

XL_HALF_VAE = "madebyollin/sdxl-vae-fp16-fix"  # SDXL's VAE, made to compute in float16


class StableDiffusion(LatentDiffusionModel):
    """The networks of a `StableDiffusionPipeline`, frozen, with the maps training needs.

    Every map runs outside autocast in `dtype`, the type the frozen weights are stored in, so that no weight is cast
    on each pass. VAE and text encoder may be `Deferred`: a training on cached latents needs neither until it draws.

    Attributes:
        text_encoder, vae: None before `load_encoders` where they are deferred.
        vae_dtype: what the VAE is stored and computes in, of most models `dtype`.
        files: where the networks were read from, by their names; None for networks that come from no file.
        known_texts: conditions of single captions for which the text encoder need not run.
        prompt_chunks: chunks of the text encoder's length that are read of each caption, one embedding after the other.
        cut_captions: captions encoded so far that have more.
    """

    pipeline: ClassVar[str] = "StableDiffusionPipeline"  # of diffusers, and that of a full LCM
    lcm_pipeline: ClassVar[str] = "LatentConsistencyModelPipeline"
    usual_sample_size: ClassVar[int] = SAMPLE_SIZE
    empty_is_zero: bool = False  # whether the condition of an empty caption is zeros

    text_encoder: CLIPTextModel
    vae: AutoencoderKL

    def __init__(
        self,
        *,
        tokenizer: CLIPTokenizer,
        text_encoder: CLIPTextModel | Deferred,
        vae: AutoencoderKL | Deferred,
        unet: UNet2DConditionModel,
        scheduler_config: Mapping[str, Any],
        name_or_path: str,
        dtype: torch.dtype,
        vae_dtype: torch.dtype | None = None,
        files: Mapping[str, NetworkFiles] | None = None,
        preview_vae: AutoencoderTiny | None = None,
        prompt_chunks: int = 1,
    ) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.prompt_chunks = prompt_chunks
        self.cut_captions = 0
        self.preview_vae = preview_vae
        self.vae_config = vae.config
        self.deferred: dict[str, Deferred] = {}
        self.memory_format: torch.memory_format | None = None
        self._hold(text_encoder=text_encoder, vae=vae)
        self.unet = unet
        self.files = files
        self.known_texts: dict[str, Condition] = {}
        self.scheduler_config = dict(scheduler_config)
        self.name_or_path = name_or_path
        self.dtype = dtype
        self.vae_dtype = vae_dtype or dtype
        self.requires_grad_(False).eval()

    def _hold(self, **encoders: nn.Module | Deferred) -> None:
        for name, network in encoders.items():
            if isinstance(network, Deferred):
                self.deferred[name] = network
                self.register_module(name, None)
            else:
                self.add_module(name, network)

    @property
    def text_encoders(self) -> dict[str, nn.Module]:
        """By name, as a pipeline calls them; None where they are deferred."""
        return {"text_encoder": self.text_encoder}

    @property
    def tokenizers(self) -> dict[str, CLIPTokenizer]:
        """By name, as a pipeline calls them."""
        return {"tokenizer": self.tokenizer}

    def pipeline_parts(self) -> dict[str, Any]:
        """What diffusers' `pipeline` is made of, but for the scheduler."""
        networks = {"vae": self.vae, "unet": self.unet, **self.text_encoders, **self.tokenizers}
        return {**networks, "safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}

    def load_encoders(self, *names: str) -> None:
        """See `LatentDiffusionModel`; all of them, or those of "vae", "text_encoder" that are named."""
        for name in [name for name in self.deferred if name in names or not names]:
            # In Lightning's validation the weights would otherwise be inference tensors, and the random numbers of a
            # training must not depend on when this happens.
            with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
                network = self.deferred[name].read()
            if self.memory_format is not None:
                network.to(memory_format=self.memory_format)
            del self.deferred[name]
            self.add_module(name, network.requires_grad_(False).eval().to(self.device))

    def set_memory_format(self, memory_format: torch.memory_format) -> None:
        """Lay out the weights of the convolutions in `memory_format`."""
        self.memory_format = memory_format
        self.to(memory_format=memory_format)

    @property
    def vae_scale_factor(self) -> int:
        """Pixels per latent along one side."""
        return 2 ** (len(self.vae_config.block_out_channels) - 1)

    @property
    def default_resolution(self) -> int:
        """See `LatentDiffusionModel`."""
        size = self.unet.config.sample_size
        side = self.usual_sample_size if size is None else size if isinstance(size, int) else min(size)
        return side * self.vae_scale_factor

    @property
    def resolution_multiple(self) -> int:
        """See `LatentDiffusionModel`; VAE and UNet halve the sides at each of their levels but one."""
        return self.vae_scale_factor * 2 ** (len(self.unet.config.block_out_channels) - 1)

    def check_resolution(self, resolution: int, key: str = "data.resolution") -> None:
        """Raise a `UserError` that names `key` unless images of `resolution` px pass VAE and UNet without remainder."""
        multiple = self.resolution_multiple
        if resolution <= 0 or resolution % multiple:
            nearest = max(multiple, round(resolution / multiple) * multiple)
            raise UserError(
                f"{key}={resolution}: expected a positive multiple of {multiple} (the VAE divides by "
                f"{self.vae_scale_factor}, the UNet by {multiple // self.vae_scale_factor}); try {nearest}"
            )

    @torch.no_grad()
    def encode_text(self, captions: Sequence[str]) -> Condition:
        """See `LatentDiffusionModel`; captions of more than `prompt_chunks` are cut at the end of a word."""
        if self.known_texts.keys() >= set(captions):
            return Condition.cat([self.known_texts[caption] for caption in captions]).to(self.device, self.dtype)
        self.load_encoders(*self.text_encoders)
        with self._no_autocast():
            return self._embed(list(captions))

    def _embed(self, captions: list[str]) -> Condition:
        return Condition(self._joined(self.text_encoder(self._tokens(captions)["tokenizer"])[0]))

    def _tokens(self, captions: list[str]) -> dict[str, Tensor]:
        """Ids [B * prompt_chunks, L] by the tokenizer's name."""
        split = {name: split_captions(tokenizer, captions) for name, tokenizer in self.tokenizers.items()}
        cut: dict[int, str] = {
            row: name
            for name, chunks in split.items()
            for row, of_caption in enumerate(chunks)
            if len(of_caption) > self.prompt_chunks
        }
        self.cut_captions += len(cut)
        for row, name in sorted(cut.items())[:1]:
            tell_of_cut(self.tokenizers[name], captions[row], split[name][row], self.prompt_chunks)
        return {
            name: padded_ids(tokenizer, split[name], self.prompt_chunks).to(self.device, non_blocking=True)
            for name, tokenizer in self.tokenizers.items()
        }

    def _joined(self, states: Tensor) -> Tensor:
        """Embeddings [B, prompt_chunks L, D] of captions, of those of their chunks [B * prompt_chunks, L, D]."""
        return states.reshape(-1, self.prompt_chunks * states.shape[1], states.shape[2])

    def denoise(self, x_t: Tensor, timesteps: Tensor, condition: Condition) -> Tensor:
        """See `LatentDiffusionModel`."""
        guidance = None
        if self.guidance_dimension and condition.guidance_scale is not None:
            guidance = guidance_embedding(condition.guidance_scale, self.guidance_dimension).to(self.dtype)
        return self.unet(
            x_t.to(self.dtype),
            timesteps,
            encoder_hidden_states=condition.text.to(self.dtype),
            timestep_cond=guidance,
            added_cond_kwargs=self._added_conditions(x_t, condition),
            return_dict=False,
        )[0]

    def _added_conditions(self, x_t: Tensor, condition: Condition) -> dict[str, Tensor] | None:
        """What the UNet is told beside timestep, caption and guidance, as diffusers names it."""
        return None

    @torch.no_grad()
    def posterior(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """See `LatentDiffusionModel`."""
        self.load_encoders("vae")
        with self._no_autocast():
            posterior = self.vae.encode(pixel_values.to(self.vae_dtype)).latent_dist
        return posterior.mean.float(), posterior.std.float()

    def sample_posterior(self, mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
        """Scaled latents ``z = (mean + std noise) s``, ``s`` the VAE's scaling factor (Rombach et al. 2022, app. G)."""
        return (mean + std * noise - self._shift) * self.vae_config.scaling_factor

    @torch.no_grad()
    def decode_latents(self, latents: Tensor, *, preview: bool = False) -> Tensor:
        """See `LatentDiffusionModel`.

        A `preview` is decoded by the `preview_vae` if there is one. A distilled autoencoder (`AutoencoderTiny`,
        of TAESD) takes scaled latents as they are and loses fine detail.
        """
        small = self.preview_vae if preview else None
        if small is None:
            self.load_encoders("vae")
        vae = self.vae if small is None else small
        latents = latents.float() / vae.config.scaling_factor + (self._shift if small is None else 0.0)
        with self._no_autocast():
            images = vae.decode(latents.to(self.vae_dtype if small is None else self.dtype)).sample
        return (images.float() / 2 + 0.5).clamp(0, 1)

    @property
    def _shift(self) -> float:
        return self.vae_config.get("shift_factor") or 0.0

    def _no_autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, enabled=False)

    def latent_shape(self, height: int, width: int | None = None) -> tuple[int, int, int]:
        """See `LatentDiffusionModel`."""
        width = height if width is None else width
        return (self.unet.config.in_channels, height // self.vae_scale_factor, width // self.vae_scale_factor)


class StableDiffusionXL(StableDiffusion):
    """The networks of a `StableDiffusionXLPipeline` (Podell et al. 2023, arXiv 2307.01952); see `StableDiffusion`.

    Two text encoders read a caption. Their states before the last layer, side by side, are its embedding of tokens; the
    second's projected embedding of the end of its first chunk is the pooled one. The UNet is also told the sizes in
    `Condition.time_ids`; where a condition has none, they are those of a whole image as large as is drawn.

    Attributes:
        text_encoder_2: None before `load_encoders` where it is deferred.
        empty_is_zero: the conditions of an empty caption are zeros, as in guidance's unconditional branch of diffusers'
            pipeline, by `force_zeros_for_empty_prompt` in `model_index.json`.
    """

    pipeline = XL_PIPELINE
    lcm_pipeline = XL_PIPELINE
    usual_sample_size = XL_SAMPLE_SIZE

    text_encoder_2: CLIPTextModelWithProjection

    def __init__(
        self,
        *,
        tokenizer_2: CLIPTokenizer,
        text_encoder_2: CLIPTextModelWithProjection | Deferred,
        empty_is_zero: bool = True,
        **parts: Any,
    ) -> None:
        super().__init__(**parts)
        self.tokenizer_2 = tokenizer_2
        self.empty_is_zero = empty_is_zero
        self._hold(text_encoder_2=text_encoder_2)
        self.requires_grad_(False).eval()

    @property
    def text_encoders(self) -> dict[str, nn.Module]:
        """See `StableDiffusion`."""
        return {**super().text_encoders, "text_encoder_2": self.text_encoder_2}

    @property
    def tokenizers(self) -> dict[str, CLIPTokenizer]:
        """See `StableDiffusion`."""
        return {**super().tokenizers, "tokenizer_2": self.tokenizer_2}

    def pipeline_parts(self) -> dict[str, Any]:
        """See `StableDiffusion`."""
        networks = {"vae": self.vae, "unet": self.unet, **self.text_encoders, **self.tokenizers}
        return {**networks, "force_zeros_for_empty_prompt": self.empty_is_zero, "add_watermarker": False}

    def _embed(self, captions: list[str]) -> Condition:
        ids = self._tokens(captions)
        first = self.text_encoder(ids["tokenizer"], output_hidden_states=True)
        second = self.text_encoder_2(ids["tokenizer_2"], output_hidden_states=True)
        text = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        condition = Condition(self._joined(text), second.text_embeds[:: self.prompt_chunks])
        if not self.empty_is_zero:
            return condition
        empty = torch.tensor([not caption for caption in captions]).to(text.device, non_blocking=True)
        return condition.map(lambda tensor: tensor.masked_fill(empty.view(-1, *[1] * (tensor.dim() - 1)), 0))

    def _added_conditions(self, x_t: Tensor, condition: Condition) -> dict[str, Tensor]:
        if condition.pooled is None:
            raise ValueError("SDXL's UNet is told the pooled embedding of a caption, and this condition has none")
        time_ids = condition.time_ids
        if time_ids is None:
            time_ids = torch.zeros(len(x_t), TIME_IDS, device=x_t.device)
            time_ids[:, 0::4], time_ids[:, 1::4] = (side * self.vae_scale_factor for side in x_t.shape[2:])
        return {"text_embeds": condition.pooled.to(self.dtype), "time_ids": time_ids}


def load_stable_diffusion(
    path: str,
    *,
    dtype: torch.dtype = torch.float32,
    unet_init: Literal["pretrained", "random", "random_xl"] = "pretrained",
    revision: str | None = None,
    channels_last: bool = False,
    gradient_checkpointing: bool = False,
    defer_encoders: bool = False,
    compile: bool = False,
    fused: bool = True,
    vae: str | None = None,
    prediction_type: PredictionType | None = None,
    preview_vae: str | None = None,
    prompt_chunks: int = 1,
    guidance_scale: float = GUIDANCE_SCALE,
) -> StableDiffusion:
    """Read a `StableDiffusionPipeline` or `StableDiffusionXLPipeline` from a folder, a single file or the hub.

    Args:
        path: folder with `model_index.json`, a `.safetensors` checkpoint in the original layout, or a hub id such as
            `stable-diffusion-v1-5/stable-diffusion-v1-5`.
        dtype: storage and compute type of the frozen weights.
        unet_init: "random" and "random_xl" read nothing and build the exact architecture of SD v1-5, or SDXL, with
            random weights.
        revision: branch, tag or commit on the hub.
        channels_last: keep convolution weights in NHWC, what tensor cores read.
        gradient_checkpointing: recompute the UNet's activations in the backward pass, for less memory.
        defer_encoders: read VAE and text encoder on first use only.
        compile: let torch.compile fuse the UNet. One graph for each use (teacher, target, student) and batch size, made
            on first use: minutes at the size of Stable Diffusion, which only long runs win back.
        fused: train through layers of our own, faster and keeping less, where diffusers and peft are of versions these
            were made for; else through theirs.
        vae: folder, hub id or `.safetensors` file of an `AutoencoderKL` that takes the place of the model's own.
        prediction_type: what the UNet predicts, in place of what its files say, if they do.
        preview_vae: folder or hub id of an `AutoencoderTiny` for the same latents, such as `madebyollin/taesd`, to
            decode previews with.
        prompt_chunks: chunks of the text encoder's length (75 tokens between begin and end) that are read of each
            caption, whose embeddings follow each other, as in A1111.
        guidance_scale: see `LatentDiffusionModel`.

    Raises:
        UserError: nothing is found there, it is no pipeline of Stable Diffusion v1, v2 or XL, or one that cannot be
            trained.
    """
    if unet_init == "random":
        model = build_sd15(dtype, deferred_random_encoders(dtype) if defer_encoders else {})
    elif unet_init == "random_xl":
        model = build_sdxl(dtype, deferred_random_encoders(dtype, xl=True) if defer_encoders else {})
    elif unet_init == "pretrained":
        model = _read_pipeline(path, dtype, revision, defer_encoders, vae, prediction_type)
    else:
        raise UserError(f"model.unet_init={unet_init}: expected pretrained, random or random_xl")
    kind = StableDiffusionXL if "text_encoder_2" in model else StableDiffusion
    preview = _read_preview_vae(preview_vae, dtype)
    wrapped = kind(**model, dtype=dtype, preview_vae=preview, prompt_chunks=prompt_chunks)
    wrapped.fused, wrapped.guidance_scale = fused, guidance_scale
    if reason := unsupported_schedule(wrapped.scheduler_config):
        raise UserError(
            f"{model_path(path)}: scheduler_config.json: {reason}; give a model of Stable Diffusion v1, v2 or XL"
        )
    if channels_last:
        wrapped.set_memory_format(torch.channels_last)
    if gradient_checkpointing:
        wrapped.unet.enable_gradient_checkpointing(checkpointed)
    if compile:
        wrapped.unet.compile(dynamic=False)
    return wrapped


def _read_preview_vae(path: str | None, dtype: torch.dtype) -> AutoencoderTiny | None:
    if path is None:
        return None
    try:
        cached = Path(path).is_dir() or not hub_answers()
        return AutoencoderTiny.from_pretrained(path, use_safetensors=True, local_files_only=cached).to(dtype)
    except (OSError, ValueError) as error:
        raise UserError(
            f"model.preview_vae={short(path, 80)}: cannot be loaded ({first_line(error)[:80]}); give a folder or hub "
            "id of diffusers' AutoencoderTiny such as madebyollin/taesd, or null"
        ) from error


def _read_pipeline(
    path: str,
    dtype: torch.dtype,
    revision: str | None,
    defer_encoders: bool,
    vae: str | None,
    prediction_type: PredictionType | None,
) -> dict[str, Any]:
    place = locate_pipeline(path, revision)
    if place.is_file():
        pipeline = open_single_file(place, prediction_type, other_vae=vae is not None)
    else:
        pipeline = open_folder(place)
    files = dict(pipeline.networks)
    if vae is not None:
        own = files["vae"].config()
        files["vae"] = open_vae(vae, own)
        check_vae(vae, files["vae"].config(), own, files["unet"].config())
    more: dict[str, Any] = {}
    if pipeline.is_xl:
        more = {"empty_is_zero": pipeline.empty_is_zero, "vae_dtype": _xl_vae_dtype(files["vae"], dtype, path, vae)}
    predicts = {} if prediction_type is None else {"prediction_type": prediction_type}
    encoders = deferred_encoders(files, dtype, more.get("vae_dtype"))
    return {
        **pipeline.tokenizers,
        "scheduler_config": {**pipeline.scheduler_config, **predicts},
        **more,
        **(encoders if defer_encoders else {name: encoder.read() for name, encoder in encoders.items()}),
        "unet": files["unet"].read(dtype),
        "name_or_path": path,
        "files": files,
    }


def _xl_vae_dtype(files: NetworkFiles, dtype: torch.dtype, path: str, vae: str | None) -> torch.dtype:
    """`vae_dtype` of SDXL's; says where it is another."""
    found = vae_dtype(files.config(), dtype, xl=True)
    if found != dtype:
        log.warning(
            "%s: its VAE overflows in float16 and computes in float32, slower; model.vae=%s does not",
            model_path(path) if vae is None else f"model.vae={short(vae, 80)}",
            XL_HALF_VAE,
        )
    return found


def vae_dtype(config: Mapping[str, Any], dtype: torch.dtype, *, xl: bool) -> torch.dtype:
    """The type that a VAE is to compute in beside networks in `dtype`: float32 where it would overflow.

    SDXL's does in float16, as `force_upcast` in its config says. diffusers writes that into the configs of all VAEs,
    and its pipelines of Stable Diffusion 1 and 2 do not ask.
    """
    return torch.float32 if xl and dtype == torch.float16 and config.get("force_upcast", True) else dtype
