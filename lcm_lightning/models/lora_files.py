"""LoRA files, of every layout that people have: found, read, and fitted to the layers of a model.

A file is a list of named tensors. Each name says by its beginning which network it belongs to, by its end which matrix
of ``alpha / rank  up down`` (Hu et al. 2021) it is, and in between which layer. Layers are known by all names that they
have in some layout, so every name finds one layer or none; what finds none is refused, never passed over.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from huggingface_hub import HfApi, hf_hub_download, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lcm_lightning.errors import UserError, first_line, short
from lcm_lightning.hub import hub_answers, hub_refusal, is_hub_id
from lcm_lightning.models.kinds import LORA_FILE
from lcm_lightning.models.pipeline_files import unet_is_xl
from lcm_lightning.output.files import write_atomic
from lcm_lightning.output.tensors import save_tensors

log = logging.getLogger(__name__)

PEFT_FILE = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
LORA_NETWORKS = ("unet", "text_encoder", "text_encoder_2")
METADATA = "lora_adapter_metadata"  # diffusers' name for what it writes of rank and alpha into a file's header
BASE_MODELS = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 2048: "SDXL"}  # by width of the cross-attention

# What a key looks like that no sum of LoRAs can stand for, what the file is then, and the remedy.
MERGE = "merge it into the model with the tool that made it, and give that as model.path"
OTHER_KINDS = (
    (r"dora_scale|lora_magnitude_vector", "a DoRA", f"only LoRA is supported; {MERGE}"),
    (r"\.hada_", "a LoHa", MERGE),
    (r"\.lokr_", "a LoKr", MERGE),
    (r"\.lora_mid\.", "a LoCon with lora_mid", MERGE),
    (r"\.diff(_b)?$|\.set_weight$", "made of whole differences of weights", MERGE),
    (r"\.b?oft_|\.oft_diag", "an OFT", MERGE),
    (r"\.ia3_|\.on_input$", "an IA3", MERGE),
    (r"\.vera_lambda", "a VeRA", MERGE),
    (r"\.[ab][12]\.weight$", "a GLoRA", MERGE),
    (r"\.scalar$", "a LyCORIS with scalars of its layers", MERGE),
    (r"\.[wb]_norm$", "a LoRA with weights of normalisations", MERGE),
    (r"lora_controlnet|^control_model\.", "a ControlNet", "give a LoRA"),
    (
        r"^(transformer|lora_transformer)[._]|(double|single|joint)_blocks[._]",
        "made for a transformer (Flux, SD 3)",
        "give a LoRA of Stable Diffusion 1, 2 or XL",
    ),
)

SUFFIX = re.compile(
    r"(?P<layer>.+?)(?:[._]lora(?:_linear_layer)?[._](?P<side>A|B|down|up)(?:\.(?P<adapter>[^.]+))?\.(?P<what>weight|bias)"
    r"|(?:\.lora)?\.alpha)"
)
SIDES = {"A": "down", "B": "up"}
KOHYA = re.compile(r"lora_(?P<network>unet|te1?|te2)_(?P<layer>.+)")
WRAPPERS = r"(?:base_model\.model\.|module\.|_orig_mod\.)*"  # of peft, distributed training and torch.compile
DOTTED = re.compile(
    rf"{WRAPPERS}(?:(?P<network>unet|(?:model\.)?diffusion_model|text_encoder(?:_2)?|cond_stage_model\.transformer|"
    rf"(?:text_encoders\.)?clip_[lg](?:\.transformer)?)\.)?{WRAPPERS}(?P<layer>.+)"
)
NETWORKS = {"unet": "unet", "model.diffusion_model": "unet", "diffusion_model": "unet"}
NETWORKS |= {"te2": "text_encoder_2", "text_encoder_2": "text_encoder_2"}
IN_TEXT_ENCODER = re.compile(r"(text_model\.)?(encoder\.layers|embeddings|final_layer_norm)\.")

Place: TypeAlias = tuple[str, str]  # network, and name of the layer as the file has it, without prefixes


@dataclass(frozen=True)
class LayerUpdate:
    """What is added to a layer's weight: ``alpha / rank  up down``.

    Attributes:
        key: of `down` in the file.
        down: [rank, in] or [rank, in, height, width].
        up: [out, rank] or [out, rank, 1, 1].
    """

    key: str
    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """Rows of `down`."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """``alpha / rank``."""
        return self.alpha / self.rank


@dataclass(frozen=True)
class LoraFile:
    """A file that was read, whatever model it is for.

    Attributes:
        layout: whose way of naming tensors it has.
        updates: by network ("unet", "text_encoder", "text_encoder_2") and name of the layer.
        unused: keys that are no part of an update.
        alpha_elsewhere: whether a file beside it says what alpha is.
    """

    layout: str
    updates: dict[Place, LayerUpdate]
    unused: tuple[str, ...]
    alpha_elsewhere: bool

    @property
    def cross_attention_dim(self) -> int | None:
        """Width of the text embeddings that the UNet's layers expect; None where no layer tells."""
        told = (update for (_, name), update in self.updates.items() if re.search(r"attn2[._](.*[._])?to_[kv]$", name))
        return next((update.down.shape[1] for update in told), None)

    @property
    def base_model(self) -> str | None:
        """The base model's name, as far as the file tells."""
        sdxl = any(net == "text_encoder_2" or _is_deep(net, name) for net, name in self.updates)
        return "SDXL" if sdxl else BASE_MODELS.get(self.cross_attention_dim or 0)


