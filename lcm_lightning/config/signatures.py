"""What classes and functions take, read in their source: importing Lightning and diffusers takes ten seconds."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec, resolve_name
from pathlib import Path
from pkgutil import resolve_name as import_name
from typing import Any, TypeAlias, cast

# A class, a function, a type or a value, in the module where it is written.
Place: TypeAlias = "tuple[Module, ast.AST]"


@dataclass(frozen=True)
class Parameters:
    """What a callable takes.

    Attributes:
        types: where the type of each parameter is written, by name; None where it has none.
        open: whether other names pass too.
    """

    types: Mapping[str, Place | None]
    open: bool

    def hint(self, name: str) -> Any:
        """The type of a parameter; `Any` where there is none, or one that only running its module would tell."""
        place = self.types.get(name)
        return Any if place is None else evaluate(*place)


def parameters(target: str) -> Parameters | None:
    """The parameters of a function, or of a class and of the parents to which its `__init__` hands `**kwargs` on.

    None where no source file shows the class or function `target`, such as "package.module.name".
    """
    module, node = find(target) or (None, None)
    if module is None or not isinstance(node, ast.FunctionDef | ast.ClassDef):
        return None
    if isinstance(node, ast.FunctionDef):
        return of_function(module, node)
    types: dict[str, Place | None] = {}
    for own in filter(None, (of_initialiser(*parent) for parent in ancestry(module, node))):
        types |= {name: place for name, place in own.types.items() if name not in types}
        if not own.open:
            return Parameters(types, False)
    return Parameters(types, True)


def of_function(module: Module, function: ast.FunctionDef) -> Parameters:
    """The parameters of one function."""
    taken = (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)
    types = {one.arg: None if one.annotation is None else (module, one.annotation) for one in taken}
    return Parameters(types, function.args.kwarg is not None)


def of_initialiser(module: Module, node: ast.ClassDef) -> Parameters | None:
    """The parameters of a class's own `__init__`, without `self`, or those that a dataclass has by its fields."""
    for part in node.body:
        if isinstance(part, ast.FunctionDef) and part.name == "__init__":
            own = of_function(module, part)
            return Parameters(dict(list(own.types.items())[1:]), own.open)
    if not any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        return None
    fields = [part for part in node.body if isinstance(part, ast.AnnAssign)]
    return Parameters({ast.unparse(field.target): (module, field.annotation) for field in fields}, bool(node.bases))


def ancestry(module: Module, node: ast.ClassDef) -> Iterator[tuple[Module, ast.ClassDef]]:
    """A class and its ancestors, as far as source files show them; one that several parents share comes after them."""
    last_first = {found: place for place, found in reversed(list(depth_first(module, node)))}
    return ((place, found) for found, place in reversed(last_first.items()))


def depth_first(module: Module, node: ast.ClassDef) -> Iterator[tuple[Module, ast.ClassDef]]:
    """A class, then each parent with its own, repeated where several share it."""
    yield module, node
    for base in node.bases:
        parent, parent_node = module.find(ast.unparse(base)) or (None, None)
        if parent is not None and isinstance(parent_node, ast.ClassDef):
            yield from depth_first(parent, parent_node)


@dataclass(frozen=True)
class Module:
    """A module's source; indexed by a name, the type of that name.

    Attributes:
        name: dotted.
        names: what is defined at its top, and where what it imports comes from.
    """

    name: str
    names: Mapping[str, ast.AST | str]

    def find(self, dotted: str) -> Place | None:
        """Where what is called `dotted` here is written, here or in the module it is imported from."""
        name, _, rest = dotted.partition(".")
        found = self.names.get(name)
        if isinstance(found, str):
            return None if found == f"{self.name}.{name}" else find(".".join(filter(None, (found, rest))))
        return None if found is None or rest else (self, found)

    def __getitem__(self, name: str) -> Any:
        found = self.names[name]
        if isinstance(found, str) and found.partition(".")[0] in sys.stdlib_module_names:
            return import_name(found)
        module, node = self.find(name) or (None, None)
        if module is None or node is None:
            raise LookupError(name)
        return type(name, (), {}) if isinstance(node, ast.ClassDef) else evaluate(module, node)


def evaluate(module: Module, node: ast.AST) -> Any:
    """A type as it is written in a module; classes that are not Python's own are represented by empty ones."""
    try:
        names = cast(Mapping[str, object], module)  # which asks for no more than items
        hint = eval(ast.unparse(node), {}, names)
        return eval(hint, {}, names) if isinstance(hint, str) else hint
    except Exception:  # of what is not there before the module has run
        return Any


def find(target: str) -> Place | None:
    """Where what is called `target` is written, however many modules import it from one another."""
    name, _, last = target.rpartition(".")
    file = source_file(name)
    return None if file is None else read(name, file).find(last)


def source_file(name: str) -> Path | None:
    """The file of a module, found without importing the packages it lies in."""
    top, *parts = name.split(".")
    try:
        spec = find_spec(top)
    except ValueError:  # no name of a module, or one that was never imported from a file
        return None
    if spec is None:
        return None
    if not parts and not spec.submodule_search_locations:
        return Path(spec.origin) if spec.has_location and spec.origin and spec.origin.endswith(".py") else None
    places = [Path(folder, *parts) for folder in spec.submodule_search_locations or ()]
    files = [file for place in places for file in (place / "__init__.py", place.with_name(f"{place.name}.py"))]
    return next((file for file in files if file.is_file()), None)


@cache
def read(name: str, file: Path) -> Module:
    """The module called `name`, from its file."""
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    names: dict[str, ast.AST | str] = {}
    for node in at_the_top(ast.parse(file.read_bytes()).body):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names[node.name] = node
        elif isinstance(node, ast.Import):
            names |= {one.asname or one.name.partition(".")[0]: one.name for one in node.names}
        elif isinstance(node, ast.ImportFrom) and package:
            origin = resolve_name("." * node.level + (node.module or ""), package)
            names |= {one.asname or one.name: f"{origin}.{one.name}" for one in node.names}
        elif isinstance(node, ast.Assign | ast.AnnAssign) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names |= {target.id: node.value for target in targets if isinstance(target, ast.Name)}
    return Module(name, names)


def at_the_top(body: Iterable[ast.stmt]) -> Iterator[ast.stmt]:
    """The statements of a module, those for some versions or for type checkers only among them."""
    for node in body:
        yield node
        if isinstance(node, ast.If | ast.Try):
            handlers = [part for handler in getattr(node, "handlers", ()) for part in handler.body]
            yield from at_the_top([*handlers, *node.orelse, *node.body])
