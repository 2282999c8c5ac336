"""What a report says of made-up figures."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jsonschema
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image
from rich.console import Console

from lcm_lightning.evaluation.dashboard import log_evaluation
from lcm_lightning.evaluation.figures import Grid, curves, frontier
from lcm_lightning.evaluation.protocol import PublishedTable
from lcm_lightning.evaluation.report import (
    SCHEMA_VERSION,
    console_tables,
    guidance,
    publish,
    report_content,
    write_report,
)
from lcm_lightning.evaluation.tables import (
    Cell,
    compared_pairs,
    comparison_table,
    estimate_cell,
    published_table,
    quality_table,
)
from lcm_lightning.output.pictures import grid_images
from lcm_lightning.tracking.wandb_logger import WandbTracker

SCHEMA = Path(__file__).parent.parent / "lcm_lightning" / "evaluation" / "metrics.schema.json"
TEACHER = "finetuned_ddim_50"
STANDARD = OmegaConf.load(Path(__file__).parent.parent / "conf" / "evaluation" / "standard.yaml")
TABLE_1: PublishedTable = instantiate(STANDARD.published.lcm_lora_distillation)


def estimate(value: float, half: float = 1.0) -> dict[str, Any]:
    return {"value": value, "low": value - half, "high": value + half, "n": 100}


def seconds(median: float) -> dict[str, float]:
    return {"median": median, "low": 0.9 * median, "high": 1.1 * median}


def entry(slug: str, role: str, series: str, steps: int, fid: float, time: float, **more: Any) -> dict[str, Any]:
    sampler = "lcm" if role == "student" else "dpmpp" if "dpmpp" in slug else "ddim"
    stages = {
        "text_encoding": seconds(0.1 * time),
        "denoising": seconds(0.7 * time),
        "vae_decoding": seconds(0.2 * time),
    }
    timed = {"batch_size": 1, "repeats": 5, "seconds_per_image": seconds(time), **stages, "peak_memory_mb": 900.0}
    return {
        "name": slug, "slug": slug, "role": role, "label": f"{series} {steps} steps", "series": series,
        "sampler": sampler, "steps": steps, "guidance_scale": 7.5, "network_evaluations": steps, "teacher": TEACHER,
        "source": "run", "trained_on": "flickr8k", "n_images": 100, "images": f"images/{slug}", "fid": estimate(fid),
        "kid": estimate(0.01, 0.001), "clip_score": estimate(25), "seconds_per_image": timed["seconds_per_image"]
        | {"batch_size": 1, "repeats": 5}, "peak_memory_mb": 900.0,
        "flops_per_image": {"text_encoding": 1e9, "denoising": 1e10, "vae_decoding": 1e9, "total": 1.2e10},
        "latency": [timed | {"flops_per_second": 1e10, "fraction_of_peak": 0.25}], **more,
    }  # fmt: skip


def compared(a: str, b: str, value: float, half: float, metric: str = "fid") -> dict[str, Any]:
    return {"a": a, "b": b, "metric": metric, "difference": estimate(value, half)}


@pytest.fixture
def metrics() -> dict[str, Any]:
    models = [
        entry("base_ddim_50", "base", "base, DDIM", 50, 20.0, 2.0),
        entry(TEACHER, "finetuned", "fine-tuned, DDIM", 50, 10.0, 2.0),
        entry("finetuned_ddim_10", "finetuned", "fine-tuned, DDIM", 10, 14.0, 0.4),
        entry("finetuned_dpmpp_10", "finetuned", "fine-tuned, DPM-Solver++", 10, 11.0, 0.4),
        entry("finetuned_dpmpp_25", "finetuned", "fine-tuned, DPM-Solver++", 25, 10.5, 1.0),
        entry("undistilled_ddim_4", "undistilled", "fine-tuned, DDIM", 4, 60.0, 0.05),
        entry("lcm_lora_4", "student", "LCM-LoRA", 4, 12.0, 0.2, to_teacher={"psnr": estimate(21.5)}),
    ]
    return {
        "schema": SCHEMA_VERSION, "protocol": "report", "dataset": "flickr8k/test", "features": "inception",
        "n_real": 100, "resolution": 64, "seed": 0, "sources": [{"name": "run", "spec": "run:outputs/a"}],
        "warnings": ["FID from N=100 images is biased."],
        "machine": {
            "cpu": "a <CPU>", "cores": 2, "threads": 1, "gpu": None, "dtype": "bfloat16", "matrix_peak_flops": 5e10
        },
        "versions": {"torch": "2"}, "models": models,
        "comparisons": [
            compared(TEACHER, "lcm_lora_4", -2.0, 1.0),
            compared("finetuned_ddim_10", "lcm_lora_4", 2.0, 1.0),
            compared("finetuned_dpmpp_10", "lcm_lora_4", -1.0, 3.0),
            compared(TEACHER, "lcm_lora_4", -2.1, 1.0, "fid_infinity"),
            compared("finetuned_ddim_10", "lcm_lora_4", -0.5, 1.0, "fid_infinity"),
            compared(TEACHER, "lcm_lora_4", -0.02, 0.01, "kid"),
            compared(TEACHER, "lcm_lora_4", 0.5, 0.1, "clip_score"),
        ],
    }  # fmt: skip


def write(metrics: dict[str, Any], folder: Path) -> Path:
    images = torch.rand(2, 3, 64, 64)
    grid = Grid("Models", [images, images], ["real", "LCM-LoRA 4 steps"], ["a <b>dog</b>", "cats"], [0, 1])
    write_report(folder, metrics, [grid], "seed: 0\n", [TABLE_1])
    return folder


def test_metrics_json_keeps_the_schema_with_numbers_nobody_could_compute(metrics: dict[str, Any], tmp_path: Path):
    metrics["models"][0]["fid"]["low"] = float("nan")
    written = json.loads((write(metrics, tmp_path) / "metrics.json").read_text())
    assert written["models"][0]["fid"]["low"] is None
    schema = json.loads(SCHEMA.read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(written, schema)
    del written["models"][3]["seconds_per_image"]["median"]
    with pytest.raises(jsonschema.ValidationError, match="median"):
        jsonschema.validate(written, schema)


def test_the_page_needs_nothing_else_and_shows_what_users_wrote_as_text(metrics: dict[str, Any], tmp_path: Path):
    html = (write(metrics, tmp_path) / "report.html").read_text()
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", html) and "<script" not in html and "@import" not in html
    assert "a &lt;b&gt;dog&lt;/b&gt;" in html and "<b>dog" not in html and "a &lt;CPU&gt;" in html
    assert "N=100: biased" in html and "seed 1" in html and "seed: 0" in html
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "frontier.png", "grid.png", "metrics.json", "report.html", "report.md"
    ]  # fmt: skip


def test_both_reports_show_the_same_sections(metrics: dict[str, Any], tmp_path: Path):
    folder = write(metrics, tmp_path)
    html, markdown = (folder / "report.html").read_text(), (folder / "report.md").read_text()
    for title in (
        "Figures",
        "Paired differences",
        "Distance to the teacher",
        "Table 1 of the source",
        "Time and memory",
    ):
        assert re.search(rf"<h2[^>]*>{title}", html) and f"## {title}" in markdown
    widths = {line.count("|") for line in markdown.split("## Figures")[1].split("In brackets")[0].strip().splitlines()}
    assert len(widths) == 1


def test_figures_that_were_not_measured_have_no_column(metrics: dict[str, Any]):
    headings = [heading for heading, _ in quality_table(metrics["models"]).headings]
    assert headings == ["", "UNet passes", "s / image", "speed-up", "FID", "KID ×1000", "CLIP score"]
    metrics["models"][6]["cmmd"] = estimate(0.5)
    table = quality_table(metrics["models"])
    place = [heading for heading, _ in table.headings].index("CMMD") - 1
    assert [str(row.cells[place]) for row in table.rows] == ["–"] * 6 + ["0.500 [-0.500, 1.50]"]


def test_speed_up_is_over_the_teacher_at_full_length(metrics: dict[str, Any]):
    assert [row.cells[2].value for row in quality_table(metrics["models"]).rows] == [
        "1.0×", "1.0×", "5.0×", "5.0×", "2.0×", "40.0×", "10.0×"
    ]  # fmt: skip


def differences(metrics: dict[str, Any]) -> dict[str, dict[str, Cell]]:
    """The student's cells by rival and heading."""
    table = comparison_table(metrics)
    headings = [heading for heading, _ in table.headings[1:]]
    rows = [row for row in table.rows if row.title.startswith("LCM-LoRA")]
    return {row.title.split(" − ")[1]: dict(zip(headings, row.cells, strict=True)) for row in rows}


