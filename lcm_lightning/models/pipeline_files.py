"""A Stable Diffusion pipeline's files: found, judged by its configs before its weights are read, read part by part."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any, Protocol

import diffusers
import torch
from diffusers import AutoencoderKL, SchedulerMixin, UNet2DConditionModel
from safetensors import safe_open
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lcm_lightning.errors import UserError, first_line, short
from lcm_lightning.hub import hub_answers, hub_refusal, is_hub_id

log = logging.getLogger(__name__)

# The class of each network, and the name of its weights.
NETWORKS: dict[str, tuple[Any, str]] = {
    "unet": (UNet2DConditionModel, "diffusion_pytorch_model"),
    "vae": (AutoencoderKL, "diffusion_pytorch_model"),
    "text_encoder": (CLIPTextModel, "model"),
    "text_encoder_2": (CLIPTextModelWithProjection, "model"),
}
# By which a UNet may want to be told more than timestep and caption, and the values by which it makes that of these.
EXTRA_CONDITIONS = {
    "class_embed_type": (None,),
    "num_class_embeds": (None,),
    "addition_embed_type": (None, "text"),
    "encoder_hid_dim_type": (None, "text_proj"),
}
# What SDXL's is told: pooled embedding and `Condition.time_ids`.
XL_CONDITIONS = {**EXTRA_CONDITIONS, "addition_embed_type": ("text_time",)}
TIME_IDS = 6
# Latents along one side where a UNet's config doesn't say: those of SD v1, and of SDXL.
SAMPLE_SIZE, XL_SAMPLE_SIZE = 64, 128
# Ids of the text encoder that a tokenizer may leave unused: embeddings are padded to round numbers.
UNUSED_IDS = 0.1
# Tokens of a vocabulary that may stand there for another reason than a merge.
UNMERGED = 0.001
# A full LCM's differs in what its UNet is told, and in the steps its scheduler takes.
XL_PIPELINE = "StableDiffusionXLPipeline"
PIPELINES = ("StableDiffusionPipeline", "LatentConsistencyModelPipeline", XL_PIPELINE)
XL_BASE = "stabilityai/stable-diffusion-xl-base-1.0"
AGAIN = "copy or download the folder again"


class NetworkFiles(Protocol):
    """Where a network is read from."""

    def config(self) -> dict[str, Any]:
        """Its config, as diffusers or transformers write it. Raises `UserError`."""

    def read(self, dtype: torch.dtype) -> nn.Module:
        """The network. Raises `UserError`: its files are missing, damaged or incomplete."""

    def tensors(self) -> Iterable[tuple[str, Tensor]]:
        """Its weights by the names and in the types that a diffusers folder has them, sorted. Raises `UserError`."""


def saved_name(network: str, key: str) -> str:
    """The name of a weight in a network's file, with the prefix of text encoders that transformers 5 leaves out."""
    return key if network != "text_encoder" or key.startswith("text_model.") else f"text_model.{key}"


@dataclass(frozen=True)
class FolderNetwork:
    """The files of the network `name` in a pipeline's `folder`; see `NetworkFiles`."""

    folder: Path
    name: str

    def config(self) -> dict[str, Any]:
        """See `NetworkFiles`."""
        return read_config(self.folder, self.name)

    def read(self, dtype: torch.dtype) -> nn.Module:
        """See `NetworkFiles`."""
        return read_network(self.folder, self.name, dtype)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """See `NetworkFiles`."""
        with reading(self.folder, self.name), ExitStack() as stack:
            files = weight_files(self.folder / self.name)[0]
            opened = [stack.enter_context(safe_open(file, framework="pt")) for file in files]
            keys = {saved_name(self.name, key): (key, file) for file in opened for key in file.keys()}  # noqa: SIM118
            for name, (key, file) in sorted(keys.items()):
                if not name.endswith(".position_ids"):  # numbers that old versions of transformers kept
                    yield name, file.get_tensor(key)


