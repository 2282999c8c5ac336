"""Checkpoints in one `.safetensors` file, in the layout of Stable Diffusion's own code, as people share them."""

from __future__ import annotations

import json
import re
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.loaders.single_file_utils import create_diffusers_clip_model_from_ldm, infer_diffusers_model_type
from safetensors import safe_open
from torch import Tensor, nn
from transformers import CLIPTextConfig

from lcm_lightning.errors import UserError, short
from lcm_lightning.models.architectures import SD1, SD2, SDXL, Architecture
from lcm_lightning.models.pipeline_files import (
    NETWORKS,
    NetworkFiles,
    PipelineFiles,
    check_weights,
    model_path,
    reading_of,
    refuse_quantised,
    saved_name,
)

# Those that are read, by diffusers' names for them. Others of diffusers' names that people are likely to try follow.
ARCHITECTURES: dict[str, Architecture] = {"v1": SD1, "v2": SD2, "xl_base": SDXL}
TITLES = {
    "xl_refiner": "the refiner of Stable Diffusion XL",
    "xl_inpaint": "Stable Diffusion XL for inpainting",
    "inpainting": "Stable Diffusion 1 for inpainting",
    "inpainting_v2": "Stable Diffusion 2 for inpainting",
    "instruct-pix2pix": "InstructPix2Pix, which edits images",
    "upscale": "an upscaler",
    "sd3": "Stable Diffusion 3",
    "sd35_medium": "Stable Diffusion 3.5",
    "sd35_large": "Stable Diffusion 3.5",
    "playground-v2-5": "Playground 2.5",
}
# What diffusers calls all that it knows no better.
UNKNOWN_KIND = "v1"
# Width of the cross-attention that tells SDXL and its refiner where the text encoders are not in the file.
XL_WIDTHS = {2048: "xl_base", 1280: "xl_refiner"}
UNET, EMA = "model.diffusion_model.", "model_ema.diffusion_model"
PREFIXES = {
    "unet": (UNET,),
    "vae": ("first_stage_model.",),
    "text_encoder": (
        "cond_stage_model.transformer.text_model.",
        "cond_stage_model.model.",
        "conditioner.embedders.0.transformer.text_model.",
    ),
    "text_encoder_2": ("conditioner.embedders.1.model.",),
}
VAE_PARTS = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
# Latents along one side of Stable Diffusion 2's models that predict velocity: 768 px.
VELOCITY_SAMPLE_SIZE = 96
AGAIN = "download it again"
COMPLETE = "give a complete checkpoint of Stable Diffusion 1, 2 or XL, or a diffusers folder"


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of its tensors, by the names that diffusers' conversions know them by.

    Attributes:
        said: the setting that gave the file and its path, which messages begin with.
        keys: the name in the file of each tensor.
        shapes, types: of each; types as safetensors calls them, such as "F16".
        metadata: what the file says beside its tensors.
    """

    path: Path
    said: str
    keys: Mapping[str, str]
    shapes: Mapping[str, tuple[int, ...]]
    types: Mapping[str, str]
    metadata: Mapping[str, str]

    def of(self, *prefixes: str) -> list[str]:
        """The sorted names that begin with one of `prefixes`."""
        return sorted(name for name in self.keys if name.startswith(prefixes))

    def read(self, names: list[str]) -> dict[str, Tensor]:
        """The tensors of these names."""
        with safe_open(self.path, framework="pt") as opened:
            return {name: opened.get_tensor(self.keys[name]) for name in names}

    @property
    def cross_attention_dim(self) -> int | None:
        """Width of the text embeddings that the UNet expects; None where no layer tells."""
        return next((self.shapes[name][-1] for name in self.of(UNET) if name.endswith("attn2.to_k.weight")), None)


def read_header(path: Path, said: str) -> Header:
    """What the file at `path` holds; no tensor is read.

    Raises:
        UserError: it is of a format that can run code, or damaged.
    """
    if path.suffix != ".safetensors":
        raise UserError(
            f"{said}: a {path.suffix or 'file without suffix'} can run code when it is read, so that only .safetensors "
            "is; get it as that, or if you trust it make a folder of it with diffusers: "
            "StableDiffusionPipeline.from_single_file(FILE).save_pretrained(FOLDER)"
        )
    with reading_of(said, path.name, AGAIN), safe_open(path, framework="pt") as opened:
        slices = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118  # no mapping
        keys = {_converted_name(key, f"{UNET}input_blocks.0.0.weight" in slices): key for key in slices}
        shapes = {name: tuple(slices[key].get_shape()) for name, key in keys.items()}
        types = {name: slices[key].get_dtype() for name, key in keys.items()}
        return Header(path, said, keys, shapes, types, opened.metadata() or {})


def _converted_name(key: str, has_unet: bool) -> str:
    """The name of a tensor as diffusers' conversions expect it.

    Averaged weights (EMA) are only taken where there are no others, as by diffusers, A1111 and ComfyUI. Some tools
    leave out ``text_model``.
    """
    if key.startswith(EMA) and not has_unet:
        return UNET + ema_layer(key.removeprefix(EMA))
    return re.sub(
        r"^(cond_stage_model|conditioner\.embedders\.0)\.transformer\.(embeddings|encoder|final_layer_norm)\.",
        r"\1.transformer.text_model.\2.",
        key,
    )


def ema_layer(flat: str) -> str:
    """The name of a UNet's weight from that of its moving average, which latent diffusion's code writes without dots.

    Blocks are numbered by one or two digits, and the modules in them, and all else, by one.
    """
    words = re.findall(
        r"(?:in|out)put_blocks|middle_block|transformer_blocks|time_embed|label_emb|(?:in|out|emb)_layers|"
        r"skip_connection|proj_(?:in|out)|to_(?:q|k|v|out)|attn[12]|norm[123]|norm|ff|net|proj|op|conv|cond_proj|out|"
        r"weight|bias|\d+(?=\d)|\d",
        flat,
    )
    return ".".join(words)


def is_checkpoint(path: Path) -> bool:
    """Whether a safetensors file holds networks of a checkpoint, rather than a LoRA. Raises `UserError`: damaged."""
    header = read_header(path, short(path, 80))
    of_networks = [prefix for prefixes in PREFIXES.values() for prefix in prefixes]
    return not _is_lora(header) and bool(header.of(*of_networks, "conditioner."))


def _is_lora(header: Header) -> bool:
    return any(re.search(r"lora_|\.lora\.", name) for name in header.keys)


def open_single_file(path: Path, prediction_type: str | None, *, other_vae: bool) -> PipelineFiles:
    """The pipeline in a checkpoint.

    Args:
        prediction_type: what its UNet predicts, where the file does not say it.
        other_vae: whether a VAE from elsewhere takes the place of the file's own, which may be missing then.

    Raises:
        UserError: it is no complete checkpoint of Stable Diffusion 1, 2 or XL, or what it predicts is not known.
    """
    header = read_header(path, model_path(path))
    architecture = architecture_of(header)
    if not other_vae and not header.of(*PREFIXES["vae"]):
        raise UserError(
            f"{header.said}: has no VAE (first_stage_model.); give the one it was made for as model.vae, such as "
            "stabilityai/sd-vae-ft-mse or a .safetensors file"
        )
    for name in architecture.text_encoders:
        if not header.of(*PREFIXES[name]):
            expected = "cond_stage_model." if len(architecture.text_encoders) == 1 else PREFIXES[name][-1]
            raise UserError(f"{header.said}: has no {name.replace('_', ' ')} ({expected}); {COMPLETE}")
    predicts = prediction_type or predicted(header) or architecture.prediction_type
    if predicts is None:
        raise UserError(
            f"{header.said}: Stable Diffusion 2 does not say in its weights what it predicts; give "
            "model.prediction_type=v_prediction (made for 768 px) or epsilon (a base model, 512 px)"
        )
    if architecture.prediction_type is None and predicts == "v_prediction":
        architecture = replace(architecture, unet={**architecture.unet, "sample_size": VELOCITY_SAMPLE_SIZE})
    zero_snr = {"rescale_betas_zero_snr": True} if "ztsnr" in header.keys else {}
    return PipelineFiles(
        {name: ConvertedNetwork(header, name, config) for name, config in _configs(architecture).items()},
        architecture.make_tokenizers(),
        {**architecture.scheduler, "prediction_type": predicts, **zero_snr},
        empty_is_zero=architecture.text_encoder_2 is not None,
    )


def architecture_of(header: Header) -> Architecture:
    """What a checkpoint is of, by the names and shapes of its tensors. Raises `UserError`: nothing that is read."""
    if _is_lora(header):
        raise UserError(f"{header.said}: is a LoRA; give it as lora=... or method.teacher_lora=..., its model here")
    kind = _kind(header)
    if kind not in ARCHITECTURES:
        raise UserError(
            f"{header.said}: is {TITLES.get(kind, f'a model of the kind {kind}')}, which is not supported; give a "
            "text-to-image checkpoint of Stable Diffusion 1, 2 or XL"
        )
    if (first := header.shapes.get(f"{UNET}input_blocks.0.0.weight")) is None:
        alone = any(name.startswith(("down_blocks.", "conv_in.", "text_model.")) for name in header.keys)
        remedy = "give the diffusers folder that it is a part of" if alone else COMPLETE
        raise UserError(f"{header.said}: has no UNet ({UNET}), its first key is {_first(header)}; {remedy}")
    architecture = ARCHITECTURES[kind]
    channels, expected = first[1], architecture.unet["in_channels"]
    if channels != expected:
        raise UserError(
            f"{header.said}: its UNet has {channels} channels in, expected {expected}: it is told an image beside the "
            "caption, which is not supported; give a text-to-image checkpoint"
        )
    sizes = () if architecture.unet.get("addition_embed_type") else (f"{UNET}label_emb.",)  # that SDXL is told
    if told := header.of(*sizes, f"{UNET}time_embed.cond_proj."):
        raise UserError(
            f"{header.said}: its UNet is told more than timestep and caption ({short(told[0])}), as a full LCM's or "
            "unCLIP's, which is not supported; give the checkpoint it was made from"
        )
    if (width := header.cross_attention_dim) != architecture.unet["cross_attention_dim"]:
        raise UserError(
            f"{header.said}: its cross-attention is {width} wide, expected {architecture.unet['cross_attention_dim']} "
            f"of {architecture.title}; {COMPLETE}"
        )
    return architecture


def _kind(header: Header) -> str:
    """What diffusers would call a checkpoint, which knows SDXL by its text encoders alone."""
    with reading_of(header.said, "its tensors", COMPLETE):
        tensors = {name: torch.empty(shape, device="meta") for name, shape in header.shapes.items()}
        kind: str = infer_diffusers_model_type(tensors)
    if kind != UNKNOWN_KIND:
        return kind
    return "xl_base" if header.of(*PREFIXES["text_encoder_2"]) else XL_WIDTHS.get(header.cross_attention_dim or 0, kind)


def _first(header: Header) -> str:
    return short(min(header.keys, default="none"))


def predicted(header: Header) -> str | None:
    """What a checkpoint says that its UNet predicts: in its header, by an empty tensor, or in a `.yaml` of its name.

    The first is the Stability AI Model Metadata Standard's, the second ComfyUI's way, the third that of Stable
    Diffusion 2's authors and of A1111.
    """
    named = {"epsilon": "epsilon", "v": "v_prediction"}.get(header.metadata.get("modelspec.prediction_type", ""))
    if named is not None or "v_pred" in header.keys:
        return named or "v_prediction"
    beside = header.path.with_suffix(".yaml")
    if not beside.is_file():
        return None
    with reading_of(header.said, beside.name, "remove it, or download it again"):
        is_v = re.search(
            r"""^\s*parameterization:\s*["']?v["']?\s*$""", beside.read_text(encoding="utf-8"), re.MULTILINE
        )
    return "v_prediction" if is_v else "epsilon"


