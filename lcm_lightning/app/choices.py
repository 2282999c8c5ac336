"""What the page offers to draw with: what the command named, local runs, the embedded pipeline, LoRAs of one's own."""

from __future__ import annotations

from collections.abc import Sequence
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
from lcm_lightning.runs.contents import exported, read_config, read_manifest

EMBEDDED = "tiny"
EMBEDDED_GUIDANCE = 2.0  # more makes its flat colours glaring
COMMAND = "command"  # key of what the command named
DEPTHS = ("*/*", "*/*/*")  # of runs below the folder of outputs, and of those of a sweep


def local_runs(outputs: Path) -> list[Path]:
    """Runs below `outputs` that left something to draw with, the newest first."""
    folders = [folder for depth in DEPTHS for folder in outputs.glob(depth) if (folder / "config.yaml").is_file()]
    found = {folder: exports for folder in folders if (exports := exported(folder)) is not None}
    return sorted(found, key=lambda folder: found[folder].stat().st_mtime, reverse=True)


def run_title(run: Path, outputs: Path) -> str:
    """Where a run lies and what it left: `quickstart/2026-01-31_12-00-00, TCD-LoRA`. Raises `UserError`."""
    return f"{run.relative_to(outputs)}, {read_manifest(run)[-1].kind.title}"


def has_student(run: Path) -> bool:
    """Whether a run left one."""
    try:
        return any(adapter.kind.role == "student" for adapter in read_manifest(run))
    except UserError:
        return False


class Choices:
    """Models by key; each is found once, so that the one that is loaded is known again."""

    def __init__(self, cfg: DictConfig, outputs: Path) -> None:
        """`cfg` is the command's: what `run`, `model`, `lora` and `student` name there comes first.

        Raises:
            UserError: they name nothing that is there.
        """
        self._cfg = cfg
        self._outputs = outputs
        self._sources: dict[str, ModelSource] = {}
        self._own: dict[str, str] = {}  # titles of LoRAs of one's own
        self._config_name = HydraConfig.get().job.config_name
        self.base_models = sorted(file.stem for file in (configurations() / "model").glob("*.yaml"))
        chosen = HydraConfig.get().runtime.choices.get("model")
        self.base_model = chosen or EMBEDDED
        if any(cfg.get(key) is not None for key in ("run", "model", "lora")) or cfg.student:
            self._sources[COMMAND] = find_models(cfg)[0]

    def listed(self) -> list[tuple[str, str]]:
        """Titles and keys of everything that can be picked, anew: runs end while the page is open."""
        own = f"{self.base_model} and its student" if self._cfg.student else None
        found = [(own or self._sources[COMMAND].spec, COMMAND)] if COMMAND in self._sources else []
        found += [(title, key) for key, title in self._own.items()]
        for run in local_runs(self._outputs):
            try:
                found.append((run_title(run, self._outputs), f"run:{run}"))
            except UserError:
                continue  # a damaged run is no choice
        return [*found, (f"{EMBEDDED}, the embedded pipeline and its student", EMBEDDED)]

    def first(self) -> str:
        """The key to begin with: of what the command named, or the newest run with a student."""
        if COMMAND in self._sources:
            return COMMAND
        students = (f"run:{run}" for run in local_runs(self._outputs) if has_student(run))
        return next(students, EMBEDDED)

    def source(self, key: str) -> ModelSource:
        """The model of a key of `listed`. Raises a `UserError` where it is gone."""
        if key not in self._sources:
            kind, _, place = key.partition(":")
            if kind == "run":
                (self._sources[key],) = find_models(self._with(None, run=place))
            elif key == EMBEDDED:
                (self._sources[key],) = find_models(self._with(EMBEDDED, student=True))
            else:
                raise UserError(f"model {key}: is not there any more; choose another one")
        return self._sources[key]

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
        if key not in self._sources:
            cfg = self._with(base_model, lora=list(places), lora_role=list(roles))
            (self._sources[key],) = find_models(cfg)
            self._own[key] = f"{self._sources[key].name} on {base_model}"
        return key

    def teacher_settings(self, key: str) -> tuple[int, float]:
        """Steps and guidance scale to begin with where a teacher is drawn: as the run's own grids have it."""
        kind, _, place = self.source(key).spec.partition(":")
        if kind == "run":
            samples = OmegaConf.select(read_config(Path(place).expanduser()), "callbacks.samples") or {}
            return samples.get("teacher_steps") or BASE.steps, samples.get("guidance_scale") or BASE.guidance_scale
        base = self.base_model if key == COMMAND else key.rpartition(" on ")[2]
        return BASE.steps, EMBEDDED_GUIDANCE if base == EMBEDDED else BASE.guidance_scale

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