def test_a_difference_is_good_or_bad_only_where_its_interval_excludes_zero(metrics: dict[str, Any]):
    teacher = differences(metrics)["fine-tuned, DDIM 50 steps"]
    fid, clip = teacher["FID"], teacher["CLIP score"]
    assert (str(fid), fid.verdict) == ("2.00 [1.00, 3.00]", "worse")  # student minus teacher, lower is better
    assert (str(clip), clip.verdict) == ("-0.500 [-0.600, -0.400]", "worse")  # higher is better
    assert teacher["KID ×1000"].verdict == "worse" and str(teacher["KID ×1000"]) == "20.0 [10.0, 30.0]"
    assert differences(metrics)["fine-tuned, DPM-Solver++ 10 steps"]["FID"].verdict == "open"


def test_fid_names_no_winner_that_its_limit_does_not_name(metrics: dict[str, Any]):
    rival = differences(metrics)["fine-tuned, DDIM 10 steps"]
    assert (str(rival["FID"]), rival["FID"].verdict) == ("-2.00 [-3.00, -1.00]", "open")
    assert rival["FID∞"].verdict == "open"


def test_too_few_images_for_the_limit_leave_every_difference_of_fid_open(metrics: dict[str, Any], tmp_path: Path):
    metrics["comparisons"] = [c for c in metrics["comparisons"] if c["metric"] != "fid_infinity"]
    assert {cells["FID, biased"].verdict for cells in differences(metrics).values()} == {"open"}
    folder = write(metrics, tmp_path)
    assert "FID, biased" in (folder / "report.html").read_text() and "FID, biased" in (folder / "report.md").read_text()
    buffer = io.StringIO()
    Console(file=buffer, width=80).print(console_tables(metrics)[1])
    assert "KID" in buffer.getvalue() and "FID " not in buffer.getvalue().split("FID from")[0]
    assert re.search(r"LCM-LoRA 4 steps − fine-tuned, DDIM 50 steps +20\.0 \[10\.0, 30\.0\]", buffer.getvalue())


