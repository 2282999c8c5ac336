"""Tables and a plot of results.json; ``python -m benchmarks.report RESULTS.json ... PAGE.md`` puts them into a page."""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

BEGIN, END = "<!-- figures -->", "<!-- end of figures -->"
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


def markdown(results: dict[str, Any]) -> str:
    """All tables, under what they were measured on."""
    peak = results["matrix_peak"]
    machine, versions = results["machine"], results["versions"]
    lines = [
        f"{results['date']}; {machine['gpu'] or machine['cpu']}, {machine['threads']} threads; matrix peak "
        f"{peak['bfloat16'] / 1e9:.0f} GFLOP/s in bf16, {peak['float32'] / 1e9:.0f} in float32; "
        + ", ".join(f"{name} {number}" for name, number in versions.items())
    ]
    for part, title in (("sd15", "SD v1-5's architecture"), ("tiny", "the embedded pipeline")):
        if results.get(part):
            row = results[part][0]
            shape = f"{row['resolution']} px, batch {row['batch_size']}, rank {row['rank']}"
            lines += ["", f"### One step: {title}, {shape}", ""]
            lines += training_table(results[part], results) + ratio_table(results[part])
    if "drawing" in results:
        lines += ["", "### Drawing", "", *drawing_table(results["drawing"])]
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
    import matplotlib  # late: tables are written where there is none

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(parts), figsize=(3 * len(parts), 3), layout="constrained", squeeze=False)
    for axis, part in zip(axes[0], parts, strict=True):
        rows = [row for row in results[part] if row["seconds"]]
        medians = [statistics.median(row["seconds"]) for row in rows]
        axis.plot([float(row["name"]) for row in rows], medians, "o-")
        axis.set(xlabel=TITLES[part.removeprefix("growth/")], ylim=(0, 1.1 * max(medians)))
    axes[0][0].set_ylabel("seconds a step")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def write(results: dict[str, Any], folder: Path) -> str:
    """Write benchmarks.md, and benchmarks.png where growth was measured, into `folder`; the Markdown."""
    text = markdown(results)
    (folder / "benchmarks.md").write_text(text)
    plot_growth(results, folder / "benchmarks.png")
    return text


def insert(runs: Sequence[dict[str, Any]], page: Path) -> None:
    """Put the tables of `runs` between the page's lines `BEGIN` and `END`, and the plot of growth beside the page.

    Raises:
        ValueError: the page has no such lines.
    """
    plot = page.with_suffix(".png")
    found = []
    for results in runs:
        plot_growth(results, plot)
        picture = f"\n![Seconds a step as one thing grows]({plot.name})\n" if growth_parts(results) else ""
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
