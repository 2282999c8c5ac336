"""The evaluations that lie in a folder, as tables and pictures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lcm_lightning.errors import UserError, first_line
from lcm_lightning.evaluation.tables import Table, cost_table, quality_table
from lcm_lightning.output.files import modified

# A run's, by its protocols; its own copy of the newest lies a folder above. And those of models without a run.
PLACES = ("*/*/evaluation/*/metrics.json", "*/*/metrics.json")


@dataclass(frozen=True)
class Shown:
    """An evaluation.

    Attributes:
        title: its protocol and data.
        tables: quality and costs.
        labels: of its contenders.
        rows: for each of some prompts a picture's file of every contender.
        warnings: what its figures are not good for.
    """

    title: str
    tables: Sequence[Table]
    labels: Sequence[str]
    rows: Sequence[Sequence[Path]]
    warnings: Sequence[str]


def find_evaluations(outputs: Path) -> list[str]:
    """Folders of evaluations below `outputs`, relative to it, the newest first."""
    files = {file for place in PLACES for file in outputs.glob(place)}
    newest = sorted(files, key=lambda file: modified(file) or 0, reverse=True)
    return [file.parent.relative_to(outputs).as_posix() for file in newest]


def read_evaluation(outputs: Path, name: str, pictures: int = 8) -> Shown:
    """The evaluation called `name` by `find_evaluations`, with the first `pictures` of each contender.

    Raises:
        UserError: there is none of that name, or it cannot be read.
    """
    if name not in find_evaluations(outputs):
        raise UserError(f"evaluation {name}: is not there any more; choose another one")
    folder = outputs / name
    try:
        metrics: Mapping[str, Any] = json.loads((folder / "metrics.json").read_text())
        models = metrics["models"]
        tables = quality_table(models), cost_table(models)
        rows = picture_rows(folder, [model["images"] for model in models], pictures)
        title = f"{metrics['protocol']}, {metrics['dataset']}, {models[0]['n_images']} images of each"
        labels, warnings = [str(model["label"]) for model in models], list(map(str, metrics["warnings"]))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        said = f"{type(error).__name__}: {first_line(error)}"
        raise UserError(f"evaluation {name}: metrics.json cannot be read ({said}); evaluate again") from error
    return Shown(title, tables, labels, rows, warnings)


def picture_rows(folder: Path, places: Sequence[str], number: int) -> list[list[Path]]:
    """The first pictures that lie in all of the folders `places`, a row for each."""
    folders = [folder / place for place in places]
    if not all(place.resolve().is_relative_to(folder.resolve()) for place in folders):
        raise ValueError("a folder of pictures lies outside")
    names = [{file.name for file in place.glob("*.png")} for place in folders]
    shared = sorted(set.intersection(*names)) if names else []
    return [[place / name for place in folders] for name in shared[:number]]
