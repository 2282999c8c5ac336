"""What W&B is told, read back from the files of offline runs; LoRAs that are named as its artifacts; its sweeps."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from PIL import Image
from wandb.sdk import wandb_setup
from wandb.sdk.launch.sweeps import utils as wandb_sweeps

from helpers.commands import ROOT, SMALL, in_process
from helpers.wandb_files import RunFile, name
from lcm_lightning.callbacks.experiment_tracking import ExperimentTracking
from lcm_lightning.config.resolvers import register_resolvers, sweep_name
from lcm_lightning.config.wandb_sources import fetch_artifacts
from lcm_lightning.errors import UserError
from lcm_lightning.runs.preemption import Preempted
from lcm_lightning.tracking.artifacts import ArtifactRecord, download, read_record, write_record
from lcm_lightning.tracking.tracker import Sample, begun
from lcm_lightning.tracking.wandb_logger import WandbTracker, wandb_logger, wandb_run_id

ENVIRONMENT = ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL", "WANDB_RUN_ID", "WANDB_SWEEP_ID", "WANDB_ARTIFACT_DIR")


def without_wandb(patch: pytest.MonkeyPatch, folder: Path) -> None:
    """A working folder, no key and no setting of W&B's."""
    patch.chdir(folder)
    patch.setenv("HOME", str(folder))
    patch.setenv("WANDB_DATA_DIR", str(folder / "staging"))
    patch.setenv("HF_HUB_OFFLINE", "1")
    for variable in ENVIRONMENT:
        patch.delenv(variable, raising=False)


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """`without_wandb`, with a session of W&B's that has seen it."""
    wandb.teardown()
    without_wandb(monkeypatch, tmp_path)
    yield tmp_path
    wandb.teardown()


def offline(folder: Path, **settings: Any) -> WandbTracker:
    """A logger without a key, whose runs keep no code and capture no output."""
    return wandb_logger(
        project="tests", save_dir=str(folder), name="run", log_code=False, settings={"console": "off"}, **settings
    )


# ---- a fine-tuning, and a distillation on top of it -------------------------------------------------------------


@dataclass(frozen=True)
class Chain:
    """Two finished runs."""

    teacher: Path
    student: Path


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory, pipeline_folder: Path, flickr_shards: Path) -> Iterator[Chain]:
    folder = tmp_path_factory.mktemp("chain")
    (folder / "mine.py").write_text("secret = 1")
    with pytest.MonkeyPatch.context() as patch:
        without_wandb(patch, folder)
        places = (f"model.path={pipeline_folder}", f"data.source={flickr_shards}", "debug=fdr", "logger=wandb")
        more = ("logger.wandb.tags=[small,tested]", "logger.wandb.group=pair", "logger.wandb.notes=two of them")
        in_process("train", "experiment=lora_flickr8k", *places, *SMALL, *more, "hydra.run.dir=teacher")
        of_teacher = ("method.teacher_lora=teacher", "callbacks.export.best_by=val/loss", "hydra.run.dir=student")
        in_process("train", "experiment=lcm_flickr8k", *places, *SMALL, *of_teacher)
        yield Chain(folder / "teacher", folder / "student")


def test_a_run_says_whose_it_is_and_carries_its_resolved_settings(chain: Chain):
    file = RunFile(chain.teacher)
    assert (file.run.project, file.run.run_group, file.run.job_type) == ("lcm-lightning", "pair", "train")
    assert (list(file.run.tags), file.run.notes) == (["small", "tested"], "two of them")
    assert file.config["method"]["lora"]["rank"] == 4 and "${" not in json.dumps(file.config)
    assert RunFile(chain.student).run.run_group == ""
    assert file.run.run_id == wandb_run_id(chain.teacher)


def test_metrics_are_plotted_over_optimizer_steps(chain: Chain):
    file = RunFile(chain.student)
    assert ("*", "trainer/global_step") in [(metric.glob_name, metric.step_metric) for metric in file.of("metric")]
    assert max(file.history("trainer/global_step")) == 2