def _is_deep(network: str, name: str) -> bool:
    """Whether a layer is of a UNet with several transformer blocks in a row, or with labels, as SDXL's is."""
    return network == "unet" and bool(re.search(r"transformer_blocks[._][1-9]|add_embedding|label_emb", name))


# ---- finding -------------------------------------------------------------------------------------------------------


def locate_lora(source: str | Path, key: str = "lora") -> Path:
    """The safetensors file of `source`: a run folder, a folder with a LoRA file, a file, or a hub id (downloaded).

    Raises:
        UserError: nothing is there, or the file is not safetensors; names `key`, the setting that gave `source`.
    """
    path = Path(source).expanduser()
    for candidate in (path, path / "lora" / LORA_FILE, path / LORA_FILE, path / PEFT_FILE):
        if candidate.is_file():
            if candidate.suffix != ".safetensors":
                raise UserError(f"{key}={source}: only .safetensors is read, other formats can run code; convert it")
            return candidate
    if (path / "pipeline" / "model_index.json").is_file():
        raise UserError(
            f"{key}={source}: a run that trained a whole UNet and left no LoRA; give a run of another method"
        )
    if path.is_dir():
        raise UserError(
            f"{key}={source}: holds neither lora/{LORA_FILE} (a run) nor {LORA_FILE} or {PEFT_FILE}; did the run reach "
            "its first validation?"
        )
    if not is_hub_id(str(source)):
        raise UserError(f"{key}={source}: no such file or folder; give a run folder, a .safetensors file or a hub id")
    return _download_lora(str(source), key)


def _download_lora(hub_id: str, key: str) -> Path:
    cached = not hub_answers()
    try:
        with suppress(EntryNotFoundError):
            file = hf_hub_download(hub_id, LORA_FILE, local_files_only=cached)
            with suppress(EntryNotFoundError):  # it has the alpha of some files, and is looked for beside them
                hf_hub_download(hub_id, PEFT_CONFIG, local_files_only=cached)
            return Path(file)
        names = _cached_files(hub_id) if cached else HfApi().list_repo_files(hub_id)
        files = [name for name in names if name.endswith(".safetensors")]
        if len(files) == 1:
            if PEFT_CONFIG in names:
                hf_hub_download(hub_id, PEFT_CONFIG, local_files_only=cached)
            return Path(hf_hub_download(hub_id, files[0], local_files_only=cached))
    except Exception as error:  # network, authentication and not-found errors of several libraries
        raise UserError(
            f"{key}={short(hub_id, 80)}: no such folder here, and {hub_refusal(error)}; give a local run folder or "
            ".safetensors file, or check the id and `hf auth login`"
        ) from error
    raise UserError(
        f"{key}={hub_id}: expected {LORA_FILE} or one .safetensors file there, found {files or 'none'}; download one "
        f"with `hf download {hub_id} FILE` and give its path"
    )


def download_published(hub_id: str, name: str) -> Path | None:
    """The file `name` of a repository on the hub; None where there is no such file, or it is out of reach."""
    if not is_hub_id(hub_id):
        return None
    try:
        return Path(hf_hub_download(hub_id, name, local_files_only=not hub_answers()))
    except Exception:  # of several libraries; who needs the file says what is missing
        return None


