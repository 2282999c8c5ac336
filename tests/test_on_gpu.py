"""The evidence from a GPU is gathered within its time, judged by what is stated, and kept when it is cut off."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import one_step
from benchmarks.agreement import BOUNDS, METHODS, Method, verdict
from benchmarks.cases import run_together
from benchmarks.gpu_report import markdown, merged
from benchmarks.on_gpu import RESERVE, TINY, Part, Session, Setup, allotted, differing_bits, measure_all, parts_of
from lcm_lightning.config.resolvers import register_resolvers
from lcm_lightning.errors import UserError

ROOT = Path(__file__).parent.parent


# ---- time ----------------------------------------------------------------------------------------------------------


def nothing(session: Session, found: dict[str, Any]) -> None:
    """A part that measures nothing."""


def test_a_part_gets_what_it_may_take_or_what_is_left_or_is_not_begun():
    part = Part("a", "A", least=30, most=100, measure=nothing)
    assert allotted(part, 500) == 100
    assert allotted(part, 60 + RESERVE) == 60
    assert allotted(part, 29 + RESERVE) is None
    assert allotted(part, 500, patience=3) == 300
    assert allotted(part, 80 + RESERVE, patience=3) is None


@pytest.fixture
def session(tmp_path: Path) -> Session:
    results = {"date": "2026-01-01", "commit": "abc", "setup": vars(TINY), "ended": "cut off", "parts": {}}
    return Session(TINY, tmp_path / "peer.py", tmp_path, tmp_path, time.monotonic() + 100, results=results)


def statuses(session: Session) -> dict[str, str]:
    """As they are on disk."""
    written = json.loads((session.out / "gpu.json").read_text())
    assert (session.out / "gpu.md").read_text() == markdown(written)
    return {name: part["status"] for name, part in written["parts"].items()}


def test_a_part_that_fails_or_has_no_time_is_named_and_the_others_are_measured(session: Session):
    def fail(session: Session, found: dict[str, Any]) -> None:
        found["before"] = 1
        raise UserError("it broke")

    def measure(session: Session, found: dict[str, Any]) -> None:
        assert 29 < session.left <= 30

    session.run(Part("broken", "Broken", 1, 50, fail, ()))
    session.run(Part("long", "Long", 200, 300, nothing, ()))
    session.run(Part("depends", "Depends", 1, 50, nothing, ("broken",)))
    session.run(Part("good", "Good", 1, 30, measure, ()))
    assert statuses(session) == {
        "broken": "failed: it broke",
        "long": "skipped: 100 s left, it needs 200",
        "depends": "skipped: it needs broken",
        "good": "done",
    }
    assert session.results["parts"]["broken"]["found"] == {"before": 1}


def test_without_a_machine_nothing_else_is_tried(session: Session, monkeypatch: pytest.MonkeyPatch):
    found = {"machine": {"gpu": None, "cpu": "c"}, "versions": {}, "matrix_peak": {"bfloat16": 1.0, "float32": 1.0}}
    monkeypatch.setattr("benchmarks.on_gpu.run_child", lambda *_, **__: found)
    session.setup = Setup()
    with pytest.raises(UserError, match="finds no GPU here"):
        measure_all(session, None)
    assert list(statuses(session)) == ["machine"]


def test_processes_that_overrun_are_killed_with_what_they_started(tmp_path: Path):
    mark = tmp_path / "mark"
    child = f"import time; time.sleep(3); open({str(mark)!r}, 'w')"
    parent = f"import subprocess, sys, time; print('begun'); subprocess.Popen([sys.executable, '-c', {child!r}]); "
    long = [sys.executable, "-u", "-c", parent + "time.sleep(60)"]
    log = tmp_path / "log"
    began = time.monotonic()
    failures = run_together({"quick": [sys.executable, "-c", "print(7)"], "long": long}, 1.5, log=log)
    assert list(failures) == ["long"]
    assert re.search(r"long: killed after \d s; .*\nbegun", failures["long"])
    assert time.monotonic() - began < 10
    assert "\n7\n" in log.read_text() and "\nbegun\n" in log.read_text()
    time.sleep(3)
    assert not mark.exists()


def test_a_failing_process_is_quoted():
    failures = run_together({"it": [sys.executable, "-c", "import sys; print('the reason'); sys.exit(3)"]})
    assert failures["it"].startswith("it: ended with status 3") and failures["it"].endswith("the reason")


def test_what_is_gathered_needs_no_heavy_import_and_ends_when_it_is_told(tmp_path: Path):
    """Until it starts a process that imports torch, the parent has taken no second of the time."""
    heavy = "import benchmarks.on_gpu, sys; print({'torch', 'lightning', 'matplotlib', 'diffusers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", heavy], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"
    (tmp_path / "peer.py").touch()
    options = ["--device", "cpu", "--tiny", "--work", str(tmp_path / "work")]
    command = [sys.executable, "-m", "benchmarks.on_gpu", "run", str(tmp_path / "peer.py"), str(tmp_path), *options]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as running:
        assert running.stdout is not None and running.stdout.readline().startswith("machine: at most")
        running.send_signal(signal.SIGTERM)
        assert running.wait(timeout=20) == 128 + signal.SIGTERM
    written = json.loads((tmp_path / "gpu.json").read_text())
    assert written["parts"]["machine"]["status"] == "running" and written["ended"] == "cut off"
    assert "| Machine and matrix peak |  | running |" in (tmp_path / "gpu.md").read_text()


# ---- judgement -----------------------------------------------------------------------------------------------------


def compared(**changed: Any) -> dict[str, Any]:
    """A comparison that agrees, but for what is changed."""
    row = {"method": "lora", "precision": "bf16-mixed", "finite": True, "loss_scale": 1.0, "loss_difference": 0.01}
    return row | {"gradient_cosine": 0.99, "gradient_norm_ratio": 0.98, "update_cosine": 0.8} | changed


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({}, "^agrees$"),
        ({"loss_difference": 0.06}, "loss differs by 0.06, more than 0.05"),
        ({"gradient_cosine": 0.9}, "cosine of the gradients 0.9000, less than 0.95"),
        ({"gradient_norm_ratio": 0.9}, "gradient longer by -0.1"),
        ({"precision": "16-mixed"}, "norm|longer"),
        ({"finite": False, "gradient_cosine": None}, "^not finite$"),
    ],
)
def test_a_step_is_judged_by_the_bound_of_its_precision(changed: dict[str, Any], said: str):
    assert re.search(said, verdict(compared(**changed)))


def steps(losses: list[float], gradients: list[list[float]], update: list[float]) -> one_step.Steps:
    made = one_step.Steps()
    made.losses, made.gradients = losses, [torch.tensor(gradient) for gradient in gradients]
    made.update = torch.tensor(update)
    return made


def test_of_several_steps_the_worst_is_compared():
    reference = steps([1.0, 2.0], [[1.0, 0.0], [0.0, 2.0]], [1.0, 1.0])
    found = one_step.compare(reference, steps([1.0, 2.2], [[1.0, 0.0], [1.5, 1.5]], [1.0, 0.0]))
    assert found["loss_difference"] == pytest.approx(0.1)
    assert found["gradient_cosine"] == pytest.approx(0.5**0.5)
    assert found["gradient_norm_ratio"] == pytest.approx(1.5 * 2**0.5 / 2)
    assert found["update_cosine"] == pytest.approx(0.5**0.5)
    assert found["finite"]


def test_what_is_not_a_number_is_not_finite_and_can_be_written():
    reference = steps([1.0], [[1.0]], [1.0])
    found = one_step.compare(reference, steps([float("nan")], [[float("inf")]], [1.0]))
    assert not found["finite"] and found["loss_difference"] is None
    json.dumps(found, allow_nan=False)
    with pytest.raises(ValueError, match="0 steps instead of 1"):
        one_step.compare(reference, steps([], [], [1.0]))


def test_a_step_in_bf16_agrees_with_that_in_float32_and_another_step_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Through the Trainer, on this machine; the comparison tells steps apart that share all but the batch."""
    register_resolvers()
    monkeypatch.setattr(one_step, "METHODS", (Method("lcm_lora"),))
    monkeypatch.setattr(one_step, "PRECISIONS", ("bf16-mixed",))
    (*_, found) = one_step.compare_methods(tmp_path)
    (row,) = found["rows"]
    assert row["verdict"] == "agrees" and row["loss_scale"] == 1
    whole = one_step.take_steps
    monkeypatch.setattr(
        one_step, "take_steps", lambda m, p, d, places, *scale: whole(m, p, d, (*places, seed(p)), *scale)
    )
    (*_, found) = one_step.compare_methods(tmp_path)
    assert "cosine of the gradients" in found["rows"][0]["verdict"]