def test_the_summary_has_the_best_value_and_the_images_seen(chain: Chain):
    file = RunFile(chain.student)
    assert file.summary["images_seen"] == 4  # two steps of two
    assert file.summary["best/val/loss"] == pytest.approx(min(file.history("val/loss")))
    assert file.summary["best/step"] == 2
    assert file.summary["val/loss"] == pytest.approx(file.history("val/loss")[-1])
    assert file.of("exit")[0].exit_code == 0


def test_samples_are_a_grid_and_a_table_with_how_each_was_drawn(chain: Chain):
    file = RunFile(chain.student)
    with Image.open(file.files / file.history("samples/grid/path")[0]) as grid:
        assert grid.format == "PNG"
    table = file.table("samples/table")
    rows = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert len(rows) == 4  # two prompts by teacher and student
    assert [row["seed"] for row in rows] == [0, 1] * 2 and {row["step"] for row in rows} == {2}
    assert {row["steps"] for row in rows} == {1, 2} and all(row["prompt"] and row["seconds"] > 0 for row in rows)
    kept = [content.path for content in file.artifact("run_table").manifest.contents]
    assert sum(path.endswith(".png") for path in kept) == len(rows)


def test_the_data_set_is_an_input_by_names_and_digests_without_a_photo(chain: Chain, flickr_shards: Path):
    first, second = (RunFile(run).artifact("dataset") for run in (chain.teacher, chain.student))
    assert first.use_after_commit and second.use_after_commit
    assert first.digest == second.digest  # one version for both runs
    (content,) = first.manifest.contents
    listed = json.loads(Path(content.local_path).read_text())
    assert {shard["name"] for shard in listed["shards"]["train"]} == {
        path.name for path in flickr_shards.rglob("*train*.tar")
    }
    assert json.loads(first.metadata)["train_samples"] == sum(shard["samples"] for shard in listed["shards"]["train"])


def test_the_teachers_lora_that_one_run_logs_is_the_one_the_next_uses(chain: Chain):
    loras = [a for a in RunFile(chain.student).of("artifact") if a.type == "lora"]
    used, made = (next(a for a in loras if a.use_after_commit is used) for used in (True, False))
    logged = RunFile(chain.teacher).artifact("lora")
    assert (used.name, used.digest) == (logged.name, logged.digest)
    assert set(logged.aliases) == {"latest", "step-2"}
    assert set(made.aliases) == {"latest", "best", "step-2"}  # callbacks.export.best_by chose it
    folder = chain.teacher / "lora"
    files = {path.name for path in folder.iterdir() if path.is_file()}
    assert {content.path for content in logged.manifest.contents} == files - {"README.md"}  # which is renewed
    assert read_record(chain.student) == ArtifactRecord(made.name, "step-2", "lora", "lora")


def test_no_checkpoint_and_no_file_of_the_working_folder_is_sent(chain: Chain):
    file = RunFile(chain.student)
    assert {a.type for a in file.of("artifact")} == {"code", "dataset", "lora", "run_table"}
    code = [content.path for a in file.of("artifact") if a.type == "code" for content in a.manifest.contents]
    assert {"train.py", "methods/lcm_lora.py", "logger/wandb.yaml"} <= {*code}
    assert "mine.py" not in code and all(path.endswith((".py", ".yaml")) for path in code)


