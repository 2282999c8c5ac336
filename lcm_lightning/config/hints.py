"""What to do next with a finished run."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from lcm_lightning.config.entry import configurations
from lcm_lightning.config.resolvers import package_file
from lcm_lightning.errors import command_line
from lcm_lightning.models.kinds import TEACHER_FILE
from lcm_lightning.runs.contents import Adapter, exported, read_manifest

PASSED_ON = ("model", "data", "trainer=", "logger=")  # what a distillation has in common with its teacher's training


def next_commands(cfg: DictConfig, run_dir: Path, overrides: Sequence[str] = ()) -> str:
    """What a finished run left, and what to do with it: pictures, a LoRA or a pipeline.

    Args:
        cfg: its resolved configuration.
        overrides: of its command line.
    """
    shown = run_dir.relative_to(Path.cwd()) if run_dir.is_relative_to(Path.cwd()) else run_dir
    lines = [f"\nrun folder: {shown}"]
    if any((run_dir / "samples").glob("*.png")):
        lines.append(f"  look at   {shown}/samples/")
    if (run_dir / "profile").is_dir():
        lines.append(f"  profile   {shown}/profile/")
    if (folder := exported(run_dir)) is None:
        return "\n".join(lines)
    last, run = read_manifest(run_dir)[-1], f"run={shlex.quote(str(shown))}"
    protocol = " evaluation=quick" if is_embedded(cfg) else ""
    lines += [f"  {line}" for line in results(shown / folder.name, folder, last)]
    if (experiment := distillation_of(cfg.name)) is not None and last.kind.role == "finetuned":
        shared = [override for override in overrides if override.startswith(PASSED_ON)]
        options = shlex.join([f"experiment={experiment}", *shared, f"method.teacher_lora={shown}"])
        lines.append(f"  distil    {command_line('train')} {options}")
    lines.append(f"  evaluate  {command_line('evaluate')} {run}{protocol}")
    lines.append(f'  generate  {command_line("generate")} {run}{guidance(cfg, last)} prompt="..."')
    lines.append(f"  export    {command_line('export')} {run} format=fused")
    return "\n".join(lines)


def results(shown: Path, folder: Path, adapter: Adapter) -> list[str]:
    """Where a run's own export lies, and who reads it."""
    if adapter.kind.whole:
        return [f"pipeline  {shown}/"]
    alone = "; without its teacher's LoRA: export format=kohya has both" if (folder / TEACHER_FILE).is_file() else ""
    kohya = [f"          {shown / file.name} (ComfyUI, A1111{alone})" for file in folder.glob("kohya_*.safetensors")]
    return [f"LoRA      {shown / adapter.file}", *kohya]


def distillation_of(name: str) -> str | None:
    """The experiment that distils what the experiment `name` fine-tunes; None where none is called after it."""
    candidates = [name.replace("lora_", "lcm_", 1), name.removesuffix("_lora")]
    files = [configurations() / "experiment" / f"{candidate}.yaml" for candidate in candidates if candidate != name]
    return next((file.stem for file in files if file.is_file()), None)


def guidance(cfg: DictConfig, adapter: Adapter) -> str:
    """The guidance that a fine-tuned model's samples were drawn with in training, where it is not the usual one."""
    kind, samples = adapter.kind, OmegaConf.select(cfg, "callbacks.samples.guidance_scale")
    usual = kind.role == "student" or samples in (None, kind.guidance_scale)
    return "" if usual else f" guidance_scale={samples:g}"


def is_embedded(cfg: DictConfig) -> bool:
    """Whether a run is of the embedded pipeline, which the protocol `quick` is for."""
    return Path(OmegaConf.select(cfg, "model.path") or "").is_relative_to(package_file("assets"))