@dataclass(frozen=True)
class ConvertedNetwork:
    """The network `name` of a checkpoint, with `given` as its config; see `NetworkFiles`."""

    header: Header
    name: str
    given: Mapping[str, Any]

    def config(self) -> dict[str, Any]:
        """See `NetworkFiles`."""
        return dict(self.given)

    def read(self, dtype: torch.dtype) -> nn.Module:
        """See `NetworkFiles`; converted by diffusers."""
        header, names = self.header, self._names()
        refuse_quantised({name: header.types[name] for name in names}, header.said, self.name)
        remedy = f"{AGAIN}, or {COMPLETE}"
        with reading_of(header.said, self.name, remedy), _config_folder(self.name, self.given) as folder:
            try:
                network = CONVERSIONS[self.name](header.read(names), folder, dtype)
            except NotImplementedError as error:  # of moving a weight that is not there
                raise UserError(f"{header.said}: weights of {self.name} are missing; {remedy}") from error
        missing = [name for name, weight in network.named_parameters() if weight.is_meta]
        check_weights(network, missing, header.said, self.name, dtype, remedy)
        return network

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """See `NetworkFiles`."""
        types = {tensor.dtype for tensor in self.header.read(self._names()).values() if tensor.is_floating_point()}
        network = self.read(types.pop() if len(types) == 1 else torch.float32)
        yield from sorted((saved_name(self.name, key), tensor) for key, tensor in network.state_dict().items())

    def _names(self) -> list[str]:
        return self.header.of(*PREFIXES[self.name]) or self.header.of(*VAE_PARTS)


