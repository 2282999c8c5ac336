"""`python -m lcm_lightning.inspect FILE_OR_FOLDER`: what a LoRA, a run or a model is, without loading a model."""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from omegaconf import OmegaConf
from torch import nn
from transformers import CLIPTextConfig

from lcm_lightning.errors import UserError, first_line, program, report_user_errors, short
from lcm_lightning.models.architectures import SD1, SD2, SDXL, Architecture
from lcm_lightning.models.lora_files import (
    BASE_MODELS,
    LORA_FILE,
    PEFT_FILE,
    LoraFile,
    fit,
    locate_lora,
    match_layers,
    read_lora,
)
from lcm_lightning.models.pipeline_files import NETWORKS, locate_pipeline, model_path, open_folder
from lcm_lightning.models.single_file import (
    PREFIXES,
    architecture_of,
    is_checkpoint,
    open_single_file,
    predicted,
    read_header,
)
from lcm_lightning.output.console import plain_table, print_table
from lcm_lightning.output.streams import lasting_output
from lcm_lightning.runs.contents import MANIFEST, exported, read_config, read_manifest
from lcm_lightning.runs.folders import CONFIG, meant_run

SHOWN = 10  # exceptions and unused keys


@lasting_output()
@report_user_errors
def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog=program(), description="Says what a LoRA, a run or a model is.")
    parser.add_argument("place", type=Path, metavar="FILE_OR_FOLDER", help="a .safetensors file, a run or a model")
    parser.add_argument(
        "--model", type=Path, metavar="PLACE", help="a model's folder or file, which the LoRA is to fit"
    )
    arguments = parser.parse_args()
    networks = None if arguments.model is None else networks_of(arguments.model)
    for title, rows in describe(arguments.place, networks):
        table = plain_table("", "", title=title, show_header=False)
        for label, text in rows:
            table.add_row(label, text)
        print_table(table)


def describe(
    place: Path, networks: Mapping[str, nn.Module] | None = None
) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Titles and rows of label and text for everything that is at `place`.

    Args:
        networks: those that a LoRA is to fit; None: those of the base model that it tells.

    Raises:
        UserError: nothing of the kind is there.
    """
    if not place.exists():
        raise UserError(f"{place}: no such file or folder; give a LoRA file, a run's folder or a model's")
    run = place.parent if (place / MANIFEST).is_file() else place
    if (folder := exported(run)) is not None:
        for adapter in read_manifest(run):
            kind, file = adapter.kind, folder / adapter.file
            use = f"{kind.sampler.name}, {kind.steps} steps, guidance {kind.guidance_scale:g}"
            step = [] if adapter.step is None else [("step", str(adapter.step))]
            name = ("adapter", f"{kind.name} ({kind.title})")
            content = model_rows(folder) if kind.whole else lora_rows(file, networks)
            yield str(file), [name, *base_rows(run), ("drawn by", use), *step, *content]
    elif (place / "model_index.json").is_file():
        yield str(place), model_rows(place)
    elif place.suffix == ".safetensors" and place.is_file() and is_checkpoint(place):
        yield str(place), checkpoint_rows(place)
    else:
        if place.is_dir() and not any((place / name).is_file() for name in (LORA_FILE, PEFT_FILE)):
            run = meant_run(place, exported)
            remedy = "give one that does" if run is None else f"did you mean {run}?"
            raise UserError(f"{place}: holds no LoRA, no {MANIFEST} of a run and no model_index.json; {remedy}")
        file = locate_lora(place.absolute(), "LoRA")
        yield str(file), lora_rows(file, networks)


def base_rows(run: Path) -> list[tuple[str, str]]:
    """The model that a run was trained on, where the run says so."""
    if not (run / CONFIG).is_file():
        return []
    path = OmegaConf.select(read_config(run), "model.path")
    return [] if path is None else [("trained on", f"model.path={path}")]


def lora_rows(path: Path, networks: Mapping[str, nn.Module] | None) -> list[tuple[str, str]]:
    """What a LoRA file holds."""
    file = read_lora(path, short(path, 80))
    rows = [("layout", file.layout), ("base model", base_model(file))]
    for network, number in Counter(network for network, _ in file.updates).items():
        rows.append((network.replace("_", " "), f"{number} layers"))
    return [*rows, *scale_rows(file), fitting(file, networks, short(path, 80))]


def base_model(file: LoraFile) -> str:
    """The base model, and what tells it."""
    width = file.cross_attention_dim
    if width is None:
        return f"{file.base_model}, by its layers" if file.base_model else "not told: no cross-attention in it"
    return f"{file.base_model or 'unknown'}, by a cross-attention of width {width}"


def scale_rows(file: LoraFile) -> list[tuple[str, str]]:
    """Rank and alpha of most layers, and which layers have others."""
    scales = {name: f"rank {update.rank}, alpha {update.alpha:g}" for (_, name), update in file.updates.items()}
    if not scales:
        return []
    ((usual, number),) = Counter(scales.values()).most_common(1)
    others = [f"{name}: {scale}" for name, scale in scales.items() if scale != usual]
    rows = [("scale", f"{usual} ({number} of {len(scales)} layers)")]
    return [*rows, ("others", listed(others))] if others else rows


def fitting(file: LoraFile, networks: Mapping[str, nn.Module] | None, said: str) -> tuple[str, str]:
    """Keys that no layer takes, of `networks` or of the base model that the file tells; or why it does not fit."""
    known = networks or networks_like(file.base_model)
    if known is None:
        return "unused", f"{listed(list(file.unused))}; --model FOLDER compares with a model's layers"
    try:
        if unused := match_layers(file, known, said)[1]:
            return "unused", listed(unused)
        fit(file, known, said, "this model")
    except UserError as error:
        return "refused", str(error)
    return "unused", "none"


def listed(texts: list[str]) -> str:
    """The first of them, a line each, and how many more there are."""
    more = [f"... and {len(texts) - SHOWN} more"] if len(texts) > SHOWN else []
    return "\n".join([*texts[:SHOWN], *more]) or "none"


def networks_like(base_model: str | None) -> dict[str, nn.Module] | None:
    """UNet and text encoders of a base model, without memory behind their weights."""
    known = next((one for one in (SD1, SD2, SDXL) if one.title == base_model), None)
    return None if known is None else networks_by(known)


def networks_of(place: Path) -> dict[str, nn.Module]:
    """UNet and text encoders of a model's folder or single file, without memory behind their weights."""
    if not place.exists():
        raise UserError(f"--model {short(place, 80)}: no such file or folder; give a model's, on this machine")
    if place.is_file():
        return networks_by(architecture_of(read_header(place, f"--model {short(place, 80)}")))
    names = ["text_encoder", *(["text_encoder_2"] if (place / "text_encoder_2").is_dir() else [])]
    unet, *texts = (read_json(place / name / "config.json") for name in ("unet", *names))
    return build(unet, dict(zip(names, texts, strict=True)))


