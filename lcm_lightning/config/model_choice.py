"""The models that a command names: `models`, `run`, `model` with or without `lora`."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from hydra.errors import ConfigCompositionException, MissingConfigException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from lcm_lightning.config.instantiate import instantiate_group, parse_dtype
from lcm_lightning.errors import UserError, closest, first_line, shown
from lcm_lightning.evaluation.model_sources import DataChoice, LoadedModel, ModelSource
from lcm_lightning.methods import adapter_kinds
from lcm_lightning.runs.contents import MANIFEST, exported, read_adapters, read_config, read_manifest
from lcm_lightning.runs.folders import did_you_mean

if TYPE_CHECKING:
    import torch

    from lcm_lightning.models.kinds import AdapterKind
    from lcm_lightning.models.stable_diffusion import StableDiffusion

log = logging.getLogger(__name__)

SPECS = "the name of a file in conf/model, run:FOLDER, or lora:, lcm: or another lora_role: with a file or hub id"

OWN_STUDENT = "student"  # in a model's folder: what is in a run's, at least its lora/


def find_models(cfg: DictConfig) -> list[ModelSource]:
    """Everything that the entry point's `models` name; `run`, or `model` with or without `lora`, stand for one of them.

    Raises:
        UserError: several ways at once, none, or something that is not there. What takes long to load is not loaded.
    """
    dtype = parse_dtype(cfg.dtype)
    specs = _specs(cfg)
    if OmegaConf.is_list(cfg.lora):
        found = [_loras(cfg, list(cfg.lora), cfg.lora_role, specs[0], dtype)]
    else:
        found = [_find(cfg, spec, dtype) for spec in specs]
    names = Counter(source.name for source in found)
    seen: Counter[str] = Counter()
    for place, source in enumerate(found):
        seen[source.name] += 1
        if names[source.name] > 1:
            found[place] = replace(source, name=f"{source.name}-{seen[source.name]}")
    return found


def _specs(cfg: DictConfig) -> list[str]:
    """`models`, or what the shorthands stand for."""
    models = cfg.get("models")
    if "models" in cfg and OmegaConf.is_list(cfg.lora):
        raise UserError(
            f"lora={cfg.lora}: an evaluation takes one LoRA at a time; 'models=[lora:A,lora:B]' compares them"
        )
    if cfg.get("weights") is not None and cfg.lora is None and not cfg.student:
        raise UserError(
            f"weights={cfg.weights}: are those of lora=...; a run is model=... lora=<its folder> weights=..."
        )
    shorthand = [f"{key}={cfg[key]}" for key in ("run", "lora") if cfg[key] is not None]
    if cfg.student:
        return [f"lora:{_own_student(cfg, shorthand if models is None else ['models=[...]'])}"]
    if models is not None:
        if isinstance(models, str) or not all(isinstance(spec, str) for spec in models) or not models:
            raise UserError(f"models={models}: expected a list such as 'models=[sd15,run:outputs/...,lcm:FILE]'")
        if shorthand:
            raise UserError(f"{shorthand[0]} and models=...: put it into the list, {shorthand[0].replace('=', ':', 1)}")
        if repeated := [spec for spec, times in Counter(models).items() if times > 1]:
            raise UserError(f"models: names {repeated[0]} more than once; name each model once")
        return list(models)
    if len(shorthand) > 1:
        raise UserError(f"run={cfg.run} and lora={cfg.lora}: a run brings its own LoRA; give model=... with lora=...")
    if shorthand:
        return [shorthand[0].replace("=", ":", 1)]
    if cfg.get("model") is None:
        several = ", or several of them with models=[...]" if "models" in cfg else ""
        raise UserError(
            "give run=outputs/<experiment>/<date_time>, or model=sd15 (or model=tiny, which is here already) with or "
            f"without lora=...{several}"
        )
    return [_chosen_model()]


def _own_student(cfg: DictConfig, others: Sequence[str]) -> Path:
    """The folder of the few-step adapter that lies in a model's own folder.

    Raises:
        UserError: there is none, or others are asked for beside it.
    """
    if others:
        raise UserError(f"student=true and {others[0]}: the model's own student, or another one; give one of the two")
    if cfg.get("model") is None:
        raise UserError("student=true: a model's own student needs its model; add model=tiny")
    folder = Path(cfg.model.path).expanduser() / OWN_STUDENT
    if not (folder / "lora" / MANIFEST).is_file():
        raise UserError(f"student=true: model.path={cfg.model.path} has no {OWN_STUDENT}/lora; give lora=... instead")
    return folder


def _find(cfg: DictConfig, spec: str, dtype: torch.dtype) -> ModelSource:
    kind, colon, place = spec.partition(":")
    if not colon:
        return _named_model(cfg, spec, dtype)
    if kind == "run":
        return _run(cfg, place, spec, dtype)
    if kind == "lora" or kind in adapter_kinds():
        return _loras(cfg, [place], cfg.lora_role if kind == "lora" else kind, spec, dtype)
    raise UserError(f"models: {spec} is of no known kind; expected {SPECS}")


def _chosen_model() -> str:
    """What `model=` chose from conf/model."""
    return HydraConfig.get().runtime.choices.get("model") or "model"


def _named_model(cfg: DictConfig, name: str, dtype: torch.dtype) -> ModelSource:
    """A file of conf/model; with the changes made on the command line where `model=` chooses the same."""
    part = cfg
    if cfg.get("model") is None or name != _chosen_model():
        try:
            composed = compose(HydraConfig.get().job.config_name, overrides=[f"model={name}"])
        except (MissingConfigException, ConfigCompositionException) as error:
            looks = f"; a run is written run:{name}" if (Path(name).expanduser() / "config.yaml").is_file() else ""
            meant = closest(name.lower(), getattr(error, "options", None) or ())
            raise UserError(f"models: no model is called {name}; {meant}expected {SPECS}{looks}") from error
        part = OmegaConf.create({"model": OmegaConf.to_container(composed.model, resolve=True)})

    def load() -> LoadedModel:
        model: StableDiffusion = instantiate_group(part, "model", dtype=dtype)
        return LoadedModel(model.eval(), own_kinds(model))

    return ModelSource(name, name, load)


def own_kinds(model: StableDiffusion) -> tuple[AdapterKind, ...]:
    """What a model is by itself: a student, if its UNet wants to be told the guidance scale."""
    if model.guidance_dimension is None:
        return ()
    return tuple(kind for kind in adapter_kinds().values() if kind.whole)


def _run(cfg: DictConfig, run: str, spec: str, dtype: torch.dtype) -> ModelSource:
    """The base model of a run with every adapter the run exported."""
    folder = Path(run).expanduser()
    config = read_config(folder)
    read_manifest(folder)  # its absence is known before anything else is drawn
    overrides = {}
    if cfg.get("models") is None and cfg.get("model") is not None:
        overrides = {key: value for key, value in cfg.model.items() if key != "_target_"}
        if not any(typed.lstrip("+").startswith("model.guidance_scale=") for typed in HydraConfig.get().overrides.task):
            overrides.pop("guidance_scale", None)  # conf/model's: another copy of the run's model is drawn as its own

    def load() -> LoadedModel:
        from lcm_lightning.runs.loading import load_run  # late, as all that imports diffusers

        loaded = load_run(folder, dtype=dtype, **overrides)
        return LoadedModel(loaded.model.eval(), loaded.adapters)

    try:
        name, data = str(config.get("name") or folder.name), _data_choice(config.get("data"))
    except (OmegaConfBaseException, AttributeError) as error:
        raise UserError(
            f"run={run}: config.yaml is damaged ({first_line(error)}); copy the run again, or train it again"
        ) from error
    return ModelSource(name, spec, load, data)


def _loras(
    cfg: DictConfig, loras: Sequence[str], role: str | Sequence[str | None] | None, spec: str, dtype: torch.dtype
) -> ModelSource:
    """`model=` with the LoRAs at `loras`, each multiplied by its own of `weights`; what they add to the model adds up.

    All LoRAs of a run folder, a student's and its teacher's, have the weight of the folder.
    """
    from lcm_lightning.models.latent_diffusion import GUIDANCE_SCALE  # late, as all that imports diffusers

    if cfg.get("model") is None:
        raise UserError(f"{spec}: a LoRA needs the model it belongs on; add model=sd15")
    if not loras:
        raise UserError("lora=[]: expected at least one LoRA, such as lora=outputs/... or 'lora=[outputs/...,FILE]'")
    guidance_scale = cfg.model.get("guidance_scale", GUIDANCE_SCALE)
    weights = [1.0 if weight is None else weight for weight in _for_each(loras, "weights", cfg.get("weights"))]
    chosen = [
        (kind, file, weight)
        for lora, its_role, weight in zip(loras, _for_each(loras, "lora_role", role), weights, strict=True)
        for kind, file in _lora_files(lora, its_role, guidance_scale).items()
    ]
    if len(loras) > 1:
        students = [kind for kind, _, _ in chosen if kind.role == "student"]
        if len({(kind.sampler, kind.steps, kind.guidance_scale) for kind in students}) > 1:
            titles = " and ".join(kind.title for kind in students)
            raise UserError(f"lora={list(loras)}: {titles} are drawn from in ways of their own; keep one student")
        chosen = [
            (replace(kind, name=f"{kind.name}_{n}"), file, weight) for n, (kind, file, weight) in enumerate(chosen, 1)
        ]
    name = "+".join(map(_lora_name, loras))
    return ModelSource(name, spec, lambda: _with_adapters(cfg, chosen, dtype), _data_of(Path(loras[0]).expanduser()))


def _for_each(loras: Sequence[str], key: str, value: Any) -> list[Any]:
    """What `key` says of each LoRA: a list says it one by one, anything else of all of them."""
    if not OmegaConf.is_list(value):
        return [value] * len(loras)
    if len(value) != len(loras):
        raise UserError(f"{key}={value}: expected as many as there are LoRAs, {len(loras)}, in the order of lora=...")
    return list(value)


def _lora_files(lora: str, role: str | None, guidance_scale: float) -> dict[AdapterKind, Path]:
    """The files at `lora` and what they are for: a run knows, in its folder or published; of others `role` says it.

    Args:
        guidance_scale: of the model, with which a LoRA is drawn that was not distilled and says no other.
    """
    from lcm_lightning.hub import is_hub_id
    from lcm_lightning.models.lora_files import download_published, is_out_of_reach

    run = Path(lora).expanduser()
    kinds = adapter_kinds()
    if (run / "lora" / MANIFEST).is_file():
        return {adapter.kind: run / "lora" / adapter.file for adapter in read_manifest(run)}
    manifest = run / MANIFEST if (run / MANIFEST).is_file() else download_published(lora, MANIFEST)
    if manifest is not None:
        return _published_files(lora, manifest)
    if exported(run) is not None:
        raise UserError(f"lora={lora}: a run that trained a whole UNet and left no LoRA; give run={lora}")
    if role in kinds and not kinds[role].whole:
        file = _locate_lora(lora)
        if is_out_of_reach(lora, MANIFEST):
            log.warning("lora=%s: %s is out of reach; a LoRA that acts with this one would be missing", lora, MANIFEST)
        kind = kinds[role]
        return {kind if kind.role == "student" else replace(kind, guidance_scale=guidance_scale): file}
    if not is_hub_id(lora) or is_out_of_reach(lora, MANIFEST):
        _locate_lora(lora)  # what is not there is missed before anybody is asked what it is; the hub has the others
    distilled = [kind for kind in kinds.values() if kind.role == "student" and not kind.whole]
    students = [f"lora_role={kind.name} ({kind.title})" for kind in distilled]
    raise UserError(
        f"lora_role={shown(role)}: say what lora={lora} is: {' or '.join(students)}, which is drawn in few steps "
        "without guidance, or lora_role=finetuned for one that was not distilled; of several in their order, "
        "lora_role=[...]"
    )


def _locate_lora(lora: str) -> Path:
    """`locate_lora`, whose refusal of a folder in a run, or of runs, names the run."""
    from lcm_lightning.models.lora_files import locate_lora

    try:
        return locate_lora(lora)
    except UserError as error:
        if (meant := did_you_mean("lora", lora, exported)) is None:
            raise
        raise UserError(f"lora={lora}: holds no LoRA; {meant}") from error


def _published_files(lora: str, manifest: Path) -> dict[AdapterKind, Path]:
    """The LoRAs that a manifest lists: files beside it, or of the repository `lora` that it was downloaded from."""
    from lcm_lightning.models.lora_files import download_published

    found = {}
    for adapter in read_adapters(manifest, f"lora={lora}: {MANIFEST}"):
        if adapter.kind.whole:
            raise UserError(f"lora={lora}: holds a whole UNet and no LoRA; give model=sd15 model.path={lora}")
        beside = manifest.parent / adapter.file
        file = beside if beside.is_file() else download_published(lora, adapter.file)
        if file is None:
            raise UserError(f"lora={lora}: {adapter.file}, which its {MANIFEST} names, is not there; download it again")
        found[adapter.kind] = file
    return found


def _with_adapters(
    cfg: DictConfig, chosen: Sequence[tuple[AdapterKind, Path, float]], dtype: torch.dtype
) -> LoadedModel:
    """`model=` with LoRAs. A full LCM is a student itself: LoRAs that were not distilled may act on it."""
    from lcm_lightning.models.adapters import load_lora, set_active_adapters

    model: StableDiffusion = instantiate_group(cfg, "model", dtype=dtype)
    own = own_kinds(model)
    if own and (students := [kind.title for kind, _, _ in chosen if kind.role == "student"]):
        raise UserError(
            f"model.path={model.name_or_path}: a full LCM, which takes no {students[0]} on top; give the Stable "
            "Diffusion model that the LoRA was made for"
        )
    for kind, file, weight in chosen:
        load_lora(model, file, kind.name, scale=weight)
    kinds = (*(kind for kind, _, _ in chosen), *own)
    set_active_adapters(model, [kind.name for kind in kinds])
    return LoadedModel(model.eval(), kinds, {kind.name: weight for kind, _, weight in chosen})


def _lora_name(lora: str) -> str:
    path = Path(lora)
    if path.suffix == ".safetensors" and path.stem not in ("pytorch_lora_weights", "kohya_lora_weights"):
        return path.stem
    folder = path.parent if path.suffix == ".safetensors" else path
    parts = [part for part in folder.parts if part != "lora"]  # a run keeps its LoRAs in lora/
    return parts[-1] if parts else path.stem


def _data_of(run: Path) -> DataChoice | None:
    return _data_choice(read_config(run).get("data")) if (run / "config.yaml").is_file() else None


def _data_choice(data: DictConfig | None) -> DataChoice | None:
    return None if not data else DataChoice(data.name, data.source, data.resolution, data.get("cache_dir"))


def evaluation_data(cfg: DictConfig, sources: Sequence[ModelSource]) -> DataChoice:
    """The data set everyone is measured on: `data`, or else what the runs were trained on.

    Raises:
        UserError: there is none, or the runs have several.
    """
    if (chosen := _data_choice(cfg.get("data"))) is not None:
        return chosen
    known = {replace(source.data, cache_dir=None): source for source in sources if source.data is not None}
    if len(known) > 1:
        listed = ", ".join(f"{source.spec} on {data.name}" for data, source in known.items())
        raise UserError(f"data: the runs were trained on different data ({listed}); choose with data=flickr8k, say")
    if not known:
        raise UserError("data: a model without a run needs a data set, such as data=flickr8k")
    (source,) = known.values()
    assert source.data is not None
    return source.data
