"""Tables of captions as they are found: token files, `captions.txt` and its like, `metadata.csv`, `metadata.jsonl`."""

from __future__ import annotations

import ast
import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lcm_lightning.data.records import IMAGE_SUFFIXES, UNREAD_SUFFIXES, clean_caption
from lcm_lightning.errors import UserError, first_line, short

# Of a quoted caption; so many are behind a quote that is never closed.
MAX_LINES = 200
# Spreadsheets put a byte order mark before the first column's name.
ENCODING = "utf-8-sig"
# What columns of captions are called, alone, in plural or numbered; those of the first name that a table has are taken.
CAPTION_NAMES = ("caption", "text", "prompt", "comment", "sentence", "description")
CAPTION_COLUMN = re.compile(rf"({'|'.join(CAPTION_NAMES)})s?[ _]?(\d*)", re.IGNORECASE)
# A text in quotes, and several as numpy writes them: blanks between them in the place of commas.
QUOTED = r"""(?:'(?:[^'\\\n]|\\.)*'|"(?:[^"\\\n]|\\.)*")"""
NUMPY_LIST = re.compile(rf"\[{QUOTED}(?:\s+{QUOTED})+\]")

Captions = dict[str, list[str]]


@contextmanager
def reading(path: Path, expected: str) -> Iterator[None]:
    """Turn what parsers say of a damaged caption file into a `UserError` that names the file."""
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, csv.Error) as error:
        found = f"no {error}" if isinstance(error, KeyError) else first_line(error)[:60]
        raise UserError(
            f"data.source: {short(path, 100)} cannot be read ({found}); expected {expected}, in UTF-8"
        ) from error


def is_image_name(name: str) -> bool:
    """True for file names with the suffix of an image, be it one that is left out with its reason."""
    stem, _, suffix = name.rpartition("/")[2].rpartition(".")
    return suffix.lower() in (*IMAGE_SUFFIXES, *UNREAD_SUFFIXES) and not stem.startswith(".") and bool(stem)


def read_token_file(path: Path) -> Captions:
    """Captions by image name from lines `name.jpg#0<tab>caption`, in the order of their numbers."""
    numbered: dict[str, list[tuple[int, str]]] = {}
    with reading(path, "lines of name.jpg#0, a tab and a caption"):
        for line in path.read_text(encoding=ENCODING).split("\n"):
            if line.strip():
                identifier, _, caption = line.partition("\t")
                name, _, number = identifier.rpartition("#")
                numbered.setdefault(name, []).append((int(number), caption))
    return {name: [caption for _, caption in sorted(captions)] for name, captions in numbered.items()}


def read_caption_table(path: Path) -> Captions:
    """Captions by image name from Kaggle's tables: `image,caption` or `image_name| comment_number| comment`.

    Also with tabs or semicolons between the columns, and without header: then the first line names an image.
    """
    with reading(path, "lines such as image,caption and a.jpg,A dog (or tab, semicolon or | for comma)"):
        lines = path.read_text(encoding=ENCODING).split("\n")
        separator = column_separator(lines)
        rows = list(pipe_rows(lines) if separator == "|" else table_rows(lines, separator))
        if not is_image_name(table_name(rows[0][0])):
            width, chosen = len(rows[0]), table_columns(rows.pop(0))
        else:
            width = 3 if are_numbered([row[1] for row in rows if len(row) > 2], rows) else 2
            chosen = [[width - 1]]
        captions: Captions = {}
        for number, row in enumerate(rows, start=1):
            if any(map(str.strip, row[width:])) and not any(width - 1 in kind for kind in chosen):
                raise ValueError(f"row {number} has {len(row)} columns, not {width}: quote captions with commas")
            cells = [*row[: width - 1], separator.join(row[width - 1 :])]  # the last may hold the separator
            cells += [""] * (width - len(cells))
            kinds = ([text for place in kind for text in texts_of(cells[place])] for kind in chosen)
            captions.setdefault(table_name(row[0]), []).extend(filter(None, first_with_text(kinds)))
        if captions and not any(map(is_image_name, captions)):
            raise ValueError(f"{next(iter(captions))[:50]!r} in the first column is no file name of an image")
    return captions


