"""What MLflow keeps of a run, read back from a local database by its own client."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("mlflow", reason="the extra `mlflow` is not installed")
pytest.importorskip("sqlalchemy", reason="the extra `mlflow` is not installed")

from mlflow.tracking import MlflowClient

from helpers.commands import SMALL, in_process
from lcm_lightning.callbacks.experiment_tracking import ExperimentTracking
from lcm_lightning.errors import UserError
from lcm_lightning.runs.preemption import Preempted
from lcm_lightning.tracking.mlflow_logger import PATIENCE, RUN_ID, MlflowTracker, mlflow_logger


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, and no setting of MLflow's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    return tmp_path


def local(folder: Path, **settings: Any) -> MlflowTracker:
    """A logger with a database in that folder."""
    (folder / "run").mkdir(exist_ok=True)
    chosen = {"tracking_uri": f"sqlite:///{folder}/mlflow.db", "experiment_name": "tests"} | settings
    return mlflow_logger(run_dir=str(folder / "run"), name="run", **chosen)


def kept(folder: Path, run_dir: Path) -> Any:
    """MLflow's run of a run folder."""
    return MlflowClient(f"sqlite:///{folder}/mlflow.db").get_run((run_dir / RUN_ID).read_text())


def artifacts(run: Any) -> set[str]:
    """Its files."""
    root = Path(run.info.artifact_uri.removeprefix("file://"))
    return {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}


def test_a_fine_tuning_and_a_distillation_are_two_runs_of_one_experiment(
    here: Path, pipeline_folder: Path, flickr_shards: Path
):
    places = (f"model.path={pipeline_folder}", f"data.source={flickr_shards}", "debug=fdr", "logger=mlflow")
    in_process(
        "train", "experiment=lora_flickr8k", *places, *SMALL, "+logger.mlflow.tags.team=blue", "hydra.run.dir=teacher"
    )
    in_process("train", "experiment=lcm_flickr8k", *places, *SMALL, "method.teacher_lora=teacher", "hydra.run.dir=it")
    teacher, student = (kept(here / "outputs", here / name) for name in ("teacher", "it"))
    assert teacher.info.experiment_id == student.info.experiment_id
    assert teacher.info.status == student.info.status == "FINISHED"
    assert teacher.info.run_name == "lora_flickr8k"
    assert teacher.data.params["method/lora/rank"] == "4"
    assert {"team": "blue", "job_type": "train", "data": "flickr8k"}.items() <= teacher.data.tags.items()
    assert student.data.tags["built_on"] == teacher.info.run_id
    assert student.data.tags["lora_aliases"] == "latest step-2"
    assert student.data.metrics["images_seen"] == 4
    assert student.data.metrics["best/val/loss"] == pytest.approx(student.data.metrics["val/loss"])
    history = MlflowClient(f"sqlite:///{here}/outputs/mlflow.db").get_metric_history(student.info.run_id, "train/loss")
    assert [point.step for point in history] == [0, 1] or [point.step for point in history] == [1, 2]
    files = artifacts(student)
    assert {"config.yaml", "samples/step_000002.png", "lora/pytorch_lora_weights.safetensors"} <= files
    assert not any(name.endswith((".ckpt", ".tar", ".jpg")) for name in files)
    rows = json.loads(next((here / "outputs").rglob("step_000002.json")).read_text())["samples"]
    assert {"prompt", "seed", "model", "steps", "guidance_scale", "seconds"} == rows[0].keys()


@pytest.mark.parametrize(
    ("end", "status"),
    [(UserError("not finite"), "FAILED"), (Preempted(15, requeue=False), "KILLED")],
    ids=["fault", "signal"],
)
def test_an_early_end_is_a_tag_and_the_runs_status(here: Path, end: Exception, status: str):
    tracker = local(here)
    tracker.log_metrics({"train/loss": 1.0}, 7)
    trainer: Any = SimpleNamespace(loggers=[tracker], is_global_zero=True, global_step=7)
    ExperimentTracking().on_exception(trainer, None, end)  # type: ignore[arg-type]
    tracker.finalize("failed")
    run = kept(here, here / "run")
    assert run.info.status == status and str(end) in run.data.tags["fault"]


def test_a_run_that_goes_on_in_its_folder_goes_on_in_its_mlflow_run(here: Path):
    for step in (1, 2):
        tracker = local(here)
        tracker.log_hyperparams({"max_steps": step})  # which MLflow would refuse to change
        tracker.log_metrics({"loss": 1.0 / step}, step)
        tracker.finalize("success")
        assert not tracker.warned
    client = MlflowClient(f"sqlite:///{here}/mlflow.db")
    run = kept(here, here / "run")
    assert [point.step for point in client.get_metric_history(run.info.run_id, "loss")] == [1, 2]
    assert run.data.params["max_steps"] == "1" and run.info.status == "FINISHED"


def test_a_server_that_does_not_answer_is_a_warning_within_seconds(
    here: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    begun = time.monotonic()
    for variable in PATIENCE:
        monkeypatch.setenv(variable, "forgotten")  # so that what the logger sets is undone
        monkeypatch.delenv(variable)
    tracker = local(here, tracking_uri="http://127.0.0.1:9")
    for step in (1, 2):
        tracker.log_metrics({"loss": 1.0}, step)
    tracker.finalize("success")
    warned = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and "lcm_lightning" in r.name]
    assert len(warned) == 1 and "127.0.0.1" in warned[0] and "metrics.csv" in warned[0]
    assert time.monotonic() - begun < 30


def test_of_an_export_what_a_broken_write_left_is_not_kept(here: Path):
    for name in ("lora/a.json", "lora/.tmp-1/b", "lora/in/c"):
        (here / "run" / name).parent.mkdir(parents=True, exist_ok=True)
        (here / "run" / name).write_text("x")
    tracker = local(here)
    tracker.log_export(here / "run" / "lora", "lora", ["latest"])
    assert artifacts(kept(here, here / "run")) == {"lora/a.json", "lora/in/c"}


def test_a_password_in_the_address_is_refused_and_not_repeated(here: Path):
    with pytest.raises(UserError, match="MLFLOW_TRACKING_PASSWORD") as refused:
        local(here, tracking_uri="http://me:hidden@server:5000")
    assert "hidden" not in str(refused.value)