def is_out_of_reach(hub_id: str, name: str) -> bool:
    """Whether, after `download_published`, nobody knows if a repository has the file `name`."""
    return is_hub_id(hub_id) and try_to_load_from_cache(hub_id, name) is None  # the cache keeps a "no" too


def _cached_files(hub_id: str) -> list[str]:
    """Names of the files that the cache holds of a repository. Raises `LocalEntryNotFoundError` if it holds none."""
    snapshot = Path(snapshot_download(hub_id, local_files_only=True))
    return [path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()]


# ---- reading -------------------------------------------------------------------------------------------------------


def read_lora(path: Path, said: str) -> LoraFile:
    """The updates that a safetensors file holds.

    Raises:
        UserError: it cannot be read, is of another kind, or its values are not finite; begins with `said`.
    """
    try:
        with safe_open(path, "pt") as file:
            keys, metadata = list(file.keys()), file.metadata() or {}
            _refuse_other_kinds(keys, said)
            parts, unused = _sort_out(keys, said)
            tensors = {key: file.get_tensor(key) for found in parts.values() for key in found.values()}
    except (OSError, SafetensorError, RuntimeError) as error:
        raise UserError(f"{said}: cannot be loaded ({first_line(error)[:120]}); download or export it again") from error
    for key, tensor in tensors.items():
        if tensor.ndim > 1 and not tensor.is_floating_point():
            raise UserError(f"{said}: {short(key)} is of type {tensor.dtype}; save it in float16 or float32")
        if not torch.isfinite(tensor.float()).all():
            raise UserError(f"{said}: {short(key)} holds values that are not finite; take one from before it diverged")
    configs, alpha_elsewhere = _configs(path, metadata, keys, said)
    updates = {}
    for (network, name), found in parts.items():
        down, up = tensors[found["down"]], tensors[found["up"]]
        if min(down.ndim, up.ndim) < 2 or not 0 < down.shape[0] == up.shape[1]:
            shapes = f"{tuple(down.shape)} and {tuple(up.shape)}"
            raise UserError(f"{said}: {short(found['down'])} does not fit its other half ({shapes}); export it again")
        if "alpha" in found:
            if tensors[found["alpha"]].numel() != 1:
                raise UserError(f"{said}: {short(found['alpha'])} is not one number; export the file again")
            alpha = tensors[found["alpha"]].item()
        else:
            alpha = _configured_alpha(configs.get(network), name, down.shape[0], said)
        updates[network, name] = LayerUpdate(found["down"], down, up, alpha)
    return LoraFile(_layout(keys), updates, tuple(unused), alpha_elsewhere)


def _refuse_other_kinds(keys: list[str], said: str) -> None:
    for key in keys:
        for pattern, kind, remedy in OTHER_KINDS:
            if re.search(pattern, key):
                raise UserError(f"{said}: is {kind} (it has {short(key)}); {remedy}")


def _sort_out(keys: list[str], said: str) -> tuple[dict[Place, dict[str, str]], list[str]]:
    """Keys of "down", "up" and, where there is one, "alpha" of each layer; and those that are no part of a pair."""
    parts: dict[Place, dict[str, str]] = {}
    unused, adapters = [], set()
    for key in keys:
        if (match := SUFFIX.fullmatch(key)) is None:
            unused.append(key)
            continue
        if match["what"] == "bias":
            raise UserError(f"{said}: has biases ({short(key)}), which are not read; train it without (lora_bias)")
        adapters.add(match["adapter"])
        found = parts.setdefault(_place(match["layer"]), {})
        part = SIDES.get(match["side"], match["side"]) or "alpha"
        if part in found and adapters <= {None, match["adapter"]}:
            raise UserError(f"{said}: {short(found[part])} and {short(key)} are the same; export it again")
        found[part] = key
    if len(named := sorted(adapters - {None})) > 1:
        raise UserError(f"{said}: holds several adapters ({short(', '.join(named))}); save each to a file of its own")
    if not any({"down", "up"} & found.keys() for found in parts.values()):
        first = f"the first is {short(keys[0])}" if keys else "it is empty"
        raise UserError(f"{said}: no key is of a LoRA ({first}); give a LoRA file, or a whole model as model.path")
    pairs = {place: found for place, found in parts.items() if {"down", "up"} <= found.keys()}
    unused += [key for place, found in parts.items() if place not in pairs for key in found.values()]
    return pairs, sorted(unused)


