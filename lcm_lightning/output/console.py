"""Tables for people, on a terminal or in a file."""

from __future__ import annotations

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

ANY_WIDTH = 10_000  # columns of a file, so that a row stays a line


def print_table(table: Table) -> None:
    """Print a table in the terminal's width, and one in a file as wide as it is; no value is cut."""
    width = None if Console().is_terminal else ANY_WIDTH
    console = Console(markup=False, highlight=False, width=width)
    if table.title is not None:  # above a table rich would break it at the table's width
        console.print(table.title, soft_wrap=True)
        table.title = None
    for column in table.columns:
        column.overflow = "fold"
    console.print(table)


def plain_table(*headings: str, title: str | None = None, show_header: bool = True) -> Table:
    """A table without lines but one below its headings."""
    return Table(*headings, title=title, box=SIMPLE_HEAD, show_header=show_header)
