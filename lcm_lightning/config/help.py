"""What ``--help`` says of a command: examples, groups, experiments and keys, with the comments of its configuration."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from lcm_lightning.errors import UserError, no_such_file

COLUMN = 34  # where explanations start
GROUP = re.compile(r"  - (?P<key>\w+): (?P<value>\S+)(?: +# (?P<comment>.*))?")
PARENT = re.compile(r"(?:  - |defaults: \[)(?P<name>\w+)(?:, _self_)?\]?")  # of a file: another of its group
KEY = re.compile(r"(?P<indent> *)(?P<key>\w+):(?: (?P<value>.*?))??(?: +# (?P<comment>.*))?")
# Groups that one command alone has, whose keys belong to what it says of itself; in others `--help GROUP=NAME` does.
OWN_GROUPS = ("cache", "evaluation")

Keys = dict[str, tuple[str, str]]


def help_text(folders: Sequence[Path], name: str, program: str, chosen: Mapping[str, str] | None = None) -> str:
    """How a command is written, five examples, the groups it chooses files of, experiments, and keys with comments.

    Read in the files as they are written: composing them would lose the comments.

    Args:
        folders: where configurations lie; the command's is in the first.
        name: of the command's.
        program: how it was started.
        chosen: files of groups whose keys are asked for, by group.

    Raises:
        UserError: there is no such file.
    """
    lines = (folders[0] / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    start, end = lines.index("defaults:"), lines.index("hydra:")
    usage, *examples = [re.sub(r"^python (-m )?\S+", program, line.removeprefix("# ")) for line in lines[:start]]
    groups = groups_of(folders[0] / f"{name}.yaml")
    parts = [usage, *(["", "examples:", *map(example, examples)] if examples else [])]
    if groups:
        parts += ["", "groups, chosen by group=name, each a folder of conf/:"]
        for group in groups.values():
            names = "listed below" if group["key"] == "experiment" else ", ".join(options(folders, group["key"]))
            explained = f"{group['comment']}: {names}" if group["comment"] else names
            parts.append(entry(f"{group['key']}={group['value']}", explained))
    if "experiment" in groups:
        parts += ["", "experiments:"]
        parts += [entry(*recipe) for recipe in options(folders, "experiment").items()]
    parts += ["", "keys, set by key=value:", *entries("", keys_of(lines[start:end]))]
    for key, option in asked_for(folders, groups, chosen or {}):
        prefix = "" if is_global(group_file(folders, key, option)) else f"{key}."
        parts += ["", f"keys of {key}={option}:", *entries(prefix, file_keys(folders, key, option))]
    if groups:
        parts += ["", f"`{program} --help GROUP=NAME` explains the keys of a file,"]
        parts += ["`--cfg job` in place of --help shows every key as it is chosen."]
    return "\n".join([*parts, "--hydra-help: the flags that Hydra takes, shell completion among them.", ""])


def groups_of(file: Path) -> dict[str, re.Match[str]]:
    """The groups a command's configuration chooses files of, by name: key, usual value and comment of each."""
    lines = file.read_text(encoding="utf-8").splitlines()
    return {found["key"]: found for line in lines[: lines.index("hydra:")] if (found := GROUP.fullmatch(line))}


def example(line: str) -> str:
    """A command, and below it what it does, which two spaces or more divide from it."""
    command, *explained = re.split(r" {2,}", line, maxsplit=1)
    return "\n".join([f"  {command}", *(f"      {text}" for text in explained)])


def options(folders: Iterable[Path], group: str) -> dict[str, str]:
    """The files of a group by name, and the first sentence of what each says of itself."""
    files = {file.stem: file for folder in folders for file in (folder / group).glob("*.yaml")}
    return {name: first_sentence(files[name]) for name in sorted(files)}


def first_sentence(file: Path) -> str:
    """The start of a configuration's first comment."""
    for line in file.read_text(encoding="utf-8").splitlines():
        if line.startswith("# ") and not line.startswith("# @package"):
            return line.removeprefix("# ").partition(". ")[0].rstrip(".")
    return ""


def asked_for(
    folders: Sequence[Path], groups: Mapping[str, re.Match[str]], chosen: Mapping[str, str]
) -> Iterator[tuple[str, str]]:
    """Group and name of files whose keys are shown: those chosen, and of the command's own groups the usual ones."""
    for group, found in groups.items():
        known = options(folders, group)
        option = chosen.get(group, found["value"])
        if group in chosen and option not in known:
            raise UserError(no_such_file(group, option, known))
        if group in chosen or group in OWN_GROUPS:
            yield from ((group, name) for name in ([option] if option in known else known))


def group_file(folders: Sequence[Path], group: str, name: str) -> Path:
    """The first of a group's files of that name."""
    return next(path for folder in folders if (path := folder / group / f"{name}.yaml").is_file())


def is_global(file: Path) -> bool:
    """Whether a file's keys are those at the top, not those of its group."""
    return "# @package _global_" in file.read_text(encoding="utf-8").splitlines()


def file_keys(folders: Sequence[Path], group: str, name: str) -> Keys:
    """The keys of a group's file and of those it is made from."""
    lines = group_file(folders, group, name).read_text(encoding="utf-8").splitlines()
    found: Keys = {}
    for parent in filter(None, map(PARENT.fullmatch, lines)):
        if parent["name"] in options(folders, group):
            found |= file_keys(folders, group, parent["name"])
    for key, (value, comment) in keys_of(lines).items():
        found[key] = (value, comment or found.get(key, ("", ""))[1])
    return found


def keys_of(lines: Iterable[str]) -> Keys:
    """Every key of a configuration's own with its value, if that is not computed, and its comment.

    A section with a comment stands for the keys in it.
    """
    found: Keys = {}
    above: list[tuple[int, str]] = []  # indents and names of the sections around a line
    hidden = -1  # the indent of the section whose keys are not shown; none
    for line in filter(None, map(KEY.fullmatch, lines)):
        indent = len(line["indent"])
        if 0 <= hidden < indent:
            continue
        hidden = indent if line["key"] in ("defaults", "hydra") else -1
        if hidden == indent or line["key"].startswith("_"):
            continue
        above = [section for section in above if section[0] < indent]
        name = ".".join([*(section for _, section in above), line["key"]])
        if line["value"] is None or line["value"] == "":
            if not line["comment"]:
                above.append((indent, line["key"]))
                continue
            hidden = indent
        shown = "..." if line["value"] == "???" else (line["value"] or "").replace(", ", ",")
        found[name] = ("" if "${" in shown else shown, line["comment"] or "")
    return found


def entries(prefix: str, keys: Keys) -> Iterator[str]:
    """An `entry` for each of the keys."""
    for key, (value, comment) in keys.items():
        yield entry(f"{prefix}{key}" + (f"={value}" if value else ""), comment)


def entry(key: str, explained: str) -> str:
    """A key and what it is, in lines as wide as the terminal; below a key that leaves no room beside it."""
    width = max(shutil.get_terminal_size((120, 24)).columns, 60)
    named, indent = f"  {key} ".ljust(COLUMN), " " * COLUMN
    if len(named) > COLUMN and explained:
        below = textwrap.fill(explained, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
        return f"{named.rstrip()}\n{below}"
    whole = named + explained
    return textwrap.fill(whole, width, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False)
