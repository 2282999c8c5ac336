"""The pages as a site, and the notebook among them."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.commands import ROOT

NOTEBOOK = ROOT / "docs" / "tour.ipynb"
LARGEST = 200_000  # bytes of a notebook with its outputs


@pytest.mark.slow
def test_the_site_is_built_without_a_warning_and_asks_no_server(tmp_path: Path):
    pytest.importorskip("material", reason="make docs needs pip install 'lcm-lightning[docs]'")
    pytest.importorskip("mkdocstrings", reason="make docs needs pip install 'lcm-lightning[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stderr
    pages = {page.relative_to(tmp_path / "site").as_posix(): page.read_text() for page in tmp_path.rglob("*.html")}
    assert {"index.html", "tour.html", "methods/lcm_lora.html", "reference/diffusion.html"} <= set(pages)
    loaded = re.compile(r"<(?:script|img|iframe|link)\b[^>]*\b(?:src|href)=\"?(https?://[^\s\">]+)")
    asked = {address for page in pages.values() for address in loaded.findall(page)}
    assert asked == set()


def test_the_notebook_has_small_outputs_and_no_errors():
    notebook = json.loads(NOTEBOOK.read_text())
    outputs = [output for cell in notebook["cells"] for output in cell.get("outputs", ())]
    assert NOTEBOOK.stat().st_size < LARGEST
    assert any("image/png" in output.get("data", {}) for output in outputs)
    assert [output for output in outputs if output["output_type"] == "error"] == []
    assert "/site-packages/" not in NOTEBOOK.read_text()


@pytest.mark.slow
def test_the_notebook_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    nbclient = pytest.importorskip("nbclient", reason="running the notebook needs pip install 'lcm-lightning[docs]'")
    nbformat = pytest.importorskip("nbformat", reason="running the notebook needs pip install 'lcm-lightning[docs]'")
    pytest.importorskip("ipykernel", reason="running the notebook needs pip install 'lcm-lightning[docs]'")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        cell.source = cell.source.replace("steps = 40\n", "steps = 2\n").replace("steps=25", "steps=2")
    nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute(cwd=tmp_path)