@dataclass(frozen=True)
class PipelineFiles:
    """A pipeline whose networks have not been read.

    Attributes:
        networks: the files of "unet", "vae", "text_encoder" and, of SDXL, "text_encoder_2".
        tokenizers: "tokenizer" and, of SDXL, "tokenizer_2".
        scheduler_config: diffusers' description of the noise schedule.
        empty_is_zero: whether the conditions of an empty caption are zeros; of SDXL alone.
    """

    networks: Mapping[str, NetworkFiles]
    tokenizers: Mapping[str, CLIPTokenizer]
    scheduler_config: Mapping[str, Any]
    empty_is_zero: bool = False

    @property
    def is_xl(self) -> bool:
        """Whether it is SDXL's."""
        return "text_encoder_2" in self.networks


def unet_is_xl(unet_config: Any) -> bool:
    """Whether a UNet is SDXL's, by what it is told beside the caption's tokens; see `XL_CONDITIONS`."""
    return bool(unet_config.addition_embed_type == "text_time")


def open_folder(folder: Path) -> PipelineFiles:
    """The pipeline in a diffusers folder. Raises `UserError`: it is none that can be trained or drawn with here."""
    check_networks(folder)
    texts = text_encoders(folder)
    networks = {name: FolderNetwork(folder, name) for name in ("unet", "vae", *texts)}
    names = [name.replace("text_encoder", "tokenizer") for name in texts]
    tokenizers = {name: read_tokenizer(folder, name) for name in names}
    zeros = is_xl(folder) and bool(read_index(folder, folder).get("force_zeros_for_empty_prompt", True))
    return PipelineFiles(networks, tokenizers, read_scheduler_config(folder), zeros)


def locate_pipeline(path: str, revision: str | None) -> Path:
    """The folder of a pipeline, downloaded if `path` is a hub id, or the single file that one is in.

    Raises:
        UserError: there is none, it is out of reach, or of a class that is none of `PIPELINES`.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        _check_pipeline_class(folder, path)
        return folder
    if folder.is_file():
        return folder
    if not is_hub_id(path):
        raise UserError(
            f"{model_path(path)}: no such folder or file; give a diffusers pipeline folder (with model_index.json), a "
            ".safetensors checkpoint or a hub id such as stable-diffusion-v1-5/stable-diffusion-v1-5"
        )
    options: dict[str, Any] = {"revision": revision, "use_safetensors": True, "local_files_only": not hub_answers()}
    left_out = {"safety_checker": None, "requires_safety_checker": False, "feature_extractor": None}
    try:
        folder = Path(diffusers.DiffusionPipeline.download(path, **options, **left_out))
    except (OSError, ValueError) as error:
        raise UserError(
            f"{model_path(path)}: no such folder here, and {hub_refusal(error)}; check the path, the id and `hf auth "
            f"login`, or fetch it elsewhere by `hf download {short(path, 60)} --local-dir DIR` and give model.path=DIR"
        ) from error
    _check_pipeline_class(folder, path)
    return folder


def model_path(path: str | Path) -> str:
    """What messages on a pipeline begin with: the setting, and the path, without its middle where it is long."""
    return f"model.path={short(path, 80)}"


def read_index(folder: Path, path: str | Path) -> dict[str, Any]:
    """A pipeline's `model_index.json`. Raises a `UserError` that says `path`: it is missing or damaged."""
    index = folder / "model_index.json"
    if not index.is_file():
        raise UserError(f"{model_path(path)}: holds no model_index.json; give a diffusers pipeline folder")
    try:
        content: dict[str, Any] = json.loads(index.read_text())
        if not isinstance(content, dict):
            raise ValueError("no object")
        return content
    except ValueError as error:
        raise UserError(
            f"{model_path(path)}: model_index.json is damaged ({error}); download the folder again"
        ) from error