def seed(precision: str) -> str:
    return f"data.seed={len(precision)}"


def test_methods_are_those_of_the_configurations():
    assert all((ROOT / "conf" / "method" / f"{method.name}.yaml").is_file() for method in METHODS)


def test_differing_bits_are_counted(tmp_path: Path):
    rng = np.random.default_rng(0)
    one, two = (rng.integers(0, 256, 1000, dtype=np.uint8) for _ in range(2))
    for name, content in (("one", one), ("two", two), ("short", one[:-1])):
        header = f'{{"__metadata__": {{"written": "{name}"}}}}'.encode()
        (tmp_path / name).write_bytes(len(header).to_bytes(8, "little") + header + content.tobytes())
    assert differing_bits(tmp_path / "one", tmp_path / "two") == np.unpackbits(one ^ two).sum()
    assert differing_bits(tmp_path / "one", tmp_path / "one") == 0
    with pytest.raises(UserError, match="999"):
        differing_bits(tmp_path / "one", tmp_path / "short")


# ---- report --------------------------------------------------------------------------------------------------------


def row(name: str, batch_size: int, seconds: list[float]) -> dict[str, Any]:
    flops = {"step": 8e12, "encoding": 2e12, "teacher": 3e12}
    shape = {"resolution": 512, "batch_size": batch_size, "rank": 64, "flops": flops}
    measured = {"seconds": seconds, "cpu_seconds": seconds, "data_wait": [], "peak_memory_mb": 1000.0}
    return {"name": name, **shape, **measured}


