"""What every command begins with: where its configurations lie, and what it says of mistakes."""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import ParamSpec, TypeVar

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.config_search_path import ConfigSearchPath
from hydra.core.plugins import Plugins
from hydra.plugins.search_path_plugin import SearchPathPlugin
from omegaconf import DictConfig

from lcm_lightning.config.help import groups_of, help_text, keys_of, options
from lcm_lightning.config.resolvers import PACKAGE, register_resolvers
from lcm_lightning.errors import (
    closest,
    fail,
    no_such_file,
    program,
    report_configuration_errors,
    report_user_errors,
)
from lcm_lightning.output.streams import lasting_output

P = ParamSpec("P")
R = TypeVar("R")


def configurations() -> Path:
    """The folder of the configurations that ship: `conf/` of a clone, or inside an installed package."""
    installed = PACKAGE / "conf"
    return installed if installed.is_dir() else PACKAGE.parent / "conf"


class ConfigurationsHere(SearchPathPlugin):
    """Finds configurations of one's own in the folder `conf/` where a command is started, after those that ship."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Add the folder."""
        here = Path.cwd() / "conf"
        if here.is_dir() and not here.samefile(configurations()):
            search_path.append(provider="working-folder", path=f"file://{here}")


def command(config_name: str) -> Callable[[Callable[P, R]], Callable[[], R | None]]:
    """Decorate the main function of a program with Hydra's command line, composed from `config_name`.

    What is wrong with the command ends it with one message and status 2; `help_text` is what it says of itself.
    """
    register_resolvers()

    def decorate(task: Callable[P, R]) -> Callable[[], R | None]:
        composed = hydra.main(version_base="1.3", config_path=str(configurations()), config_name=config_name)

        def answer(*config: DictConfig) -> R | None:
            if {"--help", "-h"}.isdisjoint(sys.argv[1:]):
                return started(*config)
            refuse_topics(sys.argv[1:], config_name)
            asked = dict(argument.split("=", 1) for argument in sys.argv[1:] if "=" in argument)
            print(help_text([configurations(), Path.cwd() / "conf"], config_name, program(), asked), end="")
            return None

        started = composed(report_user_errors(task))
        main = report_configuration_errors(answer)

        @functools.wraps(task)
        @lasting_output()
        def run(*config: DictConfig) -> R | None:
            Plugins.instance().register(ConfigurationsHere)  # not on import: another program may compose its own
            refuse_flags(sys.argv[1:])
            refuse_numbers(sys.argv[1:])
            refuse_words(sys.argv[1:], config_name)
            sys.argv[1:] = with_absolute_config_path(sys.argv[1:])
            return main(*config)

        return run

    return decorate


def refuse_flags(arguments: Sequence[str]) -> None:
    """End the program where a setting is written as a flag; Hydra takes --experiment for its --experimental-rerun."""
    flags = get_args_parser()._option_string_actions
    for place, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag.startswith("-") and flag.strip("-") and flag not in flags:
            following = next((text for text in arguments[place + 1 :][:1] if not text.startswith("-")), "...")
            setting = f"{flag.strip('-').replace('-', '_')}={value if equals else following}"
            fail(f"{argument}: settings are written without dashes; try {setting}")


def refuse_words(arguments: Sequence[str], config_name: str) -> None:
    """End the program where a value has no key, or a word names a group of the command's or a file of one."""
    folders = [configurations(), Path.cwd() / "conf"]
    files = {group: options(folders, group) for group in groups_of(configurations() / f"{config_name}.yaml")}
    for before, argument in with_the_one_before(arguments):
        if re.fullmatch(r"[+~]*(@[^=]*)?=.*|[+~]+", argument) and (not before or "=" in before):
            fail(f"{argument}: names no key; settings are written key=value, such as seed=1")
        if before and before.partition("=")[0] not in files:  # it may be of a text that the shell has cut
            continue
        if files.get(argument):
            fail(f"{argument}: which one? {argument}=NAME chooses a file; there are {', '.join(files[argument])}")
        if meant := [f"{group}={argument}" for group, names in files.items() if argument in names]:
            fail(f"{argument}: expected key=value; did you mean {' or '.join(meant)}?")


def refuse_topics(arguments: Sequence[str], config_name: str) -> None:
    """End the program where `--help` is asked for what it has no words on; of a command's own settings it says all."""
    file = configurations() / f"{config_name}.yaml"
    groups = groups_of(file)
    keys = {key.partition(".")[0] for key in keys_of(file.read_text(encoding="utf-8").splitlines())}
    ask = f"`{program()} --help` alone says all"
    if groups:
        ask += f", --help GROUP=NAME the keys of a file; groups are {', '.join(groups)}"
    for _, argument in with_the_one_before(arguments):
        key, equals, _ = argument.lstrip("+~").partition("=")
        if not equals:
            fail(f"{argument}: --help has no such topic; {ask}")
        if (top := re.split(r"[./]", key)[0]) not in {*groups, *keys, "hydra"}:
            fail(f"{argument}: there is no such key; {closest(top, [*groups, *keys])}{ask}")


def with_the_one_before(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each argument that is no flag and no flag's value, after the one before it, or "" where that is one."""
    flags = get_args_parser()._option_string_actions
    before = ""
    for place, argument in enumerate(arguments):
        of_flag = place and arguments[place - 1] in flags and flags[arguments[place - 1]].nargs != 0
        if of_flag or argument.startswith("-"):
            before = ""
        else:
            yield before, argument
            before = argument


def refuse_numbers(arguments: Sequence[str]) -> None:
    """End the program where a number stands for a file of a config group; Hydra's own refusal does not say which."""
    for argument in arguments:
        key = argument.lstrip("+").partition("=")[0]
        options = sorted(file.stem for file in (configurations() / key).glob("*.yaml")) if key else []
        if options and re.fullmatch(r"[\d.]+|true|false", argument.partition("=")[2], re.IGNORECASE):
            fail(no_such_file(key, argument.partition("=")[2], options))


def with_absolute_config_path(arguments: Sequence[str]) -> list[str]:
    """Arguments whose --config-path, which Hydra takes from where the task's code lies, is the working folder's."""
    found = list(arguments)
    for place, argument in enumerate(arguments):
        option, equals, path = argument.partition("=")
        if option in ("--config-path", "-cp"):
            if not equals and place + 1 < len(found):
                found[place + 1] = str(Path(found[place + 1]).absolute())
            elif equals and "://" not in path:
                found[place] = f"{option}={Path(path).absolute()}"
    return found