def is_xl(folder: Path) -> bool:
    """Whether the pipeline in a folder is SDXL's."""
    return read_index(folder, folder).get("_class_name") == XL_PIPELINE


def text_encoders(folder: Path) -> tuple[str, ...]:
    """Names of the text encoders of the pipeline in a folder."""
    return ("text_encoder", "text_encoder_2") if is_xl(folder) else ("text_encoder",)


def _check_pipeline_class(folder: Path, path: str) -> None:
    index = read_index(folder, path)
    name = index.get("_class_name")
    if index.get("requires_aesthetics_score"):
        raise UserError(
            f"{model_path(path)}: is SDXL's refiner, which only finishes what the base model began; give that, such as "
            f"{XL_BASE}"
        )
    if name not in PIPELINES:
        *others, last = PIPELINES
        raise UserError(f"{model_path(path)}: is a {name}; only {', '.join(others)} and {last} are supported")


def check_networks(folder: Path) -> None:
    """Raise a `UserError` unless the networks are there, fit together and are such as are trained here.

    A UNet without `sample_size` is taken for one of SD v1's, or SDXL's, and said to be.
    """
    xl = is_xl(folder)
    unet, vae = (read_config(folder, name) for name in ("unet", "vae"))
    texts = {name: read_config(folder, name) for name in text_encoders(folder)}
    for name, config in (("unet", unet), ("vae", vae)):
        _check_class(folder, name, config.get("_class_name"))
        weight_files(folder / name)
    for name in texts:
        weight_files(folder / name)
    where = f"{model_path(folder)}: unet/config.json"
    if (dimension := unet.get("time_cond_proj_dim")) and (dimension < 4 or dimension % 2):
        raise UserError(f"{where}: time_cond_proj_dim={dimension}: expected an even number of at least 4; {AGAIN}")
    latents = vae.get("latent_channels", 4)
    channels = unet.get("in_channels", 4), unet.get("out_channels", 4)
    if channels != (latents, latents):
        raise UserError(
            f"{where}: {channels[0]} channels in and {channels[1]} out, where the VAE has {latents}; UNets for "
            "inpainting (9) and editing (8) are not supported: give a text-to-image model"
        )
    conditions = XL_CONDITIONS if xl else EXTRA_CONDITIONS
    if wanted := [name for name, free in conditions.items() if unet.get(name) not in free]:
        expected = "with two text encoders text_time is supported" if xl else "which is not supported"
        raise UserError(
            f"{where}: {wanted[0]}={unet.get(wanted[0])}: a condition beside the caption, {expected}; give a Stable "
            "Diffusion v1, v2 or XL model"
        )
    _check_text_widths(where, unet, texts)
    for name, config in (("unet", unet), ("vae", vae)):
        for key, (is_right, expected) in CONFIG_VALUES.items():
            if key in config and not is_right(config[key]):
                raise UserError(
                    f"{model_path(folder)}: {name}/config.json: {key}={short(repr(config[key]))}: expected {expected}; "
                    f"{AGAIN}"
                )
    if unet.get("sample_size") is None:
        log.warning(
            "%s has no sample_size: %d, that of %s, is taken; data.resolution sets another",
            where,
            *((XL_SAMPLE_SIZE, "SDXL") if xl else (SAMPLE_SIZE, "SD v1")),
        )