@pytest.fixture
def results() -> dict[str, Any]:
    """Of a run of all parts."""
    drawing = {"resolution": 512, "seconds": {"student": [0.1], "teacher": [2.0]}, "peak_memory_mb": 3000.0}
    drawing |= {"warming_up": {"student": 1.0, "teacher": 2.0}, "draw.student_steps": 4, "draw.teacher_steps": 50}
    turn = {"rows": [row("ours, from images", 8, [0.5]), row("peer", 8, [1.0])]}
    resume = {"steps": 6, "stop": 3, "settings": [], "again": 5, "resumed": 0, "bits": 800}
    found = {
        "machine": {},
        "one_step": {
            "rows": [compared(verdict="agrees"), {"method": "x", "precision": "32-true", "verdict": "failed: y"}]
        },
        "inputs": {},
        "training_8": turn,
        "training_8_turn_2": {"rows": [row("ours, from images", 8, [0.7]), row("peer", 8, [])]},
        "drawing": {"1": drawing, "8": {"resolution": 512}},
        "cached_latents": {"prepare": {"seconds": 9.0, "samples": 256}, "rows": [row("ours, from cached", 8, [0.4])]},
        "cached_teacher": {
            "prepare": {"seconds": 5.0, "samples": 256},
            "rows": [row("ours, from cached teacher", 8, [0.2])],
        },
        "resume": resume,
    }
    return {
        "date": "2026-01-01",
        "commit": None,
        "setup": json.loads(json.dumps(vars(Setup()))),
        "ended": "whole",
        "machine": {"cpu": "c", "gpu": "a card", "threads": 1},
        "versions": {"torch": "2"},
        "matrix_peak": {"bfloat16": 8e14, "float32": 5e13},
        "parts": {k: {"title": k, "status": "done", "took": 3.0, "found": v} for k, v in found.items()},
    }


