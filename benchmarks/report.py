"""Tables and a plot of results.json; ``python -m benchmarks.report RESULTS.json ... PAGE.md`` puts them into a page."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- figures -->", "<!-- end of figures -->"
NETWORKS = {
    "sd15": "SD v1-5's architecture",
    "sdxl": "SDXL's architecture with 4 transformer layers instead of 10 at its lowest resolution",
    "tiny": "the embedded pipeline",
}
TITLES = {
    "batch_size": "batch size",
    "resolution": "resolution, px",
    "rank": "LoRA rank",
    "workers": "loading processes",
    "samples": "samples in the data set",
}


def training_table(rows: list[dict[str, Any]], results: dict[str, Any]) -> list[str]:
    """Markdown lines: what each case took.

    Utilisation is model FLOPs over time over the matrix peak. Without a GPU the time is the processor's over the number
    of threads, which other programs on the same cores change little.
    """
    peak, machine = results["matrix_peak"]["bfloat16"], results["machine"]
    lines = [
        "| | step, s | processor, s | images/s | data wait | peak memory, MB | model TFLOP | utilisation |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        if not row["seconds"]:
            continue
        seconds = statistics.median(row["seconds"])
        share = f"{statistics.median(row['data_wait']) / seconds:.1%}" if row["data_wait"] else ""
        spread = f"{seconds:.3g} [{min(row['seconds']):.3g}, {max(row['seconds']):.3g}]"
        processor = statistics.median(row["cpu_seconds"])
        busy = seconds if machine["gpu"] else processor / machine["threads"]
        flops = row["flops"]["step"]
        if "cached" in row["name"]:
            flops -= row["flops"]["encoding"]
        if "cached teacher" in row["name"]:
            flops -= row["flops"]["teacher"]
        lines.append(
            f"| {row['name']} | {spread} | {processor:.3g} "
            f"| {row['batch_size'] / seconds:.3g} | {share} | {row['peak_memory_mb']:,.0f} | {flops / 1e12:.3g} "
            f"| {flops / busy / peak:.0%} |"
        )
    return lines


def ratio_table(rows: list[dict[str, Any]]) -> list[str]:
    """Markdown lines: ours over the peer's, of the medians, with the smallest and largest ratio of turns' medians."""
    measured = {row["name"]: row for row in rows if row["seconds"]}
    if "peer" not in measured:
        return []
    other = measured.pop("peer")
    lines = ["", "| over the peer's | step time | processor time | peak memory |", "| --- | --- | --- | --- |"]
    for name, row in measured.items():
        cells = [ratio(row[key], other[key]) for key in ("seconds", "cpu_seconds")]
        lines.append(f"| {name} | {cells[0]} | {cells[1]} | {row['peak_memory_mb'] / other['peak_memory_mb']:.2f} |")
    return lines


def ratio(ours: list[float], others: list[float]) -> str:
    """Ratio of medians, and the range of ratios of values measured at the same place in the order of turns."""
    pairs = [a / b for a, b in zip(ours, others, strict=False)]
    return f"{statistics.median(ours) / statistics.median(others):.2f} [{min(pairs):.2f}, {max(pairs):.2f}]"


def drawing_table(drawing: dict[str, Any]) -> list[str]:
    """Markdown lines: seconds per image of student and teacher."""
    student, teacher = (drawing["seconds"][role] for role in ("student", "teacher"))
    return [
        f"| {drawing['resolution']} px, one image | s |",
        "| --- | --- |",
        f"| student, {drawing['draw.student_steps']} steps | {statistics.median(student):.3g} |",
        f"| teacher, {drawing['draw.teacher_steps']} steps, guided | {statistics.median(teacher):.3g} |",
        f"| teacher over student | {ratio(teacher, student)} |",
    ]


def quality_table(found: dict[str, Any]) -> list[str]:
    """Markdown lines: FID of every training's student, and when ours is as good as the best that the peer's end in."""
    counts = list(found["rows"][0]["fid"])
    lines = [
        f"FID over {found['n_images']} pictures, in {', '.join(counts)} steps; the guided teacher's in 50 is "
        f"{fid(found['teacher'])}.",
        "",
        "| | training steps | processor, s | peak memory, MB | " + " | ".join(f"FID, {n}" for n in counts) + " |",
        "| --- | --- | --- | --- |" + " --- |" * len(counts),
    ]
    for row in found["rows"]:
        distances = " | ".join(fid(row["fid"][count]) for count in counts)
        lines.append(
            f"| {row['trainer']} | {row['steps']} | {row['processor_seconds']:.0f} | {row['peak_memory_mb']:,.0f} "
            f"| {distances} |"
        )
    return [*lines, "", *overtaken(found["rows"])]


def overtaken(rows: list[dict[str, Any]]) -> list[str]:
    """Sentences: when each peer first has the FID that its longest training ends in, and when ours has it."""
    lines = []
    for trainer in dict.fromkeys(row["trainer"] for row in rows if row["trainer"] != "ours"):
        last = max((row for row in rows if row["trainer"] == trainer), key=lambda row: row["steps"])
        goal = best_fid(last)
        theirs, ours = seconds_until(rows, trainer, goal), seconds_until(rows, "ours", goal)
        assert theirs is not None  # the last has it
        found = "and ours never" if ours is None else f"and ours after {ours:.0f} s, {ours / theirs:.2f} x"
        lines.append(
            f"- The FID that {trainer} has after {last['steps']} steps, {goal:.1f} at its best number of steps, "
            f"it first has after {theirs:.0f} processor s, {found}."
        )
    return lines


def seconds_until(rows: list[dict[str, Any]], trainer: str, goal: float) -> float | None:
    """Processor seconds of a trainer's shortest training whose best FID is `goal` at most; None without one."""
    reached = [row["processor_seconds"] for row in rows if row["trainer"] == trainer and best_fid(row) <= goal]
    return min(reached, default=None)


