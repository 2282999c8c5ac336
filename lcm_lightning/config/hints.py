"""What to do next with a finished run."""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from lcm_lightning.config.resolvers import package_file
from lcm_lightning.errors import command_line
from lcm_lightning.runs.contents import exported, read_manifest

QUICK_IMAGES = 300  # `num_images` of the protocol `quick`


def next_commands(cfg: DictConfig, run_dir: Path, images: int) -> str:
    """What to do with a finished run of so many training images, of what it left: pictures, a LoRA or a pipeline."""
    shown = run_dir.relative_to(Path.cwd()) if run_dir.is_relative_to(Path.cwd()) else run_dir
    lines = [f"\nrun folder: {shown}"]
    if any((run_dir / "samples").glob("*.png")):
        lines.append(f"  look at   {shown}/samples/")
    if exported(run_dir) is not None:
        protocol = " evaluation=quick" if is_embedded(cfg) else ""
        protocol += " evaluation.num_images=null" if protocol and images < QUICK_IMAGES else ""
        lines.append(f"  evaluate  {command_line('evaluate')} run={shown}{protocol}")
        lines.append(f'  generate  {command_line("generate")} run={shown}{guidance(cfg, run_dir)} prompt="..."')
    return "\n".join(lines)


def guidance(cfg: DictConfig, run_dir: Path) -> str:
    """The guidance that a fine-tuned model's samples were drawn with in training, where it is not the usual one."""
    kind, samples = read_manifest(run_dir)[-1].kind, OmegaConf.select(cfg, "callbacks.samples.guidance_scale")
    usual = kind.role == "student" or samples in (None, kind.guidance_scale)
    return "" if usual else f" guidance_scale={samples:g}"


def is_embedded(cfg: DictConfig) -> bool:
    """Whether a run is of the embedded pipeline, which the protocol `quick` is for."""
    return Path(OmegaConf.select(cfg, "model.path") or "").is_relative_to(package_file("assets"))
