"""SIGKILL at random moments of `python train.py ... resume=auto`: 0 bits differ in the end.

`make test-faults` kills 50 times; the tests that always run kill a few times.
"""

from __future__ import annotations

import os
import random
import time
from pathlib import Path

import pytest

from helpers.stoppable import SETTINGS, Start, assert_same_end, differing_bits, whole_run


def kill_until(
    start: Start, setting: str, folder: Path, seconds: float, kills: int, dice: random.Random, *overrides: str
) -> int:
    """Kill a run at random moments, at most `kills` times, until it has ended by itself. Returns the kills."""
    done = 0
    while True:
        command = start(setting, folder, *overrides)
        deadline = time.monotonic() + dice.uniform(0, seconds) if done < kills else float("inf")
        while command.is_running() and time.monotonic() < deadline:
            time.sleep(0.01)
        if not command.is_running():
            statuses = command.wait()
            assert statuses == [0] * len(statuses), command.log.read_text()
            return done
        done += command.kill()


@pytest.mark.slow
@pytest.mark.parametrize(
    "setting",
    [
        "lora, one worker, accumulated",
        "lcm, teacher's steps, two workers",
        "pcm with a discriminator, no worker",
        "dmd2, one worker",
        *(
            pytest.param(setting, marks=pytest.mark.thorough)
            for setting in (
                "lcm, two workers",
                "lcm, latents, two workers",
                "lora, a sample that is no number",
                "tcd, two workers",
                "full lcm, two workers",
                "kd, two workers",
            )
        ),
    ],
)
def test_a_few_kills_change_no_bit(start: Start, tmp_path: Path, setting: str):
    seconds = whole_run(start, setting, tmp_path / "whole")
    kill_until(start, setting, tmp_path / "killed", seconds, 3, random.Random(setting))
    assert_same_end(tmp_path / "whole", tmp_path / "killed", tmp_path / "killed.log")


@pytest.mark.slow
@pytest.mark.multiprocess
def test_a_few_kills_of_two_processes_change_no_bit(start: Start, tmp_path: Path):
    setting = "lcm, two processes, a worker each, accumulated"
    seconds = whole_run(start, setting, tmp_path / "whole")
    kill_until(start, setting, tmp_path / "killed", seconds, 3, random.Random(1))
    assert_same_end(tmp_path / "whole", tmp_path / "killed", tmp_path / "killed.log")


@pytest.mark.faults
def test_fifty_kills_change_no_bit(start: Start, tmp_path: Path):
    """Over all settings; each time a run has ended, one of the setting killed least is started, until 50 kills."""
    dice = random.Random(int(os.environ.get("KILL_SEED", "0")))
    wanted = int(os.environ.get("KILLS", "50"))
    whole = {setting: tmp_path / f"whole {number}" for number, setting in enumerate(SETTINGS)}
    seconds = {setting: whole_run(start, setting, folder) for setting, folder in whole.items()}
    kills: dict[str, int] = dict.fromkeys(SETTINGS, 0)
    runs, bits = 0, 0
    while sum(kills.values()) < wanted:
        setting = min(SETTINGS, key=lambda name: kills[name])
        folder = tmp_path / f"killed {runs}"
        left = wanted - sum(kills.values())
        kills[setting] += kill_until(start, setting, folder, seconds[setting], min(left, 6), dice)
        bits += differing_bits(whole[setting], folder)
        assert_same_end(whole[setting], folder, tmp_path / f"{folder.name}.log")
        runs += 1
    print(f"\n{sum(kills.values())} kills of {runs} runs, {bits} differing bits: {kills}")
