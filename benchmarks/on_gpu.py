"""Evidence from one GPU, within minutes, the most valuable first; `benchmarks/on_gpu.sh` makes its environment.

    python -m benchmarks.on_gpu run PEER_SCRIPT OUT [--seconds 520] [--device cpu --tiny] [--parts one_step,training_1]
    python -m benchmarks.on_gpu report OUT/gpu.json docs/results/gpu.md

Every measurement is in a process of its own, which is killed when the time its part is given is over. OUT/gpu.json and
OUT/gpu.md are written anew, whole, after each: what was measured when everything is cut off is there. This process
imports nothing heavy and holds no memory of the device.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks import cases
from benchmarks.cases import FEW, Case, add_turn, child_command, run_child, run_together
from benchmarks.gpu_report import markdown
from lcm_lightning.errors import UserError
from lcm_lightning.output.files import write_atomic

ROOT = Path(__file__).parent.parent
RESERVE = 8.0  # seconds kept for ending: the last files, and what was killed
NEEDED = ("machine", "inputs")  # parts without which most cannot be measured
WARM_UP = 4  # optimizer steps before those that are measured: cuDNN tries its algorithms


@dataclass(frozen=True)
class Setup:
    """What is measured.

    Attributes:
        device: name of the trainer: "gpu" or "cpu".
        size, model: of `benchmarks.inputs.SIZES`, and the settings of its architecture under `model=`.
        resolution, rank: px, and of adapters.
        batch_sizes: of training.
        drawn: batch sizes of drawing.
        steps: optimizer steps measured in a turn.
        teacher_steps: of drawing, guided.
        workers: processes that load data.
    """

    device: str = "gpu"
    size: str = "sd15"
    model: str = "sd15"
    resolution: int = 512
    rank: int = 64
    batch_sizes: tuple[int, int, int] = (1, 8, 16)
    drawn: tuple[int, int] = (1, 8)
    steps: int = 20
    teacher_steps: int = 50
    workers: int = 4


TINY = Setup(
    size="small", resolution=128, rank=4, batch_sizes=(1, 2, 3), drawn=(1, 2), steps=2, teacher_steps=5, workers=1
)


@dataclass
class Session:
    """One run of all parts, and what it has found.

    Attributes:
        deadline: on the clock of `time.monotonic`, before which all must have ended.
        patience: see `allotted`.
        part_ends: when, on that clock, what the current part may take is over.
        caches: folders that were written, by the name of their `cache=`.
    """

    setup: Setup
    peer: Path
    out: Path
    work: Path
    deadline: float
    patience: float = 1.0
    results: dict[str, Any] = field(default_factory=dict)
    part_ends: float = 0.0
    caches: dict[str, Path] = field(default_factory=dict)

    @property
    def left(self) -> float:
        """Seconds that the current part still has."""
        return max(self.part_ends - time.monotonic(), 0.0)

    def save(self) -> None:
        """Write what is known."""
        write_atomic(self.out / "gpu.json", (json.dumps(self.results, indent=1) + "\n").encode())
        write_atomic(self.out / "gpu.md", markdown(self.results).encode())

    def run(self, part: Part) -> None:
        """Measure one part if there is time for it, and write how that ended."""
        entry = self.results["parts"][part.name] = {"title": part.title, "status": "running", "found": {}}
        before = time.monotonic()
        seconds = allotted(part, self.deadline - before, self.patience)
        if seconds is None:
            entry["status"] = (
                f"skipped: {max(self.deadline - before, 0):.0f} s left, it needs {self.patience * part.least:.0f}"
            )
        elif missing := [name for name in part.needs if not self.has(name)]:
            entry["status"] = f"skipped: it needs {', '.join(missing)}"
        else:
            self.part_ends = before + seconds
            self.save()
            print(f"{part.name}: at most {seconds:.0f} s", flush=True)
            entry["status"] = self._outcome(part, entry["found"])
            entry["took"] = time.monotonic() - before
        print(f"{part.name}: {entry['status']}", flush=True)
        self.save()

    def _outcome(self, part: Part, found: dict[str, Any]) -> str:
        try:
            part.measure(self, found)
        except UserError as error:
            return f"failed: {error}"
        return "done"

    def has(self, part: str) -> bool:
        """Whether a part was measured to its end."""
        return self.results["parts"].get(part, {}).get("status") == "done"

    def child(self, found: dict[str, Any], program: str, *arguments: str) -> None:
        """Run a program of `benchmarks.child`; what it finds goes into `found`, and is saved, as it comes."""

        def note(figures: dict[str, Any]) -> None:
            found.update(figures)
            self.save()

        found.update(run_child(program, *arguments, seconds=self.left, on_partial=note, log=self.log))

    @property
    def log(self) -> Path:
        """What the processes said."""
        return self.out / "gpu.log"

    @property
    def pipeline(self) -> Path:
        """See `benchmarks.inputs.inputs_in`."""
        return self.work / self.setup.size / "pipeline"

    @property
    def shards(self) -> Path:
        """See `benchmarks.inputs.inputs_in`."""
        return self.work / self.setup.size / "shards"


@dataclass(frozen=True)
class Part:
    """One thing to measure.

    Attributes:
        measure: puts what it finds into the dictionary it is given; raises `UserError` where it fails.
        least: it is not begun with fewer seconds.
        most: seconds after which it is cut off.
        needs: names of parts without which it cannot be measured.
    """

    name: str
    title: str
    least: float
    most: float
    measure: Callable[[Session, dict[str, Any]], None]
    needs: tuple[str, ...] = NEEDED


def allotted(part: Part, left: float, patience: float = 1.0) -> float | None:
    """Seconds that a part may take with so many `left` before the deadline; None if it is not to be begun.

    `patience` multiplies what parts are given, on a machine that is slower than they were meant for.
    """
    usable = left - RESERVE
    return None if usable < patience * part.least else min(patience * part.most, usable)


def measure_machine(session: Session, found: dict[str, Any]) -> None:
    """Names, versions and the matrix peak."""
    session.child(found, "machine")
    session.results |= found
    if session.setup.device == "gpu" and found["machine"]["gpu"] is None:
        raise UserError("torch finds no GPU here; --device cpu --tiny tries everything on the CPU")


def measure_one_step(session: Session, found: dict[str, Any]) -> None:
    """One step of each method and precision; the inputs of all later parts are made beside it, on the CPU."""
    results = {name: session.work / f"{name}.json" for name in ("one_step", "inputs")}
    arguments = {
        "one_step": (session.work / "one_step",),
        "inputs": (session.work / session.setup.size, session.setup.size),
    }
    commands = {
        name: child_command(results[name], name, *map(str, arguments[name]))
        for name in results
        if not session.has(name)
    }
    for path in results.values():
        path.unlink(missing_ok=True)

    def look() -> None:
        if results["one_step"].is_file() and (figures := json.loads(results["one_step"].read_text())) != found:
            found.update(figures)
            session.save()

    failures = run_together(commands, session.left, look, session.log)
    made = {"title": "Pipeline with random weights, shards, FLOPs of a step", "found": {}}
    if "inputs" in failures:
        made["status"] = f"failed: {failures['inputs']}"
    else:
        made |= {"status": "done", "found": json.loads(results["inputs"].read_text())}
    session.results["parts"]["inputs"] = made
    if "one_step" in failures:
        raise UserError(failures["one_step"])


def training_case(session: Session, name: str, source: Path, batch_size: int) -> Case:
    """Our training of the setup's model."""
    setup = session.setup
    shape = {"resolution": setup.resolution, "batch_size": batch_size, "rank": setup.rank}
    steps = {"steps": WARM_UP + setup.steps, "workers": setup.workers}
    return cases.ours(name, setup.model, session.pipeline, source, trainer=setup.device, **shape, **steps)