def _check_text_widths(where: str, unet: Mapping[str, Any], texts: Mapping[str, Mapping[str, Any]]) -> None:
    """Raise a `UserError` unless the UNet takes embeddings as wide as the text encoders', side by side, give them."""
    widths = [text.get("hidden_size", 512) for text in texts.values()]
    expected = unet.get("encoder_hid_dim") or unet.get("cross_attention_dim", 1280)
    if not all(isinstance(width, int) for width in widths) or sum(widths) != expected:
        files = " and ".join(f"{name}/config.json" for name in texts)
        raise UserError(
            f"{where}: cross_attention_dim={short(expected)}, where {files} has hidden_size="
            f"{short(' + '.join(map(str, widths)))}; take UNet and text encoder of one model"
        )
    if second := texts.get("text_encoder_2"):
        told, each = unet.get("projection_class_embeddings_input_dim"), unet.get("addition_time_embed_dim")
        pooled = second.get("projection_dim", 512)
        if not (isinstance(each, int) and isinstance(pooled, int)) or told != pooled + TIME_IDS * each:
            raise UserError(
                f"{where}: projection_class_embeddings_input_dim={short(told)}: expected projection_dim of "
                f"text_encoder_2/config.json and {TIME_IDS} times addition_time_embed_dim, {short(pooled)} + "
                f"{TIME_IDS} x {short(each)}; give the base model, not a refiner"
            )


def _are_sizes(value: object) -> bool:
    """Whether a config may give so several sizes."""
    return isinstance(value, list) and bool(value) and all(type(size) is int and size > 0 for size in value)


def _is_size(value: object) -> bool:
    """Whether a config may say so of the side of images or latents: a number, height and width, or nothing."""
    return value is None or _are_sizes(value if isinstance(value, list) else [value])


def _is_scale(value: object) -> bool:
    """Whether latents can be divided by a value of a config."""
    return isinstance(value, int | float) and math.isfinite(value) and value != 0


# Values of UNet and VAE that are computed with here, and what they have to be.
CONFIG_VALUES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "sample_size": (_is_size, "whole numbers, such as 64"),
    "block_out_channels": (_are_sizes, "whole numbers, such as [128, 256]"),
    "scaling_factor": (_is_scale, "a number, such as 0.18215"),
    "shift_factor": (lambda value: not value or _is_scale(value), "a number or null"),
    "latents_mean": (lambda value: value is None, "null: latents are scaled by one number"),
}


def _check_class(folder: Path, name: str, found: str | None) -> None:
    expected = NETWORKS[name][0].__name__
    if found == expected:
        return
    remedy = "give the full one there, and this as model.preview_vae" if found == "AutoencoderTiny" else "give one"
    raise UserError(f"{model_path(folder)}: {name}/config.json: is of class {found}, expected {expected}; {remedy}")


@contextmanager
def reading(folder: Path, part: str) -> Iterator[None]:
    """Turn what libraries raise on missing or damaged files into a `UserError` that names the part of the pipeline."""
    with reading_of(model_path(folder), part, AGAIN, f"{folder}/"):
        yield


@contextmanager
def reading_of(said: str, part: str, remedy: str, hidden: str = "\0") -> Iterator[None]:
    """The same for what the setting and path `said` name; their message is quoted without `hidden`."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # of half a dozen libraries
        reason = first_line(error).replace(hidden, "")[:120]
        raise UserError(f"{said}: cannot be loaded: {part} ({reason}); {remedy}") from error


def read_config(folder: Path, name: str) -> dict[str, Any]:
    """A network's config as it lies in the folder. Raises `UserError`."""
    file = folder / name / "config.json"
    if not file.is_file():
        raise UserError(f"{model_path(folder)}: cannot be loaded: there is no {name}/config.json; {AGAIN}")
    with reading(folder, f"{name}/config.json"):
        return dict(json.loads(file.read_text(encoding="utf-8")))


def weight_files(folder: Path) -> tuple[list[Path], str | None]:
    """The safetensors files of a network, and the variant they are: "fp16" where the plain ones are not there.

    Raises:
        UserError: there are none.
    """
    stem = NETWORKS[folder.name][1]
    for infix, variant in (("", None), (".fp16", "fp16")):
        patterns = (
            f"{stem}{infix}.safetensors",
            f"{stem}{infix}-*-of-*.safetensors",
            f"{stem}-*-of-*{infix}.safetensors",
        )
        if files := next(filter(None, (sorted(folder.glob(pattern)) for pattern in patterns)), None):
            return files, variant
    where = f"{model_path(folder.parent)}: {folder.name} has no {stem}.safetensors"
    if unsafe := [path.name for suffix in ("bin", "ckpt", "pt", "pth") for path in folder.glob(f"*.{suffix}")]:
        raise UserError(
            f"{where} but {unsafe[0]}, which can run code when it is read; if you trust it, convert the folder with "
            "diffusers: StableDiffusionPipeline.from_pretrained(OLD).save_pretrained(NEW)"
        )
    raise UserError(f"{where}; {AGAIN}")