def test_pairs_worth_reading_set_a_student_against_the_rivals_of_its_time(metrics: dict[str, Any]):
    pairs = {(a["slug"], b["slug"]) for a, b in compared_pairs(metrics["models"])}
    assert pairs == {
        (TEACHER, "base_ddim_50"),
        ("undistilled_ddim_4", TEACHER),
        ("lcm_lora_4", TEACHER),
        ("lcm_lora_4", "finetuned_ddim_10"),
        ("lcm_lora_4", "finetuned_dpmpp_10"),
    }
    hurried = metrics["models"][5] | {"seconds_per_image": {"median": 0.2}}
    assert (metrics["models"][6], hurried) in compared_pairs([*metrics["models"][:5], hurried, metrics["models"][6]])
    metrics["models"][0] |= {"teacher": "base_ddim_50", "teachers": ["base_ddim_50", TEACHER]}  # first found alone
    assert {(a["slug"], b["slug"]) for a, b in compared_pairs(metrics["models"])} == pairs
    other = {**metrics["models"][6], "slug": "lcm_lora-b_4"}
    assert (other, metrics["models"][6]) in compared_pairs([*metrics["models"], other])


def test_no_comparisons_no_table(metrics: dict[str, Any], tmp_path: Path):
    del metrics["comparisons"]
    assert comparison_table(metrics) is None
    assert "Paired differences" not in (write(metrics, tmp_path) / "report.html").read_text()


