"""The networks of a pipeline as maps of named tensors, as ONNX and OpenVINO take them.

Names and their order are those of optimum and OpenVINO GenAI: other programs ask for tensors by them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lcm_lightning.errors import UserError
from lcm_lightning.models.pipeline_files import unet_is_xl
from lcm_lightning.models.stable_diffusion import XL_HALF_VAE, StableDiffusion, vae_dtype

log = logging.getLogger(__name__)

Axes = Mapping[int, str]
FLOAT32_LIMIT, FLOAT16_LIMIT = 1e-2, 1e-1  # shares of an output; see `largest_difference`
VAE_FOLDERS = VAE_DECODER, VAE_ENCODER = "vae_decoder", "vae_encoder"
BATCH, SIDES = {0: "batch_size"}, {0: "batch_size", 2: "height", 3: "width"}


@dataclass(frozen=True)
class Graph:
    """A network to be traced.

    Attributes:
        folder: of the pipeline's that it is written to, such as "unet".
        module: takes `inputs` in their order and returns a tuple of `outputs`.
        config: of the network it is a part of; diffusers' or transformers'.
        inputs: examples. No two axes that may differ have one size, and no side is the smallest possible.
        axes: of each input those that differ from call to call, by name.
        outputs: their names.
    """

    folder: str
    module: nn.Module
    config: Any
    inputs: Mapping[str, Tensor]
    axes: Mapping[str, Axes]
    outputs: tuple[str, ...]

    def other_inputs(self) -> dict[str, Tensor]:
        """Inputs of other sizes than the examples', by which a traced network is held against the network."""
        factors = {"batch_size": 1, "height": 2, "width": 1, "sequence_length": 1}
        generator = torch.Generator().manual_seed(0)
        found = {}
        for name, example in self.inputs.items():
            shape = list(example.shape)
            for axis, called in self.axes[name].items():
                shape[axis] = shape[axis] * factors[called] + (called == "batch_size")
            if example.is_floating_point():
                found[name] = torch.randn(shape, generator=generator).to(example.dtype)
            else:
                found[name] = example.flatten()[torch.randint(example.numel(), shape, generator=generator)]
        return found


def largest_difference(graph: Graph, found: Sequence[Tensor], expected: Sequence[Tensor], limit: float) -> float:
    """The largest by which a runtime's outputs of a graph are off torch's.

    Args:
        limit: as a share of the largest value of an output; roundings of many layers stay far below it.

    Raises:
        UserError: one is no number, or off by more.
    """
    pairs = [(a.float(), b.float()) for a, b in zip(found, expected, strict=True)]
    off = torch.stack([(a - b).abs().max() for a, b in pairs])  # not Python's max, which passes over a NaN
    share = (off / torch.stack([b.abs().max().clamp(min=1) for _, b in pairs])).max()
    if not share <= limit:
        raise UserError(
            f"format: {graph.folder} is off torch by {off.max():.1e} in the runtime that it was exported for, so that "
            "it would draw other pictures; set dtype=float32 if it was not, or format=fused"
        )
    return float(off.max())


class Unet(nn.Module):
    """`UNet2DConditionModel` without dictionaries; SDXL's is told `text_embeds` and `time_ids`, an LCM's guidance."""

    def __init__(self, unet: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.unet = unet
        self.names = names

    def forward(self, sample: Tensor, timestep: Tensor, encoder_hidden_states: Tensor, *more: Tensor) -> tuple[Tensor]:
        told = dict(zip(self.names, more, strict=True))
        guidance = told.pop("timestep_cond", None)
        if "text_embeds" in told:
            # As torch.cat raises it to its neighbour's float32, for which torch's ONNX exporter (2.14) writes no cast.
            told["text_embeds"] = told["text_embeds"].float()
        return self.unet(
            sample,
            timestep,
            encoder_hidden_states,
            timestep_cond=guidance,
            added_cond_kwargs=told or None,
            return_dict=False,
        )


class VaeDecoder(nn.Module):
    """Unscaled latents to images in [-1, 1]."""

    vae: Any

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, latent_sample: Tensor) -> tuple[Tensor]:
        return self.vae.decode(latent_sample, return_dict=False)


class VaeEncoder(nn.Module):
    """Images in [-1, 1] to mean and logarithm of the variance, one after the other, of unscaled latents."""

    vae: Any

    def __init__(self, vae: nn.Module) -> None:
        super().__init__()
        self.vae = vae

    def forward(self, sample: Tensor) -> tuple[Tensor]:
        return (self.vae.encode(sample).latent_dist.parameters,)


