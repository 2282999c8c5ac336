"""`metrics.csv`, which every run writes."""

from __future__ import annotations

import csv
import io
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from lcm_lightning.output.files import write_atomic

log = logging.getLogger(__name__)


class MetricsFile(CSVLogger):
    """`metrics.csv` in a run's folder, which goes on where a resumed run does.

    Args:
        folder: the run's.
        first_step: the step a resumed run starts from: rows of earlier steps stay, later ones will be made again.
    """

    _experiment: ContinuedWriter | None

    def __init__(self, folder: Path, first_step: int = 0) -> None:
        super().__init__(folder, name="", version="")
        self.first_step = first_step

    @property
    @rank_zero_experiment
    def experiment(self) -> ContinuedWriter:
        """Lightning's writer, on a file that is kept."""
        if self._experiment is None:
            self._experiment = ContinuedWriter(self.log_dir, self.first_step)
        return self._experiment

    def is_written(self) -> bool:
        """Whether all rows are in the file."""
        return not self.experiment.metrics


class ContinuedWriter(ExperimentWriter):
    """Adds to the rows below `first_step`. The file is replaced at once, never emptied and written again.

    Rows that cannot be written (a full disk) are kept and written with later ones.
    """

    def __init__(self, log_dir: str, first_step: int) -> None:
        super().__init__(log_dir)
        self.size = 0  # bytes of whole rows in the file
        path = Path(self.metrics_file_path)
        header, rows = read_csv(path)
        kept = [row for row in rows if (row.get("step") or "").isdigit() and int(row["step"]) < first_step]
        if kept:
            self.metrics_keys = list(header)
            write_csv(path, header, kept)
        else:
            path.unlink(missing_ok=True)

    def save(self) -> None:
        """Add the new rows, whole, or none of them with a warning."""
        path, keys = Path(self.metrics_file_path), list(self.metrics_keys)
        self.size = file_size(path)
        try:
            super().save()
        except OSError as error:
            log.warning("%s: %d rows wait to be written (%s)", path, len(self.metrics), error)
            self.metrics_keys = keys  # the header that is there
            if file_size(path) > self.size:
                os.truncate(path, self.size)
            if self.size == 0:
                path.unlink(missing_ok=True)  # a new file gets the header first

    def _check_log_dir_exists(self) -> None:
        """Nothing to check: Lightning's would delete the file."""

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        path = Path(self.metrics_file_path)
        write_csv(path, fieldnames, read_csv(path)[1])
        self.size = file_size(path)


def file_size(path: Path) -> int:
    """Bytes in a file, 0 where there is none."""
    return path.stat().st_size if path.is_file() else 0


def read_csv(path: Path) -> tuple[Sequence[str], list[dict[str, str]]]:
    """Header and rows of a file; both empty where there is none."""
    if not path.is_file():
        return [], []
    with path.open(newline="") as file:
        reader = csv.DictReader(file)
        return reader.fieldnames or [], list(reader)


def write_csv(path: Path, header: Sequence[str], rows: Sequence[dict[str, Any]]) -> None:
    """Write header and rows under a temporary name, then rename."""
    content = io.StringIO(newline="")
    writer = csv.DictWriter(content, header)
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(path, content.getvalue().encode())
