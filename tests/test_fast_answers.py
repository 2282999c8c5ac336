"""What needs no model is answered before anything is imported that takes seconds: help, a configuration, a refusal."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import pytest
from omegaconf import OmegaConf

from helpers.commands import in_process
from lcm_lightning.config.entry import configurations, with_absolute_config_path
from lcm_lightning.config.help import help_text
from lcm_lightning.config.signatures import parameters
from lcm_lightning.errors import UserError
from lcm_lightning.train import TRAIN_KEYS

HERE = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent), "OMP_NUM_THREADS": "1"}
SLOW = {"torch", "lightning", "torchmetrics", "diffusers", "transformers", "peft", "wandb", "matplotlib", "scipy"}
PROBE = """
import importlib, sys
try:
    importlib.import_module(sys.argv.pop(1)).main()
finally:
    print("imported:", *{name.partition(".")[0] for name in sys.modules})
"""
COMMANDS = {
    "lcm_lightning.train": "trainer=cpu",
    "lcm_lightning.evaluate": "model=tiny data=twemoji",
    "lcm_lightning.generate": "model=tiny prompt=a",
    "lcm_lightning.export": "model=tiny student=true format=kohya",
    "lcm_lightning.prepare.commands": "data.source=photos",
    "lcm_lightning.app.command": "model=tiny",
}
Imports = Callable[..., tuple[int, set[str]]]


@pytest.fixture
def imports(tmp_path: Path) -> Imports:
    """The status a command ends with, and which packages of `SLOW` it has imported by then."""

    def run(module: str, *options: str) -> tuple[int, set[str]]:
        command = [sys.executable, "-c", PROBE, module, *options]
        done = subprocess.run(command, cwd=tmp_path, env=HERE, capture_output=True, text=True, check=False)
        return done.returncode, SLOW & set(done.stdout[done.stdout.rindex("imported:") :].split())

    return run


@pytest.mark.parametrize("option", ["--help", "--cfg job"])
@pytest.mark.parametrize("module", COMMANDS)
def test_help_and_configuration_are_shown_at_once(imports: Imports, module: str, option: str):
    assert imports(module, *option.split(), *COMMANDS[module].split()) == (0, set())


@pytest.mark.parametrize("typed", ["-m hydra/launcher=submitit_local", "hydra.run.dir=here", "method.lora.rank=8"])
def test_help_takes_what_a_command_may_be_typed_with(capsys: pytest.CaptureFixture[str], typed: str):
    in_process("train", "--help", *typed.split())
    assert "examples:" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["train", "evaluate", "generate", "export", "prepare", "app"])
def test_help_explains_every_key_at_the_top_and_every_group(name: str):
    shown = help_text([configurations()], name, "lcm-command")
    assert shown.startswith("lcm-command ")
    written = OmegaConf.load(configurations() / f"{name}.yaml")
    groups = [key for part in written.defaults if part != "_self_" for key in part if " " not in key]
    keys = [key for key in written if key not in ("defaults", "hydra", "prepare")]
    keys += [f"prepare.{key}" for key in written.get("prepare", ())]
    for key in groups + keys:
        assert re.search(rf"^  {re.escape(key)}(=\S*)?\s+\w.*", shown, re.MULTILINE), key
    for key in groups:
        for option in (configurations() / key).glob("*.yaml"):
            assert re.search(rf"\b{option.stem}\b", shown)


@pytest.mark.parametrize("name", ["train", "evaluate", "generate", "export", "prepare", "app"])
def test_help_shows_five_commands_that_can_be_typed_each_with_what_it_does(name: str):
    shown = help_text([configurations()], name, "lcm-command")
    examples = re.findall(r"^  (lcm-command \S.*)\n      (\S.*)$", shown, re.MULTILINE)
    assert len(examples) == 5
    for typed, _ in examples:
        assert all("=" in word or word == "-m" for word in shlex.split(typed)[1:]), typed


def test_help_says_of_every_experiment_what_it_does():
    shown = help_text([configurations()], "train", "lcm-command").partition("\nexperiments:\n")[2]
    for file in (configurations() / "experiment").glob("*.yaml"):
        assert re.search(rf"^  {file.stem} +[A-Z][\w-]+ ", shown, re.MULTILINE), file.stem


def test_help_fits_the_terminal(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "90")
    for name in ("train", "evaluate", "generate", "export", "prepare", "app"):
        body = help_text([configurations()], name, "lcm-command").partition("\ngroups, ")[2]
        assert max(map(len, body.splitlines())) <= 90


def test_help_of_prepare_and_evaluate_has_the_keys_of_the_groups_that_they_alone_have():
    for name, group in (("prepare", "cache"), ("evaluate", "evaluation")):
        shown = help_text([configurations()], name, "lcm-command")
        for option in ("latents", "teacher") if group == "cache" else ("standard",):
            written = OmegaConf.to_container(OmegaConf.load(configurations() / group / f"{option}.yaml"))
            part = shown.partition(f"\nkeys of {group}={option}:\n")[2]
            for key, value in written.items():
                assert isinstance(value, dict) or key == "_target_" or f"\n  {group}.{key}" in f"\n{part}", key


def test_help_of_a_file_has_its_keys_and_those_it_took_over():
    shown = help_text([configurations()], "train", "lcm-command", {"data": "twemoji", "method": "pcm_lora"})
    assert re.search(
        r"^  data\.flip_probability=0\.0 +letters, arrows and clocks have a direction$", shown, re.MULTILINE
    )
    assert "\n  data.batch_size=32\n" in shown and "\n  data.shuffle_buffer=1000\n" in shown
    assert re.search(r"^  method\.distillation\.solver_steps=1\s+in each of the num_ode_steps$", shown, re.MULTILINE)
    with pytest.raises(UserError, match="method=nonesuch: there is no such file in conf/method; there are dmd2_lora"):
        help_text([configurations()], "train", "lcm-command", {"method": "nonesuch"})


@pytest.mark.parametrize("group", ["experiment", "debug", "hparams_search"])
def test_help_of_a_recipe_has_the_keys_as_they_are_typed(group: str):
    for file in (configurations() / group).glob("*.yaml"):
        shown = help_text([configurations()], "train", "lcm-command", {group: file.stem})
        keys = re.findall(r"^  ([\w.]+)", shown.partition(f"\nkeys of {group}={file.stem}:\n")[2], re.MULTILINE)
        assert keys and {key.partition(".")[0] for key in keys} <= {*TRAIN_KEYS}, file.stem


@pytest.mark.parametrize("module", COMMANDS)
def test_a_mistyped_key_is_refused_at_once(imports: Imports, module: str):
    assert imports(module, *COMMANDS[module].split(), "sead=1") == (2, set())


@pytest.mark.parametrize(
    ("module", "option"),
    [
        *(
            ("lcm_lightning.train", option)
            for option in ("+trainer.max_step=1", "data.batch_size=abc", "optimizer.lr=-1")
        ),
        ("lcm_lightning.train", "+trainer.max_step=1"),
        ("lcm_lightning.train", "data.batch_size=abc"),
        ("lcm_lightning.train", "optimizer.lr=-1"),
        ("lcm_lightning.train", "method.lora.rank=0"),
        ("lcm_lightning.train", "+callbacks.samples.foo=1"),
        ("lcm_lightning.evaluate", "evaluation.num_images=all"),
        ("lcm_lightning.evaluate", "devices=two"),
        ("lcm_lightning.generate", "steps=0"),
        ("lcm_lightning.generate", "model.unet_init=half"),
        ("lcm_lightning.export", "format=kohia"),
        ("lcm_lightning.export", "overwrite=maybe"),
        ("lcm_lightning.prepare.commands", "prepare.quality=101"),
        ("lcm_lightning.app.command", "port=0"),
        ("lcm_lightning.app.command", "kept_models=0"),
    ],
)
def test_a_bad_value_is_refused_at_once(imports: Imports, module: str, option: str):
    assert imports(module, *COMMANDS[module].split(), option) == (2, set())


@pytest.mark.parametrize("module", ["lcm_lightning.evaluate", "lcm_lightning.generate", "lcm_lightning.export"])
def test_a_run_that_is_not_there_is_missed_before_diffusers_and_lightning_are_imported(imports: Imports, module: str):
    options = {"lcm_lightning.generate": ["prompt=a"], "lcm_lightning.export": ["format=kohya"]}.get(module, [])
    status, imported = imports(module, "run=nowhere", *options)
    assert status == 2 and imported <= {"torch"}


@pytest.mark.slow
def test_drawing_imports_nothing_that_trains_or_measures(imports: Imports):
    options = ("model=tiny", "prompt=heart", "steps=1", "num_images=1", "accelerator=cpu")
    status, imported = imports("lcm_lightning.generate", *options)
    assert status == 0 and not imported & {"lightning", "torchmetrics", "wandb", "matplotlib"}


MODULE = """
from __future__ import annotations
import lightning as L
from typing import TYPE_CHECKING, Literal
from dataclasses import dataclass
if TYPE_CHECKING:
    from pathlib import Path
