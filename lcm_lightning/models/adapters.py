"""Low-rank adapters (Hu et al. 2021, arXiv 2106.09685) on a Stable Diffusion model, by peft and diffusers."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from diffusers import UNet2DConditionModel
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from lcm_lightning.errors import UserError, short
from lcm_lightning.models.checkpointing import adapter_switches, set_adapter_switches
from lcm_lightning.models.dropout import SampleDropout
from lcm_lightning.models.latent_diffusion import LatentDiffusionModel
from lcm_lightning.models.lora_files import LayerUpdate, adaptable_layers, fit, kohya_name, locate_lora, read_lora
from lcm_lightning.models.lora_layers import FUSED_LAYERS
from lcm_lightning.models.pipeline_files import unet_is_xl
from lcm_lightning.models.sampling import DDIM, make_scheduler
from lcm_lightning.models.stable_diffusion import StableDiffusion

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline

log = logging.getLogger(__name__)

ROUNDING = 0.1
KOHYA_PREFIXES = {  # by network, and whether it is SDXL's
    ("unet", False): "lora_unet",
    ("unet", True): "lora_unet",
    ("text_encoder", False): "lora_te",
    ("text_encoder", True): "lora_te1",
    ("text_encoder_2", True): "lora_te2",
}

ATTENTION_LAYERS = ("to_q", "to_k", "to_v", "to_out.0")
TARGET_PRESETS: dict[str, tuple[str, ...]] = {
    "attention": ATTENTION_LAYERS,
    # The layers of the published latent-consistency/lcm-lora-sdv1-5 (67.5M parameters at rank 64).
    "lcm_lora": (
        *ATTENTION_LAYERS,
        "proj_in",
        "proj_out",
        "ff.net.0.proj",
        "ff.net.2",
        "conv1",
        "conv2",
        "conv_shortcut",
        "downsamplers.0.conv",
        "upsamplers.0.conv",
        "time_emb_proj",
    ),
}


@dataclass(frozen=True)
class LoraSettings:
    """Shape of an adapter.

    Attributes:
        rank: of each update ``B A``, >= 1.
        alpha: the update is scaled by ``alpha / rank``.
        target_modules: a preset ("attention", "lcm_lora") or the endings of the names of Linear and Conv2d layers.
        dropout: on the adapter's input, in [0, 1); see `SampleDropout`.
    """

    rank: int = 64
    alpha: float = 64
    target_modules: str | Sequence[str] = "lcm_lora"
    dropout: float = 0.0

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise UserError(f"method.lora.rank={self.rank}: expected an integer of at least 1; try 64")
        if self.alpha <= 0:
            raise UserError(f"method.lora.alpha={self.alpha}: expected a positive number; try the rank, {self.rank}")
        if not 0 <= self.dropout < 1:
            raise UserError(f"method.lora.dropout={self.dropout}: expected a number in [0, 1)")

    def layer_names(self, unet: nn.Module) -> list[str]:
        """Endings of the names of the layers to adapt, each matching a Linear or Conv2d of `unet`.

        A preset keeps those that occur: a UNet without `conv_shortcut` is no error. A name given by hand must occur.
        """
        layers = [name for name, _ in adaptable_layers(unet)]
        if isinstance(self.target_modules, str):
            if self.target_modules not in TARGET_PRESETS:
                raise UserError(
                    f"method.lora.target_modules={self.target_modules}: expected {' or '.join(TARGET_PRESETS)}, "
                    "or a list such as [to_q,to_v]"
                )
            return [n for n in TARGET_PRESETS[self.target_modules] if _ending_matches(n, layers)]
        for name in self.target_modules:
            if not _ending_matches(name, layers):
                endings = sorted({layer.rsplit(".", 1)[-1] for layer in layers if not layer[-1].isdigit()})
                raise UserError(
                    f"method.lora.target_modules: no Linear or Conv2d layer is named {name}; there are "
                    f"{', '.join(endings)}"
                )
        return list(self.target_modules)


def _ending_matches(ending: str, names: Sequence[str]) -> bool:
    return any(name == ending or name.endswith("." + ending) for name in names)


def add_lora(
    unet: UNet2DConditionModel,
    name: str,
    settings: LoraSettings,
    *,
    fused: bool = True,
    seeds: list[int] | None = None,
) -> None:
    """Add a trainable adapter, float32 whatever the frozen weights are, that changes nothing yet (B = 0).

    Args:
        fused: in layers of our own, otherwise in peft's.
        seeds: will hold those of each step's samples, by which dropout is drawn (`SampleDropout`).
    """
    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]
        lora_dropout=settings.dropout,
        target_modules=settings.layer_names(unet),
    )
    if fused:
        config._register_custom_module(FUSED_LAYERS)  # peft's way of giving layers of one's own
    unet.add_adapter(config, adapter_name=name)
    for parameter in lora_parameters(unet, name):
        parameter.data = parameter.data.float()
    if settings.dropout > 0:
        seeds = [] if seeds is None else seeds
        for number, layer in enumerate(lora_layers(unet)):
            if name in layer.lora_dropout:
                layer.lora_dropout[name] = SampleDropout(settings.dropout, number, seeds)


def lora_layers(module: nn.Module) -> Iterator[LoraLayer]:
    """Every layer of `module` that carries adapters."""
    return (layer for layer in module.modules() if isinstance(layer, LoraLayer))


def lora_parameters(module: nn.Module, name: str) -> list[nn.Parameter]:
    """Parameters of the adapter `name`, in a fixed order."""
    return [p for key, p in module.named_parameters() if ".lora_" in key and f".{name}." in key]


def set_active_adapters(module: nn.Module, names: Sequence[str]) -> None:
    """Let exactly the adapters `names` act; with none the frozen weights alone do. Their updates add up.

    `module` is a UNet or a whole `StableDiffusion`, whose text encoder may carry adapters of the same names, and which
    may have variants of its UNet: the last of `names` that is one takes its place.
    """
    if isinstance(module, LatentDiffusionModel):
        module.let_act(names)
    for layer in lora_layers(module):
        present = [name for name in names if name in layer.lora_A]
        if present:
            layer.set_adapter(present)
        layer.enable_adapters(bool(present))


@contextmanager
def active_adapters(module: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """Let exactly the adapters `names` act for the duration of a block; which parameters train does not change.

    Distillation enters it every step. peft's own switch also walks over every parameter to set what trains: 12 ms a
    step on the embedded pipeline, and twice as many layers on Stable Diffusion; this one sets two attributes a layer.
    """
    before = adapter_switches(module)
    unet = module.unet if isinstance(module, LatentDiffusionModel) else None
    if isinstance(module, LatentDiffusionModel):
        module.let_act(names)
    for layer, active, _ in before:
        present = [name for name in names if name in layer.lora_A]
        layer._active_adapter = present or active
        layer._disable_adapters = not present
    try:
        yield
    finally:
        set_adapter_switches(before)
        if isinstance(module, LatentDiffusionModel):
            module.unet = unet


def set_adapter_weight(module: nn.Module, name: str, weight: float) -> None:
    """Multiply the updates of the loaded LoRA `name` by `weight`, in place of what they were multiplied by before."""
    for layer in lora_layers(module):
        if name in layer.lora_A:
            layer.set_scale(name, weight)


def load_lora(model: StableDiffusion, source: str | Path, name: str, key: str = "lora", scale: float = 1.0) -> None:
    """Add the LoRA at `source` (see `locate_lora`; of any layout in `lora_files`) as frozen, active adapter `name`.

    Its updates are multiplied by `scale`.

    Raises:
        UserError: it cannot be read whole, or was made for another base model; names `key`, the setting that gave
            `source`.
    """
    said = f"{key}={short(source, 80)}"
    file = read_lora(locate_lora(source, key), said)
    if named := [name for name in model.text_encoders if any(network == name for network, _ in file.updates)]:
        model.load_encoders(*named)
    networks = {"unet": model.unet, **model.text_encoders}
    for network, updates in fit(file, networks, said, model.name_or_path).items():
        scaled = {layer: replace(update, alpha=scale * update.alpha) for layer, update in updates.items()}
        _add_frozen(networks[network], name, scaled)


@torch.no_grad()
def _add_frozen(network: nn.Module, name: str, updates: Mapping[str, LayerUpdate]) -> None:
    """Add updates, by name of the layer, as adapter `name`."""
    first = next(iter(updates.values()))
    others = {f"^{re.escape(layer)}": update for layer, update in updates.items()}
    config = LoraConfig(
        r=first.rank,
        lora_alpha=first.alpha,  # type: ignore[arg-type]  # computes with fractions too
        target_modules="|".join(map(re.escape, updates)),
        rank_pattern={layer: update.rank for layer, update in others.items() if update.rank != first.rank},
        alpha_pattern={layer: update.alpha for layer, update in others.items() if update.alpha != first.alpha},
    )
    inject_adapter_in_model(config, network, name)  # transformers' add_adapter wants a newer peft than there may be
    network._hf_peft_config_loaded = True  # type: ignore[assignment]  # by which diffusers and transformers know that there is one
    for adapted in lora_layers(network):
        adapted.set_adapter(name)
    for layer, update in updates.items():
        network.get_parameter(f"{layer}.lora_A.{name}.weight").copy_(update.down)
        network.get_parameter(f"{layer}.lora_B.{name}.weight").copy_(update.up)
    for parameter in lora_parameters(network, name):
        parameter.requires_grad_(False)


def _update(layer: LoraLayer, name: str) -> Tensor:
    return layer.get_delta_weight(name).float()  # type: ignore[attr-defined]


@contextmanager
@torch.no_grad()
def merged_adapters(module: nn.Module, names: Sequence[str]) -> Iterator[None]:
    """The adapters `names` added to the weights for the duration of a block, as fast to run as the base model.

    A variant among them takes the place of the UNet, as in `active_adapters`. Sums are taken in float32 and stored in
    the weights' type. Afterwards the very same weights are back in place and the adapters act as before, also where a
    device's memory does not suffice for the sums.
    """
    originals = []
    with active_adapters(module, ()):
        try:
            for layer in lora_layers(module):
                weight = layer.get_base_layer().get_parameter("weight")
                updates = [_update(layer, name) for name in names if name in layer.lora_A]
                if updates:
                    # Kept off a GPU, whose memory is measured.
                    originals.append((weight, weight.data.cpu() if weight.is_cuda else weight.data))
                    merged = weight.data.float() + sum(updates)
                    weight.data = torch.empty_like(weight.data).copy_(merged)  # keeps type and memory format
            if isinstance(module, LatentDiffusionModel):
                module.let_act(names)
            yield
        finally:
            for weight, original in originals:
                if original.device == weight.device:
                    weight.data = original
                else:
                    weight.data.copy_(original)  # takes no memory, of which there may be none left


@torch.no_grad()
def fuse_adapters(model: StableDiffusion, names: Sequence[str]) -> float:
    """Add the adapters `names` to the frozen weights, ``W + sum_i (alpha_i / r_i) B_i A_i``, and take all away.

    Summed in float32. Returns which share of the change half-precision weights round away, in root mean square.
    """
    change, lost = 0.0, 0.0
    for layer in lora_layers(model):
        updates = [_update(layer, name) for name in names if name in layer.lora_A]
        if updates:
            weight = layer.get_base_layer().get_parameter("weight")
            delta = torch.stack(updates).sum(0) if len(updates) > 1 else updates[0]
            exact = weight.float() + delta
            weight.copy_(exact)
            change += float(delta.square().sum())
            lost += float((weight.float() - exact).square().sum())
    as_pipeline(model).unload_lora_weights()
    return (lost / change) ** 0.5 if change else 0.0


def fuse_lora(model: StableDiffusion, source: str | Path, scale: float = 1.0, key: str = "lora") -> None:
    """Add the LoRA at `source` to the frozen weights, its changes multiplied by `scale`; see `fuse_adapters`.

    `model` must carry no other adapter. `key` is as for `load_lora`. A warning says where more than `ROUNDING` of the
    change is lost.
    """
    load_lora(model, source, "fused", key, scale)
    lost = fuse_adapters(model, ["fused"])
    if lost > ROUNDING:
        log.warning(
            "%s=%s: rounding to %s loses %.0f %% of what this LoRA changes, which is little beside the weights; "
            "float32 (trainer.precision=32-true) would keep it",
            key,
            source,
            str(model.unet.dtype).removeprefix("torch."),
            100 * lost,
        )


def lora_state_dict(unet: UNet2DConditionModel, name: str) -> dict[str, Tensor]:
    """The adapter's tensors under diffusers' keys (peft's, prefixed "unet."), float32.

    ``alpha / rank`` is folded into B. Readers that know no alpha take it for the rank: folding makes the file mean the
    same to all of them. Sharded tensors are gathered, so under FSDP every rank must call it.
    """
    scaling = {layer.scaling[name] for layer in lora_layers(unet) if name in layer.scaling}
    if len(scaling) != 1:
        raise ValueError(f"adapter {name!r}: layers scale by {sorted(scaling)}, expected one value")
    (alpha_over_rank,) = scaling
    tensors = {}
    for key, tensor in get_peft_model_state_dict(unet, adapter_name=name).items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        tensors[f"unet.{key}"] = full.detach().float().cpu() * (alpha_over_rank if ".lora_B." in key else 1.0)
    return tensors


def kohya_state_dict(state_dict: Mapping[str, Tensor], unet: UNet2DConditionModel) -> dict[str, Tensor]:
    """A LoRA under diffusers' keys, alpha being the rank, under those of kohya's scripts; `unet` is the model's.

    ComfyUI and A1111 read them. Alpha is spelled out.
    """
    xl, tensors = unet_is_xl(unet.config), {}
    for key, tensor in state_dict.items():
        network, _, name = key.partition(".")
        layer, side, _ = name.rsplit(".", 2)
        named = kohya_name(layer, unet.config) if network == "unet" else layer
        prefix = f"{KOHYA_PREFIXES[network, xl]}_{named.replace('.', '_')}"
        tensors[f"{prefix}.{'lora_down' if side == 'lora_A' else 'lora_up'}.weight"] = tensor
        if side == "lora_A":
            tensors[f"{prefix}.alpha"] = torch.tensor(float(tensor.shape[0]))
    return tensors


def as_pipeline(model: StableDiffusion) -> StableDiffusionPipeline:
    """The model's own networks (no copies) as a diffusers pipeline; without those that are still deferred."""
    import diffusers  # late: its pipelines take a second that drawing does not need

    pipeline: type[StableDiffusionPipeline] = getattr(diffusers, model.pipeline)
    return pipeline(**model.pipeline_parts(), scheduler=make_scheduler(DDIM, model.scheduler_config))
