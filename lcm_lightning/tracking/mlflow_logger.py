"""A run at MLflow: a database of one's own beside the runs, or a server."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit

from lightning.fabric.loggers.logger import _DummyExperiment, rank_zero_experiment
from lightning.pytorch.loggers import MLFlowLogger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from lcm_lightning.errors import UserError
from lcm_lightning.output.files import write_atomic
from lcm_lightning.output.visible_files import visible_files
from lcm_lightning.tracking.data_records import DataRecord
from lcm_lightning.tracking.tracker import Sample, Tracker, tolerant

RUN_ID = "mlflow_run_id"  # file in a run's folder
# A call that fails is one of a training's first rank, for which the others wait: MLflow's own limits, 7 retries and 120
# seconds each, are minutes. `PAUSE` later it is tried again.
PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1", "MLFLOW_HTTP_REQUEST_TIMEOUT": "10"}


class MlflowTracker(Tracker, MLFlowLogger):
    """An MLflow run that goes on when its run folder does; inputs, best value and faults are its tags and metrics.

    Args:
        run_dir: the run's folder.
        more: see Lightning's `MLFlowLogger`.
    """

    def __init__(self, run_dir: Path, **more: Any) -> None:
        super().__init__(**more)
        self.run_dir = run_dir
        self.status = "FAILED"  # of a run that does not succeed

    # ---- the run -------------------------------------------------------------------------------------------------

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """MLflow's client; where the server does not answer, one that does nothing."""
        if not self._initialized:
            self._start()
        return self._mlflow_client if self._initialized else _DummyExperiment()

    @tolerant
    def _start(self) -> None:
        record = self.run_dir / RUN_ID
        goes_on = record.is_file()
        if goes_on:
            self._run_id = record.read_text()
        start = cast(property, MLFlowLogger.experiment).fget
        assert start is not None
        start(self)
        if goes_on:
            self._mlflow_client.update_run(self._run_id, status="RUNNING")
        else:
            write_atomic(record, str(self._run_id).encode())

    @rank_zero_only
    def finalize(self, status: str = "success") -> None:
        """End the run as finished, failed, or killed by a signal."""
        self.silent_until = 0.0  # one more try
        if self._initialized:
            self._end(status)

    @tolerant
    def _end(self, status: str) -> None:
        self._mlflow_client.set_terminated(self._run_id, "FINISHED" if status == "success" else self.status)
        self.ended = True

    @rank_zero_only
    @tolerant
    def alert(self, title: str, text: str, exit_code: int, *, goes_on: bool = False) -> None:
        """A tag: MLflow sends nobody a message."""
        self.status = "KILLED" if goes_on else "FAILED"
        self.experiment.set_tag(self._run_id, "fault", f"{title}: {text}")

    # ---- figures and pictures ------------------------------------------------------------------------------------

    @tolerant
    def log_hyperparams(self, params: Any) -> None:
        """The resolved configuration: as a file each time, as parameters once, since MLflow's never change."""
        if self.run_dir.joinpath("config.yaml").is_file():
            self.experiment.log_artifact(self._run_id, str(self.run_dir / "config.yaml"))
        known = self.experiment.get_run(self._run_id).data.params
        if not known:
            super().log_hyperparams(params)

    @tolerant
    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Figures of a step."""
        super().log_metrics(metrics, step)

    @rank_zero_only
    @tolerant
    def summarize(self, figures: Mapping[str, float]) -> None:
        """Metrics without a step."""
        super().log_metrics(figures)

    @rank_zero_only
    @tolerant
    def log_samples(self, grid: Image.Image, samples: Sequence[Sample], step: int) -> None:
        """The grid, `samples/step_<n>.png`; and how each new picture was drawn, `samples/step_<n>.json`."""
        name = f"samples/step_{step:06d}"
        self.experiment.log_image(self._run_id, grid, f"{name}.png")
        rows = [{key: value for key, value in vars(sample).items() if key != "picture"} for sample in samples]
        self.experiment.log_dict(self._run_id, {"samples": rows}, f"{name}.json")

    # ---- what it was made from, and what it has made -------------------------------------------------------------

    @rank_zero_only
    @tolerant
    def use_data(self, data: DataRecord) -> None:
        """Tags `data` and `data_digest`."""
        self.experiment.set_tag(self._run_id, "data", data.name)
        self.experiment.set_tag(self._run_id, "data_digest", data.digest)

    @rank_zero_only
    @tolerant
    def log_data(self, data: DataRecord) -> None:
        """The same tags, and what the shards are as `data.json`."""
        self.use_data(data)
        self.experiment.log_dict(self._run_id, asdict(data), "data.json")

    @rank_zero_only
    @tolerant
    def use_export(self, run: Path) -> None:
        """A tag `built_on` with the id of that run."""
        if (run / RUN_ID).is_file():
            self.experiment.set_tag(self._run_id, "built_on", (run / RUN_ID).read_text())

    @rank_zero_only
    @tolerant
    def log_export(self, folder: Path, kind: str, aliases: Sequence[str]) -> None:
        """The folder among the run's artifacts, and a tag with its names."""
        for file in visible_files(folder):
            place = Path(kind) / file.parent.relative_to(folder)
            self.experiment.log_artifact(self._run_id, str(file), place.as_posix())
        self.experiment.set_tag(self._run_id, f"{kind}_aliases", " ".join(aliases))

    @rank_zero_only
    @tolerant
    def log_files(self, kind: str, files: Sequence[Path], aliases: Sequence[str] = ()) -> None:
        """In a folder of that name among the run's artifacts."""
        for file in files:
            self.experiment.log_artifact(self._run_id, str(file), kind)


def mlflow_logger(
    *,
    tracking_uri: str,
    experiment_name: str,
    run_dir: str,
    name: str,
    group: str | None = None,
    job_type: str | None = None,
    tags: Mapping[str, str] | None = None,
) -> MlflowTracker:
    """A logger of a local database, such as ``sqlite:///outputs/mlflow.db``, or of a server.

    The files of a local database's runs go into the folder `mlflow_artifacts` beside it.

    Args:
        tracking_uri: where MLflow keeps runs; without a password, which MLflow reads from MLFLOW_TRACKING_PASSWORD.
        experiment_name: what MLflow calls a project.
        group, job_type: tags of those names.

    Raises:
        UserError: a password, or a place that MLflow does not know.
    """
    for variable, value in PATIENCE.items():
        os.environ.setdefault(variable, value)
    place = urlsplit(tracking_uri)
    if place.password:
        raise UserError(
            "logger.mlflow.tracking_uri: its password would be written to config.yaml; leave it out, and set "
            "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"
        )
    artifacts = None
    if place.scheme == "sqlite":
        database = Path(tracking_uri.removeprefix("sqlite:///")).absolute()
        database.parent.mkdir(parents=True, exist_ok=True)
        artifacts = (database.parent / "mlflow_artifacts").as_uri()
    own = {key: value for key, value in {"group": group, "job_type": job_type}.items() if value is not None}
    return MlflowTracker(
        Path(run_dir),
        experiment_name=experiment_name,
        run_name=name,
        tracking_uri=tracking_uri,
        tags={**own, **(tags or {})},
        artifact_location=artifacts,
    )
