"""A page of what `benchmarks.on_gpu` has found, whole or cut off at any moment."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.agreement import BOUNDS, METHODS
from benchmarks.report import ratio, ratio_table, training_table

Results = Mapping[str, Any]

# What is cached in each part that trains from a cache.
CACHES = {"cached_latents": "latents", "cached_teacher": "one step of the teacher for each"}


def markdown(results: Results) -> str:
    """The page."""
    lines = ["# On a GPU", "", *heading(results)]
    for title, section in SECTIONS.items():
        if found := list(section(results)):
            lines += ["", f"## {title}", "", *found]
    return "\n".join(lines) + "\n"


def heading(results: Results) -> Iterator[str]:
    """What ran where, and how each part ended."""
    commit = results["commit"] or "not known"
    yield from (f"Written by `python -m benchmarks.on_gpu report`. {results['date']}, commit {commit}.", "")
    if "machine" in results:
        machine, peak = results["machine"], results["matrix_peak"]
        yield (
            f"{machine['gpu'] or machine['cpu']}; matrix peak {peak['bfloat16'] / 1e12:.3g} TFLOP/s in bf16, "
            f"{peak['float32'] / 1e12:.3g} in float32; "
            + ", ".join(f"{name} {number}" for name, number in results["versions"].items())
        )
        yield ""
    setup = results["setup"]
    weights = "SD v1-5's architecture with random weights" if setup["size"] == "sd15" else "a small architecture"
    yield f"Training, drawing and resume: {weights}, {setup['resolution']} px. Ended: {results['ended']}."
    yield from ("", "| part | seconds | |", "| --- | --- | --- |")
    for part in results["parts"].values():
        took = f"{part['took']:.0f}" if "took" in part else ""
        yield f"| {part['title']} | {took} | {cell(part['status'])} |"


def cell(text: str, most: int = 200) -> str:
    """`text` as it can stand in a table: on one line, without bars; of a long one the first and the last."""
    line = " ".join(text.replace("|", "/").split())
    return line if len(line) <= most else f"{line[: most // 2]} ... {line[-most // 2 :]}"


def found_in(results: Results, part: str) -> dict[str, Any]:
    """What a part has found so far."""
    return results["parts"].get(part, {}).get("found", {})


def steps_section(results: Results) -> Iterator[str]:
    """The comparison of single steps."""
    rows = found_in(results, "one_step").get("rows", [])
    if not rows:
        return
    several = ", ".join(f"{method.name} takes {method.steps}" for method in METHODS if method.steps > 1)
    yield "A step through Lightning's Trainer, small architecture, same weights, batch and random numbers, beside the"
    yield f"CPU's in float32. {several}, of which the worse is shown. AdamW's first update is nearly the gradient's"
    yield "sign, so that small gradients turn it: its cosine is for information. It agrees if everything is finite and"
    yield ""
    for precision, bound in BOUNDS.items():
        yield (
            f"- in {precision} the loss is within {bound.loss:.0%}, the gradients' cosine at least {bound.cosine:g}, "
            f"the ratio of their norms within {bound.norm:.0%} of 1."
        )
    yield ""
    yield "| method | precision | loss differs by | gradients' cosine | norms' ratio | updates' cosine | loss scale | |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- |"
    for row in rows:
        numbers = [
            number(row.get(name), form)
            for name, form in (
                ("loss_difference", ".1e"),
                ("gradient_cosine", ".5f"),
                ("gradient_norm_ratio", ".4f"),
                ("update_cosine", ".4f"),
                ("loss_scale", "g"),
            )
        ]
        yield f"| {row['method']} | {row['precision']} | {' | '.join(numbers)} | {cell(row['verdict'])} |"


def number(value: float | None, form: str) -> str:
    """`value` formatted; a dash for none."""
    return "-" if value is None else format(value, form)


def training_section(results: Results) -> Iterator[str]:
    """Tables of each batch size."""
    before: list[str] = []
    for batch_size in results["setup"]["batch_sizes"]:
        rows = merged(
            row
            for part in (f"training_{batch_size}", f"training_{batch_size}_turn_2", *CACHES)
            for row in found_in(results, part).get("rows", [])
            if row["batch_size"] == batch_size
        )
        if any(row["seconds"] for row in rows):
            yield from (*before, f"### Batch {batch_size}, rank {rows[0]['rank']}", "")
            before = [""]
            yield from training_table(rows, results)
            yield from ratio_table(rows)
    for part, what in CACHES.items():
        if prepare := found_in(results, part).get("prepare"):
            yield from (
                "",
                f"Caching {what} of {prepare['samples']} images: {prepare['seconds']:.1f} s, start included.",
            )


def merged(rows: Iterator[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each name, with the measurements of all its turns."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["name"] not in found:
            found[row["name"]] = dict(row)
            continue
        whole = found[row["name"]]
        whole |= {key: whole[key] + row[key] for key in ("seconds", "cpu_seconds", "data_wait")}
        whole["peak_memory_mb"] = max(whole["peak_memory_mb"], row["peak_memory_mb"])
    return list(found.values())


def drawing_section(results: Results) -> Iterator[str]:
    """A table of student and teacher."""
    measured = [
        (compiled, int(batch_size), drawing)
        for part, compiled in [
            ("drawing", False),
            *((f"drawing_compiled_{b}", True) for b in results["setup"]["drawn"]),
        ]
        for batch_size, drawing in found_in(results, part).items()
        if drawing.get("seconds", {}).get("teacher")
    ]
    if not measured:
        return
    yield "End to end, adapters merged, the teacher guided; median and range of repeats. MB is the most memory held;"
    yield "the first calls, of one step each, compile where that was asked for."
    yield ""
    yield "| compile | batch | student, s | steps | teacher, s | steps | teacher over student | first calls, s | MB |"
    yield "| --- | --- | --- | --- | --- | --- | --- | --- | --- |"
    for compiled, batch_size, drawing in measured:
        student, teacher = (drawing["seconds"][role] for role in ("student", "teacher"))
        first = " + ".join(f"{drawing['warming_up'][role]:.1f}" for role in ("student", "teacher"))
        yield (
            f"| {'on' if compiled else 'off'} | {batch_size} | {spread(student)} | {drawing['draw.student_steps']} "
            f"| {spread(teacher)} | {drawing['draw.teacher_steps']} | {ratio(teacher, student)} | {first} "
            f"| {drawing['peak_memory_mb']:,.0f} |"
        )


def spread(seconds: list[float]) -> str:
    """Median and range."""
    return f"{statistics.median(seconds):.3g} [{min(seconds):.3g}, {max(seconds):.3g}]"


def resume_section(results: Results) -> Iterator[str]:
    """How many bits a stop in between changes."""
    measured = {part: found_in(results, part) for part in ("resume", "resume_deterministic")}
    if not any("bits" in found for found in measured.values()):
        return
    yield "LCM-LoRA of rank 8 at batch 2, bf16-mixed: bits of the LoRA file that differ from those of a run that was"
    yield "never stopped. The same run once more shows what the kernels' own order of sums changes."
    yield ""
    yield "| settings | steps | the same run again | stopped and resumed |"
    yield "| --- | --- | --- | --- |"
    for found in measured.values():
        if "bits" in found:
            settings = " ".join(found["settings"]) or "as they are"
            steps = f"{found['steps']}, stop after {found['stop']}"
            yield f"| {settings} | {steps} | {found['again']:,} of {found['bits']:,} | {found['resumed']:,} |"


SECTIONS = {
    "One optimisation step": steps_section,
    "Training": training_section,
    "Drawing": drawing_section,
    "Stopping and going on": resume_section,
}
