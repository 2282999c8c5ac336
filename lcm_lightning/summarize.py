"""`python -m lcm_lightning.summarize FOLDER`: a table and a plot of the runs of a sweep, the best first."""

from __future__ import annotations

import argparse
import csv
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure
from omegaconf import OmegaConf
from rich.table import Table

from lcm_lightning.errors import UserError, program, report_user_errors
from lcm_lightning.output.console import plain_table, print_table
from lcm_lightning.output.files import write_atomic
from lcm_lightning.output.pictures import figure_bytes
from lcm_lightning.output.streams import lasting_output
from lcm_lightning.runs.folders import OVERRIDES

METRICS = "metrics.csv"
PREFERRED = ("val/student_cmmd", "val/loss")  # the metric unless one is named: the first that any run has
PANELS = 4  # of settings in a row of the plot


@dataclass(frozen=True)
class Run:
    """A run of a sweep.

    Attributes:
        name: its folder's, below the sweep's.
        settings: what the command line said of it.
        best, step: lowest value of the metric, and the step it was reached at.
        last: its last value.
    """

    name: str
    settings: Mapping[str, str]
    best: float
    step: int
    last: float


@lasting_output()
@report_user_errors
def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog=program(), description="A table and a plot of the runs of a sweep.")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="a sweep's, or any with runs in it")
    parser.add_argument("--metric", help=f"a column of metrics.csv, lower is better; {', else '.join(PREFERRED)}")
    arguments = parser.parse_args()
    metric, runs = read_sweep(arguments.folder, arguments.metric)
    keys = varied(runs)
    print_table(table(runs, metric, keys))
    try:
        write_csv(runs, metric, keys, arguments.folder / "summary.csv")
        write_atomic(arguments.folder / "summary.png", figure_bytes(plot(runs, metric, keys)))
    except OSError as error:
        raise UserError(f"{arguments.folder}: cannot be written to ({error}); make room there, or copy it") from error
    print(f"{arguments.folder / 'summary.csv'}\n{arguments.folder / 'summary.png'}")


def read_sweep(folder: Path, metric: str | None) -> tuple[str, list[Run]]:
    """The metric, and the runs below `folder` that have it, the best first; those that have not, such as one that runs
    still, are named.

    Raises:
        UserError: no run has it.
    """
    columns = {path.parent: read_columns(path) for path in sorted(folder.rglob(METRICS))}
    columns = {run: found for run, found in columns.items() if (run / OVERRIDES).is_file()}
    if not columns:
        raise UserError(f"{folder}: holds no run; give the folder of a sweep, such as outputs/<name>/<date_time>")
    known = {name for found in columns.values() for name in found}
    if metric is None:
        metric = next((m for m in PREFERRED if any(m in found for found in columns.values())), PREFERRED[-1])
    runs = [
        summary(str(run.relative_to(folder)), read_overrides(run / OVERRIDES), found[metric])
        for run, found in columns.items()
        if metric in found
    ]
    if not runs:
        raise UserError(f"--metric={metric}: no run has it; expected one of {', '.join(sorted(known))}")
    for run in columns:
        if metric not in columns[run]:
            print(f"{run}: has no {metric} yet, and is left out")
    return metric, sorted(runs, key=lambda run: (math.isnan(run.best), run.best))


def read_columns(path: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) of each column of a metrics.csv that has any."""
    columns: dict[str, list[tuple[int, float]]] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            for name, value in row.items():
                if value and name not in ("step", "epoch") and row.get("step"):
                    columns.setdefault(name, []).append((int(row["step"]), float(value)))
    return columns


def read_overrides(path: Path) -> dict[str, str]:
    """Key and value of each override of a run."""
    pairs = (str(override).partition("=") for override in OmegaConf.load(path))
    return {key.lstrip("+"): value for key, _, value in pairs}


def summary(name: str, settings: Mapping[str, str], values: Sequence[tuple[int, float]]) -> Run:
    """A run by its metric's `values`, (step, value); one that is no number counts for the worst."""
    step, best = min(values, key=lambda pair: math.inf if math.isnan(pair[1]) else pair[1])
    return Run(name, settings, best, step + 1, values[-1][1])


def varied(runs: Sequence[Run]) -> list[str]:
    """The keys that not all runs have the same value of."""
    keys = dict.fromkeys(key for run in runs for key in run.settings)
    return [key for key in keys if len({run.settings.get(key) for run in runs}) > 1]


def table(runs: Sequence[Run], metric: str, keys: Sequence[str]) -> Table:
    """For the terminal."""
    found = plain_table(*keys, f"{metric}, lowest", "at step", "last", "run")
    for run in runs:
        settings = (run.settings.get(key, "") for key in keys)
        found.add_row(*settings, f"{run.best:.4g}", str(run.step), f"{run.last:.4g}", run.name)
    return found


def write_csv(runs: Sequence[Run], metric: str, keys: Sequence[str], path: Path) -> None:
    """The same for other programs."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["run", *keys, metric, "step", "last"])
    for run in runs:
        writer.writerow([run.name, *(run.settings.get(key, "") for key in keys), run.best, run.step, run.last])
    write_atomic(path, text.getvalue().encode())


def plot(runs: Sequence[Run], metric: str, keys: Sequence[str]) -> Figure:
    """The metric's lowest value over each setting that varies; numbers on a scale, others side by side."""
    panels = keys or ["run"]
    rows = math.ceil(len(panels) / PANELS)
    wide = min(len(panels), PANELS)
    figure = Figure(figsize=(3.2 * wide, 3 * rows), layout="constrained")
    for axes, key in zip(figure.subplots(rows, wide, squeeze=False).flat, panels, strict=False):
        values = [run.settings.get(key, "") if keys else run.name for run in runs]
        numbers = [place for value in values if (place := number(value)) is not None]
        if len(numbers) == len(values):
            axes.plot(numbers, [run.best for run in runs], "o")
            if min(numbers) > 0 and max(numbers) / min(numbers) > 20:
                axes.set_xscale("log")
        else:
            axes.plot(values, [run.best for run in runs], "o")
            axes.tick_params("x", rotation=30)
        axes.set(xlabel=key, ylabel=metric)
    return figure


def number(text: str) -> float | None:
    """Its value, where it is one."""
    try:
        return float(text)
    except ValueError:
        return None


if __name__ == "__main__":
    main()