def test_table_1_puts_measured_beside_printed(metrics: dict[str, Any]):
    rows = {row.title: [str(cell) for cell in row.cells] for row in published_table(metrics["models"], TABLE_1).rows}
    assert rows["Base"] == ["1.68", "20.0 [19.0, 21.0]", "2.07", "2.00 [1.80, 2.20]", "base, DDIM 50 steps"]
    assert rows["LoRA fine-tuned"][:4] == ["1.49", "10.0 [9.00, 11.0]", "0.91", "2.00 [1.80, 2.20]"]
    assert rows["LCM-LoRA (Flickr8k)"] == [
        "26.95", "12.0 [11.0, 13.0]", "0.86", "0.200 [0.180, 0.220]", "LCM-LoRA 4 steps"
    ]  # fmt: skip
    assert rows["LCM-LoRA (Flickr30k)"] == ["24.85", "–", "0.86", "–", "not evaluated"]


def test_both_reports_say_the_guidance_and_whose_it_is_where_models_have_several(
    metrics: dict[str, Any], tmp_path: Path
):
    def said(folder: str) -> set[str]:
        pages = [(write(metrics, tmp_path / folder) / page).read_text() for page in ("report.html", "report.md")]
        return {found[1] for page in pages if (found := re.search(r"not distilled: (.*?)\.(?:</p>|\n)", page))}

    metrics["models"][-1]["guidance_scale"] = 1.0  # the student's
    assert said("a") == {"7.5"}
    metrics["models"][0]["guidance_scale"] = 2.0
    assert said("b") == {"2 (base, DDIM); 7.5 (fine-tuned, DDIM, fine-tuned, DPM-Solver++)"}
    assert guidance(metrics["models"][-1:]) == ""


def test_table_1_is_shown_where_it_belongs(metrics: dict[str, Any], tmp_path: Path):
    assert "26.95" in (write(metrics, tmp_path / "a") / "report.html").read_text()
    metrics |= {"protocol": "quick", "dataset": "twemoji/train"}
    assert "26.95" not in (write(metrics, tmp_path / "b") / "report.html").read_text()
    assert report_content(metrics, "", [replace(TABLE_1, datasets=None)])["published"]


def test_notes_assume_nothing_of_the_source_and_say_what_fids_interval_is_about(
    metrics: dict[str, Any], tmp_path: Path
):
    folder = write(metrics, tmp_path)
    for page in ("report.html", "report.md"):
        text = (folder / page).read_text().replace("&rsquo;", "'").replace("&#39;", "'")
        assert re.search(r"If its features are Inception's 2,048, [^.]*rank 99[^.]*1\.68", text)
        assert "FID's bracket is about its mean at 100 images, which is biased upward" in text


def test_a_report_with_fewer_pictures_leaves_no_stale_ones(metrics: dict[str, Any], tmp_path: Path):
    (tmp_path / "grid-2.png").touch()
    assert [path.name for path in write(metrics, tmp_path).glob("grid*.png")] == ["grid.png"]


def test_a_run_shows_its_newest_evaluation_and_keeps_those_of_other_protocols(metrics: dict[str, Any], tmp_path: Path):
    for protocol in ("standard", "quick"):
        write({**metrics, "protocol": protocol}, tmp_path / protocol)
        publish(tmp_path / protocol, tmp_path)
        newest = json.loads((tmp_path / "metrics.json").read_text())
        assert newest["protocol"] == protocol and newest["models"][0]["images"] == f"{protocol}/images/base_ddim_50"
        assert f"“{protocol}”" in (tmp_path / "report.html").read_text().replace("&ldquo;", "“").replace("&rdquo;", "”")
    assert json.loads((tmp_path / "standard" / "metrics.json").read_text())["protocol"] == "standard"


