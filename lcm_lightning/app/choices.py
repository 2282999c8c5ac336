"""What the page offers to draw with: what the command named, local runs, the embedded pipeline, LoRAs of one's own."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict

from lcm_lightning.config.entry import configurations
from lcm_lightning.config.model_choice import find_models
from lcm_lightning.errors import UserError
from lcm_lightning.evaluation.model_sources import ModelSource
from lcm_lightning.methods import adapter_kinds
from lcm_lightning.models.kinds import BASE
from lcm_lightning.output.files import modified
from lcm_lightning.runs.contents import MANIFEST, exported, read_config, read_manifest

EMBEDDED = "tiny"
COMMAND = "command"  # key of what the command named
DEPTHS = ("*/*", "*/*/*")  # of runs below the folder of outputs, and of those of a sweep


def local_runs(outputs: Path) -> list[Path]:
    """Runs below `outputs` that left something to draw with, the newest first."""
    folders = [folder for depth in DEPTHS for folder in outputs.glob(depth) if (folder / "config.yaml").is_file()]
    found = {folder: exports for folder in folders if (exports := exported(folder)) is not None}
    return sorted(found, key=lambda folder: modified(found[folder]) or 0, reverse=True)


def run_title(run: Path, outputs: Path) -> str:
    """Where a run lies and what it left: `quickstart/2026-01-31_12-00-00, TCD-LoRA`. Raises `UserError`."""
    return f"{run.relative_to(outputs)}, {read_manifest(run)[-1].kind.title}"


def has_student(run: Path) -> bool:
    """Whether a run left one."""
    try:
        return any(adapter.kind.role == "student" for adapter in read_manifest(run))
    except UserError:
        return False


def written(place: str) -> int | None:
    """When what lies at `place`, a run or a file or folder with LoRAs, was written; None for what lies elsewhere."""
    folder = Path(place).expanduser()
    exports = exported(folder) or folder
    return modified(exports / MANIFEST) or modified(folder)


@dataclass(frozen=True)
class Choice:
    """A model that was found.

    Attributes:
        cfg: what names it.
        source: what it is read from.
        written: when each of the places that `cfg` names was, at that time.
    """

    cfg: DictConfig
    source: ModelSource
    written: tuple[int | None, ...]

    @staticmethod
    def find(cfg: DictConfig) -> Choice:
        """The model that `cfg` names. Raises a `UserError` where it is not there."""
        before = Choice._written(cfg)
        return Choice(cfg, find_models(cfg)[0], before)

    def newest(self) -> Choice:
        """The same; found anew where one of its places was written meanwhile, by a run that goes on for example."""
        now = self._written(self.cfg)
        changed = any(new is not None and new != old for new, old in zip(now, self.written, strict=True))
        return Choice.find(self.cfg) if changed else self

    @staticmethod
    def _written(cfg: DictConfig) -> tuple[int | None, ...]:
        loras = cfg.lora if OmegaConf.is_list(cfg.lora) else [cfg.lora]
        return tuple(written(str(place)) for place in (cfg.run, *loras) if place is not None)


class Choices:
    """Models by key; each is found once, so that the one that is loaded is known again. Any thread may ask."""

    def __init__(self, cfg: DictConfig, outputs: Path) -> None:
        """`cfg` is the command's: what `run`, `model`, `lora` and `student` name there comes first.

        Raises:
            UserError: they name nothing that is there.
        """
        self._cfg = cfg
        self._outputs = outputs
        self._lock = threading.RLock()  # Hydra composes for one at a time, and a model found twice is read twice
        self._found: dict[str, Choice] = {}
        self._own: dict[str, str] = {}  # titles of LoRAs of one's own
        self._config_name = HydraConfig.get().job.config_name
        self.base_models = sorted(file.stem for file in (configurations() / "model").glob("*.yaml"))
        chosen = HydraConfig.get().runtime.choices.get("model")
        self.base_model = chosen or EMBEDDED
        if any(cfg.get(key) is not None for key in ("run", "model", "lora")) or cfg.student:
            self._found[COMMAND] = Choice.find(cfg)

    def listed(self) -> list[tuple[str, str]]:
        """Titles and keys of everything that can be picked, anew: runs end while the page is open."""
        own = f"{self.base_model} and its student" if self._cfg.student else None
        found = [(own or self._found[COMMAND].source.spec, COMMAND)] if COMMAND in self._found else []
        with self._lock:
            found += [(title, key) for key, title in self._own.items()]
        for run in local_runs(self._outputs):
            try:
                found.append((run_title(run, self._outputs), f"run:{run}"))
            except UserError:
                continue  # a damaged run is no choice
        return [*found, (f"{EMBEDDED}, the embedded pipeline and its student", EMBEDDED)]

    def first(self) -> str:
        """The key to begin with: of what the command named, or the newest run with a student."""
        if COMMAND in self._found:
            return COMMAND
        students = (f"run:{run}" for run in local_runs(self._outputs) if has_student(run))
        return next(filter(self._is_there, students), EMBEDDED)

    def _is_there(self, key: str) -> bool:
        try:
            return bool(self.source(key))
        except UserError:
            return False  # a damaged run is nothing to begin with

    def source(self, key: str) -> ModelSource:
        """The model of a key of `listed`; another one where it was written anew.

        Raises:
            UserError: it is gone, or damaged.
        """
        with self._lock:
            known = self._found.get(key)
            self._found[key] = Choice.find(self._named(key)) if known is None else known.newest()
            return self._found[key].source

    def _named(self, key: str) -> DictConfig:
        kind, _, place = key.partition(":")
        if kind == "run":
            return self._with(None, run=place)
        if key == EMBEDDED:
            return self._with(EMBEDDED, student=True)
        raise UserError(f"model {key}: is not there any more; choose another one")

    def add_loras(self, lines: Sequence[str], role: str, base_model: str) -> str:
        """The key of `base_model` with LoRAs, each a line: a file, run folder or hub id, `lcm:` and the like before it.

        Args:
            role: of those without one before them.

        Raises:
            UserError: one is not there, or there is none.
        """
        split = [_role_and_place(line.strip(), role) for line in lines if line.strip()]
        if not split:
            raise UserError("LoRA: none is given; drop a .safetensors file, or type its path or hub id")
        roles, places = zip(*split, strict=True)
        key = " + ".join(f"{its_role}:{place}" for its_role, place in split) + f" on {base_model}"
        with self._lock:
            if key not in self._found:
                self._found[key] = Choice.find(self._with(base_model, lora=list(places), lora_role=list(roles)))
                self._own[key] = f"{self._found[key].source.name} on {base_model}"
        return key

    def teacher_settings(self, key: str) -> tuple[int, float]:
        """Steps and guidance scale to begin with where a teacher is drawn: as the run's own grids have it."""
        kind, _, place = self.source(key).spec.partition(":")
        cfg: Any = read_config(Path(place).expanduser()) if kind == "run" else self._found[key].cfg
        samples = OmegaConf.select(cfg, "callbacks.samples") or {}
        usual = OmegaConf.select(cfg, "model.guidance_scale") or BASE.guidance_scale
        return samples.get("teacher_steps") or BASE.steps, samples.get("guidance_scale") or usual

    def _with(self, model: str | None, **settings: Any) -> DictConfig:
        """The command's configuration with another model; its changes of `model.` keys stay where it is the same."""
        cfg = self._cfg.copy()
        with open_dict(cfg):
            if model is None or model != HydraConfig.get().runtime.choices.get("model"):
                cfg.model = None if model is None else self._composed(model)
            for key, value in {"run": None, "lora": None, "lora_role": None, "student": False, **settings}.items():
                cfg[key] = value
        return cfg

    def _composed(self, model: str) -> Any:
        composed = compose(self._config_name, overrides=[f"model={model}"])
        return OmegaConf.create(OmegaConf.to_container(composed.model, resolve=True))


def _role_and_place(line: str, role: str) -> tuple[str, str]:
    said, colon, place = line.partition(":")
    return (said, place) if colon and said in adapter_kinds() else (role, line)
