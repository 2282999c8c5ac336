"""``make methods-table``: every method from one teacher at one price in network evaluations, and what came of it.

Trains on the embedded pipeline, evaluates all students in one report, and writes a page with its figures.
"""

from __future__ import annotations

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
from benchmarks.embedded import ROOT, Run, cost_in, evaluate, train
from lcm_lightning.config.checks import resolve
from lcm_lightning.errors import UserError, report_user_errors

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

    def run(self, common: Sequence[str]) -> Run:
        """Of train.py."""
        return Run(self.name, (sys.executable, str(ROOT / "train.py"), *self.overrides(common)), self.folder)


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


def train_all(trainings: Sequence[Training], common: Sequence[str], jobs: int) -> None:
    """`train` each, so many at a time, a teacher before its student."""
    started: dict[Path, Future[None]] = {}

    def train_after(training: Training) -> None:
        if training.recipe.after is not None:
            started[training.beside(training.recipe.after)].result()
        train(training.run(common))

    with ThreadPoolExecutor(jobs) as pool:
        for training in trainings:
            started[training.folder] = pool.submit(train_after, training)
        for future in started.values():
            future.result()


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
        cost = cost_in(training.folder)
        found.append(
            {
                "method": training.recipe.title,
                "seed": training.seed,
                **measured,
                "distance_to_teacher": model["to_teacher"]["perceptual"],
                "training_steps": training.steps,
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
    metrics = evaluate(
        [f"run:{training.folder}" for training in trainings],
        Path(cfg.work, "evaluation"),
        num_images=cfg.num_images,
        student_steps=cfg.student_steps,
        processes=cfg.jobs,
    )
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
