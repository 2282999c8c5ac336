"""A run at W&B: online with an API key, offline without, and no reason for a training to end."""

from __future__ import annotations

import inspect
import json
import logging
import os
import re
import secrets
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image

from lcm_lightning.errors import UserError, first_line
from lcm_lightning.output.files import write_atomic
from lcm_lightning.output.visible_files import lasting_files
from lcm_lightning.tracking.artifacts import ArtifactRecord, has_wandb_key, read_record, safe_name, write_record
from lcm_lightning.tracking.data_records import DataRecord
from lcm_lightning.tracking.tracker import Sample, Tracker, tolerant

log = logging.getLogger(__name__)

PACKAGE = Path(__file__).parent.parent
SERVER = {"init_timeout": 60, "finish_timeout": 600}  # seconds; W&B's own are 90 and for ever
GRACE = 20.0  # seconds that an interrupted run's uploads get; SLURM kills a job 30 after it has asked
REFUSED = re.compile(r"\b40[134]\b|permission|not found|unauthorized|invalid api key", re.IGNORECASE)
COLUMNS = ("step", "prompt", "seed", "model", "steps", "guidance_scale", "seconds", "picture")


def wandb_run_id(run_dir: Path) -> str:
    """The W&B run of a run folder: chosen once, by W&B's agent for a run of its sweep; found again in the folder."""
    path = run_dir / "wandb" / "run_id"
    if not path.is_file():
        write_atomic(path, (os.environ.get("WANDB_RUN_ID") or secrets.token_hex(4)).encode())
    return path.read_text()


