"""Loggers that never ask and never stop a run."""

from __future__ import annotations

import csv
import inspect
import io
import logging
import netrc
import os
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger, WandbLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from lcm_lightning.errors import UserError
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


def has_wandb_key() -> bool:
    """Whether W&B's key is at hand: in `WANDB_API_KEY`, W&B's settings, or the netrc file `wandb login` writes."""
    import wandb  # late, as below: only who chose it waits for it

    settings = wandb.Settings()
    if os.environ.get("WANDB_API_KEY") or settings.api_key:
        return True
    try:
        return netrc.netrc().authenticators(urlparse(settings.base_url).hostname or "") is not None
    except (FileNotFoundError, netrc.NetrcParseError):
        return False


def wandb_run_id(run_dir: Path) -> str:
    """The W&B run of a run folder: chosen once, found again by a run that goes on there."""
    path = run_dir / "wandb" / "run_id"
    if not path.is_file():
        write_atomic(path, secrets.token_hex(4).encode())
    return path.read_text()


class ContinuedWandb(WandbLogger):
    """A W&B run that goes on when its run folder does.

    The folder's id is read or chosen when the run first logs: a run refused before that leaves nothing behind.
    """

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """W&B's run."""
        if self._experiment is None and self._id is None:
            self._id = self._wandb_init["id"] = wandb_run_id(Path(self._save_dir or "."))
        return super().experiment


def wandb_logger(*, project: str, save_dir: str, name: str, **settings: Any) -> WandbLogger:
    """A W&B logger that is online with an API key and offline without, unless `WANDB_MODE` says otherwise.

    A run that goes on in its folder goes on in its W&B run. An offline run is sent later with
    ``wandb sync <run folder>/wandb/offline-run-*``. `settings` go to `wandb.init`.

    Raises:
        UserError: for a setting it does not know. W&B would notice on first use, in the middle of Lightning's set-up.
    """
    import wandb

    known = {*inspect.signature(WandbLogger).parameters, *inspect.signature(wandb.init).parameters}
    unknown = sorted(settings.keys() - known)
    if unknown:
        raise UserError(
            f"logger.wandb.{unknown[0]}={settings[unknown[0]]}: no setting of wandb.init; remove it, or see "
            "https://docs.wandb.ai/ref/python/init"
        )
    if wandb.run is not None:
        wandb.finish()  # the jobs of a sweep share a process; each gets a run of its own
    offline = "WANDB_MODE" not in os.environ and not has_wandb_key()
    return ContinuedWandb(project=project, save_dir=save_dir, name=name, offline=offline, **settings)
