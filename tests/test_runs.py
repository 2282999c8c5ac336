"""Reading a run's folder back."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from safetensors.torch import load_file

from lcm_lightning.config.teacher_lora import check_teacher_lcm, check_teacher_lora
from lcm_lightning.errors import UserError
from lcm_lightning.inspect import describe
from lcm_lightning.methods import adapter_kinds
from lcm_lightning.models.adapters import LoraSettings, active_adapters, add_lora, lora_parameters, lora_state_dict
from lcm_lightning.models.condition import Condition
from lcm_lightning.models.lora_files import LORA_FILE, save_lora
from lcm_lightning.models.sampling import Sampler, make_scheduler
from lcm_lightning.models.stable_diffusion import StableDiffusion, load_stable_diffusion
from lcm_lightning.runs.checkpoint_files import find_checkpoint
from lcm_lightning.runs.contents import Adapter, read_config, read_manifest, write_manifest
from lcm_lightning.runs.loading import load_run


def run_folder(folder: Path, pipeline: Path, *adapters: tuple[str, str, str]) -> Path:
    """A run that left (name, file, layers) `adapters` with random weights."""
    for name, file, layers in adapters:
        model = load_stable_diffusion(str(pipeline))
        add_lora(model.unet, name, LoraSettings(4, 4, layers))
        for parameter in lora_parameters(model.unet, name):
            torch.nn.init.normal_(parameter, std=0.1)
        save_lora(lora_state_dict(model.unet, name), folder / "lora" / file)
    write_manifest(folder / "lora", [Adapter(adapter_kinds()[name], file) for name, file, _ in adapters])
    target = "lcm_lightning.models.stable_diffusion.load_stable_diffusion"
    OmegaConf.save({"model": {"_target_": target, "path": str(pipeline)}}, folder / "config.yaml")
    return folder


def output(model: StableDiffusion) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x_t, text = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 16, 32, generator=generator)
    with torch.no_grad():
        return model.denoise(x_t, torch.tensor([500]), Condition(text))


def test_all_adapters_of_a_run_act_and_none_trains(pipeline_folder: Path, tmp_path: Path):
    adapters = (("finetuned", "teacher.safetensors", "attention"), ("lcm", LORA_FILE, "lcm_lora"))
    loaded = load_run(run_folder(tmp_path, pipeline_folder, *adapters))
    as_loaded = output(loaded.model)
    with active_adapters(loaded.model, ("finetuned", "lcm")):
        torch.testing.assert_close(as_loaded, output(loaded.model), rtol=0, atol=0)
    for one in ((), ("finetuned",), ("lcm",)):
        with active_adapters(loaded.model, one):
            assert (output(loaded.model) - as_loaded).abs().max() > 1e-3
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())


def test_a_lora_file_can_be_read_by_whoever_can_read_its_neighbours(tmp_path: Path):
    (tmp_path / "neighbour").write_text("")
    save_lora({"unet.a.lora_A.weight": torch.ones(2, 2)}, tmp_path / LORA_FILE)
    assert (tmp_path / LORA_FILE).stat().st_mode == (tmp_path / "neighbour").stat().st_mode
    assert load_file(tmp_path / LORA_FILE)["unet.a.lora_A.weight"].sum() == 4


@pytest.mark.parametrize(
    "change",
    [
        {"name": "../../elsewhere"},
        {"result": "a/b"},
        {"file": "../pytorch_lora_weights.safetensors"},
        {"file": "/etc/passwd"},
        {"title": 7},
        {"role": "boss"},
        {"steps": "4"},
        {"steps": 10**9},
        {"steps": 51},
        {"guidance_scale": float("inf")},
        {"sampler": {"name": "/tmp/x", "title": "x", "scheduler": "LCMScheduler", "settings": {}, "max_steps": None}},
        {"sampler": {"name": "x", "title": "x", "scheduler": "LCMScheduler", "settings": None, "max_steps": None}},
        {"sampler": None},
    ],
    ids=str,
)
def test_what_a_stranger_s_manifest_says_is_held_to_what_a_method_would_say(tmp_path: Path, change: dict[str, object]):
    write_manifest(tmp_path / "lora", [Adapter(adapter_kinds()["lcm"])])
    file = tmp_path / "lora" / "adapters.json"
    (entry,) = json.loads(file.read_text())["adapters"]
    assert [adapter.kind for adapter in read_manifest(tmp_path)] == [adapter_kinds()["lcm"]]
    file.write_text(json.dumps({"adapters": [entry | change]}))
    with pytest.raises(UserError, match=r"lora/adapters\.json is damaged, or of another version"):
        read_manifest(tmp_path)


def test_a_manifest_whose_sampler_says_no_fewest_steps_is_read(tmp_path: Path):
    write_manifest(tmp_path / "lora", [Adapter(adapter_kinds()["lcm"])])
    file = tmp_path / "lora" / "adapters.json"
    (entry,) = json.loads(file.read_text())["adapters"]
    assert entry["sampler"].pop("min_steps") == 1
    file.write_text(json.dumps({"adapters": [entry]}))
    assert [adapter.kind for adapter in read_manifest(tmp_path)] == [adapter_kinds()["lcm"]]


def test_a_manifest_of_names_alone_is_read_by_what_the_methods_say(tmp_path: Path):
    (tmp_path / "lora").mkdir()
    teacher = {"name": "finetuned", "file": "teacher_lora_weights.safetensors"}
    old = {"adapters": [teacher, {"name": "lcm", "file": LORA_FILE}]}
    (tmp_path / "lora" / "adapters.json").write_text(json.dumps(old))
    assert [adapter.kind for adapter in read_manifest(tmp_path)] == [adapter_kinds()[n] for n in ("finetuned", "lcm")]
    old["adapters"][1]["name"] = "nonesuch"
    (tmp_path / "lora" / "adapters.json").write_text(json.dumps(old))
    with pytest.raises(UserError, match="no method here trains 'nonesuch'"):
        read_manifest(tmp_path)


@pytest.mark.parametrize(
    ("names", "found"),
    [(["lcm"], "LCM-LoRA"), (["finetuned", "tcd"], "TCD-LoRA on fine-tuned"), ([], "no adapter")],
)
def test_a_students_run_is_not_taken_for_a_teacher_s_lora(tmp_path: Path, names: list[str], found: str):
    write_manifest(tmp_path / "lora", [Adapter(adapter_kinds()[name]) for name in names])
    with pytest.raises(UserError, match=rf"^teacher=.*: a run of {found}; give a run of method=lora"):
        check_teacher_lora(str(tmp_path), "teacher")
    write_manifest(tmp_path / "lora", [Adapter(adapter_kinds()["finetuned"])])
    check_teacher_lora(str(tmp_path), "teacher")
    check_teacher_lora("owner/name", "teacher")


def finished(outputs: Path, name: str, kind: str, age: int) -> Path:
    """A run that ended so many seconds ago, without weights: of an adapter, or of a whole UNet."""
    run = outputs / name
    write_manifest(run / ("pipeline" if adapter_kinds()[kind].whole else "lora"), [Adapter(adapter_kinds()[kind])])
    (run / "checkpoints").mkdir()
    (run / "checkpoints" / "last.ckpt").touch()
    (run / "config.yaml").write_text("name: it\n")
    os.utime(run / "config.yaml", (1e9 - age, 1e9 - age))
    return run


@pytest.fixture
def outputs(tmp_path: Path) -> Path:
    """A folder with runs, the newest of a whole UNet, and with one that exported nothing yet and began last."""
    folder = tmp_path / "outputs"
    finished(folder, "lora/1", "finetuned", age=9)
    finished(folder, "lora/2", "finetuned", age=8)
    finished(folder, "sweep/3/0", "lcm", age=7)
    finished(folder, "full/4", "full_lcm", age=6)
    (folder / "lora" / "5").mkdir()
    (folder / "lora" / "5" / "config.yaml").touch()
    return folder


ASKED = {
    "run": lambda place: read_config(place),
    "resume": lambda place: find_checkpoint(str(place), Path()),
    "teacher": lambda place: check_teacher_lora(str(place), "teacher"),
    "lcm": lambda place: check_teacher_lcm(str(place), "lcm"),
}


@pytest.mark.parametrize(
    ("key", "place", "meant"),
    [
        *[("run", place, "full/4") for place in (".", "full", "full/4/checkpoints", "full/4/pipeline/unet")],
        ("run", "lora", "lora/2"),
        ("run", "sweep/3", "sweep/3/0"),
        ("run", "sweep", "sweep/3/0"),
        ("resume", ".", "full/4"),
        *[("resume", f"lora/1/{inside}", "lora/1") for inside in ("lora", "checkpoints")],
        *[("teacher", place, "lora/2") for place in (".", "lora", "lora/2/checkpoints")],
        *[("lcm", place, "full/4") for place in (".", "full", "full/4/checkpoints")],
    ],
)
def test_a_folder_in_a_run_or_of_runs_is_answered_with_the_run_that_is_meant(outputs: Path, key, place, meant):
    with pytest.raises(UserError, match=rf"did you mean {key}={outputs / meant}\?$"):
        ASKED[key](outputs / place)


def test_no_run_is_proposed_where_none_fits(outputs: Path):
    with pytest.raises(UserError, match="give a run folder such as"):
        read_config(outputs / "nowhere")
    check_teacher_lora(str(outputs / "sweep"), "teacher")  # what loads it says what it is
    check_teacher_lcm(str(outputs / "lora"), "lcm")


def test_inspect_proposes_a_run_too(outputs: Path):
    with pytest.raises(UserError, match=rf"did you mean {outputs / 'lora/2'}\?$"):
        next(describe(outputs / "lora"))


def test_a_student_s_folder_of_loras_is_not_taken_for_a_teacher_s(outputs: Path):
    with pytest.raises(UserError, match="a run of LCM-LoRA; give a run of method=lora"):
        check_teacher_lora(str(outputs / "sweep/3/0/lora"), "teacher")
    check_teacher_lora(str(outputs / "lora/1/lora"), "teacher")


@pytest.mark.parametrize("scheduler", ["SchedulerMixin", "StableDiffusionPipeline", "nothing"])
def test_a_sampler_takes_a_scheduler_of_diffusers_and_the_model_s_own_noise(
    tiny_model: StableDiffusion, scheduler: str
):
    config = tiny_model.scheduler_config
    greedy = Sampler("x", "x", "DDIMScheduler", {"num_train_timesteps": 10**9, "beta_end": 0.5})
    assert make_scheduler(greedy, config).config.num_train_timesteps == 1000
    with pytest.raises(UserError, match=f"no scheduler {scheduler}"):
        make_scheduler(Sampler("x", "x", scheduler), config)
