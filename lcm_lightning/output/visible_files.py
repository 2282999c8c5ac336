"""What of a folder is shown to others."""

from __future__ import annotations

from pathlib import Path


def visible_files(folder: Path) -> list[Path]:
    """The files in an export's folder, without hidden ones: what a write that broke off has left behind."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in found if not any(part[0] == "." for part in path.relative_to(folder).parts))
