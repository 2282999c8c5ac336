"""Hooks of MkDocs (`hooks:` in mkdocs.yml): pages that lie outside docs/, without a second copy of them.

README.md is the front page; CONTRIBUTING.md, CHANGELOG.md and docs/tour.ipynb with its outputs are pages. A link to a
source file leads to a page that shows it. Links are written as they work in the repository, and mended for the site.
"""

from __future__ import annotations

import html
import json
import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
AT_THE_TOP = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "CHANGELOG.md": "changelog.md"}
NOTEBOOKS = {"docs/tour.ipynb": "tour.md"}
LANGUAGES = {".py": "python", ".yaml": "yaml", ".sh": "bash", "": "text"}
LINK = re.compile(r"(\]\()([^)\s#:]+)(#[^)\s]*)?(\))")
UNLISTED = "---\nsearch:\n  exclude: true\n---\n"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages at the top, and one of every source file that a page links to."""
    for name, page in AT_THE_TOP.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text()))
    for name, page in NOTEBOOKS.items():
        files.append(File.generated(config, page, content=notebook_page(json.loads((ROOT / name).read_text()))))
    shown = {target for file in files.documentation_pages() for target in sources_linked(file)}
    for name in sorted(shown):
        files.append(File.generated(config, source_page(name), content=listing(name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Mend the links of a page: those to and from files outside docs/."""
    place = repository_path(page.file.src_uri)
    folder = posixpath.dirname(page.file.src_uri) or "."

    def mended(link: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(place), link[2]))
        there = site_path(target)
        if there is None:
            return link[0]
        return f"{link[1]}{posixpath.relpath(there, folder)}{link[3] or ''}{link[4]}"

    return LINK.sub(mended, markdown)


def repository_path(page: str) -> str:
    """Where the page `page` of the site lies in the repository."""
    top = {site: name for name, site in (AT_THE_TOP | NOTEBOOKS).items()}
    return top.get(page, f"docs/{page}")


def site_path(target: str) -> str | None:
    """The page or file of the site that shows the repository's file `target`; None where nothing does."""
    if target in AT_THE_TOP | NOTEBOOKS:
        return (AT_THE_TOP | NOTEBOOKS)[target]
    if target.startswith("docs/"):
        return target.removeprefix("docs/")
    return source_page(target) if (ROOT / target).is_file() else None


def sources_linked(file: File) -> set[str]:
    """Source files of the repository that a page links to."""
    folder = posixpath.dirname(repository_path(file.src_uri))
    targets = {posixpath.normpath(posixpath.join(folder, link[2])) for link in LINK.finditer(file.content_string)}
    return {target for target in targets if (site_path(target) or "").startswith("source/")}


def source_page(name: str) -> str:
    """The page that shows a source file."""
    return f"source/{name}.md"


def listing(name: str) -> str:
    """A page with a source file's text."""
    file = ROOT / name
    language = LANGUAGES.get(file.suffix, "text")
    return f"{UNLISTED}\n# {name}\n\n``````{language}\n{file.read_text().rstrip()}\n``````\n"


def notebook_page(notebook: dict[str, Any]) -> str:
    """A notebook as Markdown: its text, its code, and what that printed and drew."""
    parts = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        parts += [shown for output in cell.get("outputs", ()) if (shown := output_shown(output))]
    return "\n\n".join(parts) + "\n"


def output_shown(output: dict[str, Any]) -> str:
    """What a cell printed or drew, as Markdown."""
    data = output.get("data", {})
    if "image/png" in data:
        return f'<img alt="what the cell draws" src="data:image/png;base64,{"".join(data["image/png"]).strip()}">'
    text = "".join(output.get("text", data.get("text/plain", "")))
    return f"<pre>{html.escape(text.strip())}</pre>" if text.strip() else ""
