"""A new method is one file of code and one of configuration: all else learns of it from what it says of itself."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jsonschema
import pytest
from hydra.core.global_hydra import GlobalHydra

import lcm_lightning.evaluate
import lcm_lightning.generate
import lcm_lightning.train
from lcm_lightning import methods
from lcm_lightning.runs.contents import read_manifest

CODE = """
from lcm_lightning.methods.lcm_lora import LcmLoraDistillation
from lcm_lightning.models.kinds import AdapterKind
from lcm_lightning.models.sampling import Sampler

FEWER = Sampler("fewer", "Fewer", "LCMScheduler", {"original_inference_steps": 40}, max_steps=4)


class Copied(LcmLoraDistillation):
    kind = AdapterKind("copied", "copied_lora", "Copied LoRA", "student", FEWER, steps=2, guidance_scale=1.0)
"""
CONFIGURATION = """
defaults:
  - lcm_lora
  - _self_

_target_: lcm_lightning.methods.copied.Copied
"""
SMALL = ("data.num_workers=0", "data.batch_size=2", "data.val_limit=2", "method.lora.rank=4", "max_steps=1")
GRID = ("callbacks.samples.teacher_steps=1", "callbacks.samples.num_prompts=1", "callbacks.samples.student_steps=[1,8]")
EVALUATION = ("evaluation=quick", "logger=csv", "accelerator=cpu", "dtype=float32")
EVALUATION += ("evaluation.num_images=4", "evaluation.bootstrap_samples=2", "evaluation.latency_repeats=1")
EVALUATION += (
    "evaluation.lineup.teacher_steps=1",
    "evaluation.lineup.student_steps=[1,2,8]",
    "~evaluation.lineup.rivals",
)


@pytest.fixture
def new_method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with the method's configuration; its code lies where the other methods' is."""
    (tmp_path / "methods").mkdir()
    (tmp_path / "methods" / "copied.py").write_text(CODE)
    (tmp_path / "conf" / "method").mkdir(parents=True)
    (tmp_path / "conf" / "method" / "copied.yaml").write_text(CONFIGURATION)
    monkeypatch.setattr(methods, "__path__", [*methods.__path__, str(tmp_path / "methods")])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    yield tmp_path
    sys.modules.pop("lcm_lightning.methods.copied", None)


def run(program: str, *options: str) -> None:
    """One of the commands, in this process."""
    GlobalHydra.instance().clear()
    before, sys.argv = sys.argv, [f"{program}.py", *options]
    try:
        getattr(lcm_lightning, program).main()
    finally:
        sys.argv = before
        GlobalHydra.instance().clear()


@pytest.mark.slow
def test_it_trains_draws_and_is_evaluated_under_its_own_name(new_method: Path, capsys: pytest.CaptureFixture[str]):
    chosen = ("experiment=quickstart", "method=copied", "debug=fdr")
    run("train", *chosen, *SMALL, *GRID, "hydra.run.dir=run")
    (adapter,) = read_manifest(new_method / "run")
    assert (adapter.kind.name, adapter.kind.title, adapter.kind.sampler.name) == ("copied", "Copied LoRA", "fewer")
    written = json.loads((new_method / "run" / "lora" / "adapters.json").read_text())["adapters"][0]
    assert written["sampler"]["settings"] == {"original_inference_steps": 40} and written["steps"] == 2
    assert "python -m lcm_lightning.generate run=run" in capsys.readouterr().out

    run("generate", "run=run", "prompt=heart", "num_images=1", "dtype=float32")
    run("generate", "model=tiny", "lora=run/lora/pytorch_lora_weights.safetensors", "lora_role=copied", "prompt=cat")
    assert (new_method / "run" / "generated" / "heart-0.png").is_file()

    run("evaluate", "run=run", *EVALUATION)
    metrics = json.loads((new_method / "run" / "evaluation" / "metrics.json").read_text())
    schema = Path(lcm_lightning.evaluate.__file__).parent / "evaluation" / "metrics.schema.json"
    jsonschema.validate(metrics, json.loads(schema.read_text()))
    models = metrics["models"]
    students = {model["slug"]: model["label"] for model in models if model["role"] == "student"}
    assert students == {"copied_lora_1": "Copied LoRA, 1 step", "copied_lora_2": "Copied LoRA, 2 steps"}
    assert [model["sampler"] for model in models if model["role"] == "student"] == ["fewer", "fewer"]
    assert "Copied LoRA, 2 steps" in (new_method / "run" / "evaluation" / "report.html").read_text()


def test_a_role_that_no_method_has_is_answered_with_those_there_are(
    new_method: Path, capsys: pytest.CaptureFixture[str]
):
    (new_method / "a.safetensors").touch()
    with pytest.raises(SystemExit):
        run("generate", "model=tiny", "lora=a.safetensors", "prompt=cat")
    said = capsys.readouterr().err
    assert "lora_role=lcm (LCM-LoRA)" in said and "lora_role=copied (Copied LoRA)" in said
