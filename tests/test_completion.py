"""What the Tab key shows in bash after Hydra's completion is installed as docs/command_line.md says."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.commands import ROOT

Tab = Callable[[str, str], list[str]]

# Bash calls the function that completes a command with these variables, and shows what it leaves in COMPREPLY.
TAB = """
eval "$({command} -sc install=bash)"
COMP_LINE=$TYPED COMP_POINT=${{#TYPED}} words=($TYPED)
COMP_CWORD=$((${{#words[@]}} - 1))
$(complete -p {name} | grep -o 'hydra_bash_completion')
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture
def tab(tmp_path: Path) -> Tab:
    """Asks bash what it would show for what is typed, with `python` and `lcm-generate` being these."""
    programs = tmp_path / "bin"
    programs.mkdir()
    scripts = {
        "python": f'#!/bin/sh\nexec {sys.executable} "$@"\n',  # a link would lose its environment
        "lcm-generate": f"#!{sys.executable}\nfrom lcm_lightning.generate import main\n\nmain()\n",
    }
    for name, script in scripts.items():
        (programs / name).write_text(script)
        (programs / name).chmod(0o755)
    environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}

    def shown(command: str, typed: str) -> list[str]:
        text = TAB.format(command=command, name=command.split()[0])
        done = subprocess.run(
            ["bash", "-c", text],
            cwd=ROOT,
            env={**environment, "TYPED": typed},
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.split()

    return shown


@pytest.mark.skipif(shutil.which("bash") is None, reason="bash is not here")
@pytest.mark.parametrize(
    ("command", "typed", "expected"),
    [
        ("python train.py", "python train.py exp", ["experiment="]),
        (
            "python train.py",
            "python train.py experiment=quickstart_",
            ["experiment=quickstart_dmd2", "experiment=quickstart_lora"],
        ),
        ("python train.py", "python train.py method=lora method.lora.r", ["method.lora.rank="]),
        ("python train.py", "python evaluate.py evaluation=q", ["evaluation=quick"]),
        ("lcm-generate", "lcm-generate model=t", ["model=tiny"]),
    ],
)
def test_tab_completes_groups_files_and_keys(tab: Tab, command: str, typed: str, expected: list[str]):
    assert tab(command, typed) == expected
