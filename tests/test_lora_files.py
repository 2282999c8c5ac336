"""LoRA files as people have them: read whole, with each layer's own rank and alpha, or refused in one sentence."""

from __future__ import annotations

import copy
import json
import logging
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from huggingface_hub import HfApi
from huggingface_hub.errors import EntryNotFoundError
from omegaconf import OmegaConf
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from benchmarks.inputs import random_shards
from lcm_lightning import inspect
from lcm_lightning.config.resolvers import package_file
from lcm_lightning.errors import UserError
from lcm_lightning.methods.lcm_lora import LcmLoraDistillation
from lcm_lightning.models.adapters import fuse_lora, load_lora, lora_layers, merged_adapters
from lcm_lightning.models.architectures import SD15_UNET
from lcm_lightning.models.identity import text_lora_digest
from lcm_lightning.models.lora_files import LORA_FILE, PEFT_CONFIG, PEFT_FILE, _original_names, copy_lora, locate_lora
from lcm_lightning.models.sampling import DDIM, sample
from lcm_lightning.models.stable_diffusion import StableDiffusion, load_stable_diffusion
from lcm_lightning.runs.contents import Adapter, write_manifest

ROOT = Path(__file__).parent.parent
ASSETS = ROOT / "lcm_lightning" / "assets"
ATTENTION = "down_blocks.0.attentions.0.transformer_blocks.0"
UNET = (
    f"{ATTENTION}.attn1.to_q",
    f"{ATTENTION}.attn1.to_out.0",
    f"{ATTENTION}.attn2.to_k",
    f"{ATTENTION}.ff.net.0.proj",
    "down_blocks.0.attentions.0.proj_in",
    "down_blocks.0.downsamplers.0.conv",
    "down_blocks.1.resnets.0.conv_shortcut",
    "down_blocks.1.resnets.0.time_emb_proj",
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_v",
    "mid_block.resnets.1.conv1",
    "up_blocks.0.upsamplers.0.conv",
    "up_blocks.1.attentions.1.transformer_blocks.0.attn2.to_v",
    "up_blocks.1.resnets.0.conv2",
    "conv_in",
    "conv_out",
    "time_embedding.linear_2",
)
ONLY_ATTENTION = tuple(name for name in UNET if "attn" in name)
TEXT = (
    "text_model.encoder.layers.0.self_attn.q_proj",
    "text_model.encoder.layers.1.self_attn.out_proj",
    "text_model.encoder.layers.1.mlp.fc1",
)


@dataclass(frozen=True)
class Update:
    down: Tensor
    up: Tensor
    alpha: float | None

    @property
    def delta(self) -> Tensor:
        """alpha / rank  up down, by definition; alpha is the rank where none is given."""
        scale = 1.0 if self.alpha is None else self.alpha / self.down.shape[0]
        return scale * torch.einsum("or,r...->o...", self.up.flatten(1), self.down)


Updates = Mapping[tuple[str, str], Update]
Writer = Callable[[Updates], dict[str, Tensor]]


def base_layer(model: StableDiffusion, network: str, name: str) -> nn.Module:
    return getattr(model, network).get_submodule(name.removeprefix("text_model."))


@pytest.fixture(scope="module")
def untouched(pipeline_folder: Path) -> StableDiffusion:
    return load_stable_diffusion(str(pipeline_folder))


@pytest.fixture
def model(untouched: StableDiffusion) -> StableDiffusion:
    return copy.deepcopy(untouched)


@dataclass
class Maker:
    """Makes random updates of layers of the tiny model."""

    model: StableDiffusion

    def __call__(self, network: str, names: tuple[str, ...], ranks=(4,), alphas=(None,)) -> dict:
        generator = torch.Generator().manual_seed(3)
        updates = {}
        for place, name in enumerate(names):
            shape = base_layer(self.model, network, name).weight.shape
            rank, alpha = ranks[place % len(ranks)], alphas[place % len(alphas)]
            down = torch.randn(rank, *shape[1:], generator=generator) * 0.2
            up = torch.randn(shape[0], rank, *(1 for _ in shape[2:]), generator=generator) * 0.2
            updates[network, name] = Update(down, up, alpha)
        return updates


@pytest.fixture
def make(untouched: StableDiffusion) -> Maker:
    return Maker(untouched)


# ---- layouts: how the keys of a layer are written ------------------------------------------------------------------


def dotted(prefixes: Mapping[str, str], down: str, up: str, rename=lambda network, name: name) -> Writer:
    def write(updates: Updates) -> dict[str, Tensor]:
        tensors = {}
        for (network, name), update in updates.items():
            layer = prefixes[network] + rename(network, name)
            tensors |= {f"{layer}{down}": update.down, f"{layer}{up}": update.up}
            if update.alpha is not None:
                tensors[f"{layer}.alpha"] = torch.tensor(float(update.alpha))
        return tensors

    return write


def kohya(rename=lambda name: name, text: str = "lora_te_") -> Writer:
    def write(updates: Updates) -> dict[str, Tensor]:
        prefixes = {"unet": "lora_unet_", "text_encoder": text}
        tensors = {}
        for (network, name), update in updates.items():
            layer = prefixes[network] + (rename(name) if network == "unet" else name).replace(".", "_")
            tensors |= {f"{layer}.lora_down.weight": update.down, f"{layer}.lora_up.weight": update.up}
            if update.alpha is not None:
                tensors[f"{layer}.alpha"] = torch.tensor(float(update.alpha))
        return tensors

    return write