def open_vae_file(path: Path, said: str, own: Mapping[str, Any]) -> NetworkFiles:
    """A VAE in one file, alone or in a checkpoint, with the config `own` of the one that it takes the place of.

    Raises:
        UserError: it is none.
    """
    header = read_header(path, said)
    if not header.of(*PREFIXES["vae"], *VAE_PARTS):
        raise UserError(f"{said}: holds no VAE, its first key is {_first(header)}; give one for the model's latents")
    return ConvertedNetwork(header, "vae", own)


def _configs(architecture: Architecture) -> dict[str, dict[str, Any]]:
    """The networks' configs as a folder holds them."""
    texts = {name: CLIPTextConfig(**config).to_dict() for name, config in architecture.text_encoders.items()}
    return {"unet": dict(architecture.unet), "vae": dict(architecture.vae), **texts}


@contextmanager
def _config_folder(name: str, config: Mapping[str, Any]) -> Iterator[str]:
    """A folder with the config of the network `name`, where diffusers' conversions look for it."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / name).mkdir()
        content = {"_class_name": NETWORKS[name][0].__name__, **config}
        (Path(folder) / name / "config.json").write_text(json.dumps(content, default=str), encoding="utf-8")
        yield folder


def _convert_unet(tensors: dict[str, Tensor], folder: str, dtype: torch.dtype) -> nn.Module:
    options: dict[str, Any] = {"config": folder, "subfolder": "unet", "local_files_only": True}
    return UNet2DConditionModel.from_single_file(tensors, dtype=dtype, **options)


def _convert_vae(tensors: dict[str, Tensor], folder: str, dtype: torch.dtype) -> nn.Module:
    options: dict[str, Any] = {"config": folder, "subfolder": "vae", "local_files_only": True}
    return AutoencoderKL.from_single_file(tensors, dtype=dtype, **options)


def _convert_text_encoder(name: str, tensors: dict[str, Tensor], folder: str, dtype: torch.dtype) -> nn.Module:
    """As `StableDiffusionPipeline.from_single_file` does, which converts text encoders with no other part to them."""
    options: dict[str, Any] = {"config": folder, "subfolder": name, "local_files_only": True}
    return create_diffusers_clip_model_from_ldm(NETWORKS[name][0], tensors, torch_dtype=dtype, **options)


CONVERSIONS: dict[str, Callable[[dict[str, Tensor], str, torch.dtype], nn.Module]] = {
    "unet": _convert_unet,
    "vae": _convert_vae,
    "text_encoder": partial(_convert_text_encoder, "text_encoder"),
    "text_encoder_2": partial(_convert_text_encoder, "text_encoder_2"),
}
