"""The rooms of docs/architecture.md, and which may use which."""

from __future__ import annotations

import ast
import re
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "lcm_lightning"
USES = {
    "errors": set(),
    "hub": set(),
    "output": set(),
    "diffusion": set(),
    "data": {"hub", "output"},
    "models": {"diffusion", "hub", "output"},
    "methods": {"diffusion", "models"},
    "runs": {"methods", "models", "output"},
    "exports": {"models", "output"},
    "tracking": {"data", "output"},
    "evaluation": {"data", "hub", "models", "output", "tracking"},
    "sharing": {"data", "evaluation", "hub", "models", "output", "runs"},
    "callbacks": {"data", "evaluation", "exports", "methods", "models", "output", "runs", "sharing", "tracking"},
    "toy": {"data", "diffusion", "methods", "models"},
    "config": {"data", "evaluation", "hub", "methods", "models", "output", "runs", "tracking"},
    "prepare": {"config", "data", "methods", "models", "output", "tracking"},
    "app": {"config", "evaluation", "methods", "models", "output", "runs"},
    "train": {"callbacks", "config", "output", "runs"},
    "evaluate": {"config", "evaluation", "runs", "sharing", "tracking"},
    "export": {"config", "exports", "models", "sharing"},
    "generate": {"config", "data", "methods", "models", "output"},
    "inspect": {"models", "output", "runs"},
    "summarize": {"output", "runs"},
}


def imports(file: Path) -> set[str]:
    """Modules of the package that a file imports, anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lcm_lightning"):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in names if module_file(name)} or {node.module}
    return found - {"lcm_lightning"}


def module_file(name: str) -> Path | None:
    place = PACKAGE.parent.joinpath(*name.split("."))
    return next((file for file in (place.with_suffix(".py"), place / "__init__.py") if file.is_file()), None)


MODULES = {
    ".".join(("lcm_lightning", *file.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): file
    for file in PACKAGE.rglob("*.py")
}


def room(module: str) -> str:
    return module.split(".")[1]


def test_no_module_is_part_of_a_circle():
    graph = {module: imports(file) for module, file in MODULES.items()}
    assert len(list(TopologicalSorter(graph).static_order())) >= len(MODULES)  # raises CycleError


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"lcm_lightning"}))
def test_a_room_uses_those_below_it(module: str):
    used = {room(other) for other in imports(MODULES[module])} - {room(module), "errors"}
    assert used <= USES[room(module)]


def test_every_room_and_file_at_the_top_is_explained():
    page = (PACKAGE.parent / "docs" / "architecture.md").read_text()
    at_the_top = {path.name for path in PACKAGE.iterdir() if path.suffix in (".py", ".pyi")} - {"__init__.py"}
    rooms = {f"{path.name}/" for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert [name for name in at_the_top | rooms if name not in page] == []
    assert {room(module) for module in MODULES if module != "lcm_lightning"} == set(USES)


def test_nothing_outside_the_methods_names_one():
    named = re.compile(
        r"methods\.lcm_lora\b|methods\.lora\b|LcmLora|LoraFinetuning|[\"']lcm[\"']|[\"']finetuned[\"'] *[,\]]"
    )
    allowed = {PACKAGE / "evaluation" / "contenders.py": "a role", PACKAGE / "models" / "kinds.py": "a role"}
    naming = {
        file.relative_to(PACKAGE).as_posix(): named.findall(code(file))
        for file in MODULES.values()
        if file.parent.name != "methods" and file not in allowed and named.search(code(file))
    }
    assert naming == {}


def code(file: Path) -> str:
    """A file without its docstrings and comments."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def test_no_two_files_of_the_package_share_a_name_but_for_what_prepare_and_export_are_about():
    names = [file.name for file in MODULES.values() if file.name not in ("__init__.py", "__main__.py")]
    assert {name for name in names if names.count(name) > 1} == {"images.py", "latents.py", "export.py"}


def test_every_file_that_the_pages_name_is_there():
    root = PACKAGE.parent
    pages = [root / "README.md", root / "NOTICE", *(root / "docs").rglob("*.md")]
    named = re.compile(r"(?:lcm_lightning|tests|scripts|benchmarks)/[\w/]+\.(?:py|yaml)")
    assert [name for page in pages for name in named.findall(page.read_text()) if not (root / name).is_file()] == []
