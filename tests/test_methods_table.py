"""``make methods-table`` counts right what a step costs, and says what was measured."""

from __future__ import annotations

import json
import time
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf
from PIL import Image

from benchmarks import methods, methods_page
from benchmarks.embedded import Run
from benchmarks.methods import Recipe, Training, recipes
from helpers.adapters import random_batch
from helpers.commands import ROOT
from helpers.pipelines import build_tiny_pipeline, save_full_lcm
from lcm_lightning.config.checks import resolve
from lcm_lightning.config.instantiate import build_module
from lcm_lightning.errors import UserError
from lcm_lightning.train import TRAIN_KEYS

TABLE = OmegaConf.load(ROOT / "conf" / "methods_table.yaml")
RECIPES = recipes(OmegaConf.to_container(TABLE.methods), None)
SIZE, ROUNDS = 2, 8


def composed(training: Training, *more: str) -> DictConfig:
    """The configuration of a training."""
    GlobalHydra.instance().clear()
    with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        overrides = [o for o in training.overrides(TABLE.common) if not o.startswith("hydra.")]
        cfg = hydra.compose("train", [*overrides, "run_dir=run", *more])
    resolve(cfg, TRAIN_KEYS)
    return cfg


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.name)
def test_a_step_takes_as_many_passes_as_the_table_says(
    recipe: Recipe, pipeline_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    training = Training(recipe, 1, 1, tmp_path / recipe.name)
    if recipe.after is not None:
        save_full_lcm(build_tiny_pipeline(), training.beside(recipe.after))
    module = build_module(composed(training, f"model.path={pipeline_folder}", "data.resolution=32"), "32-true")
    begun, ended = [], []
    for unet in {module.model.unet, *module.model.variants.values()}:
        unet.conv_in.register_forward_hook(lambda *call: begun.append(len(call[2])))
        unet.conv_out.register_forward_hook(lambda *call: ended.append(len(call[2])))
    monkeypatch.setattr(module, "log", lambda *_, **__: None)
    for step in range(ROUNDS):
        monkeypatch.setattr(type(module), "trainer", SimpleNamespace(global_step=step, strategy=None))
        module.training_step(random_batch(step, SIZE), step)
    whole, encoders = Fraction(sum(ended), SIZE * ROUNDS), Fraction(sum(begun) - sum(ended), SIZE * ROUNDS)
    assert whole + encoders / 2 == Fraction(recipe.passes)


def test_a_recipe_s_own_experiment_takes_the_place_of_the_common_one(tmp_path: Path):
    training = Training(Recipe("dmd2", "DMD2", 4, ("experiment=other", "seed=7")), 3, 5, tmp_path)
    overrides = training.overrides(["experiment=common", "data=a"])
    assert overrides[:2] == ["data=a", "experiment=other"] and overrides.count("seed=3") == 1


def test_the_same_passes_buy_more_of_the_cheaper_steps():
    assert [Recipe("", "", passes, ()).steps(1600) for passes in (4, 2, 6.5)] == [400, 800, 246]


def test_an_unknown_method_is_answered_with_those_there_are():
    with pytest.raises(UserError, match=r"^only=nonesuch: expected some of .*lcm_lora"):
        recipes(OmegaConf.to_container(TABLE.methods), ["nonesuch"])


def test_a_student_is_not_trained_without_its_teacher():
    with pytest.raises(UserError, match=r"^only=kd_lora: needs lcm as its teacher"):
        recipes(OmegaConf.to_container(TABLE.methods), ["kd_lora"])


def test_a_teacher_is_trained_before_its_student(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    done: list[str] = []

    def train(run: Run) -> None:
        time.sleep(0.2 if run.name.startswith("first") else 0.0)
        done.append(run.name)

    monkeypatch.setattr(methods, "train", train)
    pair = (Recipe("first", "", 4, ()), Recipe("second", "", 2, ("a={teacher}",), "first"))
    trainings = [Training(recipe, seed, 1, tmp_path / f"{recipe.name}_{seed}") for seed in (1, 2) for recipe in pair]
    methods.train_all(trainings, [], jobs=2)
    assert sorted(done) == ["first_1", "first_2", "second_1", "second_2"]
    assert all(done.index(f"first_{seed}") < done.index(f"second_{seed}") for seed in (1, 2))
    assert f"a={tmp_path / 'first_2'}" in trainings[3].overrides([])


def test_every_key_of_the_configuration_is_listed_once():
    assert sorted(methods.KEYS) == sorted(set(TABLE) - {"defaults", "hydra"})


def estimate(value: float) -> dict[str, float]:
    return {"value": value, "low": value - 1, "high": value + 1}


def row(method: str, seed: int | None, steps: int, fid: float) -> dict[str, Any]:
    measured = {"fid": estimate(fid), **{key: estimate(0.5) for key in ("cmmd", "clip_score", "recall")}}
    cost = {"training_steps": 400, "training_seconds": 100.0 * (seed or 0), "training_peak_memory_mb": 900.0}
    student = {} if seed is None else {"distance_to_teacher": estimate(0.25), **cost}
    return {"method": method, "seed": seed, "steps": steps, "n_images": 6, "images": "images", **measured, **student}


def test_the_page_has_the_best_first_and_can_be_written_again(tmp_path: Path):
    (tmp_path / "images").mkdir()
    for index in range(6):
        Image.new("RGB", (8, 8)).save(tmp_path / "images" / f"{index:06d}.png")
    students = [row(name, seed, 1, fid + seed) for name, fid in (("worse", 30), ("better", 10)) for seed in (2, 1)]
    results = {
        "date": "2026-01-01",
        "machine": {"gpu": None, "cpu": "some"},
        "versions": {"torch": "2"},
        "features": "clip",
        "rows": [row("base, DDIM 50 steps", None, 50, 20.0), *students],
    }
    page = tmp_path / "page.md"
    for _ in range(2):
        methods_page.write(results, page, tmp_path)
    text = page.read_text()
    order = [line.split(" | ")[0] for line in text.split("### 1 step")[1].splitlines() if line.startswith("| ")]
    assert order[2:5] == ["| better", "| base, DDIM 50 steps", "| worse"]
    assert "| better | 11.0 / 12.0 [10.0, 12.0] |" in text and "| worse | 400 | 150 | 900 |" in text
    assert json.loads(page.with_suffix(".json").read_text()) == results
    for picture in (page.with_suffix(".png"), tmp_path / "page_pictures.png"):
        assert Image.open(picture).width > 300
