"""What to do next with a finished run."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from lcm_lightning.config.resolvers import package_file
from lcm_lightning.errors import command_line
from lcm_lightning.runs.contents import exported


def next_commands(cfg: DictConfig, run_dir: Path) -> str:
    """What to do with a finished run, of what it left: pictures, a LoRA or a pipeline."""
    shown = run_dir.relative_to(Path.cwd()) if run_dir.is_relative_to(Path.cwd()) else run_dir
    lines = [f"\nrun folder: {shown}"]
    if any((run_dir / "samples").glob("*.png")):
        lines.append(f"  look at   {shown}/samples/")
    if exported(run_dir) is not None:
        protocol = " evaluation=quick" if is_embedded(cfg) else ""
        lines.append(f"  evaluate  {command_line('evaluate')} run={shown}{protocol}")
        lines.append(f'  generate  {command_line("generate")} run={shown} prompt="..."')
    return "\n".join(lines)


def is_embedded(cfg: DictConfig) -> bool:
    """Whether a run is of the embedded pipeline, which the protocol `quick` is for."""
    return Path(OmegaConf.select(cfg, "model.path") or "").is_relative_to(package_file("assets"))
