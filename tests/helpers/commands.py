"""`python train.py` and the other programs as they are typed, in this process."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from hydra.core.global_hydra import GlobalHydra

ROOT = Path(__file__).parents[2]
SMALLER = (
    "data.num_workers=0",
    "data.batch_size=2",
    "data.val_limit=2",
    "data.resolution=32",
    "callbacks.samples.teacher_steps=2",
    "callbacks.samples.num_prompts=2",
    "callbacks.samples.student_steps=[1]",
    "trainer.accumulate_grad_batches=1",
)
SMALL = (*SMALLER, "method.lora.rank=4")


def in_process(program: str, *overrides: str) -> None:
    """`python -m program ...` in this process; raises SystemExit where the command would end with an error."""
    main = importlib.import_module(program).main
    GlobalHydra.instance().clear()
    before = sys.argv
    # Hydra looks for conf/ beside the main program, which is pytest here.
    sys.argv = [f"{program}.py", f"--config-path={ROOT / 'conf'}", *overrides]
    try:
        main()
    finally:
        sys.argv = before
        GlobalHydra.instance().clear()
