"""Which folder a run is written to."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from datetime import datetime
from pathlib import Path

from omegaconf import OmegaConf

from lcm_lightning.errors import UserError

AUTO = "auto"
CONFIG = "config.yaml"
CHECKPOINTS = "checkpoints"
SWEEP = "multirun.yaml"  # in a sweep's folder: Hydra's notes of it
OVERRIDES = "overrides.yaml"  # of the command that trained; Hydra's own in .hydra/ is of the last one, also if refused


def auto_run_folder(resume: str | None, experiment: str, overrides: list[str]) -> str:
    """Folder of a run: a new one named by date and time, or with resume=auto the newest one of the same command.

    Commands are the same if their overrides are, whatever their order and `resume=`. A run that left no checkpoint has
    nothing to go on with.

    Raises:
        UserError: several processes, which `torchrun` or `srun` started, would each name a folder by its own clock.
    """
    root = Path("outputs") / experiment
    if resume == AUTO:
        runs = [path for path in root.glob("*") if checkpoint_files(path) and same_command(path, overrides)]
        if runs:
            return str(max(runs, key=lambda path: (max(f.stat().st_mtime for f in checkpoint_files(path)), path.name)))
    refuse_own_clocks("hydra.run.dir", root)
    return str(root / date_and_time())


def auto_sweep_time(resume: str | None, experiment: str, overrides: list[str]) -> str:
    """Last part of a sweep's folder: date and time, or with resume=auto that of the newest sweep of the same command.

    A sweep whose jobs left no checkpoint has nothing to go on with. Commands are the same as in `auto_run_folder`.

    Raises:
        UserError: as `auto_run_folder`.
    """
    root = Path("outputs") / experiment
    if resume == AUTO:
        notes = [path for path in root.glob(f"*/{SWEEP}") if is_sweep_of(path, overrides) and has_jobs(path.parent)]
        if notes:
            return max(notes, key=lambda path: (path.stat().st_mtime, path.parent.name)).parent.name
    refuse_own_clocks("hydra.sweep.dir", root)
    return date_and_time()


def is_sweep_of(notes: Path, overrides: list[str]) -> bool:
    """Whether Hydra's notes of a sweep are of one started with `overrides`, `resume=` aside."""
    return _without_resume(typed_in_sweep(notes)) == _without_resume(overrides)


def typed_in_sweep(notes: Path) -> list[str]:
    """What the command line of a sweep said, by Hydra's notes of it."""
    try:
        return list(OmegaConf.select(OmegaConf.load(notes), "hydra.overrides.task") or ())
    except Exception:  # of YAML or OmegaConf: Hydra writes it in place, and was killed as it did, or is still at it
        return []


def has_jobs(sweep: Path) -> bool:
    """Whether jobs of a sweep left checkpoints; of several methods each has its folder, called after the same time."""
    return any(checkpoint_files(job) for job in sweep.parents[1].glob(f"*/{sweep.name}/*"))


def check_own_run(resume: str | None, run_dir: Path, overrides: list[str]) -> None:
    """Raise a `UserError` where resume=auto would let a job of a sweep go on with another job's run.

    What the sweep has in common may be changed, such as max_steps, as in a run's folder that is named; what it varies
    has to be that of the run, and a job whose own run lies in another folder of the sweep belongs there.
    """
    if resume != AUTO or not checkpoint_files(run_dir) or same_command(run_dir, overrides):
        return
    notes, record = run_dir.parent / SWEEP, run_dir / OVERRIDES
    varied = {*_without_resume(overrides)} - {*(typed_in_sweep(notes) if notes.is_file() else ())}
    others = sorted(varied - {*(OmegaConf.load(record) if record.is_file() else ())})
    own = any(same_command(folder, overrides) for folder in run_dir.parent.iterdir())
    if others or own or not notes.is_file():
        raise UserError(
            f"resume=auto: {run_dir} holds a run of another job than this one ({' '.join(others or overrides)}); type "
            "what the sweep varies as at first, or set hydra.sweep.dir=... to another folder"
        )


def date_and_time() -> str:
    """Now, as a folder's name."""
    return datetime.now().strftime("%Y-%m-%d_%H-%M-%S")


def refuse_own_clocks(key: str, root: Path) -> None:
    """Raise a `UserError` with an example in `root` where each of several processes would name the folder `key`."""
    if started_apart():
        raise UserError(
            f"{key}: torchrun or srun started several processes, which must share a run folder; set it, as in "
            f"{key}={root}/${{SLURM_JOB_ID:-first}}"
        )


def started_apart() -> bool:
    """Whether this is one of several processes that `torchrun` or SLURM's `srun` started, not Lightning."""
    torchrun = "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1
    return torchrun or int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1


def same_command(run_dir: Path, overrides: list[str]) -> bool:
    """Whether a run was started with `overrides`, `resume=` aside."""
    path = run_dir / OVERRIDES
    return path.is_file() and _without_resume(OmegaConf.load(path)) == _without_resume(overrides)


def _without_resume(overrides: Iterable[str]) -> list[str]:
    return sorted(override for override in overrides if not override.lstrip("+").startswith("resume="))


def meant_run(place: Path, usable: Callable[[Path], object]) -> Path | None:
    """The run that a folder of its own stands for, such as its `lora/`, or else the newest in a folder of runs.

    Args:
        usable: whether a folder is a run that what is asked for can be had from.
    """
    # Around what is not there lies the working folder at last, where a hub's id has nothing to do.
    near = [folder for folder in place.parents[:2] if folder.parts or place.exists()]
    around = next(filter(usable, near), None)
    if around is not None or not place.is_dir():
        return around
    # outputs/<experiment>/<date_time>, and of a sweep a level more.
    configs = [path for depth in (1, 2, 3) for path in place.glob("*/" * depth + CONFIG) if usable(path.parent)]
    return max(configs, key=lambda path: path.stat().st_mtime).parent if configs else None


def did_you_mean(key: str, place: str | Path, usable: Callable[[Path], object]) -> str | None:
    """A question whether `meant_run` is meant by `key=place`; None where there is none."""
    run = meant_run(Path(place).expanduser(), usable)
    return None if run is None else f"did you mean {key}={run}?"


def checkpoint_files(run_dir: Path) -> list[Path]:
    """The finished checkpoint files of a run."""
    return sorted(path for path in (run_dir / CHECKPOINTS).glob("*.ckpt") if not path.name.startswith("."))
