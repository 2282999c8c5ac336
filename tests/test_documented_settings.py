"""Settings that README.md and docs/ name in a sentence or a table, such as `method.w_min=6.5`: each is there."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from markdown_it import MarkdownIt
from omegaconf import OmegaConf

from documented_commands import pages
from helpers.commands import ROOT
from lcm_lightning.config.signatures import parameters

GROUPS = ("model", "method", "optimizer", "data", "trainer", "logger", "callbacks", "evaluation", "cache")
KEY = re.compile(rf"({'|'.join(GROUPS)}|prepare)\.([a-z_]\w*(?:\.[a-z_]\w*)*)(?:=.*)?")
OPEN = "*"  # stands for any key of a section that hands its keys on


def keys_of(section: object) -> Iterator[str]:
    """The dotted keys that a section of a configuration has, or that what it builds takes."""
    if not isinstance(section, dict):
        return
    for name, value in section.items():
        yield str(name)
        yield from (f"{name}.{key}" for key in keys_of(value))
    if taken := parameters(str(section["_target_"])) if "_target_" in section else None:
        yield from (OPEN,) if taken.open else taken.types


@functools.cache
def keys_in(group: str) -> frozenset[str]:
    """Those of all files of a config group; of the experiments' sections and of prepare.yaml too."""
    files = sorted((ROOT / "conf" / group).glob("*.yaml"))
    sections = [OmegaConf.to_container(OmegaConf.load(file)) for file in files]
    tops = [*(ROOT / "conf" / "experiment").glob("*.yaml"), ROOT / "conf" / "prepare.yaml"]
    sections += [OmegaConf.to_container(OmegaConf.load(file)).get(group) for file in tops]
    return frozenset(key for section in sections for key in keys_of(section))


def known(group: str, key: str) -> bool:
    parts = key.split(".")
    above = [".".join(parts[:depth]) for depth in range(len(parts))]
    return key in keys_in(group) or any(f"{place}.{OPEN}".lstrip(".") in keys_in(group) for place in above)


def keys_named(page: Path) -> list[tuple[str, str]]:
    """Group and key of every setting in the inline code of a page, such as `method.w_min=6.5`."""
    inline = [token for token in MarkdownIt().enable("table").parse(page.read_text()) if token.type == "inline"]
    spans = [child.content for token in inline for child in token.children or () if child.type == "code_inline"]
    words = [word for span in spans for word in span.split() if "(" not in word and "/" not in word.partition("=")[0]]
    named = [match.groups() for word in words if not word.endswith(".png") and (match := KEY.fullmatch(word))]
    return [(group, key) for group, key in named if not is_module(group, key)]


def is_module(group: str, key: str) -> bool:
    """Whether `group.key` is a file of the package, or something in it, rather than a setting."""
    return (ROOT / "lcm_lightning" / group / f"{key.partition('.')[0]}.py").is_file()


def test_a_setting_that_is_none_is_known_to_be_none():
    assert known("method", "lora.rank") and known("callbacks", "samples.student_steps") and known("optimizer", "lr")
    assert not known("method", "w_mim") and not known("callbacks", "samples.step") and not known("data", "batchsize")


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_setting_that_a_page_names_is_there(page: Path):
    assert [f"{group}.{key}" for group, key in keys_named(page) if not known(group, key)] == []
