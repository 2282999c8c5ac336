"""A model card: what a run's export is, how it is used, how good it is and how it was made.

Cards of the Hugging Face hub are Markdown under a head of YAML (https://huggingface.co/docs/hub/model-cards). Nothing
is in it that only this machine knows: no path, no name of a user.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jinja2
from huggingface_hub import ModelCard, ModelCardData
from PIL import Image
from safetensors import safe_open

from lcm_lightning.data.layouts import DOWNLOADS
from lcm_lightning.errors import first_line
from lcm_lightning.evaluation.photos import without_photos
from lcm_lightning.evaluation.tables import Table, quality_table
from lcm_lightning.models import pipeline_files
from lcm_lightning.models.kinds import LORA_FILE, AdapterKind
from lcm_lightning.models.programs import loader, quoted, scheduler_settings
from lcm_lightning.output.files import write_atomic
from lcm_lightning.output.pictures import grid_images, png_bytes
from lcm_lightning.output.visible_files import CARD, EVALUATION_GRID, PICTURES
from lcm_lightning.runs.contents import MANIFEST, Adapter, exported, read_manifest, read_versions, weights_digest
from lcm_lightning.sharing.base_models import BaseModel, base_model, was_hub_id
from lcm_lightning.sharing.redaction import public
from lcm_lightning.sharing.training_facts import (
    images_per_step,
    settings_of_run,
    training_command,
    training_seconds,
    training_table,
)

log = logging.getLogger(__name__)

MARK = "<!-- Written by lcm-lightning, which renews it. Remove this line, and the page is yours and left as it is. -->"
SAID = "<!-- Said by a person: "
TEMPLATES = Path(__file__).parent / "templates"
LARGEST_PICTURE = 512  # px of a side
EMBEDDED_BASE = "The base model, `{}`, is the pipeline that ships with lcm-lightning as `lcm_lightning/assets/tiny`."
LOCAL_BASE = "The base model lay in a local folder or file, `{}`, and is named by that alone."
LICENSE = "The licence given is that of the base model; the terms of the data set are its own."
NO_LICENSE = (
    "The licence is not known: weights trained on a model are bound by that model's, and nothing said what that of "
    "`{}` is (`license=...` of `python -m lcm_lightning.export` does)."
)


@dataclass(frozen=True)
class CardSettings:
    """What a run does not know and a person may say. A card keeps it for when it is renewed.

    Attributes:
        repo_id: where the card will stand on the hub.
        base_model: hub id of the base model, where the run had a local copy.
        license: as cards name it, such as openrail++.
    """

    repo_id: str | None = None
    base_model: str | None = None
    license: str | None = None

    def said(self) -> dict[str, str]:
        """Those that are not None."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def settings_of(card: str) -> CardSettings:
    """What a person had said when `card` was written."""
    found = re.search(rf"^{re.escape(SAID)}(.*) -->$", card, re.MULTILINE)
    return CardSettings(**json.loads(found[1])) if found else CardSettings()


def write_card(run: Path, settings: CardSettings | None = None) -> Path | None:
    """Write or renew the card of what a run has exported, with pictures beside it; its path.

    None where there is nothing to write of: no export, or no record of settings. A card that a person has made their
    own is left alone.

    Raises:
        UserError: `settings`, or the run's records, make no sense.
        OSError: it cannot be written.
    """
    folder = exported(run)
    if folder is None or not (run / "config.yaml").is_file():
        return None
    path = folder / CARD
    before = path.read_text(encoding="utf-8") if path.is_file() else None
    if before is not None and MARK not in before:
        return path
    samples, metrics = write_pictures(run, folder), evaluation_of(run)
    copy_evaluation_grid(run, folder, metrics)
    said = replace(settings_of(before or ""), **(settings or CardSettings()).said())
    known_ids = None if before is None else ids_of(before)
    write_atomic(path, card_of(run, folder, samples, metrics, said, known_ids).encode())
    return path


def ids_of(card: str) -> set[str]:
    """Ids on the hub of the base model and the data sets that a card names."""
    head = ModelCard(card, ignore_metadata_errors=True).data.to_dict()
    named = (head.get("base_model"), head.get("datasets"))
    return {name for names in named for name in ([names] if isinstance(names, str) else names or [])}


def renew_card(run: Path) -> None:
    """`write_card` where it is beside the point: what fails is a warning, and not worth a training or its figures."""
    try:
        write_card(run)
    except Exception as error:  # what a card reads is of many kinds
        log.warning("the model card of %s was not written (%s)", run, error_line(error))


def error_line(error: Exception) -> str:
    """An error's first line, which of some is but a name of a key, after its type."""
    return f"{type(error).__name__}: {first_line(error)}"