class TextEncoder(nn.Module):
    """Ids to embeddings; with all hidden states where the pipeline takes one but the last, as SDXL's."""

    def __init__(self, text_encoder: nn.Module, hidden_states: bool) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.hidden_states = hidden_states

    def forward(self, input_ids: Tensor) -> tuple[Tensor, ...]:
        found = self.text_encoder(input_ids, output_hidden_states=self.hidden_states)
        first = (found.text_embeds, found.last_hidden_state) if "text_embeds" in found else found[:2]
        return (*first, *(found.hidden_states if self.hidden_states else ()))


def runtime_vae_dtype(model: StableDiffusion, dtype: torch.dtype) -> torch.dtype:
    """The type that the VAE's graphs are written in beside others in `dtype` (`vae_dtype`); a warning says another."""
    found = vae_dtype(model.vae_config, dtype, xl=unet_is_xl(model.unet.config))
    if found != dtype:
        log.warning(
            "dtype=float16: this model's VAE overflows in it (force_upcast in its config) and is written in float32; "
            "model.vae=%s does not",
            XL_HALF_VAE,
        )
    return found


def graphs(pipeline: Any, timestep_rank: int) -> Iterator[Graph]:
    """The networks of a pipeline of Stable Diffusion or SDXL.

    Args:
        timestep_rank: of the UNet's timestep, which optimum gives as a number (0) and OpenVINO GenAI as a vector (1).
    """
    xl = hasattr(pipeline, "text_encoder_2")
    for name in ("text_encoder", "text_encoder_2") if xl else ("text_encoder",):
        yield _text_graph(name, getattr(pipeline, name), hidden_states=xl)
    yield _unet_graph(pipeline, timestep_rank)
    yield from _vae_graphs(pipeline.vae)


def _text_graph(name: str, network: Any, *, hidden_states: bool) -> Graph:
    config = network.config
    ids = torch.randint(config.vocab_size, (2, config.max_position_embeddings))
    first = ("text_embeds", "last_hidden_state") if name == "text_encoder_2" else ("last_hidden_state", "pooler_output")
    states = [f"hidden_states.{layer}" for layer in range(config.num_hidden_layers + 1)] if hidden_states else []
    module = TextEncoder(network, hidden_states)
    return Graph(name, module, config, {"input_ids": ids}, {"input_ids": BATCH}, (*first, *states))


def _unet_graph(pipeline: Any, timestep_rank: int) -> Graph:
    unet, text = pipeline.unet, pipeline.text_encoder.config
    config, dtype = unet.config, unet.dtype
    least = 2 ** (len(config.block_out_channels) - 1)
    width = config.encoder_hid_dim or config.cross_attention_dim  # of what is projected first, where it is
    inputs = {
        "sample": torch.randn(2, config.in_channels, 2 * least, 3 * least, dtype=dtype),
        "timestep": torch.full((1,) * timestep_rank, 499),
        "encoder_hidden_states": torch.randn(2, text.max_position_embeddings, width, dtype=dtype),
    }
    axes: dict[str, Axes] = {"sample": SIDES, "timestep": {}, "encoder_hidden_states": {**BATCH, 1: "sequence_length"}}
    more: dict[str, Tensor] = {}
    if config.time_cond_proj_dim:
        more["timestep_cond"] = torch.randn(2, config.time_cond_proj_dim, dtype=dtype)
    if unet_is_xl(config):
        more["text_embeds"] = torch.randn(2, pipeline.text_encoder_2.config.projection_dim, dtype=dtype)
        more["time_ids"] = torch.full((2, 6), 512, dtype=dtype)
    axes |= dict.fromkeys(more, BATCH)
    return Graph("unet", Unet(unet, tuple(more)), config, inputs | more, axes, ("out_sample",))


def _vae_graphs(vae: Any) -> Iterator[Graph]:
    config, least = vae.config, 2 ** (len(vae.config.block_out_channels) - 1)
    latent = torch.randn(2, config.latent_channels, 3, 4, dtype=vae.dtype)
    image = torch.randn(2, config.in_channels, 3 * least, 4 * least, dtype=vae.dtype)
    yield Graph(VAE_DECODER, VaeDecoder(vae), config, {"latent_sample": latent}, {"latent_sample": SIDES}, ("sample",))
    yield Graph(VAE_ENCODER, VaeEncoder(vae), config, {"sample": image}, {"sample": SIDES}, ("latent_parameters",))
