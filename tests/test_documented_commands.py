"""Commands and Python that README.md and docs/ show: every key composes, every file and target is there."""

from __future__ import annotations

import importlib
import importlib.util
import re
import tomllib
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from omegaconf import open_dict

from documented_commands import (
    NEEDS,
    PROGRAMS,
    SCRIPTS,
    Command,
    configured,
    documented_commands,
    pages,
    programs,
    shrunk,
)
from helpers.commands import ROOT
from lcm_lightning.config.checks import check_values, interpolate
from lcm_lightning.config.resolvers import register_resolvers
from lcm_lightning.errors import UserError

COMMANDS = [command for page in pages() for command in documented_commands(page)]
KEYS = {
    "train": ("lcm_lightning.train", "TRAIN_KEYS"),
    "evaluate": ("lcm_lightning.evaluate", "EVALUATE_KEYS"),
    "generate": ("lcm_lightning.generate", "GENERATE_KEYS"),
    "bench": ("benchmarks.__main__", "BENCH_KEYS"),
    "methods_table": ("benchmarks.methods", "KEYS"),
}
PREPARE_KEYS = ("data", "prepare", "seed", "model", "method", "cache")


@pytest.fixture
def restored_configuration() -> Iterator[None]:
    """Leaves Hydra's own configuration as it was."""
    register_resolvers()
    before = HydraConfig.instance().cfg
    yield
    HydraConfig.instance().cfg = before


def one_value(override: Override) -> str:
    """An override as typed, or with the first value of those it sweeps over."""
    if not override.is_sweep_override():
        return str(override.input_line)
    value = override.value()
    first = value.start if isinstance(value, IntervalSweep) else next(override.sweep_string_iterator())
    return f"{override.get_key_element()}={first}"


def check(config: str, arguments: Sequence[str]) -> None:
    """Compose a configuration as the command does, and check it as far as the command does before any work."""
    overrides = OverridesParser.create().parse_overrides([text for text in arguments if not text.startswith("-")])
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose(config, [one_value(override) for override in overrides], return_hydra_config=True)
    if config in ("train", "prepare"):
        cfg.hydra.runtime.output_dir = "outputs"
    HydraConfig.instance().set_config(cfg)
    with open_dict(cfg):
        del cfg["hydra"]
    if config in KEYS:
        module, name = KEYS[config]
        interpolate(cfg, getattr(importlib.import_module(module), name))
    else:
        interpolate(cfg, PREPARE_KEYS)
    if config != "prepare" or cfg.get("cache") is not None:
        check_values(cfg)


def checked(command: Command) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The configurations that a command composes, as it is typed and as it is run here, with their overrides."""
    for program in programs(command):
        found = configured(program)
        if found is not None and "experiment=mine" not in found.arguments:  # which the page has its reader write
            yield found.config, found.arguments
            if not command.needs:
                yield found.config, tuple(shrunk(found)[len(found.start) :])


TYPED = {asked: command for command in reversed(COMMANDS) for asked in checked(command)}  # each once


@pytest.mark.parametrize(
    ("config", "arguments"), TYPED, ids=[f"{command.page}:{command.line}" for command in TYPED.values()]
)
def test_every_key_of_a_command_is_one_of_its_configuration(
    config: str, arguments: tuple[str, ...], restored_configuration: None
):
    check(config, arguments)


def test_a_key_that_is_none_is_found(restored_configuration: None):
    with pytest.raises(UserError, match="nothing reads this key"):
        check("train", ["experiment=lcm_flickr8k", "+method.w_mim=3"])


def test_make_is_asked_for_targets_that_it_has():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    asked = {
        word
        for command in COMMANDS
        for program in programs(command)
        if "make" in program
        for word in program[program.index("make") + 1 :]
        if "=" not in word
    }
    assert asked <= targets


def test_files_that_commands_name_are_there():
    named = re.compile(r"(?:^| )((?:tests|scripts|benchmarks)/[\w/]+\.(?:py|sh))")
    files = [(command, name) for command in COMMANDS for name in named.findall(command.text)]
    assert [str(command) for command, name in files if not (ROOT / name).is_file()] == []


def test_modules_that_commands_start_are_there():
    started = re.compile(r"-m ((?:lcm_lightning|benchmarks)[\w.]*)")
    modules = [(command, name) for command in COMMANDS for name in started.findall(command.text)]
    assert [str(command) for command, name in modules if importlib.util.find_spec(name) is None] == []


def test_extras_that_pip_is_asked_for_are_there():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    asked = {
        name
        for command in COMMANDS
        for names in re.findall(r"(?:lightning|\.)\[([\w,-]+)\]", command.text)
        for name in names.split(",")
    }
    assert asked <= set(extras)


def test_what_commands_need_is_said_in_known_words():
    assert {need for command in COMMANDS for need in command.needs} <= set(NEEDS)


def test_installed_commands_are_those_of_the_package():
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    typed = {word for command in COMMANDS for word in re.findall(r"^lcm-\w+", command.text)}
    assert typed <= set(scripts)
    assert {name: SCRIPTS[name] for name in typed} == {
        name: scripts[name].partition(":")[0].removesuffix(".commands") for name in typed
    }
    assert {SCRIPTS[name] for name in typed} - {"lcm_lightning.inspect", "lcm_lightning.summarize"} <= set(PROGRAMS)


def test_python_in_the_pages_is_python():
    snippets = [command for command in COMMANDS if command.code]
    assert snippets
    for command in snippets:
        compile(command.code, f"{command.page}:{command.line}", "exec")


def test_commands_are_told_from_what_they_print(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text(
        'Set `C="a=1 b=2"`.\n\n'
        "    $ python train.py $C c=3 \\\n        d=4    # a comment\n    1000 images in 1 s\n"
        "    python train.py printed=1\n\n"
        "<!-- needs: hours 2 -->\n\n    make quickstart\n    python train.py data=x\n\n"
        "text\n\n    loss = w_t x\n"
    )
    found = documented_commands(page)
    assert [command.text for command in found] == [
        "python train.py $C c=3  d=4",
        "make quickstart",
        "python train.py data=x",
    ]
    assert [command.needs for command in found] == [(), ("hours",), ("hours",)]
    assert [command.line for command in found] == [3, 10, 11]
    assert programs(found[0]) == [["python", "train.py", "a=1", "b=2", "c=3", "d=4"]]


def test_a_command_that_is_answered_with_an_error_is_known(tmp_path: Path):
    page = tmp_path / "page.md"
    page.write_text("    $ python train.py a=1\n    error: a=1: no\n    $ python train.py b=2\n")
    assert [command.refused for command in documented_commands(page)] == [True, False]