def card_of(
    run: Path,
    folder: Path,
    samples: Mapping[str, str],
    metrics: Mapping[str, Any] | None,
    settings: CardSettings,
    known_ids: Collection[str] | None = None,
) -> str:
    """The card's text.

    Args:
        folder: of the run's export.
        samples: prompts by picture, whose paths are relative to `folder`.
        metrics: see `evaluation_of`.
        known_ids: see `was_hub_id`.
    """
    config, adapters = settings_of_run(run), read_manifest(run)
    kind, base = adapters[-1].kind, base_model(config["model"], settings.base_model, known_ids)
    license = settings.license or base.license
    seconds = training_seconds(run / "metrics.csv", images_per_step(config))
    header = {} if kind.whole else lora_header(folder)
    xl = is_xl(folder, kind, header)
    prompt = next(iter(samples.values()), "a photo of a dog")
    content = {
        "kind": kind,
        "below": adapters[:-1],
        "base": base,
        "notes": notes(base, license, given=settings.license is not None),
        "data": config["data"]["name"],
        "usage": usage(adapters, base, prompt, config, settings.repo_id, schedule_of(base, header, config), xl=xl),
        "repo_id": settings.repo_id,
        "model": "sdxl" if xl else "sd15",
        "files": {file.name for file in folder.iterdir()},
        "pictures": samples,
        "evaluation": metrics,
        "quality": quality_table(metrics["models"]) if metrics else None,
        "has_grid": (folder / EVALUATION_GRID).is_file(),
        "training": training_table(config, adapters[-1].step, seconds),
        "command": training_command(run),
        "versions": read_versions(folder / MANIFEST),
        "mark": MARK,
        "said": f"{SAID}{json.dumps(settings.said())} -->" if settings.said() else None,
    }
    datasets = hub_datasets(config["data"], known_ids)
    data = card_data(kind, base, license, datasets, samples, xl)
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_template('model_card.md.j2').render(content)}").content


def notes(base: BaseModel, license: str | None, *, given: bool) -> list[str]:
    """What a reader should know of origin and licence.

    Args:
        given: whether a person has said the licence.
    """
    origin = [] if base.hub_id else [(EMBEDDED_BASE if base.embedded else LOCAL_BASE).format(base.name)]
    if given:
        return origin
    return [*origin, LICENSE if license else NO_LICENSE.format(base.name)]


def card_data(
    kind: AdapterKind,
    base: BaseModel,
    license: str | None,
    datasets: list[str],
    samples: Mapping[str, str],
    xl: bool,
) -> ModelCardData:
    """The head, by which the hub files a model."""
    tags = ["text-to-image", "diffusers", "stable-diffusion-xl" if xl else "stable-diffusion"]
    tags += [] if kind.whole else ["lora"]
    tags += [kind.name, "distillation"] if kind.role == "student" else []
    other: dict[str, Any] = {**license_head(license)}
    if base.hub_id:
        other |= {"base_model": base.hub_id, "base_model_relation": "finetune" if kind.whole else "adapter"}
    return ModelCardData(
        library_name="diffusers",
        pipeline_tag="text-to-image",
        datasets=datasets or None,
        tags=[*tags, "lcm-lightning"],
        widget=[{"text": prompt, "output": {"url": picture}} for picture, prompt in samples.items()] or None,
        **other,
    )


def license_head(license: str | None) -> dict[str, str]:
    """How a card names a licence: by an id of the hub's list, or as another one."""
    if license is not None and re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license):
        return {"license": license}
    name = "unknown" if license is None else re.sub(r"[^a-z0-9.+]+", "-", license.lower()).strip("-")
    return {"license": "other", "license_name": name}


def hub_datasets(data: Mapping[str, Any], known_ids: Collection[str] | None = None) -> list[str]:
    """Ids of the data sets on the hub that a run's `data` section means; for `known_ids` see `was_hub_id`."""
    source = str(data.get("source") or "")
    if source.startswith("hf://datasets/"):
        return ["/".join(source.removeprefix("hf://datasets/").split("/")[:2])]
    ready = [ids for _, ids in DOWNLOADS.values()]
    if was_hub_id(source, None if known_ids is None else {*known_ids, *ready}):
        return [source]
    known = DOWNLOADS.get(data["name"], ("", ""))[1]
    return [known] if known else []


def lora_header(folder: Path) -> dict[str, str]:
    """What the LoRA of an export says of itself (`exports.metadata.model_spec`)."""
    with safe_open(folder / LORA_FILE, "pt") as file:
        return dict(file.metadata() or {})


def is_xl(folder: Path, kind: AdapterKind, header: Mapping[str, str]) -> bool:
    """Whether an export is for SDXL, by its own files; for `header` see `lora_header`."""
    if kind.whole:
        return pipeline_files.is_xl(folder)
    if (architecture := header.get("modelspec.architecture")) is not None:
        return architecture.startswith("stable-diffusion-xl")
    with safe_open(folder / LORA_FILE, "pt") as file:  # of former versions, which says nothing
        return any(".transformer_blocks.1." in key for key in file.keys())  # noqa: SIM118  # no mapping