def test_rivals_and_students_are_curves_by_time(metrics: dict[str, Any]):
    found = [[model["slug"] for model in curve] for curve in curves(metrics["models"])]
    assert found == [
        ["base_ddim_50"],
        ["undistilled_ddim_4", "finetuned_ddim_10", TEACHER],
        ["finetuned_dpmpp_10", "finetuned_dpmpp_25"],
        ["lcm_lora_4"],
    ]
    figure = frontier(metrics["models"])
    assert [axes.get_title(loc="left") for axes in figure.axes] == [
        "FID: lower is better",
        "KID ×1000: lower is better",
    ]
    lines = {line.get_label(): line for line in figure.axes[0].lines if not line.get_label().startswith("_")}
    assert list(lines["fine-tuned, DPM-Solver++"].get_xdata()) == [0.4, 1.0]
    assert list(lines["fine-tuned, DPM-Solver++"].get_ydata()) == [11.0, 10.5]


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (87.04, "87.0"),
        (1234.6, "1235"),
        (0.01234, "0.0123"),
        (0.0, "0.00"),
        (541.7, "542"),
        (-323773.0, "-3.24e5"),
        (2.5e-5, "2.5e-05"),
    ],
)
def test_figures_have_three_digits(value: float, written: str):
    assert estimate_cell({"value": value}).value == written


def test_the_console_shows_every_contender_paired_differences_and_every_warning(metrics: dict[str, Any]):
    figures, differences = console_tables(metrics)
    assert figures.row_count == 7 and differences.row_count == 5 and "biased" in str(differences.caption)
    buffer = io.StringIO()
    Console(file=buffer, width=80).print(figures, differences)
    assert re.search(r"LCM-LoRA 4 steps − fine-tuned, DDIM 50 steps +2\.10 \[1\.10, 3\.10\]", buffer.getvalue())
    assert max(map(len, buffer.getvalue().splitlines())) <= 80
    del metrics["comparisons"]
    assert len(console_tables(metrics)) == 1


def test_dashboards_get_numbers_table_and_pictures_and_no_photo(metrics: dict[str, Any], tmp_path: Path):
    class Recorder(WandbTracker):
        """A W&B logger that writes nothing."""

        def __init__(self) -> None:
            self.logged: dict[str, Any] = {}

        @property
        def experiment(self) -> Any:
            return SimpleNamespace(log=self.logged.update)

        def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
            self.logged |= metrics

        def log_table(self, key: str, columns: list[str], data: list[list[str]]) -> None:
            self.logged[key] = [columns, *data]

        def log_image(self, key: str, images: list[str]) -> None:
            self.logged[key] = [Path(image).name for image in images]
            if "grid" in key:
                with Image.open(images[0]) as file:
                    self.logged["headings"] = {cell.heading for cell in grid_images(file)}

        def log_files(self, kind: str, files: list[Path], aliases: list[str]) -> None:  # type: ignore[override]
            self.logged[kind] = [file.name for file in files if file.is_file()]

        def use_export(self, run: Path) -> None:
            self.logged["used"] = run

        def finalize(self, status: str) -> None:
            self.logged["status"] = status

    recorder = Recorder()
    log_evaluation(recorder, metrics, write(metrics, tmp_path), [tmp_path / "run"])
    logged = recorder.logged
    assert logged["evaluation/lcm_lora_4/fid"] == 12.0 and logged["evaluation/lcm_lora_4/to_teacher/psnr"] == 21.5
    assert logged["evaluation/base_ddim_50/seconds_per_image"] == 2.0
    assert len(logged["evaluation/table"]) == 8 and len({len(row) for row in logged["evaluation/table"]}) == 1
    assert logged["evaluation/frontier"] == ["frontier.png"] and logged["evaluation/grid"] == ["grid.png"]
    assert logged["headings"] == {"LCM-LoRA 4 steps"} and logged["status"] == "success"
    assert (
        logged["evaluation"] == ["metrics.json", "report.md", "frontier.png", "grid.png"]
        and logged["used"] == tmp_path / "run"
    )