def measure_training(batch_size: int, session: Session, found: dict[str, Any]) -> None:
    """A turn of ours and one of the peer's, added to those of an earlier part of this batch size."""
    setup = session.setup
    shape = {"resolution": setup.resolution, "batch_size": batch_size, "rank": setup.rank}
    steps = {"steps": WARM_UP + setup.steps, "workers": setup.workers}
    take_turns(
        session,
        found,
        [
            training_case(session, "ours, from images", session.shards, batch_size),
            cases.peer(session.peer, session.pipeline, session.shards, session.work, **shape, **steps),
        ],
    )


def take_turns(session: Session, found: dict[str, Any], turns: list[Case]) -> None:
    """A turn of each case; one that fails leaves the others theirs. Raises a `UserError` in the end if any did."""
    counted = session.results["parts"]["inputs"]["found"]["flops"]
    failures = []
    rows = found["rows"] = []
    for case in turns:
        row = case.row({name: case.batch_size * flops for name, flops in counted.items()})
        rows.append(row)
        try:
            figures = run_child(case.program, *case.arguments, seconds=session.left, log=session.log)
        except UserError as error:
            failures.append(f"{case.name}: {error}")
            continue
        add_turn(row, figures, session.setup.steps)
        session.save()
    if failures:
        raise UserError("; ".join(failures))


