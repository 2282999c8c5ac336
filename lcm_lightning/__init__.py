"""Latent-consistency LoRA distillation of Stable Diffusion with PyTorch Lightning.

`__init__.pyi` lists what is for use without Hydra, imported when it is first asked for; docs/api.md shows how.
"""

import lazy_loader

__version__ = "0.1.0"

__getattr__, __dir__, __all__ = lazy_loader.attach_stub(__name__, __file__)