class WandbTracker(Tracker, WandbLogger):
    """A W&B run that goes on when its run folder does.

    The folder's id is read or chosen when the run first logs: a run refused before that leaves nothing behind.

    Args:
        log_code: whether the package and its configurations become an artifact of type "code".
        log_checkpoints: whether the checkpoints of a finished run become an artifact, some 100 MB of optimizer state.
        more: see Lightning's `WandbLogger`.
    """

    def __init__(self, *, log_code: bool = True, log_checkpoints: bool = False, **more: Any) -> None:
        super().__init__(**more)
        if self._wandb_init["anonymous"] is None:  # W&B warns of it, whatever its value
            del self._wandb_init["anonymous"]
        self.run_dir = Path(self._save_dir or ".")
        self.log_code = log_code
        self.log_checkpoints = log_checkpoints
        self.exit_code = 1  # of a run that fails
        self.goes_on = False

    # ---- the run -------------------------------------------------------------------------------------------------

    @property
    @rank_zero_experiment
    def experiment(self) -> Any:
        """W&B's run."""
        if self._experiment is None:
            self._id = self._wandb_init["id"] = self._id or wandb_run_id(self.run_dir)
            self._start()
        return super().experiment

    def _start(self) -> None:
        """Begin the run; offline where the server does not answer. Raises a `UserError` where it refuses."""
        import wandb

        start = cast(property, WandbLogger.experiment).fget
        assert start is not None
        try:
            start(self)
        except wandb.errors.UsageError as error:
            raise UserError(f"logger.wandb: {first_line(error)}") from error
        except wandb.errors.CommError as error:
            if isinstance(error, wandb.errors.AuthenticationError) or REFUSED.search(str(error)):
                where = f"logger.wandb.entity={self._wandb_init.get('entity')} logger.wandb.project={self._project}"
                raise UserError(
                    f"{where}: W&B refuses ({first_line(error)}); check both and `wandb login`, or WANDB_MODE=offline"
                ) from error
            log.warning(
                "W&B does not answer (%s): this run is logged offline; `wandb sync %s/wandb/offline-run-*` sends it",
                first_line(error),
                self.run_dir,
            )
            wandb.teardown()  # its service holds on to the id of the run it could not begin
            self._offline, self._wandb_init["mode"] = True, "offline"
            start(self)
        if self.log_code and self._experiment is not None:
            log_code(self._experiment, str(self._project))

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """End the run, with a status that tells a finished one from a failed one.

        An interrupted one ends with the process, whose status W&B sees, and whose end waits for uploads; `GRACE`
        limits that. What was not sent is in the run's folder, for `wandb sync`.
        """
        self.silent_until = 0.0  # one more try
        if self._experiment is None:
            return
        if self.goes_on:
            end_service_after(GRACE)
        else:
            self._end(status)

    @tolerant
    def _end(self, status: str) -> None:
        if status == "success" and self.log_checkpoints:
            self.log_files("checkpoint", sorted((self.run_dir / "checkpoints").glob("[!.]*.ckpt")))
        self.experiment.finish(exit_code=0 if status == "success" else self.exit_code)
        self.ended = True

    @rank_zero_only
    @tolerant
    def alert(self, title: str, text: str, exit_code: int, *, goes_on: bool = False) -> None:
        """W&B mails or posts it, as the user's settings there say; an interrupted run is "preempted" there.

        Not one of an agent: it ends by SIGTERM runs that its sweep gives up, and W&B queues preempted ones again.
        """
        self.exit_code, self.goes_on = exit_code, goes_on
        if goes_on and "WANDB_SWEEP_ID" not in os.environ:
            self.experiment.mark_preempting()
        self.experiment.alert(title[:63], text, level="WARN" if goes_on else "ERROR")

    # ---- figures and pictures ------------------------------------------------------------------------------------

    @tolerant
    def log_hyperparams(self, params: Any) -> None:
        """The resolved configuration."""
        super().log_hyperparams(params)

    @tolerant
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Figures of a step."""
        super().log_metrics(metrics, step)

    @rank_zero_only
    @tolerant
    def summarize(self, figures: Mapping[str, float]) -> None:
        """The last value of each metric is there by itself."""
        self.experiment.summary.update(dict(figures))

    @rank_zero_only
    @tolerant
    def log_samples(self, grid: Image.Image, samples: Sequence[Sample], step: int) -> None:
        """`samples/grid`, and `samples/table` with a row for each picture."""
        import wandb

        rows = [
            [step, s.prompt, s.seed, s.model, s.steps, s.guidance_scale, round(s.seconds, 4), wandb.Image(s.picture)]
            for s in samples
        ]
        table = wandb.Table(columns=list(COLUMNS), data=rows)
        shown: dict[str, Any] = {"samples/grid": wandb.Image(grid), "samples/table": table}
        super().log_metrics(shown, step)

    # ---- what it was made from, and what it has made -------------------------------------------------------------

    @rank_zero_only
    @tolerant
    def use_data(self, data: DataRecord) -> None:
        """An artifact of names and digests: of the same data in all runs it is the same version."""
        self._use(data_artifact(data), [])

    @rank_zero_only
    @tolerant
    def log_data(self, data: DataRecord) -> None:
        """The same artifact, made by this run."""
        self.experiment.log_artifact(data_artifact(data))

    @rank_zero_only
    @tolerant
    def use_export(self, run: Path) -> None:
        """Its artifact by name where the server knows it, else by its content, which is recognised on upload."""
        import wandb

        record = read_record(run)
        if record is None:
            return
        if record.path is not None and not self.experiment.offline:
            try:
                self.experiment.use_artifact(record.path)
                return
            except (ValueError, wandb.errors.CommError) as error:  # logged offline, and not sent yet
                log.info("W&B does not know %s (%s): it is sent", record.path, first_line(error))
        artifact = wandb.Artifact(record.name, record.type)
        folder = run / record.folder
        for file in lasting_files(folder):
            artifact.add_file(str(file), name=str(file.relative_to(folder)))
        self._use(artifact, [record.alias])

    def _use(self, artifact: Any, aliases: list[str]) -> None:
        """Log an artifact as an input of the run.

        `Run.use_artifact` refuses this offline, and online waits for the upload, for ever where the server is gone;
        this is the record it writes.
        """
        self.experiment._log_artifact(artifact, aliases=aliases, is_user_created=True, use_after_commit=True)

    @rank_zero_only
    @tolerant
    def log_export(self, folder: Path, kind: str, aliases: Sequence[str]) -> None:
        """An artifact `lora-<run id>` or `model-<run id>`, which the run's folder remembers; `aliases` ends with its
        own."""
        self._log_files(kind, lasting_files(folder), aliases, folder)
        run = self.experiment
        owner = {} if run.offline else {"entity": run.entity, "project": run.project}
        name = safe_name(f"{kind}-{run.id}")
        write_record(folder.parent, ArtifactRecord(name, aliases[-1], kind, folder.name, **owner))

    @rank_zero_only
    @tolerant
    def log_files(self, kind: str, files: Sequence[Path], aliases: Sequence[str] = ("latest",)) -> None:
        """An artifact `<kind>-<run id>` of files."""
        self._log_files(kind, files, aliases)

    def _log_files(self, kind: str, files: Sequence[Path], aliases: Sequence[str], folder: Path | None = None) -> None:
        """The same under their names in `folder`; raises what W&B raises."""
        import wandb

        artifact = wandb.Artifact(safe_name(f"{kind}-{self.experiment.id}"), kind)
        for file in files:
            artifact.add_file(str(file), name=str(file.relative_to(folder)) if folder else file.name)
        self.experiment.log_artifact(artifact, aliases=list(aliases))


def end_service_after(seconds: float) -> None:
    """Kill W&B's service process, where it still runs by then.

    At the process's end `wandb` waits for it without a limit, and it for a server that may be gone (wandb 0.31:
    `ServiceConnection.teardown` joins it; `finish_timeout` is of `Run.finish` alone).
    """
    from wandb.sdk import wandb_setup

    connection = wandb_setup.singleton()._connection
    if connection is not None and connection._proc is not None:  # else it is another process's service
        timer = threading.Timer(seconds, connection._proc._process.kill)
        timer.daemon = True
        timer.start()


def data_artifact(data: DataRecord) -> Any:
    """A `wandb.Artifact` of what tells data from others."""
    import wandb

    counts = {split: sum(shard["samples"] for shard in shards) for split, shards in data.shards.items()}
    metadata = {"digest": data.digest, **{f"{split}_samples": count for split, count in counts.items()}}
    artifact = wandb.Artifact(safe_name(f"data-{data.name}"), "dataset", metadata=metadata)
    with artifact.new_file("shards.json") as file:
        json.dump(asdict(data), file, indent=2)
    return artifact


def log_code(run: Any, project: str) -> None:
    """Keep the package's Python files and the configurations that ship with it, nothing else of the working folder."""

    def ours(path: str, root: str) -> bool:
        return path.endswith((".py", ".yaml"))

    conf = PACKAGE / "conf" if (PACKAGE / "conf").is_dir() else PACKAGE.parent / "conf"
    for folder, name in ((conf, "conf"), (PACKAGE, "package")):  # the last one is what the run's Code tab shows
        run.log_code(str(folder), name=safe_name(f"source-{project}-{name}"), include_fn=ours)