@pytest.mark.slow
def test_an_evaluation_uses_what_it_measures(chain: Chain, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    without_wandb(monkeypatch, chain.student.parent)
    clip = f"evaluation.clip={ROOT / 'lcm_lightning/assets/tiny_clip'}"
    short = ("evaluation=quick", "evaluation.num_images=4", clip, "accelerator=cpu", "logger.wandb.log_code=false")
    in_process("evaluate", "run=student", "logger=wandb", *short)
    file = RunFile(chain.student / "evaluation" / "quick-4")
    assert file.run.job_type == "evaluate" and file.config["evaluation"]["num_images"] == 4
    used = file.artifact("lora")
    (made,) = [a for a in RunFile(chain.student).of("artifact") if a.type == "lora" and not a.use_after_commit]
    assert used.use_after_commit and (used.name, used.digest) == (made.name, made.digest)
    grids = {path.name for path in (chain.student / "evaluation" / "quick-4").glob("grid*.png")}
    assert "grid.png" in grids
    sent = {content.path for content in file.artifact("evaluation").manifest.contents}
    assert sent == {"metrics.json", "report.md", "frontier.png"} | grids


def test_prepared_shards_are_the_version_that_a_training_on_them_uses(
    here: Path, pipeline_folder: Path, flickr_shards: Path
):
    photos = here / "photos"
    photos.mkdir()
    for n in range(20):
        Image.new("RGB", (40, 40), (12 * n, 0, 0)).save(photos / f"{n}.png")
        (photos / f"{n}.txt").write_text(f"shade {n}")
    in_process(
        "lcm_lightning.prepare.commands", "data=folder", "data.name=shades", "data.source=photos", "logger=wandb"
    )
    file = RunFile(here / "outputs" / "prepare" / "shades")
    made = file.artifact("dataset")
    assert file.run.job_type == "prepare" and not made.use_after_commit
    places = (f"model.path={pipeline_folder}", "data.source=data/shades", "debug=fdr", "logger=wandb")
    options = ("experiment=lora_folder", "data.name=shades", "logger.wandb.log_code=false", "hydra.run.dir=trained")
    in_process("train", *options, *places, *SMALL)
    used = RunFile(here / "trained").artifact("dataset")
    assert used.use_after_commit and (used.name, used.digest) == (made.name, made.digest)


# ---- ends -------------------------------------------------------------------------------------------------------


def fake_trainer(*loggers: Any, step: int = 7) -> Any:
    return SimpleNamespace(loggers=list(loggers), is_global_zero=True, global_step=step)


@pytest.mark.parametrize(
    ("end", "status", "level", "words"),
    [
        (UserError("loss or gradient not finite in 10 steps in a row"), 2, "ERROR", "not finite in 10 steps in a row"),
        (RuntimeError("out of memory\nmore"), 1, "ERROR", "RuntimeError: out of memory"),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_an_early_end_is_an_alert_and_the_commands_status(
    here: Path, end: Exception, status: int, level: str, words: str
):
    tracker = offline(here)
    tracker.log_metrics({"train/loss": 1.0}, 7)
    ExperimentTracking().on_exception(fake_trainer(tracker), None, end)  # type: ignore[arg-type]
    tracker.finalize("failed")
    file = RunFile(here)
    (alert,) = file.of("alert")
    assert alert.level == level and words in alert.text and "\n" not in alert.text
    assert file.of("exit")[0].exit_code == status and not file.of("preempting")


@pytest.mark.slow
def test_a_training_that_a_signal_interrupts_is_preempted_and_goes_on_in_its_run(here: Path):
    long = ("experiment=quickstart_lora", "logger=wandb", "logger.wandb.log_code=false", "hydra.run.dir=long")
    long += (
        "max_steps=1000",
        "val_every=1000",
        "data.batch_size=2",
        "data.num_workers=0",
        "trainer.log_every_n_steps=1",
    )
    command = [sys.executable, str(ROOT / "train.py"), *long]
    with (here / "log").open("w") as log:
        training = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)
    try:
        deadline = time.monotonic() + 300
        while not (here / "long" / "metrics.csv").is_file() and time.monotonic() < deadline:
            assert training.poll() is None, (here / "log").read_text()
            time.sleep(0.2)
        training.send_signal(signal.SIGTERM)
        assert training.wait(120) == 128 + signal.SIGTERM
    finally:
        training.kill()
    file = RunFile(here / "long")
    (alert,) = file.of("alert")
    assert alert.level == "WARN" and alert.text.startswith("stopped by SIGTERM after step")
    assert len(file.of("preempting")) == 1 and file.of("exit")[0].exit_code == 143


@pytest.mark.slow
def test_a_training_whose_numbers_fail_ends_as_a_failed_run(
    here: Path, pipeline_folder: Path, flickr_shards: Path, capfd: pytest.CaptureFixture[str]
):
    places = (f"model.path={pipeline_folder}", f"data.source={flickr_shards}", "debug=fdr", "logger=wandb")
    bad = ("optimizer.lr=1e38", "method.warmup_steps=0", "callbacks.faults.max_in_a_row=1", "trainer.max_steps=4")
    with pytest.raises(SystemExit):
        in_process("train", "experiment=lora_flickr8k", *places, *SMALL, *bad, "hydra.run.dir=bad")
    assert "not finite" in capfd.readouterr().err
    file = RunFile(here / "bad")
    assert "not finite" in file.of("alert")[0].text and file.of("exit")[0].exit_code == 2


def test_an_interrupted_run_does_not_wait_for_a_server_that_is_gone(here: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("lcm_lightning.tracking.wandb_logger.GRACE", 0.1)
    tracker = offline(here)
    tracker.log_metrics({"train/loss": 1.0}, 7)
    connection = wandb_setup.singleton()._connection
    assert connection is not None and connection._proc is not None
    service = connection._proc._process
    hung = subprocess.Popen(["sleep", "60"])
    monkeypatch.setattr(connection._proc, "_process", hung)
    ExperimentTracking().on_exception(fake_trainer(tracker), None, Preempted(15, requeue=False))  # type: ignore[arg-type]
    tracker.finalize("failed")
    assert hung.wait(10) == -signal.SIGKILL
    monkeypatch.setattr(connection._proc, "_process", service)
    tracker._experiment.finish(exit_code=143)


@pytest.mark.parametrize("sweep", [None, "sweep123"])
def test_a_run_that_an_agent_ends_is_not_queued_again(here: Path, monkeypatch: pytest.MonkeyPatch, sweep: str | None):
    if sweep:
        monkeypatch.setenv("WANDB_SWEEP_ID", sweep)
    tracker = offline(here)
    told: list[str] = []
    tracker._experiment = SimpleNamespace(  # type: ignore[assignment]
        mark_preempting=lambda: told.append("preempting"), alert=lambda *_, level: told.append(level)
    )
    tracker.alert("interrupted", "by SIGTERM", 143, goes_on=True)
    assert told == (["WARN"] if sweep else ["preempting", "WARN"])


def test_of_an_export_what_a_broken_write_left_is_not_sent(here: Path):
    for place in ("lora/a.json", "lora/.tmp-1/b", "lora/in/c"):
        (here / place).parent.mkdir(parents=True, exist_ok=True)
        (here / place).write_text("x")
    tracker = offline(here)
    tracker.log_export(here / "lora", "lora", ["latest", "step-1"])
    tracker.finalize("success")
    assert {content.path for content in RunFile(here).artifact("lora").manifest.contents} == {"a.json", "in/c"}


def test_an_artifact_that_was_not_logged_is_not_recorded(here: Path, monkeypatch: pytest.MonkeyPatch):
    (here / "lora").mkdir()
    (here / "lora" / "a.json").write_text("{}")
    tracker = offline(here)

    def full(*_: Any, **more: Any) -> None:
        raise OSError("disk full")

    tracker._experiment = SimpleNamespace(id="x", offline=True, log_artifact=full)  # type: ignore[assignment]
    tracker.log_export(here / "lora", "lora", ["latest"])
    assert tracker.warned and read_record(here) is None


# ---- a server that fails ------------------------------------------------------------------------------------------


def test_a_server_that_does_not_answer_makes_an_offline_run(
    here: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    init = wandb.init

    def unreachable(**settings: Any) -> Any:
        if settings.get("mode") != "offline":
            raise wandb.errors.CommError("Timed out while retrying: Post http://127.0.0.1:9: connection refused")
        return init(**settings)

    monkeypatch.setattr(wandb, "init", unreachable)
    tracker = offline(here)
    tracker.log_metrics({"val/loss": 0.5}, 1)
    tracker.finalize("success")
    assert RunFile(here).history("val/loss") == [0.5]
    (said,) = [record.getMessage() for record in caplog.records if "not answer" in record.getMessage()]
    assert "connection refused" in said and f"`wandb sync {here}/wandb/offline-run-*` sends it" in said


@pytest.mark.slow
def test_a_port_where_nobody_listens_makes_an_offline_run(
    here: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    tracker = wandb_logger(
        project="tests", save_dir=str(here), name="run", log_code=False, settings={"init_timeout": 1}
    )
    tracker.log_metrics({"val/loss": 0.5}, 1)
    tracker.finalize("success")
    assert caplog.text.count("W&B does not answer") == 1
    assert RunFile(here).history("val/loss") == [0.5]


@pytest.mark.parametrize(
    "error",
    [
        wandb.errors.AuthenticationError("invalid API key"),
        wandb.errors.CommError("returned error 403: permission denied"),
    ],
    ids=["key", "rights"],
)
def test_a_server_that_refuses_is_a_mistake_to_mend(here: Path, monkeypatch: pytest.MonkeyPatch, error: Exception):
    def refuse(**settings: Any) -> Any:
        raise error

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(UserError, match=r"^logger\.wandb\.entity=team .*W&B refuses .*`wandb login`"):
        _ = offline(here, entity="team").experiment


def test_a_refusal_comes_before_the_work_and_a_failure_of_it_is_the_run_s(here: Path, monkeypatch: pytest.MonkeyPatch):
    tracker = offline(here)
    with pytest.raises(ZeroDivisionError), begun([tracker]):
        _ = 1 / 0
    assert RunFile(here).of("exit")[0].exit_code == 1

    def refuse(**settings: Any) -> Any:
        raise wandb.errors.AuthenticationError("invalid API key")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(UserError, match="W&B refuses"), begun([offline(here / "other")]):
        pytest.fail("measured for hours")


def test_what_fails_while_training_is_told_once_and_tried_again_later(
    here: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    tracker = offline(here)
    run = SimpleNamespace(calls=0, log=lambda _: None, finish=lambda exit_code: None, id="x", offline=True)

    def fail(_: dict[str, float]) -> None:
        run.calls += 1
        raise BrokenPipeError("the service is gone")

    run.log, tracker._experiment = fail, run
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr("lcm_lightning.tracking.tracker.time", SimpleNamespace(monotonic=lambda: clock.now))
    for _ in range(3):
        tracker.log_metrics({"loss": 1.0}, 1)
        tracker.log_samples(Image.new("RGB", (8, 8)), [], 1)
    assert run.calls == 1
    clock.now += 601
    tracker.log_metrics({"loss": 1.0}, 2)
    assert run.calls == 2
    (said,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert "the service is gone" in said and "metrics.csv" in said


# ---- settings -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"settings": {"api_key": "0" * 40}}, r"logger\.wandb\.settings\.api_key: .*WANDB_API_KEY"),
        ({"settings": {"no_such": 1}}, r"logger\.wandb: .*no_such"),
        ({"project": "a/b"}, r"logger\.wandb: .*project"),
    ],
    ids=["key", "unknown", "project"],
)
def test_settings_that_are_wrong_are_one_sentence_without_the_key(here: Path, settings: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message) as refused:
        wandb_logger(**{"project": "tests", "save_dir": str(here), "name": "run", **settings})
    assert "0" * 40 not in str(refused.value) and "\n" not in str(refused.value)


def test_a_run_of_an_agents_sweep_is_the_one_the_agent_made(here: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WANDB_RUN_ID", "of-agent")
    assert wandb_run_id(here / "new") == "of-agent"
    monkeypatch.setenv("WANDB_RUN_ID", "another")
    assert wandb_run_id(here / "new") == "of-agent"


@pytest.mark.parametrize(("mode", "group"), [("MULTIRUN", "quickstart-2026-01-02_03-04-05"), ("RUN", None)])
def test_the_runs_of_a_sweep_share_a_group(monkeypatch: pytest.MonkeyPatch, mode: str, group: str | None):
    GlobalHydra.instance().clear()
    register_resolvers()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        options = [f"hydra.mode={mode}", "hydra.sweep.dir=outputs/quickstart/2026-01-02_03-04-05"]
        cfg = compose("train", overrides=["experiment=quickstart", *options], return_hydra_config=True)
    monkeypatch.setattr(HydraConfig.instance(), "cfg", None)
    HydraConfig.instance().set_config(cfg)
    assert sweep_name() == group


# ---- wandb:entity/project/name:alias ------------------------------------------------------------------------------


class Api:
    """What is used of `wandb.Api`: artifacts that are copies of a folder."""

    folder: Path
    downloads = 0
    type = "lora"

    def artifact(self, name: str) -> Any:
        if not name.startswith("team/lcm/lora-1a2b3c4d:"):
            raise wandb.errors.CommError(f"artifact '{name}' not found in 'team/lcm'")
        return SimpleNamespace(
            type=Api.type,
            name="lora-1a2b3c4d:v3",
            version="v3",
            entity="team",
            project="lcm",
            download=self.download,
        )

    @staticmethod
    def download(root: str) -> str:
        Api.downloads += 1
        shutil.copytree(Api.folder, root)
        return root


@pytest.fixture
def api(here: Path, monkeypatch: pytest.MonkeyPatch) -> type[Api]:
    """W&B with a key and one artifact, whose folder holds `adapters.json`."""
    Api.folder, Api.downloads, Api.type = here / "kept", 0, "lora"
    Api.folder.mkdir()
    (Api.folder / "adapters.json").write_text("{}")
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr(wandb, "Api", Api)
    return Api


def test_an_artifact_becomes_a_folder_like_that_of_its_run(api: type[Api], here: Path):
    folder = download("wandb:team/lcm/lora-1a2b3c4d:best", "lora")
    assert folder == Path("outputs/artifacts/team/lcm/lora-1a2b3c4d/v3")
    assert (folder / "lora" / "adapters.json").is_file() and [path.name for path in folder.parent.iterdir()] == ["v3"]
    assert download("wandb:team/lcm/lora-1a2b3c4d:latest", "lora") == folder and api.downloads == 1
    record = read_record(folder)
    assert record is not None and record.path == "team/lcm/lora-1a2b3c4d:v3"


def test_a_version_that_is_here_is_taken_without_asking(api: type[Api], monkeypatch: pytest.MonkeyPatch):
    """As by the same command after a signal, on a machine that has no way to W&B."""
    folder = download("wandb:team/lcm/lora-1a2b3c4d:best", "lora")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert download("wandb:team/lcm/lora-1a2b3c4d:v3", "lora") == folder
    with pytest.raises(UserError, match=r"or give wandb:team/lcm/lora-1a2b3c4d:v3, which is here$"):
        download("wandb:team/lcm/lora-1a2b3c4d:best", "lora")


def test_every_setting_of_a_lora_takes_one(api: type[Api]):
    best = "wandb:team/lcm/lora-1a2b3c4d:best"
    cfg = OmegaConf.create(
        {"lora": [best, "other"], "method": {"teacher_lora": best}, "models": [f"lcm:{best}", "sd15", "run:outputs/a"]}
    )
    fetch_artifacts(cfg)
    folder = "outputs/artifacts/team/lcm/lora-1a2b3c4d/v3"
    assert cfg.lora == [folder, "other"] and cfg.method.teacher_lora == folder
    assert cfg.models == [f"lcm:{folder}", "sd15", "run:outputs/a"]


def test_an_artifact_that_cannot_be_had_is_one_sentence(api: type[Api], monkeypatch: pytest.MonkeyPatch):
    def said(reference: str) -> str:
        with pytest.raises(UserError) as refused:
            download(reference, "method.teacher_lora")
        assert str(refused.value).startswith(f"method.teacher_lora={reference}: ")
        return str(refused.value)

    assert "expected wandb:ENTITY/PROJECT/NAME:ALIAS" in said("wandb:lora-1a2b3c4d")
    assert "no such artifact (artifact 'team/lcm/other:best' not found" in said("wandb:team/lcm/other:best")
    monkeypatch.setattr(api, "type", "dataset")
    assert "of type dataset; expected one of type lora" in said("wandb:team/lcm/lora-1a2b3c4d:best")
    monkeypatch.setattr(api, "type", "lora")
    monkeypatch.setattr(api, "folder", Path("nowhere"))
    assert "could not be downloaded" in said("wandb:team/lcm/lora-1a2b3c4d:best")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert "WANDB_MODE=offline fetches nothing" in said("wandb:team/lcm/lora-1a2b3c4d:best")
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.delenv("WANDB_API_KEY")
    assert "wants an API key; `wandb login`" in said("wandb:team/lcm/lora-1a2b3c4d:best")
    with pytest.raises(UserError, match=r"^run=wandb:.*give model=\.\.\. lora="):
        fetch_artifacts(OmegaConf.create({"run": "wandb:team/lcm/lora-1a2b3c4d:best"}))


def test_a_downloaded_lora_is_an_input_by_the_name_the_server_knows(here: Path):
    write_record(here / "got", ArtifactRecord("lora-1a2b3c4d", "v3", "lora", "lora", "team", "lcm"))
    tracker = offline(here)
    used: list[str] = []
    tracker._experiment = SimpleNamespace(offline=False, use_artifact=used.append)  # type: ignore[assignment]
    tracker.use_export(here / "got")
    assert used == ["team/lcm/lora-1a2b3c4d:v3"]
    tracker.use_export(here / "trained_with_logger_csv")
    assert len(used) == 1


@pytest.mark.slow
def test_a_student_is_distilled_from_a_teacher_that_is_an_artifact(
    chain: Chain, api: type[Api], here: Path, pipeline_folder: Path, flickr_shards: Path
):
    api.folder = chain.teacher / "lora"
    places = (f"model.path={pipeline_folder}", f"data.source={flickr_shards}", "debug=fdr", "logger=csv")
    teacher = "method.teacher_lora=wandb:team/lcm/lora-1a2b3c4d:best"
    in_process("train", "experiment=lcm_flickr8k", *places, *SMALL, teacher, "hydra.run.dir=student")
    recorded = OmegaConf.load(here / "student" / "config.yaml")
    assert recorded.method.teacher_lora == "outputs/artifacts/team/lcm/lora-1a2b3c4d/v3"
    names = ("teacher_lora_weights.safetensors", "pytorch_lora_weights.safetensors")
    taught, given = (here / "student" / "lora" / names[0], chain.teacher / "lora" / names[1])
    assert taught.is_file() and taught.stat().st_size >= given.stat().st_size / 2


# ---- W&B's own sweeps ---------------------------------------------------------------------------------------------

SWEEP = ROOT / "conf" / "wandb_sweep.yaml"


def agents_command(values: dict[str, Any]) -> list[str]:
    """The command that `wandb agent` builds (`Agent._command_run` of wandb 0.31), by W&B's own functions."""
    sweep = wandb_sweeps.load_sweep_config(str(SWEEP))
    assert sweep is not None
    arguments = wandb_sweeps.create_sweep_command_args({"args": {key: {"value": v} for key, v in values.items()}})
    macros = {**arguments, "interpreter": [sys.executable], "program": [sweep["program"]], "env": ["/usr/bin/env"]}
    command: list[str] = []
    for word in wandb_sweeps.create_sweep_command(sweep["command"]):
        command += macros[word[2:-1]] if word.startswith("${") and word.endswith("}") else [word]
    return command


def test_the_sweeps_parameters_are_numbers_of_settings_that_exist():
    sweep = wandb_sweeps.load_sweep_config(str(SWEEP))
    assert sweep is not None
    lr, rank = sweep["parameters"]["optimizer.lr"], sweep["parameters"]["method.lora.rank"]
    assert all(isinstance(lr[bound], float) for bound in ("min", "max")) and math.isclose(lr["max"], 1e-3)
    command = agents_command({"optimizer.lr": lr["min"], "method.lora.rank": rank["values"][0]})
    assert command[:3] == ["/usr/bin/env", sys.executable, "train.py"]
    assert command[-2:] == ["optimizer.lr=1e-05", "method.lora.rank=16"]
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("train", overrides=[word for word in command[3:] if not word.startswith("hydra.")])
    assert cfg.optimizer.lr == 1e-5 and cfg.method.lora.rank == 16
    assert cfg.optimized_metric == sweep["metric"]["name"]
    assert cfg.callbacks.student_quality is not None


@pytest.mark.slow
def test_the_command_of_an_agent_trains_the_run_that_the_agent_made(here: Path):
    """A tiny budget beside what the sweep itself says."""
    tiny = ("experiment=quickstart", "debug=fdr", "max_steps=1", "val_every=1", "callbacks.samples=null")
    tiny += ("method.warmup_steps=0", "data.batch_size=2", "data.val_limit=2", "callbacks.student_quality.num_images=4")
    tiny += (f"callbacks.student_quality.clip={ROOT / 'lcm_lightning/assets/tiny_clip'}", "logger=wandb")
    tiny += ("callbacks.student_quality.teacher_steps=2", "callbacks.student_quality.bootstrap_samples=0")
    command = agents_command({"optimizer.lr": 2e-4, "method.lora.rank": 16})
    command[2] = str(ROOT / "train.py")
    command.remove("experiment=lcm_flickr8k")
    agent = {"WANDB_RUN_ID": "ab12cd34", "WANDB_SWEEP_ID": "sweep123", "WANDB_MODE": "offline"}
    done = subprocess.run(
        [*command, *tiny], env={**os.environ, **agent}, capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stderr
    file = RunFile(here / "outputs" / "wandb_sweep" / "ab12cd34")
    assert (file.run.run_id, file.run.sweep_id) == ("ab12cd34", "sweep123")
    assert file.config["optimizer"]["lr"] == 2e-4 and len(file.history("val/student_cmmd")) == 1


# ---- samples ----------------------------------------------------------------------------------------------------


def test_a_table_of_samples_keeps_each_picture(here: Path):
    tracker = offline(here)
    pictures = [Image.new("RGB", (8, 8), color) for color in ("red", "blue")]
    samples = [Sample("a dog", n, "LCM-LoRA 4 steps", 4, 1.0, 0.25, picture) for n, picture in enumerate(pictures)]
    tracker.log_samples(pictures[0], samples, 3)
    tracker.finalize("success")
    file = RunFile(here)
    contents = file.artifact("run_table").manifest.contents
    kept = [Path(content.local_path) for content in contents if content.path.endswith(".png")]
    colors = []
    for path in kept:
        with Image.open(path) as picture:
            colors.append(picture.getpixel((0, 0)))
    assert sorted(colors) == [(0, 0, 255), (255, 0, 0)]
    assert file.table("samples/table")["data"][1][:7] == [3, "a dog", 1, "LCM-LoRA 4 steps", 4, 1.0, 0.25]


# ---- the workspace ----


def test_the_workspace_plots_what_runs_log(chain: Chain, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("wandb_workspaces", reason="wandb-workspaces is not installed")
    spec = importlib.util.spec_from_file_location("wandb_workspace", ROOT / "scripts" / "wandb_workspace.py")
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    view = script.workspace("team", "lcm-lightning")
    assert [section.name for section in view.sections] == ["Samples", *script.CURVES, "Evaluation"]
    plotted = {key for lines in script.CURVES.values() for keys in lines for key in keys}
    logged = {name(item) for row in RunFile(chain.student).of("history") for item in row.item}
    quality = {"val/student_distance", "val/student_cmmd", "val/student_kid"}  # of callbacks=student_quality
    assert plotted - quality <= logged