def networks_by(architecture: Architecture) -> dict[str, nn.Module]:
    """UNet and text encoders of an architecture."""
    return build(architecture.unet, architecture.text_encoders)


def build(unet: Mapping[str, Any], texts: Mapping[str, Mapping[str, Any]]) -> dict[str, nn.Module]:
    """The networks by their configs, text encoders by name."""
    try:
        with torch.device("meta"):
            encoders = {name: NETWORKS[name][0](CLIPTextConfig(**text)) for name, text in texts.items()}
            return {"unet": UNet2DConditionModel.from_config(dict(unet)), **encoders}
    except Exception as error:  # whatever such a value does where it is first used
        raise UserError(f"--model: its configs are of no Stable Diffusion ({first_line(error)[:100]})") from error


def model_rows(folder: Path) -> list[tuple[str, str]]:
    """What a model's folder says of itself, right or wrong; None where it says nothing."""
    unet = read_json(folder / "unet" / "config.json")
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")
    width = unet.get("cross_attention_dim")
    base = BASE_MODELS.get(width, "unknown") if isinstance(width, int) else "unknown"
    rows = [
        ("pipeline", said(read_json(folder / "model_index.json").get("_class_name"))),
        ("base model", f"{base}, by cross-attention {said(width)} wide"),
        ("UNet", f"blocks of {said(unet.get('block_out_channels'))} channels"),
        ("latents", f"{said(unet.get('sample_size'))} wide, {said(unet.get('in_channels'))} channels"),
        ("scheduler", said(scheduler.get("_class_name"))),
        ("predicts", said(scheduler.get("prediction_type"))),
        ("guidance", "told to the UNet (a full LCM)" if unet.get("time_cond_proj_dim") else "by a second pass"),
    ]
    try:
        open_folder(locate_pipeline(str(folder), None))
    except UserError as error:
        rows.append(("refused", str(error)))
    return rows


def checkpoint_rows(path: Path) -> list[tuple[str, str]]:
    """What a checkpoint in one file holds."""
    header = read_header(path, model_path(path))
    width = header.cross_attention_dim
    rows = [
        ("layout", "a checkpoint in one file"),
        ("base model", f"{BASE_MODELS.get(width or 0, 'unknown')}, by cross-attention {said(width)} wide"),
    ]
    for network, prefixes in PREFIXES.items():
        types = Counter(header.types[name] for name in header.of(*prefixes))
        if network == "text_encoder_2" and not types:  # of SDXL alone; what lacks it is refused below
            continue
        held = ", ".join(f"{number} tensors of {kind}" for kind, number in types.most_common())
        rows.append((network.replace("_", " "), held or "none"))
    rows.append(("predicts", said(predicted(header) or "not told")))
    try:
        open_single_file(path, None, other_vae=False)
    except UserError as error:
        rows.append(("refused", str(error)))
    return rows


def said(value: object) -> str:
    """A value of a config in a few words; a list by its items."""
    return short(", ".join(map(str, value)) if isinstance(value, list) else str(value))


def read_json(path: Path) -> dict[str, Any]:
    """An object of a file. Raises `UserError`."""
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{short(path, 80)}: cannot be read ({first_line(error)[:100]}); download it again") from error


if __name__ == "__main__":
    main()
