"""What ``--help`` says of a command: its keys with the comments that they have in its configuration."""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path

COLUMN = 34  # where explanations start
GROUP = re.compile(r"  - (?P<key>\w+): (?P<value>\S+)(?: +# (?P<comment>.*))?")
KEY = re.compile(r"(?P<indent> *)(?P<key>\w+):(?: (?P<value>.*?))??(?: +# (?P<comment>.*))?")


def help_text(folders: Sequence[Path], name: str, program: str) -> str:
    """How a command is written, the groups it chooses files of, and its own keys, each with its comment.

    Read in the file as it is written: composing it would lose the comments.

    Args:
        folders: where configurations lie; the command's is in the first.
        name: of the command's.
        program: how it was started.
    """
    lines = (folders[0] / f"{name}.yaml").read_text(encoding="utf-8").splitlines()
    start, end = lines.index("defaults:"), lines.index("hydra:")
    groups = [found for line in lines[start:end] if (found := GROUP.fullmatch(line))]
    parts = [re.sub(r"^python (-m )?\S+", program, line.removeprefix("# ")) for line in lines[:start]]
    if groups:
        parts += ["", "files of conf/, chosen by group=name:"]
        for group in groups:
            names = sorted({file.stem for folder in folders for file in (folder / group["key"]).glob("*.yaml")})
            explained = f"{group['comment']}: {', '.join(names)}" if group["comment"] else ", ".join(names)
            parts.append(entry(f"{group['key']}={group['value']}", explained))
    parts += ["", "keys, set by key=value:", *(entry(key, comment) for key, comment in own_keys(lines[start:end]))]
    parts += ["", f"`{program} --cfg job` shows every key, also of chosen files; conf/GROUP/NAME.yaml explains them."]
    return "\n".join([*parts, "--hydra-help: the flags that Hydra takes.", ""])


def own_keys(lines: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Every key of a configuration's own with its value, if that is not computed, and its comment."""
    section = ""
    for found in filter(None, map(KEY.fullmatch, lines)):
        key, value = found["key"], found["value"]
        if key == "defaults":
            continue
        if not value:
            section = f"{key}."
            continue
        section = section if found["indent"] else ""
        shown = "..." if value == "???" else value
        yield section + key + (f"={shown}" if "${" not in value else ""), found["comment"] or ""


def entry(key: str, explained: str) -> str:
    """A key and what it is, in lines as wide as the terminal."""
    width = max(shutil.get_terminal_size((120, 24)).columns, 60)
    whole = f"  {key} ".ljust(COLUMN) + explained
    return textwrap.fill(whole, width, subsequent_indent=" " * COLUMN, break_on_hyphens=False, break_long_words=False)