def table_columns(header: Sequence[str]) -> list[list[int]]:
    """Places of the columns that hold captions, kind by kind: by their names, else the last of at most three.

    Raises:
        ValueError: there are more and none is called so.
    """
    kinds = [[place for place, name in enumerate(header) if name in names] for names in caption_kinds(header)]
    if not kinds and len(header) > 3:
        raise ValueError(f"none of its columns {', '.join(header)[:60]} is called caption")
    return kinds or [[len(header) - 1]]


def caption_columns(columns: Iterable[str]) -> list[str]:
    """Columns that hold captions, in the order of their numbers: `caption`, `captions`, `Caption 1`, `caption_2`, ...

    Where none is called so, those of the next of `CAPTION_NAMES`; [] if there are none.
    """
    found = [(name, match) for name in columns if (match := CAPTION_COLUMN.fullmatch(name.strip()))]
    kind = min((CAPTION_NAMES.index(match[1].lower()) for _, match in found), default=None)
    chosen = [(int(match[2] or 0), name) for name, match in found if match[1].lower() == CAPTION_NAMES[kind or 0]]
    return [name for _, name in sorted(chosen, key=lambda pair: pair[0])]


def caption_kinds(columns: Iterable[str]) -> Iterator[list[str]]:
    """`caption_columns`, then those of the next name that a table has, and so on."""
    left = list(columns)
    while chosen := caption_columns(left):
        yield chosen
        left = [name for name in left if name not in chosen]


def texts_of(value: object) -> list[str]:
    """Captions in a cell: a text, or a list of them, also as JSON, Python or numpy write one; [] for nothing.

    Raises:
        ValueError: it holds something else, which nobody would say of an image.
    """
    if isinstance(value, str):
        value = parsed(value)
    if value is None or value != value:  # not a number, which pandas writes for nothing
        return []
    if isinstance(value, str | int | float):
        return [str(value)]
    if isinstance(value, list | tuple) and not any(isinstance(text, list | tuple | dict) for text in value):
        return [text for item in value for text in texts_of(item)]
    raise ValueError(f"a caption is a {type(value).__name__} of others: {short(value)}")


def parsed(cell: str) -> object:
    """The list of texts or the dictionary that a cell spells, None where it spells nothing; else the cell."""
    if cell.strip() in ("nan", "NaN", "None", "null"):
        return None
    if NUMPY_LIST.fullmatch(cell.strip()):
        return [ast.literal_eval(text) for text in re.findall(QUOTED, cell)]
    for parse in (json.loads, ast.literal_eval):
        if cell.lstrip().startswith(("[", "{")):
            with suppress(ValueError, SyntaxError, RecursionError, MemoryError):
                found = parse(cell.strip())
                if isinstance(found, dict) or (isinstance(found, list) and all(isinstance(t, str) for t in found)):
                    return found
    return cell


def row_captions(row: Mapping[str, Any]) -> tuple[str, ...]:
    """All captions of a table's row, of the first kind of column that has text in it; raises as `texts_of`."""
    kinds = ([text for name in names for text in texts_of(row[name])] for names in caption_kinds(row))
    return tuple(map(clean_caption, first_with_text(kinds)))


def first_with_text(kinds: Iterable[Sequence[str]]) -> Sequence[str]:
    """The first of several lists of captions that are not all blank; () if there is none."""
    return next((texts for texts in kinds if any(map(str.strip, texts))), ())


def table_name(cell: str) -> str:
    """The image's name in the first column of a table, where the caption's number may follow it: `name.jpg#0`."""
    return re.sub(r"#\d+$", "", cell.strip())


def column_separator(lines: Iterable[str]) -> str:
    """What stands between the columns of a table: the first such sign in it. Raises `ValueError` without one."""
    first = next(filter(str.strip, lines), "")
    found = re.search(r"[|,\t;]", first)
    if found is None:
        raise ValueError(f"its first line {first[:50]!r} has one column")
    return found.group()


def pipe_rows(lines: Iterable[str]) -> Iterator[list[str]]:
    """Image and caption of `image| number| caption` lines; nothing is quoted in them.

    In the row of 2199200615.jpg the second bar is missing: `2199200615.jpg| 4   A dog runs across the grass .`
    """
    parts = [line.partition("|")[::2] for line in filter(str.strip, lines)]
    with_bars = [rest.partition("|")[0] for _, rest in parts if "|" in rest]
    has_header = parts and not is_image_name(table_name(parts[0][0]))
    numbered = "|" in parts[0][1] if has_header else are_numbered(with_bars, parts)
    for name, rest in parts:
        yield [name, re.sub(r"^\s*\d+\s*(\||\s)", "", rest) if numbered else rest]


