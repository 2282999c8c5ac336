"""The guidance that a model is drawn with where nothing else is asked for: said once, the same everywhere."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from lcm_lightning.app.engine import columns
from lcm_lightning.config.entry import configurations
from lcm_lightning.evaluation.contenders import Lineup
from lcm_lightning.exports.metadata import DIFFUSERS, Described, model_spec
from lcm_lightning.exports.usage import diffusers_folder, diffusers_lora
from lcm_lightning.methods.lcm_lora import LcmLoraDistillation
from lcm_lightning.methods.lora import LoraFinetuning, finetuned_kind
from lcm_lightning.models.adapters import LoraSettings
from lcm_lightning.models.kinds import usual_kind
from lcm_lightning.models.stable_diffusion import StableDiffusion, load_stable_diffusion
from lcm_lightning.runs.contents import write_manifest
from lcm_lightning.runs.loading import load_run

OWN = 3.0


@pytest.fixture(scope="module")
def model(pipeline_folder: Path) -> StableDiffusion:
    return load_stable_diffusion(str(pipeline_folder), guidance_scale=OWN)


def guidances(config: Any, path: str = "") -> dict[str, object]:
    """Every guidance scale in a configuration, by its key."""
    found: dict[str, object] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            found |= guidances(value, f"{path}{key}.")
        elif key == "guidance_scale" and value is not None:
            found[path + key] = value
    return found


def test_no_experiment_repeats_or_contradicts_what_its_model_is_drawn_with():
    experiments = sorted(file.stem for file in (configurations() / "experiment").glob("*.yaml"))
    with initialize_config_dir(str(configurations()), version_base="1.3"):
        composed = [compose("train", overrides=[f"experiment={name}"]) for name in experiments]
        composed += [compose("train", overrides=["model=tiny", "callbacks=student_quality"])]
        composed += [compose("evaluate", overrides=["model=tiny", "evaluation=quick", "data=noto_emoji"])]
    for config in map(partial(OmegaConf.to_container, resolve=False), composed):
        assert isinstance(config, dict)
        embedded = "assets/tiny" in str((config.get("model") or {}).get("path"))
        assert set(guidances(config).values()) <= {2.0 if embedded else 7.5}
        assert guidances(config).keys() <= {"model.guidance_scale"}


def test_what_is_drawn_exported_and_measured_has_the_model_s_guidance(model: StableDiffusion, tmp_path: Path):
    tuned = finetuned_kind(model)
    for kinds in ([], [tuned]):
        assert usual_kind(kinds, model.guidance_scale).guidance_scale == OWN
        assert model_spec(model, kinds, DIFFUSERS, Described(), lora=True)["guidance_scale"] == "3"
        assert "guidance_scale=3)" in diffusers_folder(tmp_path, model, kinds, torch.float32)
        assert "guidance_scale=3)" in diffusers_lora(tmp_path / "a.safetensors", model, kinds)
        assert [c.guidance_scale for c in columns(kinds, guidance_scale=OWN, taught=True)] == [OWN] * (1 + len(kinds))
        asked = {None: OWN, 5.0: 5.0}
        for said, expected in asked.items():
            lineup = Lineup(guidance_scale=said).contenders(kinds, own_guidance=model.guidance_scale)
            assert {contender.guidance_scale for contender in lineup} == {expected}
    student = LcmLoraDistillation.kind
    assert usual_kind([tuned, student], OWN).guidance_scale == 1.0  # which knows its own


def test_a_fine_tuning_records_its_model_s_guidance(pipeline_folder: Path):
    module = LoraFinetuning(
        load_stable_diffusion(str(pipeline_folder), guidance_scale=OWN),
        lora=LoraSettings(rank=4, alpha=4),
        optimizer=partial(torch.optim.SGD, lr=1e-3),
    )
    assert module.kind.guidance_scale == OWN
    setups = module.sampling_setups(teacher_steps=5, student_steps=[4])
    assert [setup.guidance_scale for setup in setups] == [OWN, OWN]
    setups = module.sampling_setups(teacher_steps=5, guidance_scale=5.0, student_steps=[4])
    assert [setup.guidance_scale for setup in setups] == [5.0, 5.0]


@pytest.mark.parametrize(("samples", "expected"), [({"guidance_scale": 2.5}, 2.5), ({"guidance_scale": None}, 7.5)])
def test_a_run_of_former_versions_is_drawn_as_its_grids_were(
    samples: dict[str, float | None], expected: float, pipeline_folder: Path, tmp_path: Path
):
    write_manifest(tmp_path / "lora", [])
    target = "lcm_lightning.models.stable_diffusion.load_stable_diffusion"
    config = {"model": {"_target_": target, "path": str(pipeline_folder)}, "callbacks": {"samples": samples}}
    OmegaConf.save(OmegaConf.create(config), tmp_path / "config.yaml")
    assert load_run(tmp_path).model.guidance_scale == expected
    assert load_run(tmp_path, guidance_scale=OWN).model.guidance_scale == OWN
