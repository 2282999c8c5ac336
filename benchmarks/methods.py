"""``make methods-table``: every method from one teacher at one price in network evaluations, and what came of it.

Trains on the embedded pipeline, evaluates all students in one report, and writes a page with its figures.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from benchmarks import methods_page
from lcm_lightning.config.checks import resolve
from lcm_lightning.errors import UserError, report_user_errors

ROOT = Path(__file__).parent.parent
KEYS = (
    "passes",
    "seeds",
    "only",
    "jobs",
    "student_steps",
    "num_images",
    "common",
    "methods",
    "work",
    "page",
)
COST = "cost.json"


@dataclass(frozen=True)
class Recipe:
    """How a method is trained.

    Attributes:
        name: a key of `methods` in conf/methods_table.yaml.
        title: in the page.
        passes: network evaluations that an optimizer step takes for each place of its batch.
        overrides: of train.py; `{teacher}` in one is the run folder of `after`.
        after: the recipe whose student of the same seed is this one's teacher.
    """

    name: str
    title: str
    passes: float
    overrides: tuple[str, ...]
    after: str | None = None

    def steps(self, passes: int) -> int:
        """Optimizer steps that so many network evaluations buy."""
        return round(passes / self.passes)


@dataclass(frozen=True)
class Training:
    """One run of a recipe."""

    recipe: Recipe
    seed: int
    steps: int
    folder: Path

    @property
    def name(self) -> str:
        """Of its model in an evaluation."""
        return f"{self.recipe.name}_{self.seed}"

    def beside(self, name: str) -> Path:
        """The folder of another recipe's run of this seed."""
        return self.folder.with_name(f"{name}_{self.seed}")

    def overrides(self, common: Sequence[str]) -> list[str]:
        """All of train.py's; an experiment of the recipe's takes the place of the common one."""
        own = {override.partition("=")[0] for override in self.recipe.overrides}
        return [
            *(override for override in common if override.partition("=")[0] not in own),
            *(override.format(teacher=self.beside(str(self.recipe.after))) for override in self.recipe.overrides),
            *(f"name={self.name}", f"seed={self.seed}", f"max_steps={self.steps}", f"val_every={self.steps}"),
            f"hydra.run.dir={self.folder}",
        ]


def recipes(methods: Mapping[str, Any], only: Sequence[str] | None) -> list[Recipe]:
    """Those of a configuration. Raises a `UserError` for an unknown name, or one whose teacher is left out."""
    unknown = sorted(set(only or ()) - set(methods))
    if unknown:
        raise UserError(f"only={unknown[0]}: expected some of {', '.join(methods)}")
    for name in only or ():
        if (teacher := methods[name].get("after")) and teacher not in only:
            raise UserError(f"only={name}: needs {teacher} as its teacher; name it too, before {name}")
    chosen = {name: method for name, method in methods.items() if only is None or name in only}
    return [Recipe(name, m["title"], m["passes"], tuple(m["overrides"]), m.get("after")) for name, m in chosen.items()]


def train(training: Training, common: Sequence[str]) -> None:
    """Run train.py on one core, unless it has been; its costs go to `COST` in its folder once it has ended well."""
    settings = training.overrides(common)
    done = training.folder / COST
    if done.is_file() and json.loads(done.read_text())["overrides"] == settings:
        print(f"{training.name}: trained before", flush=True)
        return
    print(f"{training.name}: {training.steps} steps", flush=True)
    training.folder.mkdir(parents=True, exist_ok=True)
    log = training.folder / "output.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), *settings],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise UserError(f"{training.name}: train.py ended with status {process.returncode}; see {log}")
    cost = {
        "overrides": settings,
        "steps": training.steps,
        "processor_seconds": usage.ru_utime + usage.ru_stime,
        "peak_memory_mb": usage.ru_maxrss / 1024,
    }
    done.write_text(json.dumps(cost, indent=1))
    print(f"{training.name}: {cost['processor_seconds']:.0f} processor s", flush=True)


def train_all(trainings: Sequence[Training], common: Sequence[str], jobs: int) -> None:
    """`train` each, so many at a time, a teacher before its student."""
    started: dict[Path, Future[None]] = {}

    def train_after(training: Training) -> None:
        if training.recipe.after is not None:
            started[training.beside(training.recipe.after)].result()
        train(training, common)

    with ThreadPoolExecutor(jobs) as pool:
        for training in trainings:
            started[training.folder] = pool.submit(train_after, training)
        for future in started.values():
            future.result()


def evaluate(trainings: Sequence[Training], cfg: DictConfig) -> dict[str, Any]:
    """The metrics.json of one evaluation of them all, with their teacher."""
    folder = Path(cfg.work, "evaluation")
    models = ",".join(f"run:{training.folder}" for training in trainings)
    options = [
        f"models=[{models}]",
        "data=noto_emoji",
        "evaluation=quick",
        f"evaluation.num_images={cfg.num_images}",
        f"evaluation.lineup.student_steps={list(cfg.student_steps)}".replace(" ", ""),
        "logger=csv",
        "accelerator=cpu",
        f"devices={cfg.jobs}",
        "evaluation.latency_repeats=1",  # how fast each draws is not asked here
        f"run_dir={folder}",
    ]
    subprocess.run([sys.executable, str(ROOT / "evaluate.py"), *options], check=True)
    return json.loads((folder / "metrics.json").read_text())


def rows(trainings: Sequence[Training], metrics: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A row for each student and number of steps, with the cost of its training; and for each way without one."""
    by_source = {training.name: training for training in trainings}
    found = []
    for model in metrics["models"]:
        measured = {
            "steps": model["steps"],
            **{
                key: model[key]
                for key in ("network_evaluations", "n_images", "fid", "cmmd", "clip_score", "recall", "images")
            },
        }
        if model["role"] != "student":
            found.append({"method": model["label"], "seed": None, **measured})
            continue
        training = by_source[model["source"]]
        cost = json.loads((training.folder / COST).read_text())
        found.append(
            {
                "method": training.recipe.title,
                "seed": training.seed,
                **measured,
                "distance_to_teacher": model["to_teacher"]["perceptual"],
                "training_steps": cost["steps"],
                "training_seconds": cost["processor_seconds"],
                "training_peak_memory_mb": cost["peak_memory_mb"],
            }
        )
    return found


@hydra.main(config_path="../conf", config_name="methods_table", version_base="1.3")
@report_user_errors
def main(cfg: DictConfig) -> None:
    """Entry point."""
    resolve(cfg, KEYS)
    chosen = recipes(OmegaConf.to_container(cfg.methods), cfg.only)
    trainings = [
        Training(recipe, seed, recipe.steps(cfg.passes), Path(cfg.work, f"{recipe.name}_{seed}").absolute())
        for seed in cfg.seeds
        for recipe in chosen
    ]
    train_all(trainings, cfg.common, cfg.jobs)
    metrics = evaluate(trainings, cfg)
    results = {
        "date": datetime.now(UTC).date().isoformat(),
        "passes": cfg.passes,
        "machine": metrics["machine"],
        "versions": metrics["versions"],
        "features": metrics["features"],
        "rows": rows(trainings, metrics),
    }
    print(methods_page.write(results, Path(cfg.page), Path(cfg.work, "evaluation")))


if __name__ == "__main__":
    main()