def best_fid(row: dict[str, Any]) -> float:
    """Of the numbers of steps that a student was drawn in."""
    return min(estimate["value"] for estimate in row["fid"].values())


def fid(estimate: dict[str, Any]) -> str:
    """With its interval."""
    return f"{estimate['value']:.1f} [{estimate['low']:.1f}, {estimate['high']:.1f}]"


def markdown(results: dict[str, Any]) -> str:
    """All tables, under what they were measured on."""
    peak = results["matrix_peak"]
    machine, versions = results["machine"], results["versions"]
    lines = [
        f"{results['date']}; {machine['gpu'] or machine['cpu']}, {machine['threads']} threads; matrix peak "
        f"{peak['bfloat16'] / 1e9:.0f} GFLOP/s in bf16, {peak['float32'] / 1e9:.0f} in float32; "
        + ", ".join(f"{name} {number}" for name, number in versions.items())
    ]
    for part, title in NETWORKS.items():
        if results.get(part):
            row = results[part][0]
            shape = f"{row['resolution']} px, batch {row['batch_size']}, rank {row['rank']}"
            lines += ["", f"### One step: {title}, {shape}", ""]
            lines += training_table(results[part], results) + ratio_table(results[part])
    if "drawing" in results:
        lines += ["", "### Drawing", "", *drawing_table(results["drawing"])]
    if "quality" in results:
        lines += [
            "",
            "### Quality against processor time: the embedded pipeline",
            "",
            *quality_table(results["quality"]),
        ]
    for part in growth_parts(results):
        lines += ["", f"### {TITLES[part.removeprefix('growth/')]} (growth, {results['settings']['growth_model']})", ""]
        lines += training_table(results[part], results)
    return "\n".join(lines) + "\n"


def growth_parts(results: dict[str, Any]) -> list[str]:
    """The parts of results that hold growth and something measured."""
    return [part for part in results if part.startswith("growth/") and any(row["seconds"] for row in results[part])]


def plot_growth(results: dict[str, Any], path: Path) -> None:
    """Step time over each thing that grows."""
    parts = growth_parts(results)
    if not parts:
        return
    from matplotlib.figure import Figure  # late: tables are written where there is none

    figure = Figure(figsize=(3 * len(parts), 3), layout="constrained")
    axes = figure.subplots(1, len(parts), squeeze=False)
    for axis, part in zip(axes[0], parts, strict=True):
        rows = [row for row in results[part] if row["seconds"]]
        medians = [statistics.median(row["seconds"]) for row in rows]
        axis.plot([float(row["name"]) for row in rows], medians, "o-")
        axis.set(xlabel=TITLES[part.removeprefix("growth/")], ylim=(0, 1.1 * max(medians)))
    axes[0][0].set_ylabel("seconds a step")
    figure.savefig(path, dpi=120)


def plot_quality(results: dict[str, Any], path: Path) -> None:
    """The best FID of each training over its processor time, a line a trainer."""
    if "quality" not in results:
        return
    from matplotlib.figure import Figure

    found = results["quality"]
    figure = Figure(figsize=(5, 3.5), layout="constrained")
    axis = figure.subplots()
    for trainer in dict.fromkeys(row["trainer"] for row in found["rows"]):
        rows = [row for row in found["rows"] if row["trainer"] == trainer]
        axis.plot([row["processor_seconds"] for row in rows], [best_fid(row) for row in rows], "o-", label=trainer)
    axis.axhline(found["teacher"]["value"], color="gray", linestyle=":", label="teacher, 50 guided steps")
    axis.set(xlabel="processor seconds of training", ylabel="FID at the best number of steps", yscale="log")
    axis.legend()
    figure.savefig(path, dpi=120)


def write(results: dict[str, Any], folder: Path) -> str:
    """Write benchmarks.md, and pictures of what was measured of growth and quality, into `folder`; the Markdown."""
    text = markdown(results)
    (folder / "benchmarks.md").write_text(text)
    plot_growth(results, folder / "benchmarks.png")
    plot_quality(results, folder / "quality.png")
    return text


def insert(runs: Sequence[dict[str, Any]], page: Path) -> None:
    """Put the tables of `runs` between the page's lines `BEGIN` and `END`, and the plots beside the page.

    Raises:
        ValueError: the page has no such lines.
    """
    plot = page.with_suffix(".png")
    found = []
    for results in runs:
        plot_growth(results, plot)
        picture = f"\n![Seconds a step as one thing grows]({plot.name})\n" if growth_parts(results) else ""
        if "quality" in results:
            curves = page.with_name(f"{page.stem}_quality.png")
            plot_quality(results, curves)
            picture += f"\n![FID against processor seconds of training]({curves.name})\n"
        found.append(markdown(results) + picture)
    replace_figures(page, "\n".join(found))


def replace_figures(page: Path, figures: str) -> None:
    """Put `figures` between the page's lines `BEGIN` and `END`. Raises ValueError where it has none."""
    before, rest = page.read_text().split(BEGIN)
    _, after = rest.split(END)
    page.write_text(f"{before}{BEGIN}\n{figures}{END}{after}")


if __name__ == "__main__":
    *files, page = sys.argv[1:]
    insert([json.loads(Path(file).read_text()) for file in files], Path(page))
