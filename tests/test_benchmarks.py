"""The benchmark measures what it says, on a pipeline that takes milliseconds."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import webdataset as wds
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import OmegaConf
from safetensors.torch import save_file

import benchmarks.__main__ as benchmarks
from benchmarks import embedded, quality
from benchmarks.limits import step_flops
from benchmarks.report import BEGIN, END, insert, markdown, write
from lcm_lightning.config.model_choice import find_models
from lcm_lightning.errors import UserError

ROOT = Path(__file__).parent.parent
# As diffusers' script looks from outside: it takes --max_train_steps and steps an optimizer of torch.
PEER = """
import argparse, os, time, torch
parser = argparse.ArgumentParser()
parser.add_argument("--max_train_steps", type=int)
parser.add_argument("--pretrained_teacher_model")
known, _ = parser.parse_known_args()
assert "model_index.json" in os.listdir(known.pretrained_teacher_model)
weight = torch.nn.Parameter(torch.ones(2))
optimizer = torch.optim.AdamW([weight])
for _ in range(known.max_train_steps):
    weight.sum().backward()
    time.sleep(0.2)
    optimizer.step()
"""


def bench(*overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks", *overrides]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_bench_runs_ours_and_the_peer_in_turns_and_draws(pipeline_folder: Path, tmp_path: Path):
    (tmp_path / "peer.py").write_text(PEER)
    done = bench(
        f"peer={tmp_path / 'peer.py'}",
        f"pipeline={pipeline_folder}",
        "parts=[sd15,drawing]",
        "rounds=2",
        "steps=2",
        "resolution=32",
        "rank=4",
        "teacher_steps=10",
        "drawings=2",
        f"work={tmp_path / 'work'}",
        f"output={tmp_path / 'out'}",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    ours, other = results["sd15"]
    turns = [line for line in done.stdout.splitlines() if line.startswith("sd15: ")]
    assert [turn.split(",")[0] for turn in turns] == ["sd15: ours", "sd15: peer"] * 2
    assert len(ours["seconds"]) == len(ours["data_wait"]) == len(other["seconds"]) == 4
    assert all(0.2 <= seconds < 2 for seconds in other["seconds"])
    assert 0 < max(ours["data_wait"]) < max(ours["seconds"])
    assert ours["peak_memory_mb"] > 200
    assert len(results["drawing"]["seconds"]["student"]) == 2
    text = (tmp_path / "out" / "benchmarks.md").read_text()
    assert "| over the peer's |" in text and "teacher over student" in text and text in done.stdout


def test_a_missing_peer_is_named(pipeline_folder: Path, tmp_path: Path):
    options = ["parts=[sd15]", "resolution=32", f"pipeline={pipeline_folder}", f"work={tmp_path}", f"output={tmp_path}"]
    done = bench("peer=/nowhere.py", *options)
    assert done.returncode != 0 and "peer=/nowhere.py: no such file" in done.stdout + done.stderr


def test_flops_are_linear_in_batch_and_rank(pipeline_folder: Path):
    def flops(batch_size: int = 1, rank: int = 8) -> float:
        return step_flops(pipeline_folder, resolution=32, batch_size=batch_size, rank=rank)["step"]

    assert flops(batch_size=4) == pytest.approx(4 * flops(), rel=1e-3)
    assert flops(rank=24) - flops(rank=16) == flops(rank=16) - flops(rank=8) > 0


def test_sdxl_runs_beside_its_own_script(sdxl_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ran: dict[str, tuple[str, ...]] = {}

    def child(program: str, *arguments: str) -> dict[str, list[float]]:
        ran[program] = arguments
        return {"finished": [1.0, 2.0], "cpu_seconds": [1.0, 2.0], "data_wait": [0.1], "peak_memory_mb": [1.0] * 2}

    monkeypatch.setattr(benchmarks, "run_child", child)
    script = tmp_path / "script.py"
    script.touch()
    settings = {"pipeline_sdxl": str(sdxl_folder), "peer_sdxl": str(script), "work": str(tmp_path / "work"), "steps": 1}
    cfg = OmegaConf.create(settings | {"rank": 4, "resolution": 32, "batch_size": 1, "rounds": 1})
    bench = benchmarks.Bench(tmp_path, steps=1, deadline=float("inf"))
    benchmarks.measure_sdxl(cfg, bench)
    assert [row["name"] for row in bench.results["sdxl"]] == ["ours", "peer"]
    assert all(row["flops"]["step"] > row["flops"]["teacher"] > 0 for row in bench.results["sdxl"])
    assert f"model.path={sdxl_folder}" in ran["train"] and "model=sdxl" in ran["train"]
    assert {
        str(script),
        "--gradient_checkpointing",
        f"--pretrained_vae_model_name_or_path={sdxl_folder / 'vae'}",
    } <= set(ran["peer"])
    (shard,) = (tmp_path / "work" / "shards_32").glob("*.tar")
    sample = next(iter(wds.WebDataset(str(shard), shardshuffle=False)))
    assert json.loads(sample["json"]) == {"width": 1024, "height": 1024}  # the script leaves out what is below 700


def test_growth_varies_one_thing_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    ran: list[dict[str, str]] = []

    def child(program: str, *arguments: str) -> dict[str, list[float]]:
        ran.append(dict(item.split("=", 1) for item in arguments))
        times = [1.0, 2.0, 4.0]
        return {"finished": times, "cpu_seconds": times, "data_wait": [0.1, 0.1], "peak_memory_mb": [1.0] * 3}

    monkeypatch.setattr(benchmarks, "run_child", child)
    monkeypatch.setattr(benchmarks, "step_flops", lambda *_, **__: {"step": 1e12, "encoding": 1e11})
    monkeypatch.setitem(benchmarks.GROWTH, "samples", (10, 20))
    cfg = OmegaConf.create({"growth_model": "tiny", "rank": 64, "work": str(tmp_path / "work"), "steps": 1})
    bench = benchmarks.Bench(tmp_path, steps=1, deadline=float("inf"))
    benchmarks.measure_growth(cfg, bench)
    assert [row["seconds"] for row in bench.results["growth/rank"]] == [[2.0]] * 4
    assert len(list((tmp_path / "work").glob("shards_64_20/train-*.tar"))) == 1
    usual = {"data.batch_size": "4", "data.resolution": "64", "data.num_workers": "1", "method.lora.rank": "64"}
    usual["data.source"] = str(tmp_path / "work" / "shards_64_1000")
    for arguments in ran:
        other = {key for key, value in usual.items() if arguments[key] != value}
        assert len(other - {"data.source"}) <= 1


def row(name: str, seconds: list[float], memory: float) -> dict[str, object]:
    return {
        "name": name,
        "resolution": 512,
        "batch_size": 2,
        "rank": 64,
        "flops": {"step": 8e12, "encoding": 2e12},
        "seconds": seconds,
        "cpu_seconds": [2 * second for second in seconds],
        "data_wait": [0.1] * len(seconds) if name != "peer" else [],
        "peak_memory_mb": memory,
    }


def test_the_tables_say_ratio_spread_and_utilisation(tmp_path: Path):
    results = {
        "date": "2026-01-01",
        "machine": {"cpu": "a processor", "gpu": None, "threads": 2},
        "versions": {"torch": "2"},
        "settings": {"growth_model": "tiny"},
        "matrix_peak": {"bfloat16": 2e12, "float32": 1e12},
        "sd15": [
            row("ours, from images", [10.0, 8.0, 12.0], 500.0),
            row("ours, from cached latents", [6.0, 6.0, 6.0], 400.0),
            row("peer", [20.0, 20.0, 20.0], 1000.0),
        ],
        "growth/rank": [row("8", [1.0], 1.0), row("16", [2.0], 1.0)],
        "growth/samples": [row("1000", [], 1.0)],
    }
    text = markdown(results)
    assert "| ours, from images | 10 [8, 12] | 20 | 0.2 | 1.0% | 500 | 8 | 40% |" in text
    assert "| ours, from cached latents | 6 [6, 6] | 12 | 0.333 | 1.7% | 400 | 6 | 50% |" in text
    assert "| ours, from images | 0.50 [0.40, 0.60] | 0.50 [0.40, 0.60] | 0.50 |" in text
    assert "samples in the data set" not in text
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    for _ in range(2):
        insert([results], page)
    written = page.read_text()
    assert written.startswith("before\n") and written.endswith("\nafter\n") and "old" not in written
    assert written.count(text) == 1 and "(page.png)" in written
    assert (tmp_path / "page.png").stat().st_size > 1000


def test_every_key_of_the_configuration_is_listed_once():
    assert sorted(benchmarks.BENCH_KEYS) == sorted(
        set(OmegaConf.load(ROOT / "conf" / "bench.yaml")) - {"defaults", "hydra"}
    )


def quality_row(trainer: str, steps: int, seconds: float, *distances: float) -> dict[str, object]:
    estimates = {
        str(n): {"value": fid, "low": fid - 1, "high": fid + 1} for n, fid in zip((1, 2), distances, strict=True)
    }
    return {
        "trainer": trainer,
        "steps": steps,
        "processor_seconds": seconds,
        "peak_memory_mb": 1000.0,
        "fid": estimates,
    }


def test_quality_is_told_by_when_ours_is_as_good_as_the_peer_s_last(tmp_path: Path):
    rows = [
        quality_row("ours", 25, 30.0, 60.0, 50.0),
        quality_row("ours", 50, 60.0, 40.0, 30.0),
        quality_row("ours", 400, 300.0, 20.0, 20.0),
        quality_row("peer", 50, 80.0, 90.0, 95.0),
        quality_row("peer", 200, 120.0, 40.0, 30.5),
        quality_row("peer", 400, 400.0, 31.0, 35.0),
        quality_row("peer, our settings", 400, 400.0, 10.0, 11.0),
    ]
    results = {
        "date": "2026-01-01",
        "machine": {"cpu": "a processor", "gpu": None, "threads": 2},
        "versions": {"torch": "2"},
        "settings": {},
        "matrix_peak": {"bfloat16": 2e12, "float32": 1e12},
        "quality": {"rows": rows, "teacher": {"value": 12.0, "low": 11.0, "high": 13.0}, "n_images": 300},
    }
    text = write(results, tmp_path)
    assert "| ours | 50 | 60 | 1,000 | 40.0 [39.0, 41.0] | 30.0 [29.0, 31.0] |" in text
    reached = "has after 400 steps, 31.0 at its best number of steps, it first has after 120 processor s, "
    assert f"- The FID that peer {reached}and ours after 60 s, 0.50 x." in text
    assert "10.0 at its best number of steps, it first has after 400 processor s, and ours never." in text
    assert (tmp_path / "quality.png").stat().st_size > 1000


SCRIPT = """MAX_SEQ_LENGTH = 77
ids = tokenizer([""], max_length=77
)
"""


def test_the_peer_s_script_is_fitted_to_the_embedded_pipeline_s_captions(tmp_path: Path):
    (tmp_path / "peer.py").write_text(SCRIPT)
    fitted = quality.fitted_script(tmp_path / "peer.py", tmp_path / "work")
    assert fitted.read_text() == SCRIPT.replace("77", "24")
    (tmp_path / "peer.py").write_text("print()")
    with pytest.raises(UserError, match=r"peer\.py: no 'MAX_SEQ_LENGTH = 77' in it"):
        quality.fitted_script(tmp_path / "peer.py", tmp_path / "work")


def test_the_peer_reads_noto_s_pictures_with_all_their_captions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(quality, "SAMPLES", 3000)
    pictures: dict[bytes, set[str]] = {}
    for sample in wds.WebDataset(str(quality.peer_shard(tmp_path / "train-000000.tar")), shardshuffle=False):
        pictures.setdefault(sample["png"], set()).add(sample["txt"].decode())
    assert len(pictures) > 1400 and sum(len(captions) > 1 for captions in pictures.values()) > 1000


def test_students_of_all_trainings_are_told_apart(tmp_path: Path):
    points = [quality.our_point(25, tmp_path), quality.peer_point("peer", tmp_path, tmp_path, 25, tmp_path)]
    points += [quality.peer_point("peer, our settings", tmp_path, tmp_path, 25, tmp_path)]
    for number, point in enumerate(points):
        point.run.folder.mkdir()
        cost = {"processor_seconds": float(number), "peak_memory_mb": 1.0}
        (point.run.folder / "cost.json").write_text(json.dumps(cost))
    models = [{"role": "student", "source": str(number), "steps": 1, "fid": number} for number in range(3)]
    base = {"role": "base", "fid": 9, "n_images": 7}
    sources = [{"name": str(number), "spec": point.model} for number, point in enumerate(points)]
    found = quality.summary(points, {"models": [*models[::-1], base], "sources": sources})
    assert (
        [row["fid"]["1"] for row in found["rows"]] == [row["processor_seconds"] for row in found["rows"]] == [0, 1, 2]
    )
    assert found["teacher"] == 9 and found["n_images"] == 7


def test_students_of_runs_and_the_peer_s_are_models_of_one_evaluation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What `evaluate` asks of evaluate.py is what it takes: a LoRA in a file needs its model named."""
    asked: list[str] = []

    def run(command: list[str], **_: object) -> None:
        asked.extend(command[2:])
        (tmp_path / "metrics.json").write_text("{}")

    monkeypatch.setattr(embedded.subprocess, "run", run)
    save_file({"unet.down.lora_A.weight": torch.zeros(1, 1)}, tmp_path / "pytorch_lora_weights.safetensors")
    embedded.evaluate([f"lcm:{tmp_path}"], tmp_path, num_images=1, student_steps=[1, 2], processes=1)
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("evaluate", asked)
    assert [source.spec for source in find_models(cfg)] == [f"lcm:{tmp_path}"]
