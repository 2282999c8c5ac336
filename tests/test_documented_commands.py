"""Commands and Python that README.md and docs/ show: every key composes, every file and target is there."""

from __future__ import annotations

import ast
import functools
import importlib
import importlib.util
import re
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
    PROJECT,
    SCRIPTS,
    SOURCES,
    Command,
    Configured,
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
KNOWN = re.compile(r"\b(?:resolve|interpolate)\(\w+, (\w+|\([^()]*\))\)")  # what a program takes its keys to be


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


@functools.cache
def known_keys(config: str) -> tuple[str, ...]:
    """The keys at the top that the program of a configuration reads, as it says itself."""
    file = next(SOURCES[module] for module, composed in PROGRAMS.items() if composed == config)
    (keys,) = KNOWN.findall(file.read_text())
    if keys.startswith("("):
        return ast.literal_eval(keys)
    module = ".".join(file.relative_to(ROOT).with_suffix("").parts)
    return getattr(importlib.import_module(module), keys)


def settings_among(arguments: Sequence[str]) -> list[str]:
    """Arguments without options such as `-m` and `--cfg job`."""
    values = {place + 1 for place, text in enumerate(arguments) if text in ("--cfg", "--info", "--package")}
    return [text for place, text in enumerate(arguments) if not text.startswith("-") and place not in values]


def check(config: str, arguments: Sequence[str]) -> None:
    """Compose a configuration as the command does, and check it as far as the command does before any work."""
    overrides = OverridesParser.create().parse_overrides(settings_among(arguments))
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose(config, [one_value(override) for override in overrides], return_hydra_config=True)
    if config in ("train", "prepare"):
        cfg.hydra.runtime.output_dir = "outputs"
    HydraConfig.instance().set_config(cfg)
    with open_dict(cfg):
        del cfg["hydra"]
    interpolate(cfg, known_keys(config))
    if config != "prepare" or cfg.get("cache") is not None:
        check_values(cfg)


def composed(command: Command) -> Iterator[Configured]:
    """The programs with a configuration that a command starts."""
    for program in programs(command):
        found = configured(program)
        if found is not None and "experiment=mine" not in found.arguments:  # which the page has its reader write
            yield found


# Each once, as it is typed, but for those that a page shows to be refused; and one of each program as
# run_documented_commands.py makes it small.
TYPED = {
    (found.config, found.arguments): str(command)
    for command in reversed(COMMANDS)
    if not command.refused
    for found in composed(command)
}
SMALL = {
    found.config: tuple(shrunk(found)[len(found.start) :])
    for command in reversed(COMMANDS)
    for found in composed(command)
    if not command.needs and not command.refused
}
TYPED |= {small: f"small {small[0]}" for small in SMALL.items()}


@pytest.mark.parametrize(("config", "arguments"), TYPED, ids=[said.partition(": ")[0] for said in TYPED.values()])
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
    extras = PROJECT["optional-dependencies"]
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
    typed = {word for command in COMMANDS for word in re.findall(r"^lcm-\w+", command.text)}
    assert "lcm-train" in typed <= set(SCRIPTS)


def test_programs_with_a_configuration_are_known():
    assert {"train", "evaluate", "prepare", "generate", "bench", "methods_table"} <= set(PROGRAMS.values())
    assert all((ROOT / "conf" / f"{config}.yaml").is_file() for config in PROGRAMS.values())


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
