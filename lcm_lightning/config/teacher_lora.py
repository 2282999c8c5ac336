"""What a command may give as a teacher: its LoRA, or a full LCM."""

from __future__ import annotations

from pathlib import Path

from lcm_lightning.errors import UserError
from lcm_lightning.runs.contents import MANIFEST, read_adapters, read_manifest
from lcm_lightning.runs.folders import did_you_mean


def check_teacher_lora(source: str, key: str) -> None:
    """Raise a `UserError` where `source` is a run whose LoRA is none of a fine-tuned model's, such as a student's.

    Also where it is a folder without a LoRA, in a run or around it. Of a file or a hub id nothing says what it is.

    Args:
        key: the setting that gave `source`.
    """
    place = Path(source).expanduser()
    manifest = next((file for file in (place / "lora" / MANIFEST, place / MANIFEST) if file.is_file()), None)
    if manifest is not None:
        kinds = [adapter.kind for adapter in read_adapters(manifest, f"{key}={source}: {MANIFEST}")]
        if len(kinds) != 1 or kinds[0].role == "student":
            found = " on ".join(kind.title for kind in reversed(kinds)) or "no adapter"
            raise UserError(f"{key}={source}: a run of {found}; give a run of method=lora, or the file of a LoRA")
        return
    holds_lora = any((*place.glob("*.safetensors"), *place.glob("lora/*.safetensors")))
    if place.is_dir() and not holds_lora and (meant := did_you_mean(key, place, is_teachers)) is not None:
        raise UserError(f"{key}={source}: holds no LoRA; {meant}")


def check_teacher_lcm(source: str, key: str) -> None:
    """Raise a `UserError` where `source` is a folder without a pipeline, in a run of a whole UNet or around it."""
    place = Path(source).expanduser()
    holds_pipeline = any((place / folder / "model_index.json").is_file() for folder in ("", "pipeline"))
    if place.is_dir() and not holds_pipeline and (meant := did_you_mean(key, place, trained_whole)) is not None:
        raise UserError(f"{key}={source}: holds no pipeline; {meant}")


def trained_whole(run: Path) -> bool:
    """Whether `run` has trained a whole UNet."""
    return (run / "pipeline" / MANIFEST).is_file()


def is_teachers(run: Path) -> bool:
    """Whether `run` has fine-tuned a model by a LoRA."""
    if not (run / "lora" / MANIFEST).is_file():
        return False
    try:
        return [adapter.kind.role for adapter in read_manifest(run)] == ["finetuned"]
    except UserError:
        return False  # damaged: nothing to propose
