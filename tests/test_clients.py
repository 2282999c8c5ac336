"""Programs that are not ours read our files and draw what we draw; those that are installed here are run."""

from __future__ import annotations

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from benchmarks.clients.__main__ import CLIENTS, cells, table
from benchmarks.clients.inputs import SIZES, make_inputs

ROOT = Path(__file__).parent.parent
FLOAT, BYTES = 0.01, 1.01  # of 255: of pictures in float32, and in whole numbers, which may be cut instead of rounded


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("clients")
    return {size: folder / size for size in SIZES}


def rows_of(script: str, folder: Path, size: str) -> list[dict[str, Any]]:
    make_inputs(folder, SIZES[size])
    command = [sys.executable, str(ROOT / "benchmarks" / "clients" / script), str(folder)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])["rows"]


def need(*packages: str) -> None:
    for package in packages:
        if find_spec(package) is None:
            pytest.skip(f"{package} is not installed")


@pytest.mark.slow
def test_plain_diffusers_draws_our_picture_from_every_file(inputs: dict[str, Path]):
    for row in rows_of("with_diffusers.py", inputs["tiny"], "tiny"):
        assert "error" not in row
        assert row["picture"]["max"] < FLOAT
        assert row["picture"]["change"] > 100 * FLOAT


@pytest.mark.slow
def test_lycoris_merges_kohya_s_file_as_we_do(inputs: dict[str, Path]):
    need("lycoris")
    (row,) = rows_of("with_lycoris.py", inputs["tiny"], "tiny")
    assert row["modules"] == row["layers"] > 0
    assert row["weight_relative"] < 1e-6


@pytest.mark.slow
def test_onnxruntime_draws_our_picture(inputs: dict[str, Path]):
    need("onnx", "onnxscript", "onnxruntime")
    (row,) = rows_of("with_onnxruntime.py", inputs["tiny"], "tiny")
    assert row["picture"]["max"] < BYTES


@pytest.mark.slow
def test_openvino_genai_draws_our_picture_and_applies_attention_layers(inputs: dict[str, Path]):
    need("openvino", "openvino_tokenizers", "openvino_genai")
    rows = {row["loaded"]: row for row in rows_of("with_openvino.py", inputs["small"], "small")}
    for loaded in ("openvino-fused/", "openvino/ and kohya_attention.safetensors"):
        assert rows[loaded]["picture"]["max"] < BYTES


def test_every_client_has_its_script_and_its_size():
    for client in CLIENTS:
        assert (ROOT / "benchmarks" / "clients" / client.script).is_file()
        assert client.size in SIZES


def test_the_table_says_what_was_read_and_how_far_it_is_from_ours():
    picture = {"max": 0.5, "mean": 0.25, "change": 12.0}
    read = {"loaded": "fused.safetensors", "picture": picture, "warnings": []}
    refused = {"loaded": "x.safetensors", "error": "RuntimeError: no", "warnings": []}
    result = {"client": "A", "versions": {"a": "1.0"}, "size": "tiny", "date": "2026-01-01", "rows": [read, refused]}
    lines = table([result]).splitlines()
    assert lines[2] == "| A | a 1.0 | fused.safetensors (tiny) | picture: max 0.5, mean 0.25 | 12 | 2026-01-01 |"
    assert "RuntimeError: no" in lines[3]


def test_keys_that_a_client_passes_over_are_counted():
    row = {"loaded": "x", "warnings": ["lora key not loaded: a", "lora key not loaded: b", "else"]}
    assert cells(row) == ("2 keys not loaded", "")
