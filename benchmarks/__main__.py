"""``python -m benchmarks``: measure training steps and drawing, beside a peer if one is given."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import hydra
import torch
from omegaconf import DictConfig, OmegaConf

from benchmarks import cases, quality, report
from benchmarks.cases import Case, add_turn, run_child
from benchmarks.inputs import random_shards
from benchmarks.limits import step_flops
from lcm_lightning.config.checks import resolve
from lcm_lightning.config.resolvers import package_file, register_resolvers
from lcm_lightning.errors import UserError, report_user_errors
from lcm_lightning.evaluation.latency import machine_info, matrix_peak
from lcm_lightning.output.versions import package_versions

register_resolvers()

PARTS = ("tiny", "sd15", "sdxl", "drawing", "growth", "quality")
BENCH_KEYS = ("peer", "pipeline", "parts", "rounds", "steps", "resolution", "batch_size", "rank", "cached")
BENCH_KEYS += ("cached_teacher", "student_steps", "teacher_steps", "drawings", "growth_model", "minutes", "work")
BENCH_KEYS += ("output", "quality_steps", "quality_images", "peer_sdxl", "pipeline_sdxl")
GROWTH = {
    "batch_size": (1, 2, 4, 8),
    "resolution": {"tiny": (32, 64, 128), "sd15": (256, 512, 768)},
    "rank": (8, 16, 64, 128),
    "workers": (0, 1, 2),
    "samples": (1000, 8000, 30000),
}


@dataclass
class Bench:
    """Runs children in turns and keeps what they found in `results`, written after every turn."""

    output: Path
    steps: int
    deadline: float
    results: dict[str, Any] = field(default_factory=dict)

    def save(self) -> None:
        """Write results.json whole or not at all."""
        self.output.mkdir(parents=True, exist_ok=True)
        temporary = self.output / ".results.json"
        temporary.write_text(json.dumps(self.results, indent=1) + "\n")
        temporary.replace(self.output / "results.json")

    def late(self) -> bool:
        """Whether no new turn may start."""
        return time.monotonic() > self.deadline

    def train(self, part: str, cases: list[Case], rounds: int) -> None:
        """Give every case `rounds` turns; append its intervals between optimizer steps under `part`."""
        rows = self.results.setdefault(part, [])
        for case in cases:
            flops = step_flops(case.pipeline, resolution=case.resolution, batch_size=case.batch_size, rank=case.rank)
            rows.append(case.row(flops))
        for _ in range(rounds):
            for case, row in zip(cases, rows, strict=True):
                if self.late():
                    return
                print(f"{part}: {case.name}, {self.steps} steps", flush=True)
                found = run_child(case.program, *case.arguments)
                add_turn(row, found, self.steps)
                self.save()


def trainer() -> str:
    """The name of the trainer for this machine."""
    return "gpu" if torch.cuda.is_available() else "cpu"


def pipeline(cfg: DictConfig, model: str) -> Path:
    """The pipeline folder that stands for "tiny", "sd15" or "sdxl"."""
    if model == "tiny":
        return Path(package_file("assets/tiny"))
    given = cfg["pipeline_sdxl" if model == "sdxl" else "pipeline"]
    if given is not None:
        return Path(given)
    folder = Path(cfg.work) / model
    run_child("pipeline", str(folder), model)  # a process of its own gives its gigabytes back
    return folder


def ours(
    cfg: DictConfig, name: str, model: str, shards: Path | str, *, resolution: int, batch_size: int, **more: Any
) -> Case:
    """Our training of `model`; `more` are rank and workers."""
    shape = {"resolution": resolution, "batch_size": batch_size, "rank": cfg.rank, **more}
    return cases.ours(name, model, pipeline(cfg, model), shards, trainer=trainer(), steps=cfg.steps + 1, **shape)


PEERS = {"peer": "train_lcm_distill_lora_sd_wds.py", "peer_sdxl": "train_lcm_distill_lora_sdxl_wds.py"}


def peer_script(cfg: DictConfig, key: str = "peer") -> Path:
    """diffusers' script under one of the keys `PEERS`."""
    script = Path(cfg[key]).expanduser().absolute()
    if not script.is_file():
        raise UserError(f"{key}={cfg[key]}: no such file; give diffusers' {PEERS[key]}")
    return script


def peer(cfg: DictConfig, shards: Path, model: str) -> Case:
    """diffusers' script at the same work."""
    xl = model == "sdxl"
    shape = {"resolution": cfg.resolution, "batch_size": cfg.batch_size, "rank": cfg.rank, "steps": cfg.steps + 1}
    script = peer_script(cfg, "peer_sdxl" if xl else "peer")
    return cases.peer(script, pipeline(cfg, model), shards, Path(cfg.work), **shape, xl=xl)


def shards_for_the_peer(cfg: DictConfig) -> Path:
    """More samples than the peer's reader comes to: at the end of a shard it fails with webdataset 1.0."""
    folder = Path(cfg.work) / f"shards_{cfg.resolution}"
    return random_shards(folder, samples=2000, side=cfg.resolution, per_shard=2000)


