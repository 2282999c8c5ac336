"""What of an export's folder is shown to others."""

from __future__ import annotations

from pathlib import Path

CARD = "README.md"
PICTURES = "pictures"  # folder of a card's samples, beside it
EVALUATION_GRID = "evaluation.png"


def visible_files(folder: Path) -> list[Path]:
    """The files in an export's folder, without hidden ones: what a write that broke off has left behind."""
    found = (path for path in folder.rglob("*") if path.is_file())
    return sorted(path for path in found if not any(part[0] == "." for part in path.relative_to(folder).parts))


def lasting_files(folder: Path) -> list[Path]:
    """Those but the card's, which an evaluation renews: a version is known again by their content."""
    renewed = (CARD, EVALUATION_GRID, PICTURES)
    return [file for file in visible_files(folder) if file.relative_to(folder).parts[0] not in renewed]
