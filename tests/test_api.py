"""What `lcm_lightning` exports, used as docs/api.md says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

import lcm_lightning

ROOT = Path(__file__).parents[1]


def test_all_that_is_exported_is_there():
    assert all(getattr(lcm_lightning, name) is not None for name in lcm_lightning.__all__)


def test_the_import_alone_imports_nothing_else():
    code = "import sys, lcm_lightning; print({'torch', 'lightning', 'diffusers', 'hydra'} & set(sys.modules))"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    assert said.strip() == "set()"


def test_every_name_is_explained():
    page = (ROOT / "docs" / "api.md").read_text()
    assert [name for name in lcm_lightning.__all__ if not re.search(rf"\b{name}\b", page)] == []


@pytest.mark.slow
def test_the_example_distils_and_draws(tmp_path: Path):
    (example,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "api.md").read_text(), re.DOTALL)
    assert len([line for line in example.splitlines() if line.strip()]) <= 30
    short = example.replace("max_steps=10", "max_steps=1")
    subprocess.run(
        [sys.executable, "-c", short], check=True, cwd=tmp_path, env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    )
    assert (tmp_path / "lora" / "pytorch_lora_weights.safetensors").is_file()
    assert Image.open(tmp_path / "student.png").height > 128