def measure_drawing(batch_sizes: tuple[int, ...], compiled: bool, session: Session, found: dict[str, Any]) -> None:
    """The student's few steps and the guided teacher's many, in turns, for each batch size."""
    setup = session.setup
    for batch_size in batch_sizes:
        session.child(
            found.setdefault(str(batch_size), {"resolution": setup.resolution}),
            "draw",
            f"trainer={setup.device}",
            f"model={setup.model}",
            f"model.path={session.pipeline}",
            f"model.compile={str(compiled).lower()}",
            f"data.resolution={setup.resolution}",
            f"method.lora.rank={setup.rank}",
            "draw.repeats=3",
            "draw.student_steps=4",
            f"draw.teacher_steps={setup.teacher_steps}",
            f"draw.batch_size={batch_size}",
        )


def measure_cache(cache: str, session: Session, found: dict[str, Any]) -> None:
    """Write a cache of `cache=`, of latents that were written before where it is of a teacher, and train from it."""
    setup = session.setup
    source, more = session.work / setup.size / "few_shards", []
    if cache == "teacher":  # of one epoch, which is more than is trained
        source = session.caches["latents"]
        more = ["method=lcm_lora", f"method.lora.rank={setup.rank}", "data.caption_dropout=0", "cache.draws=1"]
    output = session.caches[cache] = session.work / setup.size / f"{cache}_{time.time_ns()}"
    command = [
        *(sys.executable, "-m", "lcm_lightning.prepare", "data=shards", f"data.source={source}", f"cache={cache}"),
        *(f"model={setup.model}", f"model.path={session.pipeline}", f"data.resolution={setup.resolution}"),
        *(f"cache.output={output}", "data.buckets=false", "data.flip_probability=0", *more),
    ]
    before = time.monotonic()
    failures = run_together({"prepare": command}, session.left, log=session.log)
    if failures:
        raise UserError(failures["prepare"])
    found["prepare"] = {"seconds": time.monotonic() - before, "samples": FEW}
    case = training_case(session, f"ours, from cached {cache}", output, setup.batch_sizes[1])
    # Mirror images were not cached.
    take_turns(session, found, [replace(case, arguments=(*case.arguments, "data.flip_probability=0"))])


def measure_resume(settings: tuple[str, ...], session: Session, found: dict[str, Any]) -> None:
    """Train to a step, once, once more, and with a stop in between; count the bits that differ in the end."""
    setup, runs = session.setup, session.work / f"runs_{time.time_ns()}"
    whole, again, first, resumed = (runs / name for name in ("whole", "again", "first", "resumed"))
    steps, stop = 6, 3

    def train(folder: Path, *more: str) -> list[str]:
        return [
            *(sys.executable, str(ROOT / "train.py"), *cases.OURS, f"trainer={setup.device}", f"model={setup.model}"),
            *(f"model.path={session.pipeline}", f"data.source={session.shards}", f"data.resolution={setup.resolution}"),
            *("data.batch_size=2", "data.num_workers=1", "data.val_limit=0", "val_every=1000000", "logger=csv"),
            *("callbacks.samples=null", "callbacks.progress=null", "callbacks.final_validation=null"),
            *("method.lora.rank=8", "method.warmup_steps=0", "trainer.log_every_n_steps=1", *settings),
            *(f"hydra.run.dir={folder}", *more),
        ]

    to_the_end, half_way = f"max_steps={steps}", f"max_steps={stop}"
    together = {"whole": train(whole, to_the_end), "again": train(again, to_the_end), "first": train(first, half_way)}
    for commands in (together, {"resumed": train(resumed, to_the_end, f"resume={first}")}):
        failures = run_together(commands, session.left, log=session.log)
        if failures:
            raise UserError("; ".join(failures.values()))
    found |= {"steps": steps, "stop": stop, "settings": list(settings)}
    for name, run in (("again", again), ("resumed", resumed)):
        found[name] = differing_bits(lora_file(whole), lora_file(run))
    found["bits"] = 8 * lora_file(whole).stat().st_size


def lora_file(run: Path) -> Path:
    """What a run has trained."""
    return run / "lora" / "pytorch_lora_weights.safetensors"


def differing_bits(first: Path, second: Path) -> int:
    """Of the tensors in two files of them, of the same size. Raises a `UserError` where they are not."""
    one, two = (tensor_bytes(path) for path in (first, second))
    if len(one) != len(two):
        raise UserError(f"{first} has {len(one)} bytes and {second} {len(two)}")
    return (int.from_bytes(one, "little") ^ int.from_bytes(two, "little")).bit_count()


def tensor_bytes(path: Path) -> bytes:
    """What follows the header of a .safetensors file, which says when it was written."""
    content = path.read_bytes()
    return content[8 + int.from_bytes(content[:8], "little") :]


