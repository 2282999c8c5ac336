"""What configuration files may compute: `${fused_adamw:...}` and `${package_file:...}`."""

from __future__ import annotations

from pathlib import Path

from omegaconf import OmegaConf


def fused_adamw(precision: str) -> bool:
    """Whether AdamW's fused kernel can be used: not with fp16's scaled gradients, which it unscales after clipping."""
    return precision not in ("16-mixed", "16")


def package_file(name: str) -> str:
    """Path of a file or folder that ships inside the package."""
    return str(Path(__file__).parent / name)


def register_resolvers() -> None:
    """Make the resolvers known to OmegaConf; may be called again."""
    OmegaConf.register_new_resolver("fused_adamw", fused_adamw, replace=True)
    OmegaConf.register_new_resolver("package_file", package_file, replace=True)
