"""What a run is made of, to be read at its start: the files chosen of each group and what the command changed."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

from omegaconf import DictConfig
from rich.console import Console
from rich.text import Text
from rich.tree import Tree

ALWAYS = ("seed", "max_steps", "val_every")


def overview(cfg: DictConfig, choices: Mapping[str, str | None], overrides: Sequence[str]) -> Tree:
    """A tree of the groups that a run has files of, each over the keys of its own that the command line set.

    Args:
        cfg: the resolved configuration.
        choices: the file of each group.
        overrides: of the command line; those of no group stand at the end.
    """
    chosen = {group: choice for group, choice in choices.items() if choice is not None and "/" not in group}
    recipes = [group for group in chosen if group not in cfg]  # experiment, hparams_search: they leave no section
    groups = {group: chosen[group] for group in [*recipes, *map(str, cfg)] if group in chosen}
    tree = Tree(Text(f"{cfg.name}: {cfg.run_dir}"))
    own = {group: [text for text in overrides if text.lstrip("+~").startswith(f"{group}.")] for group in groups}
    for group, choice in groups.items():
        branch = tree.add(Text(f"{group}={choice}"))
        for override in own[group]:
            branch.add(Text(override))
    said = {text for texts in own.values() for text in texts}
    rest = [text for text in overrides if text not in said and text.partition("=")[0].lstrip("+~") not in choices]
    for text in dict.fromkeys([*(f"{key}={cfg[key]}" for key in ALWAYS), *rest]):
        tree.add(Text(text))
    return tree


def as_text(tree: Tree) -> str:
    """The tree in lines of any length: paths stay in one piece, to be copied."""
    file = io.StringIO()
    Console(file=file, width=10_000, color_system=None).print(tree)
    return "\n".join(line.rstrip() for line in file.getvalue().rstrip().splitlines())