def read_network(folder: Path, name: str, dtype: torch.dtype) -> nn.Module:
    """A network of the pipeline in `folder`. Raises `UserError`: its files are missing, damaged or incomplete."""
    network_class = NETWORKS[name][0]
    with reading(folder, name):
        _refuse_quantised(folder, name)
    options = {
        "use_safetensors": True,
        "variant": weight_files(folder / name)[1],
        "dtype": dtype,
        "output_loading_info": True,
        "local_files_only": True,
    }
    with reading(folder, name):
        network, report = network_class.from_pretrained(folder / name, **options)
    check_weights(network, report["missing_keys"], model_path(folder), name, dtype, AGAIN)
    if adapters := [key for key in report["unexpected_keys"] if ".lora_" in key]:
        raise UserError(
            f"{model_path(folder)}: {name} has a LoRA beside its weights, first {short(adapters[0])}, which would not "
            "act; fuse it (pipe.fuse_lora()) and save the model again"
        )
    return network


def check_weights(
    network: nn.Module, missing: Collection[str], said: str, name: str, dtype: torch.dtype, remedy: str
) -> None:
    """Raise a `UserError` unless the network called `name` has all its weights, and finite ones."""
    if missing:
        raise UserError(f"{said}: the weights of {name} lack {len(missing)} tensors, first {min(missing)}; {remedy}")
    for tensor_name, weight in network.named_parameters():
        if weight.numel() and not torch.stack(weight.aminmax()).isfinite().all():  # in one pass, without a copy
            raise UserError(
                f"{said}: weights of {name} are not finite in {dtype}, first {short(tensor_name)}; {remedy}, or take "
                "one from before its training diverged"
            )


def _refuse_quantised(folder: Path, name: str) -> None:
    """Raise a `UserError` for weights of whole numbers: without what they are scaled by they are none."""
    for file in weight_files(folder / name)[0]:
        with safe_open(file, "pt") as tensors:
            types = {key: tensors.get_slice(key).get_dtype() for key in tensors.keys()}  # noqa: SIM118  # no mapping
        refuse_quantised(types, model_path(folder), name)


def refuse_quantised(types: Mapping[str, str], said: str, name: str) -> None:
    """Raise a `UserError` if any of the weights of the network `name`, given by their `types`, is a whole number."""
    for key, kind in types.items():
        if "F" not in kind and not key.endswith("position_ids"):
            raise UserError(
                f"{said}: {name} is quantised ({short(key)} is of type {kind}), which is not supported; give its "
                "weights in float16 or float32"
            )


def read_tokenizer(folder: Path, name: str = "tokenizer") -> CLIPTokenizer:
    """A tokenizer of the pipeline in `folder`, cutting captions at the length its text encoder has positions for.

    transformers makes a tokenizer of two tokens where the vocabulary is missing.

    Raises:
        UserError: its files are missing or damaged, or its vocabulary is not the text encoder's.
    """
    files, encoder = folder / name, name.replace("tokenizer", "text_encoder")
    if not (files / "tokenizer.json").is_file():
        for file in ("vocab.json", "merges.txt"):
            if not (files / file).is_file():
                raise UserError(
                    f"{model_path(folder)}: {name} holds neither tokenizer.json nor {file}, without which all "
                    f"captions read the same; {AGAIN}"
                )
    with reading(folder, name):
        tokenizer = CLIPTokenizer.from_pretrained(files, local_files_only=True)
    with reading(folder, f"{encoder}/config.json"):
        text = CLIPTextConfig.from_pretrained(folder / encoder, local_files_only=True)
    _check_merges(folder, name, tokenizer)
    size = max(tokenizer.get_vocab().values()) + 1
    if not (1 - UNUSED_IDS) * text.vocab_size <= size <= text.vocab_size:
        raise UserError(
            f"{model_path(folder)}: {name} knows {size} tokens, the text encoder {text.vocab_size} (vocab_size); "
            "give it the tokenizer it was trained with"
        )
    length, positions = tokenizer.model_max_length, text.max_position_embeddings
    tokenizer.model_max_length = min(length, positions) if isinstance(length, int) and length > 0 else positions
    return tokenizer