def original(name: str) -> str:
    """The name in the code of Rombach et al.; `test_original_names_are_those_that_diffusers_converts` checks them."""
    (*_, last) = _original_names(name, layers_per_block=1)
    return next(_original_names(name, layers_per_block=1)) if name == "up_blocks.0.upsamplers.0.conv" else last


def old_processor(network: str, name: str) -> str:
    name = name.replace("attn1.", "attn1.processor.").replace("attn2.", "attn2.processor.").removesuffix(".0")
    for new, old in {"q_proj": "to_q", "out_proj": "to_out"}.items():
        name = name.replace(f"self_attn.{new}", f"self_attn.{old}")
    return name


A, B = ".lora_A.weight", ".lora_B.weight"
OWN = {"unet": "unet.", "text_encoder": "text_encoder."}
BARE = {"unet": "", "text_encoder": ""}
LAYOUTS: dict[str, Writer] = {
    "kohya": kohya(),
    "kohya, original names": kohya(original),
    "kohya, te1": kohya(text="lora_te1_"),
    "diffusers": dotted(OWN, A, B),
    "diffusers, lora.down": dotted(OWN, ".lora.down.weight", ".lora.up.weight"),
    "diffusers, linear layers": dotted(OWN, ".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    "diffusers, kohya's ends": dotted(OWN, ".lora_down.weight", ".lora_up.weight"),
    "peft with default": dotted(OWN, ".lora_A.default.weight", ".lora_B.default.weight"),
    "peft with default_0": dotted(OWN, ".lora_A.default_0.weight", ".lora_B.default_0.weight"),
    "peft with a name": dotted(OWN, ".lora_A.my-style.weight", ".lora_B.my-style.weight"),
    "peft": dotted({"unet": "base_model.model.", "text_encoder": "base_model.model."}, A, B),
    "peft in diffusers": dotted({key: f"{value}base_model.model." for key, value in OWN.items()}, A, B),
    "peft in diffusers, default": dotted(
        {key: f"{value}base_model.model." for key, value in OWN.items()},
        ".lora_A.default.weight",
        ".lora_B.default.weight",
    ),
    "peft, network inside": dotted({key: f"base_model.model.{value}" for key, value in OWN.items()}, A, B),
    "distributed": dotted({key: f"{value}module." for key, value in OWN.items()}, A, B),
    "compiled": dotted({"unet": "unet._orig_mod.", "text_encoder": "text_encoder._orig_mod."}, A, B),
    "bare": dotted(BARE, A, B),
    "bare, down and up": dotted(BARE, ".lora.down.weight", ".lora.up.weight"),
    "bare, default": dotted(BARE, ".lora_A.default.weight", ".lora_B.default.weight"),
    "ComfyUI": dotted({"unet": "diffusion_model.", "text_encoder": "text_encoders.clip_l.transformer."}, A, B),
    "ComfyUI, original names": dotted(
        {"unet": "diffusion_model.", "text_encoder": "clip_l.transformer."},
        ".lora_down.weight",
        ".lora_up.weight",
        lambda network, name: original(name) if network == "unet" else name,
    ),
    "original checkpoint": dotted(
        {"unet": "model.diffusion_model.", "text_encoder": "cond_stage_model.transformer."},
        ".lora_down.weight",
        ".lora_up.weight",
        lambda network, name: original(name) if network == "unet" else name,
    ),
    "without text_model": dotted(OWN, A, B, lambda network, name: name.removeprefix("text_model.")),
}
OLD = {
    "attention processors": dotted(OWN, "_lora.down.weight", "_lora.up.weight", old_processor),
    "attention processors, bare": dotted(BARE, "_lora.down.weight", "_lora.up.weight", old_processor),
}
SCALES = {
    "no alpha": ((4,), (None,)),
    "one alpha": ((4,), (2.0,)),
    "ranks differ": ((8, 2, 4), (8.0, 2.0, 4.0)),
    "alphas differ": ((8, 8, 2), (1.0, 4.0, 3.0)),
    "alpha of some": ((8, 8, 4), (1.0, None, None)),
    "ranks differ without alpha": ((1, 6, 3), (None,)),
    "all of it": ((8, 8, 2, 5), (8.0, 1.0, None, 3.0)),
}
CASES = [(layout, "all of it") for layout in (*LAYOUTS, *OLD)]
CASES += [(layout, scale) for layout in ("kohya", "diffusers", "attention processors") for scale in SCALES]


def assert_merges(model: StableDiffusion, file: Path, updates: Updates, tolerance: float = 1e-6) -> None:
    """The file adds the updates and nothing else, where it is merged for drawing and where it is fused."""
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for (network, name), update in updates.items():
        key = f"{network}.{name.removeprefix('text_model.')}.weight"
        assert key in expected
        expected[key] += update.delta

    def assert_expected() -> None:
        found = {k.replace(".base_layer", ""): v for k, v in model.state_dict().items() if ".lora_" not in k}
        assert found.keys() == expected.keys()
        for name in expected:
            torch.testing.assert_close(found[name], expected[name], atol=tolerance, rtol=1e-5, msg=name)

    loaded, fused = model, copy.deepcopy(model)
    load_lora(loaded, file, "style")
    with merged_adapters(loaded, ["style"]):
        assert_expected()
    model = fused
    fuse_lora(fused, file)
    assert_expected()


@pytest.mark.parametrize(("layout", "scale"), dict.fromkeys(CASES))
def test_every_layout_is_read_with_each_layer_s_own_scale(
    model: StableDiffusion, make: Maker, tmp_path: Path, layout: str, scale: str
):
    if layout in OLD:
        updates, write = make("unet", ONLY_ATTENTION, *SCALES[scale]), OLD[layout]
        updates |= make("text_encoder", TEXT[:2], *SCALES[scale]) if layout == "attention processors" else {}
    else:
        updates, write = make("unet", UNET, *SCALES[scale]), LAYOUTS[layout]
        updates |= make("text_encoder", TEXT, *SCALES[scale])
    save_file(write(updates), tmp_path / "style.safetensors")
    assert_merges(model, tmp_path / "style.safetensors", updates)


@pytest.mark.parametrize("network", ["unet", "text_encoder"])
def test_a_lora_of_one_network_leaves_the_other_alone(
    model: StableDiffusion, make: Maker, tmp_path: Path, network: str
):
    updates = make(network, UNET if network == "unet" else TEXT, (8, 2), (8.0, 1.0))
    save_file(kohya()(updates), tmp_path / "style.safetensors")
    assert_merges(model, tmp_path / "style.safetensors", updates)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types_are_read(model: StableDiffusion, make: Maker, tmp_path: Path, dtype: torch.dtype):
    updates = make("unet", UNET, (4, 2), (1.0, None))
    rounded = {place: Update(u.down.to(dtype).float(), u.up.to(dtype).float(), u.alpha) for place, u in updates.items()}
    save_file({k: t.to(dtype) for k, t in kohya()(updates).items()}, tmp_path / "style.safetensors")
    assert_merges(model, tmp_path / "style.safetensors", rounded)


def test_matrices_of_1x1_convolutions_are_read_with_and_without_their_ones(
    model: StableDiffusion, make: Maker, tmp_path: Path
):
    updates = make("unet", ("down_blocks.0.attentions.0.proj_in", f"{ATTENTION}.attn1.to_q"), (4,), (2.0,))
    swapped = {
        key: t.flatten(1) if t.ndim == 4 else t[..., None, None] for key, t in kohya()(updates).items() if t.ndim
    }
    alphas = {key: tensor for key, tensor in kohya()(updates).items() if not tensor.ndim}
    save_file(swapped | alphas, tmp_path / "style.safetensors")
    assert_merges(model, tmp_path / "style.safetensors", updates)


def test_pictures_are_those_of_weights_summed_by_hand(model: StableDiffusion, make: Maker, tmp_path: Path):
    updates = make("unet", UNET, (8, 8, 2), (8.0, 1.0, 2.0)) | make("text_encoder", TEXT, (4,), (1.0,))
    summed = copy.deepcopy(model)
    for (network, name), update in updates.items():
        base_layer(summed, network, name).weight.data += update.delta
    settings = {"seeds": [0], "steps": 3, "guidance_scale": 3.0, "sampler": DDIM, "resolution": 32}
    base, expected = sample(model, ["a dog"], **settings), sample(summed, ["a dog"], **settings)
    assert (base - expected).abs().max() > 0.05
    for number, layout in enumerate(("kohya", "peft with default", "ComfyUI, original names")):
        save_file(LAYOUTS[layout](updates), tmp_path / "style.safetensors")
        load_lora(model, tmp_path / "style.safetensors", f"style{number}")
        with merged_adapters(model, [f"style{number}"]):
            assert (sample(model, ["a dog"], **settings) - expected).abs().max() < 1 / 255


def test_original_names_are_those_that_diffusers_converts():
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SD15_UNET)
    layers = [name for name, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    names = {}
    for layer in layers:
        found = list(_original_names(layer, layers_per_block=2))
        behind_attention = "upsamplers" in layer and not layer.startswith("up_blocks.0")
        names[layer] = found[-1 if behind_attention else 0]
    checkpoint = {f"model.diffusion_model.{other}.weight": torch.tensor(n) for n, other in enumerate(names.values())}
    biases = [f"{other}.bias" for other in (*names.values(), "out.0")]
    checkpoint |= {f"model.diffusion_model.{other}": torch.tensor(-1) for other in (*biases, "out.0.weight")}
    converted = convert_ldm_unet_checkpoint(checkpoint, {**unet.config})
    assert {key.removesuffix(".weight"): int(n) for key, n in converted.items() if n >= 0} == {
        layer: number for number, layer in enumerate(names)
    }


# ---- alpha that stands elsewhere -----------------------------------------------------------------------------------


PEFT_SETTINGS = {
    "alpha": {"r": 4, "lora_alpha": 2},
    "patterns": {
        "r": 4,
        "lora_alpha": 2,
        "rank_pattern": {"to_out.0": 2, "mid_block.*to_v": 8},
        "alpha_pattern": {"attn2.to_k": 1, "mid_block.*to_v": 16},
    },
    "rank-stabilised": {"r": 4, "lora_alpha": 2, "use_rslora": True},
}


def trained_by_peft(unet: UNet2DConditionModel, settings: Mapping) -> nn.Module:
    targets = [name for name in UNET if "attn" in name or "conv1" in name]
    wrapped = get_peft_model(copy.deepcopy(unet), LoraConfig(target_modules=targets, **settings))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(0, 0.2, generator=generator)
    return wrapped


def assert_same_as_peft(model: StableDiffusion, file: Path, wrapped: nn.Module) -> None:
    load_lora(model, file, "style")
    expected = copy.deepcopy(wrapped).merge_and_unload().state_dict()
    with merged_adapters(model, ["style"]):
        found = {k.replace(".base_layer", ""): v for k, v in model.unet.state_dict().items() if ".lora_" not in k}
    assert found.keys() == expected.keys()
    with merged_adapters(model, ["style"]):
        for name, tensor in model.unet.state_dict().items():
            if ".lora_" not in name:
                torch.testing.assert_close(tensor, expected[name.replace(".base_layer", "")], atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("settings", PEFT_SETTINGS)
def test_a_folder_of_peft_is_read_with_its_settings(model: StableDiffusion, tmp_path: Path, settings: str):
    wrapped = trained_by_peft(model.unet, PEFT_SETTINGS[settings])
    wrapped.save_pretrained(tmp_path)
    assert (tmp_path / PEFT_FILE).is_file()
    assert_same_as_peft(model, tmp_path, wrapped)


@pytest.mark.parametrize("settings", PEFT_SETTINGS)
def test_what_diffusers_lcm_lora_script_writes_is_read(model: StableDiffusion, tmp_path: Path, settings: str):
    wrapped = trained_by_peft(model.unet, PEFT_SETTINGS[settings])
    wrapped.save_pretrained(tmp_path)
    tensors = get_peft_model_state_dict(wrapped, adapter_name="default")
    (tmp_path / "unet_lora").mkdir()
    save_file({f"unet.{key}": t for key, t in tensors.items()}, tmp_path / "unet_lora" / LORA_FILE)
    assert all(key.startswith("base_model.model.") for key in tensors)
    assert_same_as_peft(model, tmp_path / "unet_lora", wrapped)


def test_a_copy_of_peft_s_file_holds_its_alpha(model: StableDiffusion, tmp_path: Path):
    wrapped = trained_by_peft(model.unet, PEFT_SETTINGS["patterns"])
    wrapped.save_pretrained(tmp_path / "trained")
    copy_lora(tmp_path / "trained", tmp_path / "copy.safetensors")
    assert_same_as_peft(model, tmp_path / "copy.safetensors", wrapped)


def test_a_copy_of_any_other_file_is_the_same_bytes(make: Maker, tmp_path: Path):
    file = tmp_path / "style.safetensors"
    save_file(kohya()(make("unet", UNET, (4,), (2.0,))), file)
    copy_lora(file, tmp_path / "copy.safetensors")
    assert (tmp_path / "copy.safetensors").read_bytes() == file.read_bytes()


@pytest.mark.parametrize("patterns", [{}, {"alpha_pattern": {f"{ATTENTION}.attn1.to_q": 1}}])
def test_alpha_in_the_header_of_diffusers_files_is_read(
    model: StableDiffusion, make: Maker, tmp_path: Path, patterns: dict
):
    updates = make("unet", ONLY_ATTENTION)
    header = {f"unet.{key}": value for key, value in {"r": 4, "lora_alpha": 2, **patterns}.items()}
    save_file(LAYOUTS["diffusers"](updates), tmp_path / LORA_FILE, {"lora_adapter_metadata": json.dumps(header)})
    scaled = {place: Update(update.down, update.up, 2) for place, update in updates.items()}
    if patterns:
        first = next(iter(updates))
        scaled[first] = Update(updates[first].down, updates[first].up, 1)
    assert_merges(model, tmp_path, scaled)


# ---- what is refused -----------------------------------------------------------------------------------------------


def key_of(tensors: Mapping[str, Tensor], ending: str) -> str:
    return next(key for key in tensors if key.endswith(ending))


def renamed(old: str, new: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {key.replace(old, new): tensor for key, tensor in tensors.items()}


def with_tensor(key: str, *shape: int) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {**tensors, key: torch.zeros(shape)}


def with_value(ending: str, value: float) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors = {key: tensor.clone() for key, tensor in tensors.items()}
        tensors[key_of(tensors, ending)].view(-1)[0] = value
        return tensors

    return change


def without(ending: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: {key: t for key, t in tensors.items() if key != key_of(tensors, ending)}


LAYER = "lora_unet_mid_block_resnets_0_conv1"
DEEP = "lora_unet_input_blocks_7_1_transformer_blocks_3_attn1_to_q"
WIDE = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
SDXL = {f"{WIDE}.lora_down.weight": torch.zeros(4, 2048), f"{WIDE}.lora_up.weight": torch.zeros(640, 4)}
BIG = {f"lora_te_text_model_encoder_layers_20_mlp_fc1.lora_{side}.weight": torch.zeros(4, 4) for side in ("down", "up")}
REFUSED = {
    "a layer that there is not": (with_tensor("lora_unet_mid_block_resnets_7_conv1.alpha"), r"takes 1 of its keys"),
    "a pair of a layer that there is not": (
        lambda t: {**t, **{f"{LAYER}7.lora_{s}.weight": torch.zeros(4, 4) for s in ("down", "up")}},
        r"no layer of .* takes 1 of its keys, the first lora_unet_mid_block_resnets_0_conv17\.lora_down\.weight",
    ),
    "down without up": (without("lora_up.weight"), r"lora_down\.weight is half of an update \(1 of its keys are\)"),
    "up without down": (without("lora_down.weight"), r"lora_up\.weight is half of an update"),
    "ups lost": (
        lambda t: {key: tensor for key, tensor in t.items() if "lora_up" not in key},
        r"no key is of a LoRA|half of an update",
    ),
    "a key of no known end": (with_tensor("lora_unet_mid_block.lora_sideways.weight", 2, 2), r"takes 1 of its keys"),
    "an embedding": (with_tensor("bundle_emb.style.string_to_param.*", 2, 2), r"takes 1 .* first bundle_emb"),
    "bias of the base": (with_tensor("unet.conv_in.bias", 32), r"takes 1 of its keys, the first unet\.conv_in\.bias"),
    "bias": (with_tensor(f"{LAYER}.lora_up.bias", 64), "has biases"),
    "NaN in down": (with_value("lora_down.weight", float("nan")), "not finite"),
    "infinity in up": (with_value("lora_up.weight", float("inf")), "not finite"),
    "NaN in alpha": (with_value(".alpha", float("nan")), "not finite"),
    "integers": (lambda t: {**t, key_of(t, "lora_up.weight"): torch.ones(32, 4, dtype=torch.int8)}, "type torch.int8"),
    "alpha of several numbers": (
        lambda t: {**t, key_of(t, ".alpha"): torch.ones(2)},
        "is not one number",
    ),
    "halves of different ranks": (
        lambda t: {**t, key_of(t, "lora_up.weight"): torch.zeros(32, 3)},
        "does not fit its other half",
    ),
    "no rank": (
        lambda t: {**t, key_of(t, "lora_up.weight"): torch.zeros(32, 0), key_of(t, "_down.weight"): torch.zeros(0, 32)},
        "does not fit its other half",
    ),
    "vectors": (lambda t: {**t, key_of(t, "lora_up.weight"): torch.zeros(4)}, "does not fit its other half"),
    "another width": (
        lambda t: {**t, key_of(t, "lora_down.weight"): torch.zeros(4, 48)},
        "shapes do not fit .* another base model",
    ),
    "a 3 x 3 kernel as a matrix": (
        lambda t: {
            **t,
            f"{LAYER}.lora_down.weight": torch.zeros(4, 9 * 64),
            f"{LAYER}.lora_up.weight": torch.zeros(64, 4),
        },
        "shapes do not fit",
    ),
    "DoRA": (with_tensor(f"{LAYER}.dora_scale", 64), "is a DoRA"),
    "DoRA of peft": (with_tensor("unet.conv_in.lora_magnitude_vector", 64), "is a DoRA"),
    "LoHa": (with_tensor(f"{LAYER}.hada_w1_a", 4, 4), "is a LoHa"),
    "LoKr": (with_tensor(f"{LAYER}.lokr_w1", 4, 4), "is a LoKr"),
    "LoKr of peft": (with_tensor("base_model.model.conv_in.lokr_w2_a", 4, 4), "is a LoKr"),
    "LoCon with mid": (with_tensor(f"{LAYER}.lora_mid.weight", 4, 4, 3, 3), "is a LoCon with lora_mid"),
    "whole differences": (with_tensor(f"{LAYER}.diff", 4, 4), "is made of whole differences"),
    "whole differences of biases": (with_tensor("diffusion_model.out.2.diff_b", 4), "is made of whole differences"),
    "OFT": (with_tensor(f"{LAYER}.oft_blocks", 4, 4, 4), "is an OFT"),
    "IA3": (with_tensor(f"{LAYER}.on_input", 1), "is an IA3"),
    "GLoRA": (with_tensor(f"{LAYER}.a1.weight", 4, 4), "is a GLoRA"),
    "scalars": (with_tensor(f"{LAYER}.scalar"), r"is a LyCORIS with scalars .*merge it"),
    "normalisations": (with_tensor("lora_unet_conv_norm_out.w_norm", 4), "normalisations"),
    "Flux": (with_tensor("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", 4, 4), "a transformer"),
    "Flux of kohya": (with_tensor("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", 4, 4), "a transformer"),
    "SDXL by its second text encoder": (
        lambda t: {
            **t,
            **{
                f"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_{s}.weight": torch.zeros(4, 4)
                for s in ("up", "down")
            },
        },
        "is for SDXL",
    ),
    "SDXL by its depth": (
        lambda t: {**t, **{f"{DEEP}.lora_{s}.weight": torch.zeros(4, 4) for s in ("up", "down")}},
        "is for SDXL",
    ),
    "SDXL by its width": (lambda t: SDXL, "is for SDXL, .* another base model"),
    "SD 2 by its width": (
        lambda t: {
            "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora_A.weight": torch.zeros(4, 1024),
            "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k.lora_B.weight": torch.zeros(64, 4),
        },
        "is for Stable Diffusion 2, .* another base model",
    ),
    "a text encoder of more layers": (lambda t: {**t, **BIG}, "takes 1 of its keys"),
    "two adapters": (
        lambda t: {f"unet.conv_in.lora_{s}.{name}.weight": torch.zeros(4, 4) for s in "AB" for name in ("one", "two")},
        r"holds several adapters \(one, two\)",
    ),
    "one layer twice": (
        lambda t: {
            f"{p}conv_in.lora_{s}.weight": torch.zeros(4, 4) for s in "AB" for p in ("unet.", "diffusion_model.")
        },
        "are the same",
    ),
    "one layer by two names": (
        lambda t: {
            **{f"diffusion_model.conv_in.lora_{s}.weight": torch.zeros(4, 4) for s in "AB"},
            **{f"diffusion_model.input_blocks.0.0.lora_{s}.weight": torch.zeros(4, 4) for s in "AB"},
        },
        "two updates of one layer",
    ),
    "a whole model": (lambda t: {"conv_in.weight": torch.zeros(4, 4)}, "no key is of a LoRA .*model.path"),
    "an original checkpoint": (
        lambda t: {"model.diffusion_model.out.2.weight": torch.zeros(4, 4)},
        "no key is of a LoRA",
    ),
    "a textual inversion": (lambda t: {"emb_params": torch.zeros(1, 768)}, "no key is of a LoRA"),
    "nothing": (lambda t: {}, "it is empty"),
    "alpha alone": (lambda t: {f"{LAYER}.alpha": torch.ones(())}, "no key is of a LoRA"),
    "a layout of its own": (renamed(".lora_", ".adapter_"), "no key is of a LoRA|of its keys"),
    "other networks": (
        lambda t: {f"vae.decoder.conv_in.lora_{s}.weight": torch.zeros(4, 4) for s in "AB"},
        "takes 1 of its keys, the first vae",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_read_whole_is_refused_in_one_sentence(
    model: StableDiffusion, make: Maker, tmp_path: Path, case: str
):
    change, said = REFUSED[case]
    tensors = change(kohya()(make("unet", (*ONLY_ATTENTION, "mid_block.resnets.1.conv1"), (4,), (2.0,))))
    file = tmp_path / "refused.safetensors"
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, file)
    with pytest.raises(UserError, match=said) as refusal:
        load_lora(model, file, "style", "method.teacher_lora")
    message = str(refusal.value)
    assert "refused.safetensors" in message and len(message) <= 300 and "\n" not in message and "; " in message
    assert not any("lora_" in name for name, _ in model.named_parameters())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"peft_type": "LOHA"}, "is a LOHA"),
        ({"peft_type": "LORA", "r": 4, "lora_alpha": 4, "use_dora": True}, "is a DoRA"),
        ({"r": 4, "lora_alpha": 4, "init_lora_weights": "pissa_niter_4"}, "init_lora_weights=pissa_niter_4"),
        ({"r": 16, "lora_alpha": 4}, "has rank 4, its settings say 16"),
        ({"r": 4, "lora_alpha": "much"}, "settings of rank and alpha cannot be read"),
        ({"r": 4, "lora_alpha": 4, "alpha_pattern": {"to_q(": 3}}, "settings of rank and alpha cannot be read"),
        ({"r": 4, "lora_alpha": float("nan")}, "alpha nan"),
        ([1, 2], f"{PEFT_CONFIG} cannot be read"),
    ],
)
def test_settings_of_peft_that_change_more_are_refused(
    model: StableDiffusion, make: Maker, tmp_path: Path, settings: object, said: str
):
    save_file(LAYOUTS["peft"](make("unet", ONLY_ATTENTION)), tmp_path / PEFT_FILE)
    (tmp_path / PEFT_CONFIG).write_text(json.dumps(settings))
    with pytest.raises(UserError, match=said) as refusal:
        load_lora(model, tmp_path, "style")
    assert len(str(refusal.value)) <= 300


@pytest.mark.parametrize("content", [b"", b"version https://git-lfs.github.com/spec/v1", b"\x80\x02}q\x00." * 99])
def test_what_is_no_safetensors_file_is_refused(model: StableDiffusion, tmp_path: Path, content: bytes):
    (tmp_path / "style.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"style\.safetensors: cannot be loaded") as refusal:
        load_lora(model, tmp_path / "style.safetensors", "style")
    assert len(str(refusal.value)) <= 300


@pytest.mark.parametrize("name", ["style.bin", "style.pt", "style.ckpt"])
def test_pickles_are_not_read(tmp_path: Path, name: str):
    (tmp_path / name).write_bytes(b"")
    with pytest.raises(UserError, match=r"only \.safetensors is read"):
        locate_lora(tmp_path / name)


def test_a_lora_of_zeros_is_announced(
    model: StableDiffusion, make: Maker, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    updates = {place: Update(u.down, 0 * u.up, u.alpha) for place, u in make("unet", ONLY_ATTENTION).items()}
    save_file(kohya()(updates), tmp_path / "style.safetensors")
    with caplog.at_level(logging.WARNING):
        load_lora(model, tmp_path / "style.safetensors", "style")
    assert "changes nothing" in caplog.text


def test_equal_loras_on_the_text_encoder_have_one_digest_in_every_layout(make: Maker, tmp_path: Path):
    updates = make("text_encoder", TEXT, (4, 2), (2.0, None))
    digests = set()
    for number, write in enumerate((LAYOUTS["kohya"], LAYOUTS["peft"], LAYOUTS["without text_model"])):
        save_file(write(updates), tmp_path / f"{number}.safetensors")
        digests.add(text_lora_digest(str(tmp_path / f"{number}.safetensors")))
    assert len(digests) == 1 and None not in digests
    others = {place: Update(u.down, u.up, 1.0) for place, u in updates.items()}
    save_file(kohya()(others), tmp_path / "other.safetensors")
    assert text_lora_digest(str(tmp_path / "other.safetensors")) not in digests
    assert load_file(tmp_path / "other.safetensors")


# ---- inspect -------------------------------------------------------------------------------------------------------


def said_of(place: Path, *options: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> str:
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.setattr(sys, "argv", ["lcm-inspect", str(place), *options])
    inspect.main()
    return " ".join(capsys.readouterr().out.split())


def test_inspect_says_layout_scales_and_what_fits(
    make: Maker, pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    look = partial(said_of, tmp_path / "style.safetensors", monkeypatch=monkeypatch, capsys=capsys)
    updates = make("unet", ONLY_ATTENTION, (4, 4, 4, 2), (4.0,)) | make("text_encoder", TEXT)
    save_file(kohya()(updates), tmp_path / "style.safetensors")
    said = look()
    assert "layout kohya" in said and "unknown, by a cross-attention of width 32" in said
    assert f"unet {len(ONLY_ATTENTION)} layers" in said and "text encoder 3 layers" in said
    assert "rank 4, alpha 4 (7 of 8 layers)" in said and "attn1_to_v: rank 2, alpha 4" in said
    assert "unused none" in look("--model", str(pipeline_folder))
    save_file({**kohya()(updates), "lora_unet_nothing.alpha": torch.ones(())}, tmp_path / "style.safetensors")
    assert "unused lora_unet_nothing.alpha" in look("--model", str(pipeline_folder))


@pytest.mark.parametrize(("width", "base"), [(768, "Stable Diffusion 1"), (1024, "Stable Diffusion 2"), (2048, "SDXL")])
def test_inspect_tells_the_base_model_by_its_cross_attention(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, width: int, base: str
):
    layer = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    tensors = {f"{layer}.lora_A.weight": torch.ones(2, width), f"{layer}.lora_B.weight": torch.ones(640, 2)}
    save_file(tensors, tmp_path / LORA_FILE)
    said = said_of(tmp_path, monkeypatch=monkeypatch, capsys=capsys)
    assert f"base model {base}, by a cross-attention of width {width}" in said
    assert "unused none" in said


def test_inspect_says_how_the_adapters_of_a_run_are_drawn(
    make: Maker, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    (tmp_path / "lora").mkdir()
    save_file(LAYOUTS["diffusers"](make("unet", ONLY_ATTENTION)), tmp_path / "lora" / LORA_FILE)
    write_manifest(tmp_path / "lora", [Adapter(LcmLoraDistillation.kind)])
    OmegaConf.save({"model": {"path": "my/model"}}, tmp_path / "config.yaml")
    for place in (tmp_path, tmp_path / "lora"):
        said = said_of(place, monkeypatch=monkeypatch, capsys=capsys)
        assert "trained on model.path=my/model" in said
        assert "adapter lcm" in said and "drawn by lcm, 4 steps, guidance 1" in said and "layout diffusers" in said


def test_inspect_reads_a_model_s_folder(
    pipeline_folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    said = said_of(pipeline_folder, monkeypatch=monkeypatch, capsys=capsys)
    assert "pipeline StableDiffusionPipeline" in said and "cross-attention" in said and "predicts epsilon" in said


@pytest.mark.parametrize(
    ("network", "values", "shown"),
    [
        ("unet", {"sample_size": "16"}, "latents 16 wide, 4 channels"),
        ("unet", {"cross_attention_dim": [32, 32]}, "base model unknown, by cross-attention 32, 32 wide"),
        ("unet", {"block_out_channels": 5}, "blocks of 5 channels"),
        ("unet", {"block_out_channels": None, "in_channels": {}}, "blocks of None channels"),
        ("scheduler", {"prediction_type": ["flow"], "_class_name": 7}, "predicts flow"),
        ("text_encoder", {"hidden_size": "wide"}, "base model unknown, by cross-attention 32 wide"),
    ],
)
def test_inspect_shows_a_config_that_makes_no_sense_and_why_it_is_refused(
    pipeline_folder: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
    network: str,
    values: dict,
    shown: str,
):
    folder = shutil.copytree(pipeline_folder, tmp_path / "model")
    file = folder / network / ("scheduler_config.json" if network == "scheduler" else "config.json")
    file.write_text(json.dumps(json.loads(file.read_text()) | values))
    said = said_of(folder, monkeypatch=monkeypatch, capsys=capsys)
    assert shown in said and "refused model.path=" in said


def test_inspect_ends_with_a_sentence_for_what_is_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    (tmp_path / "text.txt").write_text("")
    (tmp_path / "cut.safetensors").write_bytes(b"cut")
    for place in (tmp_path, tmp_path / "text.txt", tmp_path / "cut.safetensors", tmp_path / "nowhere"):
        with pytest.raises(SystemExit) as ended:
            said_of(place, monkeypatch=monkeypatch, capsys=capsys)
        said = capsys.readouterr().err
        assert ended.value.code == 2 and said.startswith("error: ") and place.name in said and len(said) <= 300


# ---- as a command --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_what_diffusers_lcm_lora_script_writes_is_evaluated(tmp_path: Path):
    wrapped = get_peft_model(
        load_stable_diffusion(str(ASSETS / "tiny")).unet,
        LoraConfig(r=4, lora_alpha=4, target_modules=["to_q", "to_k", "to_v", "to_out.0", "conv1", "proj_in"]),
    )
    for name, parameter in wrapped.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.02, generator=torch.Generator().manual_seed(0))
    layers = get_peft_model_state_dict(wrapped, adapter_name="default")
    StableDiffusionPipeline.save_lora_weights(tmp_path / "unet_lora", layers)
    file = tmp_path / "unet_lora" / LORA_FILE
    assert all(key.startswith("unet.base_model.model.") for key in load_file(file))
    assert "student" in roles_evaluated(file, tmp_path)


SCRIPT = os.environ.get("DIFFUSERS_LCM_SCRIPT", "")


@pytest.mark.slow
@pytest.mark.skipif(not SCRIPT, reason="DIFFUSERS_LCM_SCRIPT names no train_lcm_distill_lora_sd_wds.py of diffusers")
def test_what_diffusers_lcm_lora_script_trains_is_evaluated_with_its_strength(tmp_path: Path):
    settings = {
        "pretrained_teacher_model": with_77_tokens(ASSETS / "tiny", tmp_path / "model"),
        "output_dir": tmp_path / "trained",
        "train_shards_path_or_url": random_shards(tmp_path / "shards", samples=1200, side=64, per_shard=1200)
        / "train-000000.tar",
        "max_train_samples": 1200,
        "resolution": 64,
        "train_batch_size": 2,
        "max_train_steps": 5,
        "learning_rate": 1e-3,
        "lora_rank": 4,
        "lora_alpha": 8,
        "dataloader_num_workers": 1,
        "seed": 0,
    }
    options = [f"--{key}={value}" for key, value in settings.items()]
    command = [sys.executable, "-m", "benchmarks.child", str(tmp_path / "times.json"), "peer", SCRIPT, *options]
    trained = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600, check=False)
    assert trained.returncode == 0, trained.stderr
    unet = UNet2DConditionModel.from_pretrained(ASSETS / "tiny" / "unet")
    for place in (tmp_path / "trained", tmp_path / "trained" / "unet_lora"):
        model = load_stable_diffusion(str(ASSETS / "tiny"))
        assert_same_as_peft(model, place, PeftModel.from_pretrained(copy.deepcopy(unet), tmp_path / "trained"))
    assert "student" in roles_evaluated(tmp_path / "trained" / "unet_lora", tmp_path)


def with_77_tokens(pipeline: Path, folder: Path) -> Path:
    """A copy of a pipeline that takes 77 tokens, as the script does whatever its model takes."""
    shutil.copytree(pipeline, folder)
    short = CLIPTextModel.from_pretrained(pipeline / "text_encoder")
    longer = CLIPTextModel(CLIPTextConfig(**{**short.config.to_dict(), "max_position_embeddings": 77}))
    weights = {key: t for key, t in short.state_dict().items() if "position" not in key}
    longer.load_state_dict(weights, strict=False)
    longer.save_pretrained(folder / "text_encoder")
    CLIPTokenizer.from_pretrained(pipeline / "tokenizer", model_max_length=77).save_pretrained(folder / "tokenizer")
    return folder


def roles_evaluated(file: Path, folder: Path) -> set[str]:
    """The roles that `evaluate.py models=[lcm:FILE]` measured."""
    options = ["num_images=4", "batch_size=2", "lineup.teacher_steps=2", "lineup.rivals={ddim:[],dpmpp:[]}"]
    options += ["lineup.undistilled_steps=[1]", "lineup.student_steps=[1]", "latency_repeats=1", "bootstrap_samples=5"]
    command = ["model=tiny", f"models=[lcm:{file}]", "data=twemoji", "evaluation=quick", "logger=csv", "run_dir=done"]
    finished = subprocess.run(
        [sys.executable, str(ROOT / "evaluate.py"), *command, *(f"evaluation.{option}" for option in options)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1", "XDG_CACHE_HOME": str(folder / "cache"), "PYTHONPATH": str(ROOT)},
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    return {model["role"] for model in json.loads((folder / "done" / "metrics.json").read_text())["models"]}


def test_what_a_network_saves_of_its_own_adapter_has_its_strength(tmp_path: Path):
    """diffusers' `unet.save_lora_adapter` writes its settings without the network's name."""
    unet = UNet2DConditionModel.from_pretrained(package_file("assets/tiny/unet"))
    settings = {"r": 4, "lora_alpha": 16, "target_modules": ["to_q"], "init_lora_weights": False}
    unet.add_adapter(LoraConfig(**settings))
    unet.save_lora_adapter(tmp_path)
    model = load_stable_diffusion(package_file("assets/tiny"))
    load_lora(model, tmp_path, "a")
    assert {layer.scaling["a"] for layer in lora_layers(model.unet) if "a" in layer.scaling} == {4.0}


def test_an_id_that_the_hub_does_not_know_is_one_message(monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object, **__: object) -> None:
        raise ValueError("401 Client Error\nRepository Not Found")

    monkeypatch.setattr("lcm_lightning.models.lora_files.hf_hub_download", refuse)
    for module in ("models.lora_files", "hub"):
        monkeypatch.setattr(f"lcm_lightning.{module}.hub_answers", lambda: True)
    with pytest.raises(UserError, match=r"no such folder here, and the hub refuses it: 401 Client Error; give a local"):
        locate_lora("loras/mistyped")


def cached_repository(cache: Path, *names: str) -> Path:
    """The snapshot of a repository `owner/name` as the hub's library keeps it."""
    repository = cache / "models--owner--name"
    snapshot = repository / "snapshots" / ("0" * 40)
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(snapshot.name)
    for name in names:
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        (snapshot / name).touch()
    return snapshot


@pytest.mark.parametrize("name", [LORA_FILE, "my style.safetensors", "weights/lora.safetensors"])
def test_without_the_hub_the_only_lora_of_a_cached_repository_is_taken(tmp_path, monkeypatch, name: str):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    snapshot = cached_repository(tmp_path, name, "README.md")
    assert locate_lora("owner/name") == snapshot / name
    if name != LORA_FILE:
        (snapshot / "second.safetensors").touch()
        with pytest.raises(UserError, match=r"lora=owner/name: expected .* one \.safetensors file there, found \["):
            locate_lora("owner/name")


@pytest.mark.parametrize("file", [LORA_FILE, "adapter_model.safetensors"])
def test_the_settings_that_lie_beside_a_lora_on_the_hub_are_fetched_with_it(tmp_path, monkeypatch, file: str):
    """They have the alpha of files that peft wrote."""
    fetched = []

    def download(repository: str, name: str, **_: object) -> str:
        if name not in (file, PEFT_CONFIG):
            raise EntryNotFoundError(name)
        fetched.append(name)
        return str(tmp_path / name)

    monkeypatch.setattr("lcm_lightning.models.lora_files.hf_hub_download", download)
    monkeypatch.setattr("lcm_lightning.models.lora_files.hub_answers", lambda: True)
    monkeypatch.setattr(HfApi, "list_repo_files", lambda *_: [file, PEFT_CONFIG])
    assert locate_lora("owner/name") == tmp_path / file
    assert sorted(fetched) == sorted([file, PEFT_CONFIG])


def test_without_the_hub_and_a_cached_copy_that_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(UserError, match="no such folder here, and the hub cannot be reached"):
        locate_lora("owner/name")
