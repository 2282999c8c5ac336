"""A search by Optuna keeps what it has found, and goes on with it."""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
import torch

from helpers.commands import ROOT
from lcm_lightning.config.resolvers import package_file
from lcm_lightning.errors import UserError, report_user_errors
from lcm_lightning.train import main, optimized_value

CHEAP = (
    "-m",
    "experiment=quickstart",
    "hparams_search=student",
    "name=searched",
    "debug=fdr",
    "max_steps=1",
    "val_every=1",
    "data.batch_size=2",
    "data.val_limit=2",
    "method.warmup_steps=0",
    "callbacks.samples=null",
    f"callbacks.student_quality.clip={package_file('assets/tiny_clip')}",
    "callbacks.student_quality.num_images=4",
    "callbacks.student_quality.teacher_steps=2",
    "callbacks.student_quality.bootstrap_samples=4",
)


def search(log: Path, *more: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, str(ROOT / "train.py"), *CHEAP, *more]
    with log.open("w") as output:
        return subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, process_group=0)


def trials(storage: str) -> list[optuna.trial.FrozenTrial]:
    """Those of the study; none where it isn't there yet."""
    with contextlib.suppress(KeyError):
        if not Path("outputs").is_dir():
            return []
        return optuna.load_study(study_name="searched", storage=storage).trials
    return []


@pytest.mark.slow
def test_a_search_that_was_killed_goes_on_with_what_it_has_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    storage, complete = "sqlite:///outputs/searched_search.db", optuna.trial.TrialState.COMPLETE
    first = search(tmp_path / "first.log", "hydra.sweeper.n_trials=50")
    deadline = time.monotonic() + 300
    while first.poll() is None and time.monotonic() < deadline:
        if sum(trial.state == complete for trial in trials(storage)) >= 1:
            break
        time.sleep(0.5)
    assert first.poll() is None, (tmp_path / "first.log").read_text()
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    before = [trial for trial in trials(storage) if trial.state == complete]
    assert before

    second = search(tmp_path / "second.log", "hydra.sweeper.n_trials=1")
    assert second.wait(timeout=300) == 0, (tmp_path / "second.log").read_text()
    after = [trial for trial in trials(storage) if trial.state == complete]
    assert [trial.value for trial in after[: len(before)]] == [trial.value for trial in before]
    assert len(after) == len(before) + 1
    assert set(after[-1].params) == {"optimizer.lr", "method.lora.rank"}
    assert len(list((tmp_path / "outputs" / "searched" / "search").glob("*/quality/quality.png"))) >= len(after)


@pytest.mark.slow
def test_a_trial_whose_student_draws_nothing_finite_is_the_worst_and_no_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    done = search(tmp_path / "log", "hydra.sweeper.n_trials=2", "optimizer.lr=choice(1e36,1e37)")
    assert done.wait(timeout=300) == 0, (tmp_path / "log").read_text()
    assert [trial.value for trial in trials("sqlite:///outputs/searched_search.db")] == [math.inf] * 2


def test_training_can_be_sent_to_other_processes_as_submitit_does():
    cloudpickle = pytest.importorskip("cloudpickle", reason="of submitit; pip install 'lcm-lightning[sweeps]'")
    task = report_user_errors(main.__wrapped__)  # what Hydra's launchers get
    assert cloudpickle.loads(cloudpickle.dumps(task)).__name__ == "main"


def test_a_sweeper_is_given_the_metric_that_was_chosen():
    metrics = {"val/loss": torch.tensor(2.0), "val/student_cmmd": torch.tensor(0.5)}
    assert optimized_value(metrics, "val/student_cmmd") == 0.5
    assert optimized_value({}, "val/loss") is None
    assert optimized_value({"val/psnr": torch.tensor(20.0)}, None) is None
    assert optimized_value({"val/loss": torch.tensor(math.nan)}, "val/loss") == math.inf
    with pytest.raises(UserError, match=r"^optimized_metric=val/nothing: .*one of val/loss, val/student_cmmd$"):
        optimized_value(metrics, "val/nothing")