def _place(layer: str) -> Place:
    """Network and layer that a key without its end names."""
    match = KOHYA.fullmatch(layer) or DOTTED.fullmatch(layer)
    assert match is not None
    if match["network"] is None:
        return ("text_encoder" if IN_TEXT_ENCODER.match(match["layer"]) else "unet"), match["layer"]
    default = "text_encoder_2" if "clip_g" in match["network"] else "text_encoder"
    return NETWORKS.get(match["network"], default), match["layer"]


def _layout(keys: list[str]) -> str:
    if any(KOHYA.match(key) for key in keys):
        return "kohya"
    if any("base_model.model." in key for key in keys):
        return "peft"
    if any("_lora." in key for key in keys):
        return "diffusers, of attention processors"
    if any("diffusion_model." in key or "clip_l" in key for key in keys):
        return "ComfyUI"
    return "diffusers" if any(key.startswith(("unet.", "text_encoder")) for key in keys) else "names of layers alone"


# ---- rank and alpha that stand elsewhere ---------------------------------------------------------------------------


def _configs(
    path: Path, metadata: Mapping[str, str], keys: list[str], said: str
) -> tuple[dict[str, Mapping[str, Any]], bool]:
    """peft's settings of each network, from the file's header or a file beside it; and whether from beside it."""
    try:
        if METADATA in metadata:
            entries = json.loads(metadata[METADATA])
            configs: dict[str, Mapping[str, Any]] = {
                network: {k.removeprefix(f"{network}."): v for k, v in entries.items() if k.startswith(f"{network}.")}
                for network in LORA_NETWORKS
            }
            configs = {network: config for network, config in configs.items() if config}
            if entries and not configs:  # of one network alone, as diffusers' `save_lora_adapter` writes it
                configs = {network: dict(entries) for network in LORA_NETWORKS}
            for config in configs.values():
                _check_config(config, said)
            return configs, False
        # diffusers' script for LCM-LoRA writes its weights into unet_lora/ beside peft's settings.
        folders = (path.parent, path.parent.parent) if path.parent.name == "unet_lora" else (path.parent,)
        files = [folder / PEFT_CONFIG for folder in folders if (folder / PEFT_CONFIG).is_file()]
        of_peft = path.name == PEFT_FILE or any("base_model.model." in key for key in keys)
        if of_peft and files:
            config = dict(json.loads(files[0].read_text()))
            _check_config(config, said)
            return dict.fromkeys(LORA_NETWORKS, config), True
    except (OSError, ValueError, TypeError, AttributeError) as error:
        where = METADATA if METADATA in metadata else PEFT_CONFIG
        raise UserError(f"{said}: its {where} cannot be read ({first_line(error)[:100]}); export it again") from error
    if path.name == PEFT_FILE or any("base_model.model." in key for key in keys):
        log.warning("%s: no %s lies beside it; alpha is taken for the rank", said, PEFT_CONFIG)
    return {}, False


def _check_config(config: Mapping[str, Any], said: str) -> None:
    """Refuse what the tensors do not tell: another kind of adapter, or one of a base model that was changed with it."""
    kind, start = config.get("peft_type") or "LORA", config.get("init_lora_weights")
    if kind != "LORA" or config.get("use_dora"):
        raise UserError(f"{said}: is a {'DoRA' if kind == 'LORA' else kind} by its {PEFT_CONFIG}; {MERGE}")
    if isinstance(start, str) and start not in ("gaussian", "eva", "orthogonal"):
        raise UserError(f"{said}: belongs on weights changed by init_lora_weights={short(start, 30)}; {MERGE}")


def _configured_alpha(config: Mapping[str, Any] | None, name: str, rank: int, said: str) -> float:
    """What settings say of a layer; without settings, the rank: the update is not scaled then."""
    if config is None:
        return rank

    def value(key: str, patterns: str) -> float:
        by_name: dict[str, float] = config.get(patterns) or {}
        return by_name.get(get_pattern_key(list(by_name), name), config.get(key, 8))  # peft's default is 8

    try:
        expected, alpha = value("r", "rank_pattern"), float(value("lora_alpha", "alpha_pattern"))
    except (AttributeError, TypeError, ValueError, re.error) as error:
        raise UserError(f"{said}: its settings of rank and alpha cannot be read; export it again") from error
    if not math.isfinite(alpha):
        raise UserError(f"{said}: its settings give {short(name)} alpha {alpha}; export it again")
    if expected != rank:
        raise UserError(f"{said}: {short(name)} has rank {rank}, its settings say {expected}; export both again")
    return alpha * rank**0.5 if config.get("use_rslora") else alpha


