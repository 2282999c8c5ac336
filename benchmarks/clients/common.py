"""What the scripts of all clients share; needs numpy alone, so that it runs in any client's environment."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import time
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np


class Inputs:
    """The folder that `benchmarks.clients.inputs` made, and what is in it."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).absolute()
        self.expected: dict[str, Any] = json.loads((self.folder / "expected.json").read_text())
        self.noise = np.load(self.folder / "noise.npy")
        self.base, self.lora, self.attention = (
            np.load(self.folder / f"{name}.npy") for name in ("base", "lora", "attention")
        )

    def __truediv__(self, name: str) -> str:
        return str(self.folder / name)


class Report:
    """Rows of what a client was given and how its answer differs from ours; printed as JSON on the last line."""

    def __init__(self, client: str, *packages: str, **versions: str) -> None:
        self.client = client
        self.versions = {package: version(package) for package in packages} | versions
        self.rows: list[dict[str, Any]] = []
        self.heard: list[str] = []

    @contextmanager
    def row(self, loaded: str) -> Iterator[dict[str, Any]]:
        """One row; what is raised within becomes its `error`, what is warned of its `warnings`."""
        row: dict[str, Any] = {"loaded": loaded}
        before, self.heard = time.monotonic(), []
        try:
            yield row
        except Exception as error:
            said = str(error).strip().splitlines() or [""]
            row["error"] = f"{type(error).__name__}: {said[-1]}"[:300]  # C++'s first lines name its source
        row |= {"warnings": sorted(set(self.heard)), "seconds": round(time.monotonic() - before, 1)}
        self.rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)

    def listen(self) -> None:
        """Note warnings, and log records from WARNING on, of all libraries."""
        report = self

        class Handler(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                report.heard.append(record.getMessage().strip()[:300])

        def heard(message: Warning | str, *_: Any, **__: Any) -> None:
            report.heard.append(str(message).strip()[:300])

        handler = Handler(logging.WARNING)
        logging.getLogger().addHandler(handler)
        for name in ("diffusers", "transformers", "peft", "huggingface_hub"):  # they may not hand records on
            logging.getLogger(name).addHandler(handler)
        warnings.simplefilter("always")
        warnings.showwarning = heard  # type: ignore[assignment]

    def finish(self) -> None:
        """Print it."""
        print(json.dumps({"client": self.client, "versions": self.versions, "rows": self.rows}))


def difference(found: np.ndarray, expected: np.ndarray, without: np.ndarray) -> dict[str, float]:
    """Largest and mean absolute difference of two pictures in 0..255, and the mean change by the LoRA in ours."""
    apart = np.abs(found.astype(np.float64) - expected)
    change = np.abs(expected.astype(np.float64) - without).mean()
    return {"max": round(apart.max(), 4), "mean": round(apart.mean(), 5), "change": round(change, 3)}


def commit_of(checkout: str) -> str:
    """The commit of a cloned repository, "" of a folder that is none."""
    done = subprocess.run(["git", "-C", checkout, "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip()[:10]


class Weights:
    """How far weights merged by a client are from ours, gathered layer by layer."""

    def __init__(self) -> None:
        self.largest = self.apart = self.change = 0.0
        self.layers = 0

    def add(self, found: np.ndarray, expected: np.ndarray, without: np.ndarray) -> None:
        """One layer's weights of a client, of ours, and before the LoRA."""
        wrong = np.abs(found.astype(np.float64) - expected)
        changed = np.abs(expected.astype(np.float64) - without)
        self.largest = max(self.largest, wrong.max())
        self.apart += np.square(wrong).sum()
        self.change += np.square(changed).sum()
        self.layers += bool(changed.any())

    def add_unet(self, inputs: Inputs, unet: Any, before: Mapping[str, Any]) -> None:
        """Every tensor of a merged diffusers UNet beside our fused folder's; `before` is its state before merging."""
        from safetensors import safe_open

        ours = safe_open(inputs / "fused/unet/diffusion_pytorch_model.safetensors", "pt")
        for name, tensor in unet.state_dict().items():
            self.add(tensor.numpy(), ours.get_tensor(name).numpy(), before[name].numpy())

    def row(self) -> dict[str, float]:
        """The largest difference, the norm of all of it over that of the LoRA's change, and the layers changed."""
        relative = (self.apart / self.change) ** 0.5
        return {
            "weight_max": float(f"{self.largest:.2g}"),
            "weight_relative": float(f"{relative:.2g}"),
            "layers": self.layers,
        }