def _check_merges(folder: Path, name: str, tokenizer: CLIPTokenizer) -> None:
    """Raise a `UserError` unless the tokenizer merges letters into all tokens of its vocabulary (Sennrich et al. 2016).

    Without merges, or with half of them, it spells captions as the text encoder has never seen them.
    """
    model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    made = {"".join(pair if isinstance(pair, list) else pair.split(" ")) for pair in model["merges"]}
    made |= tokenizer.get_added_vocab().keys()
    lost = [token for token in model["vocab"] if len(token.removesuffix("</w>")) > 1 and token not in made]
    if len(lost) > UNMERGED * len(model["vocab"]):
        raise UserError(
            f"{model_path(folder)}: {name} has no merges for {len(lost)} of its {len(model['vocab'])} tokens, first "
            f"{short(lost[0], 30)!r}, so that captions come out in other ones; {AGAIN}"
        )


def read_scheduler_config(folder: Path) -> Mapping[str, Any]:
    """The config of the scheduler in `folder`, with its class's defaults.

    Raises:
        UserError: it is missing or damaged, or of a class for models of another kind.
    """
    with reading(folder, "scheduler/scheduler_config.json"):
        given = json.loads((folder / "scheduler" / "scheduler_config.json").read_text(encoding="utf-8"))
        indexed = json.loads((folder / "model_index.json").read_text(encoding="utf-8")).get("scheduler")
        name = (indexed or [None, None])[1] or given["_class_name"]
        for other in {name, given.get("_class_name", name)}:
            _check_diffusion(folder, other, given)
        config: Mapping[str, Any] = getattr(diffusers, name).from_config(given).config
        if is_xl(folder):
            _refuse_distilled(folder, config)
        return config


def _refuse_distilled(folder: Path, schedule: Mapping[str, Any]) -> None:
    """Raise a `UserError` for SDXL Turbo and its like, which make nothing of guidance.

    They are SDXL but for their weights and the spacing of their steps, which otherwise only models of zero terminal
    SNR have.
    """
    if schedule.get("timestep_spacing") == "trailing" and not schedule.get("rescale_betas_zero_snr"):
        raise UserError(
            f"{model_path(folder)}: scheduler_config.json: timestep_spacing=trailing is of models distilled already "
            "(SDXL Turbo, Lightning), whose guidance teaches nothing; give the model it was made from, or set leading "
            "there if it is none"
        )


def _check_diffusion(folder: Path, name: str, config: Mapping[str, Any]) -> None:
    """Raise a `UserError` for a scheduler that knows no ``beta_t``: its models are none of Ho et al. (2020)."""
    scheduler: Any = getattr(diffusers, name, None)
    if not (isinstance(scheduler, type) and issubclass(scheduler, SchedulerMixin)):
        raise ValueError(f"{name} is no scheduler of diffusers")
    if "beta_schedule" not in signature(scheduler).parameters or config.get("use_flow_sigmas"):
        raise UserError(
            f"{model_path(folder)}: scheduler/scheduler_config.json: {name} is for models of another kind, such as "
            "flow matching; only those trained on a schedule of betas are supported: give one of Stable Diffusion"
        )
