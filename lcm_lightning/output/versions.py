"""Which versions made something."""

from __future__ import annotations

import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("torch", "lightning", "diffusers", "transformers", "peft", "torchmetrics", "lcm-lightning")


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that decide the figures; a clone that is not installed has none."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found
