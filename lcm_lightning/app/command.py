"""`python -m lcm_lightning.app`: a page in the browser that draws, teacher and students side by side."""

from __future__ import annotations

import logging
import os
import threading
from contextlib import ExitStack
from importlib.util import find_spec
from pathlib import Path

from omegaconf import DictConfig

from lcm_lightning.config.checks import resolve
from lcm_lightning.config.entry import command
from lcm_lightning.errors import UserError, install

APP_KEYS: tuple[str, ...] = ("model", "run", "lora", "lora_role", "student", "outputs", "host", "port", "share")
APP_KEYS += ("kept_models", "accelerator", "dtype")
FIRST_PROMPT = "red heart"


@command("app")
def main(cfg: DictConfig) -> None:
    """Entry point."""
    resolve(cfg, APP_KEYS)
    if find_spec("gradio") is None:
        raise UserError(f"gradio: is not installed, of which the page is made; {install('gradio')}")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when it is imported
    logging.getLogger("httpx").setLevel(logging.WARNING)  # by which it asks itself whether it answers
    # Imported once the configuration is right.
    from lcm_lightning.app.choices import Choices
    from lcm_lightning.config.instantiate import find_device
    from lcm_lightning.config.quiet import quiet_known_warnings

    device = find_device(cfg.accelerator)
    choices = Choices(cfg, Path(cfg.outputs))
    from lcm_lightning.app.engine import Engine

    quiet_known_warnings()
    engine = Engine(device, cfg.kept_models)
    engine.warm_up(choices.source(choices.first()))  # while what the page is made of is imported
    from lcm_lightning.app.page import Page, serve

    with ExitStack() as ending:
        ending.callback(engine.close)
        page = Page(engine, choices, Path(cfg.outputs), FIRST_PROMPT)
        ending.callback(page.blocks.close, verbose=False)  # by which dropped files go
        print(f"{serve(page, cfg.host, cfg.port, cfg.share)}  (Ctrl-C ends it)", flush=True)
        threading.Event().wait()