def schedule_of(base: BaseModel, header: Mapping[str, str], config: Mapping[str, Any]) -> dict[str, Any]:
    """What is known of the base model's noise schedule, and is not in the scheduler that diffusers makes of its files.

    A checkpoint in one file has none; and `model.prediction_type` corrects others.
    """
    schedule: dict[str, Any] = {"rescale_betas_zero_snr": True} if base.zero_terminal_snr else {}
    predicts = header.get("modelspec.prediction_type")
    if predicts is not None and (base.is_file or config["model"].get("prediction_type")):
        schedule["prediction_type"] = {"v": "v_prediction"}.get(predicts, predicts)
    return schedule


def usage(
    adapters: Sequence[Adapter],
    base: BaseModel,
    prompt: str,
    config: Mapping[str, Any],
    repo_id: str | None,
    schedule: Mapping[str, Any],
    *,
    xl: bool,
) -> str:
    """A program for diffusers that draws `prompt` with what was exported, as its method means it to be drawn with.

    Args:
        schedule: see `schedule_of`.
        xl: whether the base model is SDXL.
    """
    kind = adapters[-1].kind
    pipeline, load = ("DiffusionPipeline", "from_pretrained") if kind.whole else loader(is_file=base.is_file, xl=xl)
    untold = tuple(key for key in schedule if base.is_file or key == "prediction_type")
    settings = scheduler_settings(kind.sampler, schedule, from_file=untold)
    call: dict[str, Any] = {"num_inference_steps": kind.steps, "guidance_scale": kind.guidance_scale}
    if "eta" in kind.sampler.settings:
        call["eta"] = kind.sampler.settings["eta"]
    if side := config["data"].get("resolution"):
        call |= {"height": side, "width": side}
    return _template("usage.py.j2").render(
        kind=kind,
        adapters=adapters,
        base=quoted(base.hub_id or f"path/to/{base.name}"),
        pipeline=pipeline,
        load=load,
        place=quoted(repo_id or "path/to/this/folder"),
        settings=[f"{key}={value!r}" for key, value in settings.items()],
        call=[f"{key}={value!r}" for key, value in call.items()],
        prompt=quoted(prompt),
    )


def write_pictures(run: Path, folder: Path) -> dict[str, str]:
    """Put what was drawn in the usual steps in the run's last grid beside the card; prompts by picture."""
    *_, adapter = read_manifest(run)
    grids = sorted((run / "samples").glob("step_*.png"))
    exact = run / "samples" / f"step_{adapter.step or 0:06d}.png"  # that of the best step, where that is kept
    if not grids:
        return {}
    with Image.open(exact if exact in grids else grids[-1]) as file:
        images = grid_images(file.convert("RGB"))
    headings = [image.heading for image in images]
    wanted = adapter.kind.label(adapter.kind.steps)
    if wanted not in headings:
        wanted = headings[-1] if headings else ""
    prompts = {}
    for number, image in enumerate((image for image in images if image.heading == wanted), start=1):
        image.picture.thumbnail((LARGEST_PICTURE, LARGEST_PICTURE), Image.Resampling.LANCZOS)
        write_atomic(folder / PICTURES / f"{number}.png", png_bytes(image.picture))
        prompts[f"{PICTURES}/{number}.png"] = image.caption
    for stale in (folder / PICTURES).glob("*.png"):
        if f"{PICTURES}/{stale.name}" not in prompts:
            stale.unlink()
    return prompts


def evaluation_of(run: Path) -> dict[str, Any] | None:
    """The metrics.json of a run's newest evaluation, fit to be published.

    None where there is none of the weights that are there now: the run went on after it.
    """
    file = run / "evaluation" / "metrics.json"
    if not file.is_file():
        return None
    metrics: dict[str, Any] = public(json.loads(file.read_text()))
    return metrics if metrics.get("weights") in (None, weights_digest(run)) else None


def copy_evaluation_grid(run: Path, folder: Path, metrics: Mapping[str, Any] | None) -> None:
    """Put the grid of a run's evaluation beside the card, without the photos: they are the data set's."""
    grid = run / "evaluation" / metrics["protocol"] / "grid.png" if metrics else None
    if picture := without_photos(grid) if grid is not None and grid.is_file() else None:
        write_atomic(folder / EVALUATION_GRID, picture)
    else:
        (folder / EVALUATION_GRID).unlink(missing_ok=True)


def _template(name: str) -> jinja2.Template:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=False, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["pipes"] = pipes
    return environment.get_template(name)


def pipes(table: Table) -> str:
    """A table in Markdown."""
    lines = [[heading for heading, _ in table.headings], ["---"] * len(table.headings)]
    lines += [[row.title, *map(str, row.cells)] for row in table.rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