def test_the_page_says_what_was_measured(results: dict[str, Any]):
    text = markdown(results)
    assert "a card; matrix peak 800 TFLOP/s in bf16" in text
    assert "| lora | bf16-mixed | 1.0e-02 | 0.99000 | 0.9800 | 0.8000 | 1 | agrees |" in text
    assert "| x | 32-true | - | - | - | - | - | failed: y |" in text
    assert "| ours, from images | 0.6 [0.5, 0.7] |" in text  # both turns
    assert "| ours, from cached | 0.4 [0.4, 0.4] |" in text
    assert re.search(r"\| ours, from cached teacher \| 0.2 .*\| 3 \| 2% \|", text)  # of 8 TFLOP
    assert "Caching one step of the teacher for each of 256 images: 5.0 s, start included." in text
    assert "| ours, from images | 0.60 [0.50, 0.50] |" in text
    assert "| off | 1 | 0.1 [0.1, 0.1] | 4 | 2 [2, 2] | 50 | 20.00 [20.00, 20.00] | 1.0 + 2.0 | 3,000 |" in text
    assert "| as they are | 6, stop after 3 | 5 of 800 | 0 |" in text
    for batch_size in (1, 16):
        assert f"### Batch {batch_size}," not in text


def test_a_page_can_be_written_at_any_moment(results: dict[str, Any]):
    whole = results["parts"]
    for number in range(len(whole) + 1):
        known = dict(list(whole.items())[:number])
        assert markdown({**results, "parts": known}).count("| done |") == number
        for name in known:
            begun = {"title": name, "status": "running", "found": {}}
            assert "| running |" in markdown({**results, "parts": {**known, name: begun}})
    unknown = {key: value for key, value in results.items() if key not in ("machine", "versions", "matrix_peak")}
    assert markdown({**unknown, "parts": {}}).startswith("# On a GPU")


def test_the_report_command_writes_the_page(results: dict[str, Any], tmp_path: Path):
    (tmp_path / "gpu.json").write_text(json.dumps(results))
    command = [
        sys.executable,
        "-m",
        "benchmarks.on_gpu",
        "report",
        str(tmp_path / "gpu.json"),
        str(tmp_path / "gpu.md"),
    ]
    subprocess.run(command, cwd=ROOT, check=True)
    assert (tmp_path / "gpu.md").read_text() == markdown(results)


def test_turns_of_the_same_name_are_one_row():
    found = merged(iter([row("a", 1, [1.0]), row("b", 1, [2.0]), row("a", 1, [3.0])]))
    assert [(entry["name"], entry["seconds"]) for entry in found] == [("a", [1.0, 3.0]), ("b", [2.0])]


# ---- what it takes along -------------------------------------------------------------------------------------------


def test_its_packages_are_those_everything_was_tested_with():
    def pins(path: Path) -> dict[str, str]:
        lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
        return dict(line.split("==") for line in lines)

    needs = pins(ROOT / "benchmarks" / "on_gpu_requirements.txt")
    assert needs.items() <= pins(ROOT / "constraints.txt").items()


def test_every_part_has_a_name_of_its_own_and_bounds_are_for_all_precisions():
    for setup in (Setup(), TINY):
        names = [part.name for part in parts_of(setup)]
        assert len(set(names)) == len(names)
    assert set(one_step.PRECISIONS) == set(BOUNDS)