def wandb_logger(
    *,
    project: str,
    save_dir: str,
    name: str,
    entity: str | None = None,
    group: str | None = None,
    job_type: str | None = None,
    tags: Sequence[str] = (),
    notes: str | None = None,
    log_code: bool = True,
    log_checkpoints: bool = False,
    settings: Mapping[str, Any] | None = None,
    **more: Any,
) -> WandbTracker:
    """A W&B logger that is online with an API key and offline without, unless `WANDB_MODE` says otherwise.

    A run that goes on in its folder goes on in its W&B run. An offline run is sent later with
    ``wandb sync <run folder>/wandb/offline-run-*``.

    Args:
        entity: user or team; None for W&B's default, the user's own.
        group, job_type, tags, notes: of `wandb.init`.
        settings: of `wandb.Settings`.
        more: goes to `wandb.init` too.

    Raises:
        UserError: for a setting it does not know. W&B would notice on first use, in the middle of Lightning's set-up.
    """
    import wandb

    chosen = {**SERVER, **(settings or {})}
    check_settings(project, chosen, more)
    if wandb.run is not None:
        wandb.finish()  # one of the caller's own
    return WandbTracker(
        project=project,
        save_dir=save_dir,
        name=name,
        entity=entity,
        group=group,
        job_type=job_type,
        tags=list(tags),
        notes=notes,
        settings=chosen,
        offline="WANDB_MODE" not in os.environ and not has_wandb_key(),
        log_code=log_code,
        log_checkpoints=log_checkpoints,
        **more,
    )


def check_settings(project: str, settings: Mapping[str, Any], more: Mapping[str, Any]) -> None:
    """Raise a `UserError` for what `wandb.Settings`, or of `more` `wandb.init`, does not take, or is not to be kept."""
    import wandb

    known = {*inspect.signature(WandbLogger).parameters, *inspect.signature(wandb.init).parameters}
    if unknown := sorted(more.keys() - known):
        raise UserError(
            f"logger.wandb.{unknown[0]}={more[unknown[0]]}: no setting of wandb.init; remove it, or see "
            "https://docs.wandb.ai/ref/python/init"
        )
    if "api_key" in settings:
        raise UserError(
            "logger.wandb.settings.api_key: would be written to config.yaml; `wandb login`, or WANDB_API_KEY"
        )
    try:
        wandb.Settings(project=project, **settings)
    except (wandb.errors.UsageError, ValueError) as error:
        raise UserError(f"logger.wandb: {' '.join(str(error).split())[:300]}") from error