def are_numbered(cells: Iterable[str], rows: Sequence[object]) -> bool:
    """Whether most rows have the number of a caption in such a cell; captions themselves may begin with numbers."""
    return 2 * sum(cell.strip().isdigit() for cell in cells) > len(rows)


def table_rows(lines: Sequence[str], separator: str) -> Iterator[list[str]]:
    """Cells of the rows of a CSV table, whose quoted cells may go over lines.

    In tables written by hand a quote may be opened and never closed. It is a sign like any other then, if the line
    after it begins with the name of an image.

    Raises:
        ValueError: it is not closed and no such line follows, so that nobody knows where its row ends.
    """
    row: list[str] = []
    start = 0
    first = next(filter(str.strip, lines), "")
    spaced = f"{separator} " in first and not is_image_name(table_name(first.partition(separator)[0]))
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        if row and is_image_name(table_name(next(csv.reader([line], delimiter=separator))[0])):
            yield literal_cells(row, separator, start)
            row = []
        start = start if row else number
        row.append(line)
        with suppress(csv.Error):  # in the middle of a quoted cell, or with more behind its end
            text = " ".join(row)
            escape = None if '\\"' not in text else "\\"  # as MySQL writes quotes
            yield next(
                csv.reader(
                    [text],
                    delimiter=separator,
                    strict=True,
                    skipinitialspace=spaced,
                    escapechar=escape,
                    doublequote=escape is None,
                )
            )
            row = []
        if len(row) > MAX_LINES:
            break
    if row:
        yield literal_cells(row, separator, start)


def literal_cells(row: Sequence[str], separator: str, start: int) -> list[str]:
    """Cells of a row whose quotes mean nothing. Raises `ValueError` if it goes on over lines from `start` on."""
    if len(row) > 1:
        raise ValueError(f"the quote in line {start} is not closed properly")
    return row[0].split(separator)


def metadata_rows(path: Path) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Image and captions of each row of a `metadata.jsonl` or `metadata.csv`.

    Raises:
        UserError: it is damaged, a row is without file name, or no row has a column of captions.
    """
    columns: dict[str, None] = {}
    with reading(path, "a file_name and a text, caption or captions in each row"):
        lines = path.read_text(encoding=ENCODING).split("\n")
        rows = metadata_table(lines) if path.suffix == ".csv" else map(json_row, filter(str.strip, lines))
        for number, row in enumerate(rows, start=1):
            name = row.get("file_name")
            if not isinstance(name, str) or not name:
                raise UserError(
                    f"data.source: {short(path, 80)}, row {number}: expected a file_name and a text or caption"
                )
            columns.update(dict.fromkeys(row))
            try:
                yield name.strip(), row_captions(row)
            except ValueError as error:
                raise ValueError(f"row {number}: {error}") from error
    if columns and not caption_columns(columns):
        raise UserError(
            f"data.source: {short(path, 80)}: none of its columns {short(', '.join(columns))} holds captions; call one "
            "text, caption or captions"
        )


def json_row(line: str) -> Any:
    """A row of a `metadata.jsonl`. Raises `ValueError` for what is no JSON, and as `refuse_twice`."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        refuse_twice([name for name, _ in pairs])
        return dict(pairs)

    return json.loads(line, object_pairs_hook=once)


def refuse_twice(names: Sequence[str]) -> None:
    """Raise `ValueError` where a column that is read comes twice: nobody knows which is meant."""
    if twice := [name for name in ("file_name", *caption_columns(names)) if names.count(name) > 1]:
        raise ValueError(f"two columns are called {twice[0]}: rename one")


def metadata_table(lines: Sequence[str]) -> Iterator[dict[str, str]]:
    """Rows of a CSV table by the names in its header; commas that nobody quoted stay in a caption of the last column.

    Raises:
        ValueError: there are more columns than the header has, and the last is no caption.
    """
    separator = column_separator(lines)
    rows = table_rows(lines, separator)
    header = [name.strip() for name in next(rows)]
    refuse_twice(header)
    last = len(header) - 1
    for number, row in enumerate(rows, start=1):
        if len(row) > len(header) and header[last] not in caption_columns(header):
            raise ValueError(
                f"row {number} has {len(row)} columns, the header {len(header)}: quote captions with commas"
            )
        yield dict(zip(header, [*row[:last], separator.join(row[last:])], strict=False))