def parts_of(setup: Setup) -> tuple[Part, ...]:
    """All parts, the most valuable first; what takes long to compile, and second turns, last."""
    shape = f"{setup.resolution} px, batch"
    one, many = setup.drawn

    def training(batch_size: int, turn: int) -> Part:
        name = f"training_{batch_size}" + (f"_turn_{turn}" if turn > 1 else "")
        title = f"Training step, {shape} {batch_size}" + (f", turn {turn}" if turn > 1 else "")
        return Part(name, title, 40, 120, partial(measure_training, batch_size))

    def drawing(name: str, batch_sizes: tuple[int, ...], compiled: bool, most: float, *needs: str) -> Part:
        title = f"Drawing, model.compile={str(compiled).lower()}, {shape} {' and '.join(map(str, batch_sizes))}"
        return Part(name, title, 30, most, partial(measure_drawing, batch_sizes, compiled), NEEDED + needs)

    def resume(name: str, title: str, *settings: str) -> Part:
        return Part(name, title, 40, 120, partial(measure_resume, settings))

    return (
        # The first to import torch, from a disk that may be slow.
        Part("machine", "Machine and matrix peak", 10, 180, measure_machine, ()),
        Part("one_step", "One optimisation step against the CPU's", 30, 150, measure_one_step, ("machine",)),
        *(training(batch_size, 1) for batch_size in setup.batch_sizes),
        drawing("drawing", setup.drawn, False, 70),
        Part("cached_latents", "Training from cached latents", 40, 100, partial(measure_cache, "latents")),
        Part(
            *("cached_teacher", "Training from the teacher's cached steps", 40, 100, partial(measure_cache, "teacher")),
            needs=(*NEEDED, "cached_latents"),
        ),
        resume("resume", "Resume, settings as they are"),
        drawing(f"drawing_compiled_{one}", (one,), True, 150),
        drawing(f"drawing_compiled_{many}", (many,), True, 150, f"drawing_compiled_{one}"),  # else it would fail alike
        resume(
            "resume_deterministic", "Resume, deterministic", "trainer.deterministic=true", "trainer.benchmark=false"
        ),
        *(training(batch_size, 2) for batch_size in setup.batch_sizes),
    )


def measure_all(session: Session, names: tuple[str, ...] | None) -> None:
    """Go through the parts; `names` picks some, with those that all need."""
    for part in parts_of(session.setup):
        if names is None or part.name in (*names, "machine", "one_step"):
            session.run(part)
        if part.name == "machine" and not session.has("machine"):
            raise UserError(session.results["parts"]["machine"]["status"])
    session.results["ended"] = "whole"
    session.save()


def started(arguments: argparse.Namespace) -> Session:
    """A session as asked for on the command line; nothing is measured yet."""
    setup = replace(TINY if arguments.tiny else Setup(), device=arguments.device)
    if not arguments.peer.is_file():
        raise UserError(f"{arguments.peer}: no such file; give diffusers' train_lcm_distill_lora_sd_wds.py")
    if arguments.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ |= {"HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    session = Session(
        setup, arguments.peer, arguments.out, arguments.work, time.monotonic() + arguments.seconds, arguments.patience
    )
    for folder in (session.out, session.work):
        folder.mkdir(parents=True, exist_ok=True)
    session.log.unlink(missing_ok=True)
    session.results |= {
        "date": datetime.now(UTC).isoformat(timespec="minutes"),
        "commit": arguments.commit,
        "seconds": arguments.seconds,
        "setup": vars(setup) | {},
        "ended": "cut off",  # until it is not
        "parts": {},
    }
    return session


def command_line() -> argparse.ArgumentParser:
    """What can be typed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.on_gpu", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure")
    run.add_argument("peer", type=Path, help="diffusers' train_lcm_distill_lora_sd_wds.py")
    run.add_argument("out", type=Path, help="folder for gpu.json, gpu.md and gpu.log")
    run.add_argument("--seconds", type=float, default=520, help="after which it has ended")
    run.add_argument("--device", choices=("gpu", "cpu"), default="gpu")
    run.add_argument("--tiny", action="store_true", help="a small architecture, to try everything")
    run.add_argument("--patience", type=float, default=1, help="multiplies what each part is given")
    run.add_argument("--parts", help="only these, with commas in between, and what they need")
    run.add_argument("--work", type=Path, default=Path("/tmp/lcm_on_gpu"), help="folder for what is made on the way")
    run.add_argument("--commit", default=None, help="of the code, to be written down")
    report = commands.add_parser("report", help="write a page from gpu.json")
    report.add_argument("results", type=Path)
    report.add_argument("page", type=Path)
    return parser


def main() -> None:
    """Entry point."""
    typed = command_line().parse_args()
    if typed.command == "report":
        write_atomic(typed.page, markdown(json.loads(typed.results.read_text())).encode())
        return
    # So that a process that is asked to end takes its children with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        session = started(typed)
        measure_all(session, None if typed.parts is None else tuple(typed.parts.split(",")))
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