def measure_sdxl(cfg: DictConfig, bench: Bench) -> None:
    """Ours and the peer on the shallow SDXL, both with activations computed anew, in turns."""
    shards = shards_for_the_peer(cfg)
    cases = [ours(cfg, "ours", "sdxl", shards, resolution=cfg.resolution, batch_size=cfg.batch_size)]
    if cfg.peer_sdxl is not None:
        cases.append(peer(cfg, shards, "sdxl"))
    bench.train("sdxl", cases, cfg.rounds)


def measure_sd15(cfg: DictConfig, bench: Bench) -> None:
    """Ours from images, from cached latents, from the teacher's cached steps, and the peer, in turns."""
    shards = shards_for_the_peer(cfg)
    shape = {"resolution": cfg.resolution, "batch_size": cfg.batch_size}
    cases = [ours(cfg, "ours, from images", "sd15", shards, **shape)]
    for name, source in (("latents", cfg.cached), ("teacher", cfg.cached_teacher)):
        if source is not None:
            cached = ours(cfg, f"ours, from cached {name}", "sd15", source, **shape)
            # Mirror images may not have been cached.
            cases.append(replace(cached, arguments=(*cached.arguments, "data.flip_probability=0")))
    if cfg.peer is not None:
        cases.append(peer(cfg, shards, "sd15"))
    bench.train("sd15", cases, cfg.rounds)


def measure_tiny(cfg: DictConfig, bench: Bench) -> None:
    """The embedded pipeline at the quickstart's batch."""
    shards = random_shards(Path(cfg.work) / "shards_64", samples=1000, side=64)
    case = ours(cfg, "ours, from images", "tiny", shards, resolution=64, batch_size=16, rank=32)
    bench.train("tiny", [case], cfg.rounds)


def measure_drawing(cfg: DictConfig, bench: Bench) -> None:
    """One image of the guided teacher and of the student, end to end."""
    print("drawing: student and teacher", flush=True)
    bench.results["drawing"] = {"resolution": cfg.resolution} | run_child(
        "draw",
        f"trainer={trainer()}",
        f"model.path={pipeline(cfg, 'sd15')}",
        f"data.resolution={cfg.resolution}",
        f"method.lora.rank={cfg.rank}",
        f"draw.repeats={cfg.drawings}",
        f"draw.student_steps={cfg.student_steps}",
        f"draw.teacher_steps={cfg.teacher_steps}",
    )
    bench.save()


def measure_growth(cfg: DictConfig, bench: Bench) -> None:
    """One thing at a time away from batch 4, one worker and the model's own resolution."""
    model = cfg.growth_model
    side = 64 if model == "tiny" else 512
    for axis, values in GROWTH.items():
        cases = []
        for value in values[model] if isinstance(values, dict) else values:
            shape = {"resolution": side, "batch_size": 4 if model == "tiny" else 1, "rank": cfg.rank, "workers": 1}
            if axis in shape:
                shape[axis] = value
            samples = value if axis == "samples" else 1000
            folder = Path(cfg.work) / f"shards_{shape['resolution']}_{samples}"
            shards = random_shards(folder, samples=samples, side=shape["resolution"])
            cases.append(ours(cfg, str(value), model, shards, **shape))
        bench.train(f"growth/{axis}", cases, 1)


def measure_quality(cfg: DictConfig, bench: Bench) -> None:
    """FID on the embedded pipeline against processor seconds of training, ours and the peer's."""
    script = None if cfg.peer is None else peer_script(cfg)
    work = (Path(cfg.work) / "quality").absolute()
    bench.results["quality"] = quality.measure(script, work, cfg.quality_steps, cfg.quality_images)
    bench.save()


MEASURES = {
    "tiny": measure_tiny,
    "sd15": measure_sd15,
    "sdxl": measure_sdxl,
    "drawing": measure_drawing,
    "growth": measure_growth,
    "quality": measure_quality,
}


@hydra.main(config_path="../conf", config_name="bench", version_base="1.3")
@report_user_errors
def main(cfg: DictConfig) -> None:
    """Entry point."""
    resolve(cfg, BENCH_KEYS)
    unknown = sorted(set(cfg.parts) - set(PARTS))
    if unknown:
        raise UserError(f"parts={unknown[0]}: expected some of {', '.join(PARTS)}")
    if min(cfg.steps, cfg.rounds, cfg.drawings) < 1:
        raise UserError(f"rounds={cfg.rounds} steps={cfg.steps} drawings={cfg.drawings}: expected at least 1")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    limit = float("inf") if cfg.minutes is None else 60 * cfg.minutes
    bench = Bench(Path(cfg.output), cfg.steps, time.monotonic() + limit)
    bench.results = {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "machine": machine_info(device),
        "versions": package_versions(),
        "settings": OmegaConf.to_container(cfg),
        "matrix_peak": {
            str(dtype).removeprefix("torch."): matrix_peak(device, dtype) for dtype in (torch.bfloat16, torch.float32)
        },
    }
    for part in cfg.parts:
        if not bench.late():
            MEASURES[part](cfg, bench)
    bench.save()
    print(report.write(bench.results, bench.output))


if __name__ == "__main__":
    main()
