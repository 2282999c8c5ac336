"""``python -m lcm_lightning.summarize``: what a sweep has found."""

from __future__ import annotations

import csv
import re
import sys
from pathlib import Path

import pytest
from hydra.core.hydra_config import HydraConfig
from matplotlib.figure import Figure
from omegaconf import OmegaConf
from PIL import Image

from lcm_lightning import summarize


def save_run(folder: Path, overrides: list[str], values: dict[str, list[tuple[int, float]]]) -> None:
    folder.mkdir(parents=True)
    (folder / "overrides.yaml").write_text("".join(f"- {override}\n" for override in overrides))
    with (folder / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["epoch", "step", *values])
        writer.writeheader()
        for name, pairs in values.items():
            for step, value in pairs:
                writer.writerow({"epoch": 0, "step": step, name: value})


def command(*arguments: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["summarize", *arguments])
    summarize.main()


@pytest.fixture
def sweep(tmp_path: Path) -> Path:
    losses = {"4": (0.5, 0.3), "8": (0.2, 0.4), "16": (0.6, float("nan"))}
    for place, (rank, (first, second)) in enumerate(losses.items()):
        overrides = ["experiment=x", f"method.lora.rank={rank}", "optimizer.lr=1e-4"]
        values = {"train/loss": [(9, 1.0)], "val/loss": [(99, first), (199, second)]}
        save_run(tmp_path / "sweep" / str(place), overrides, values)
    return tmp_path / "sweep"


def test_the_best_run_comes_first_with_the_step_it_was_best_at(
    sweep: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    command(str(sweep), monkeypatch=monkeypatch)
    with (sweep / "summary.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    assert [(row["method.lora.rank"], row["val/loss"], row["step"], row["last"]) for row in found] == [
        ("8", "0.2", "100", "0.4"),
        ("4", "0.3", "200", "0.3"),
        ("16", "0.6", "100", "nan"),
    ]
    assert "optimizer.lr" not in found[0]  # all have the same
    assert Image.open(sweep / "summary.png").width > 200
    assert "at step" in capsys.readouterr().out


def test_a_plot_that_is_not_finished_leaves_the_one_before(sweep: Path, monkeypatch: pytest.MonkeyPatch):
    (sweep / "summary.png").write_bytes(b"before")

    def half(figure: Figure, file: object, **_: object) -> None:
        if isinstance(file, str | Path):
            Path(file).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(Figure, "savefig", half)
    with pytest.raises(SystemExit):
        command(str(sweep), monkeypatch=monkeypatch)
    assert (sweep / "summary.png").read_bytes() == b"before"


def test_no_value_is_cut_in_a_file_or_on_a_narrow_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    name = "a_folder_with_a_name_" + 5 * "that_is_long_"
    for place, value in enumerate(("short", "x" * 70)):
        save_run(tmp_path / name / str(place), [f"data.source={value}", f"seed={place}"], {"val/loss": [(9, 1.0)]})
    monkeypatch.setenv("COLUMNS", "80")
    command(str(tmp_path), monkeypatch=monkeypatch)
    (row,) = [line for line in capsys.readouterr().out.splitlines() if "x" * 70 in line]
    assert row.split() == ["x" * 70, "1", "1", "10", "1", f"{name}/1"]
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    command(str(tmp_path), monkeypatch=monkeypatch)
    shown = re.sub(r"\x1b\[[\d;]*m", "", capsys.readouterr().out).partition(str(tmp_path))[0]
    assert shown.count("x") >= 70 and "…" not in shown and max(map(len, shown.splitlines())) <= 80


def test_a_run_that_has_no_validation_yet_is_named_and_left_out(
    sweep: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    save_run(sweep / "3", ["method.lora.rank=32"], {"train/loss": [(9, 1.0)]})
    command(str(sweep), monkeypatch=monkeypatch)
    assert f"{sweep / '3'}: has no val/loss yet" in capsys.readouterr().out
    command(str(sweep), "--metric", "train/loss", monkeypatch=monkeypatch)
    assert (sweep / "summary.csv").read_text().count("\n") == 5


def test_the_quality_of_pictures_goes_before_the_loss_where_any_run_has_it(tmp_path: Path):
    """A trial that was killed before it was measured stays in the folder of a search."""
    for place, quality in (("0", 0.2), ("1", 0.1)):
        save_run(tmp_path / place, [f"seed={place}"], {"val/loss": [(9, quality)], "val/student_cmmd": [(9, quality)]})
    save_run(tmp_path / "2", ["seed=2"], {"train/loss": [(9, 1.0)]})
    save_run(tmp_path / "3", ["seed=3"], {"val/loss": [(9, 0.05)]})
    metric, runs = summarize.read_sweep(tmp_path, None)
    assert metric == "val/student_cmmd" and [run.name for run in runs] == ["1", "0"]


def test_a_setting_in_words_is_plotted_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for loss in ("huber", "l2"):
        save_run(tmp_path / loss, [f"method.distillation.loss={loss}"], {"val/loss": [(9, 1.0)]})
    command(str(tmp_path), monkeypatch=monkeypatch)
    assert (tmp_path / "summary.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "holds no run; give the folder of a sweep"),
        (("--metric", "val/nothing"), "--metric=val/nothing: no run has"),
    ],
)
def test_what_cannot_be_summarized_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...],
    message: str,
):
    if arguments:
        save_run(tmp_path / "0", ["seed=0"], {"val/loss": [(9, 1.0)]})
    with pytest.raises(SystemExit) as end:
        command(str(tmp_path), *arguments, monkeypatch=monkeypatch)
    assert end.value.code == 2 and message in capsys.readouterr().err


def test_an_error_after_a_sweep_in_the_same_process_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """The configuration that Hydra leaves behind of a sweep as a whole has no folder of a run."""
    left = OmegaConf.create({"hydra": {"output_subdir": ".hydra", "runtime": {"output_dir": "???"}}})
    monkeypatch.setattr(HydraConfig.instance(), "cfg", left)
    with pytest.raises(SystemExit) as ended:
        command(str(tmp_path), monkeypatch=monkeypatch)
    assert ended.value.code == 2 and "holds no run" in capsys.readouterr().err