# ---- fitting -------------------------------------------------------------------------------------------------------


def adaptable_layers(network: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules of the layers that a LoRA can be on, whether or not they carry one."""
    for name, module in network.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d) and ".lora_" not in name:
            yield name.removesuffix(".base_layer"), module


def match_layers(
    file: LoraFile, networks: Mapping[str, nn.Module], said: str
) -> tuple[dict[str, dict[str, LayerUpdate]], list[str]]:
    """Updates by network and name of its layer, and keys that would be unused. Networks that are not given have none.

    Raises:
        UserError: two updates are of the same layer; begins with `said`.
    """
    names = {network: _layers_by_name(networks[network]) for network in {net for net, _ in file.updates} & {*networks}}
    matched: dict[str, dict[str, LayerUpdate]] = {}
    unused = list(file.unused)
    for (network, name), update in file.updates.items():
        layer = names.get(network, {}).get(_flat(name))
        if layer is None:
            unused.append(update.key)
        elif layer in matched.setdefault(network, {}):
            raise UserError(
                f"{said}: has two updates of one layer ({short(update.key)} is the second); export it again"
            )
        else:
            matched[network][layer] = update
    return {network: updates for network, updates in matched.items() if updates}, sorted(unused)


def fit(
    file: LoraFile, networks: Mapping[str, nn.Module], said: str, model_name: str
) -> dict[str, dict[str, LayerUpdate]]:
    """Updates in the shapes of the layers that they belong to, by network and name of the layer.

    Raises:
        UserError: not all of the file fits the networks; begins with `said`.
    """
    matched, unused = match_layers(file, networks, said)
    model_name, base = short(model_name, 40), file.base_model
    misfits = [] if unused else [update.key for update in _shape(matched, networks)]
    if (unused or misfits) and base not in (None, BASE_MODELS.get(_config(networks["unet"]).cross_attention_dim)):
        raise UserError(f"{said}: is for {base}, and {model_name} is not; it was made for another base model")
    if halves := [key for key in file.unused if (match := SUFFIX.fullmatch(key)) and match["side"]]:
        raise UserError(
            f"{said}: {short(halves[0])} is half of an update ({len(halves)} of its keys are), which changes nothing; "
            "export or download it again"
        )
    if unused:
        raise UserError(
            f"{said}: no layer of {model_name} takes {len(unused)} of its keys, the first {short(unused[0])}; "
            "remove them, or give its base model"
        )
    if misfits:
        raise UserError(
            f"{said}: its shapes do not fit {model_name}; it was made for another base model (the first key is "
            f"{short(misfits[0])})"
        )
    every = [update for updates in matched.values() for update in updates.values()]
    if not any(update.alpha and update.down.any() and update.up.any() for update in every):
        log.warning("%s: changes nothing, all its updates are zero", said)
    return matched


def _config(network: nn.Module) -> Any:
    return network.config


def _shape(matched: dict[str, dict[str, LayerUpdate]], networks: Mapping[str, nn.Module]) -> Iterator[LayerUpdate]:
    """Give updates the shapes of their layers; yields those that cannot have them."""
    for network, updates in matched.items():
        layers = dict(adaptable_layers(networks[network]))
        for name, update in updates.items():
            if (shaped := _shaped_as(update, layers[name].get_parameter("weight").shape)) is None:
                yield update
            else:
                updates[name] = shaped


def _shaped_as(update: LayerUpdate, shape: torch.Size) -> LayerUpdate | None:
    """The update of a weight of a shape, where that is a matter of trailing ones: a 1 x 1 convolution is a matrix."""
    down, up = (update.rank, *shape[1:]), (shape[0], update.rank, *(1 for _ in shape[2:]))
    if _plain(update.down.shape) != _plain(down) or _plain(update.up.shape) != _plain(up):
        return None
    return replace(update, down=update.down.reshape(down), up=update.up.reshape(up))


def _plain(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(shape[:2]) if all(size == 1 for size in shape[2:]) else tuple(shape)


def _flat(name: str) -> str:
    """A name as kohya's scripts write it; other layouts' are told apart by it as well."""
    return name.replace(".processor.", ".").replace(".", "_")


def _layers_by_name(network: nn.Module) -> dict[str, str]:
    """The layers of a UNet or a text encoder by all their names, flat."""
    layers = [name for name, _ in adaptable_layers(network)]
    per_block = getattr(network.config, "layers_per_block", None)
    others = {_flat(other): layer for layer in layers for other in _other_names(layer, per_block)}
    return others | {_flat(layer): layer for layer in layers}


def _other_names(layer: str, layers_per_block: int | None) -> Iterator[str]:
    """What a layer is called elsewhere: in old attention processors, older transformers, the original code."""
    if layer.endswith("_proj"):
        before, _, last = layer.rpartition(".")
        old = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}.get(last)
        names = [layer] if old is None else [layer, f"{before}.{old}"]
    else:
        names = [layer, layer.removesuffix(".0")] if layer.endswith("to_out.0") else [layer]
    for name in names:
        yield name
        yield name.removeprefix("text_model.")
        yield f"text_model.{name}"
        if isinstance(layers_per_block, int):
            yield from _original_names(name, layers_per_block)


OUTSIDE_BLOCKS = {
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
IN_RESNETS = {
    "norm1": "in_layers.0",
    "norm2": "out_layers.0",
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}
IN_BLOCKS = re.compile(r"(down|mid|up)_blocks?(?:\.(\d+))?\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")


def _original_names(layer: str, layers_per_block: int) -> Iterator[str]:
    """What a layer of the UNet is called in the code of Rombach et al. (2022), which kept blocks in one list."""
    if layer in OUTSIDE_BLOCKS:
        yield OUTSIDE_BLOCKS[layer]
    if (match := IN_BLOCKS.fullmatch(layer)) is None:
        return
    side, block, kind, number, inside = match[1], int(match[2] or 0), match[3], int(match[4]), match[5]
    stride = layers_per_block + 1
    if kind == "downsamplers":
        yield f"input_blocks.{(block + 1) * stride}.0.op"
    elif kind == "upsamplers":  # behind an attention if the block has one
        yield from (f"output_blocks.{block * stride + layers_per_block}.{place}.{inside}" for place in (1, 2))
    else:
        place = 0 if kind == "resnets" else 1
        inside = IN_RESNETS.get(inside, inside) if kind == "resnets" else inside
        if side == "mid":
            yield f"middle_block.{2 * number + place}.{inside}"
        else:
            start = "input_blocks.{}" if side == "down" else "output_blocks.{}"
            yield f"{start.format(block * stride + number + (side == 'down'))}.{place}.{inside}"


def original_name(layer: str, config: Any) -> str:
    """What the code of Rombach et al. (2022) calls a layer of a UNet with `config`."""
    names = list(_original_names(layer, config.layers_per_block)) or [layer]
    block = re.match(r"up_blocks\.(\d+)\.upsamplers", layer)
    return names[-1 if block and "Attn" in config.up_block_types[int(block[1])] else 0]


def kohya_name(layer: str, config: Any) -> str:
    """What kohya's scripts call a layer of a UNet with `config`, before they make it flat.

    For Stable Diffusion 1 and 2 they train diffusers' UNet, for SDXL one named as in the original code.
    """
    return original_name(layer, config) if unet_is_xl(config) else layer


# ---- writing -------------------------------------------------------------------------------------------------------


def save_lora(state_dict: dict[str, Tensor], path: Path, **metadata: str) -> None:
    """Write a LoRA's tensors as `path` (.safetensors), whole or not at all; see `save_tensors`.

    Raises:
        OSError: it cannot be written.
    """
    save_tensors(state_dict, path, metadata)


def copy_lora(source: str | Path, path: Path, key: str = "lora") -> None:
    """Write the LoRA at `source` as `path`: as it is, or with the alpha that stands in a file beside it, folded in.

    Raises:
        UserError: it cannot be read.
        OSError: `path` cannot be written.
    """
    original = locate_lora(source, key)
    file = read_lora(original, f"{key}={short(source, 80)}")
    if not file.alpha_elsewhere:
        return write_atomic(path, original.read_bytes())
    tensors = {}
    for (network, name), update in file.updates.items():
        tensors[f"{network}.{name}.lora_A.weight"] = update.down.float()
        tensors[f"{network}.{name}.lora_B.weight"] = update.up.float() * update.scale
    save_lora(tensors, path)
