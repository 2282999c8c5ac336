"""What a command may give as a teacher's LoRA."""

from __future__ import annotations

from pathlib import Path

from lcm_lightning.errors import UserError
from lcm_lightning.runs.contents import MANIFEST, read_manifest


def check_teacher_lora(source: str, key: str) -> None:
    """Raise a `UserError` where `source` is a run whose LoRA is none of a fine-tuned model's, such as a student's.

    Of a file or a hub id nothing says what it is.

    Args:
        key: the setting that gave `source`.
    """
    run = Path(source).expanduser()
    if (run / "lora" / MANIFEST).is_file():
        kinds = [adapter.kind for adapter in read_manifest(run)]
        if len(kinds) != 1 or kinds[0].role == "student":
            found = " on ".join(kind.title for kind in reversed(kinds)) or "no adapter"
            raise UserError(f"{key}={source}: a run of {found}; give a run of method=lora, or the file of a LoRA")