Unit = Literal["step", "epoch"]
raise SystemExit("this module was imported")

@dataclass
class Plain:
    size: int
    unit: Unit = "step"

class Parent(L.Callback):
    def __init__(self, folder: Path | None, *, module: L.LightningModule, **kwargs): ...

class Child(Parent):
    def __init__(self, every: "int", **parent): ...

def function(a: float, *rest: int, b: list[str]): ...
"""


def test_signatures_are_read_without_running_their_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").write_text("from .own import Child as Renamed, function, Plain")
    (tmp_path / "mine" / "own.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))

    def taken(name: str) -> tuple[dict[str, object], bool]:
        found = parameters(f"mine.{name}")
        return {parameter: found.hint(parameter) for parameter in found.types}, found.open

    assert taken("function") == ({"a": float, "b": list[str]}, False)
    assert taken("Plain") == ({"size": int, "unit": Literal["step", "epoch"]}, False)
    child, passes_others = taken("Renamed")
    assert list(child) == ["every", "folder", "module"] and passes_others
    assert (child["every"], child["folder"]) == (int, Path | None)
    assert parameters("mine.own.nothing") is None and parameters("nowhere.at.all") is None


def test_a_relative_config_path_is_that_of_the_working_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.chdir(tmp_path)
    for option in ("--config-path", "-cp"):
        absolute = with_absolute_config_path([f"{option}=conf", "seed=1"])
        assert absolute == [f"{option}={tmp_path}/conf", "seed=1"]
    assert with_absolute_config_path(["-cp", "conf"]) == ["-cp", f"{tmp_path}/conf"]
    assert with_absolute_config_path(["--config-path=pkg://a.b"]) == ["--config-path=pkg://a.b"]
