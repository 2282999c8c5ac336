"""What a command shows of its progress: a bar on a terminal, lines where output goes to a file."""

from __future__ import annotations

import io
import re

from rich.console import Console

from lcm_lightning.output.progress import image_progress


def shown(terminal: bool, disable: bool = False, *, total: int | None = 250, step: int = 5) -> str:
    """What counting to 250 by `step` leaves on a console."""
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100, _environ={"TERM": "xterm"})
    with image_progress(console, disable=disable) as progress:
        bar = progress.add_task("drawing", total=total)
        for _ in range(250 // step):
            progress.advance(bar, step)
    return console.file.getvalue()


def test_a_terminal_has_a_bar():
    assert "━" in (drawn := shown(terminal=True)) and "250/250" in drawn


def test_a_file_has_a_line_each_tenth_with_images_a_second_and_time_left():
    lines = shown(terminal=False).splitlines()
    assert [line.partition(",")[0] for line in lines] == [f"drawing: {n}/250" for n in range(25, 251, 25)]
    assert all(re.search(r", \d[\d.e+]* images/s(, \d:\d\d:\d\d left)?$", line) for line in lines)
    assert [line.endswith("left") for line in lines] == [True] * 9 + [False]


def test_large_steps_have_a_line_each():
    assert len(shown(terminal=False, step=125).splitlines()) == 2


def test_without_a_known_whole_lines_are_few():
    assert shown(terminal=False, total=None) == ""
    assert shown(terminal=False, total=None, step=1).count("\n") == 0


def test_other_ranks_say_nothing():
    assert shown(terminal=False, disable=True) == shown(terminal=True, disable=True) == ""


def test_what_counts_no_images_has_no_speed():
    console = Console(file=io.StringIO(), width=100)
    with image_progress(console) as progress:
        bar = progress.add_task("intervals", total=2, counts_images=False)
        progress.advance(bar)
        progress.update(bar, completed=2)
    assert re.fullmatch(r"intervals: 1/2, 0:00:00 left\nintervals: 2/2\n", console.file.getvalue())
