"""A program whose output is read no more goes on, says nothing of a reader who left, and ends with 2 on a full disk."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import TextIO

import pytest
from rich.console import Console

from helpers.commands import in_process
from lcm_lightning.output.progress import image_progress
from lcm_lightning.output.streams import lasting_output


@contextmanager
def read_by_nobody() -> Iterator[TextIO]:
    """Standard output is a pipe whose reader has gone, as `head` has; in the end flushed, as Python does it."""
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "w") as stream, redirect_stdout(stream):
        yield stream


@contextmanager
def full_disk() -> Iterator[TextIO]:
    """Standard output is a file on a disk without room."""
    with Path("/dev/full").open("w") as stream, redirect_stdout(stream):
        yield stream


def work() -> int:
    """Prints, logs and counts, and returns what was done."""
    handler = logging.StreamHandler(sys.stdout)
    logger = logging.Logger("work")
    logger.addHandler(handler)
    done = 0
    with image_progress(Console(width=100)) as progress:
        bar = progress.add_task("drawing", total=20)
        for number in range(20):
            print("line", number, flush=True)
            logger.info("logged %d", number)
            progress.advance(bar)
            done += 1
    return done


def test_work_goes_on_and_nothing_is_said_when_the_reader_has_gone(capfd: pytest.CaptureFixture[str]):
    with read_by_nobody():
        assert lasting_output()(work)() == 20
    assert capfd.readouterr() == ("", "")


def test_work_goes_on_when_the_disk_is_full_and_the_end_says_so(capfd: pytest.CaptureFixture[str]):
    done: list[int] = []
    with full_disk(), pytest.raises(SystemExit) as end:
        lasting_output()(lambda: done.append(work()))()
    assert (end.value.code, done) == (2, [20])
    assert capfd.readouterr().err.startswith("error: standard output: cannot be written ([Errno 28]")


def test_help_onto_a_full_disk_is_not_told_as_a_run_folder(capfd: pytest.CaptureFixture[str]):
    with full_disk(), pytest.raises(SystemExit) as end:
        in_process("lcm_lightning.generate", "--help")
    said = capfd.readouterr().err
    assert end.value.code == 2 and said.startswith("error: standard output: ") and "hydra.run.dir" not in said


def test_a_failure_is_raised_though_the_reader_has_gone():
    with read_by_nobody(), pytest.raises(ZeroDivisionError), lasting_output():
        print("said", flush=True)
        raise ZeroDivisionError


def test_pictures_are_written_though_nobody_reads_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    options = ("num_images=3", "batch_size=1", "steps=1", "output=drawn", "accelerator=cpu", "dtype=float32")
    with read_by_nobody():
        in_process("lcm_lightning.generate", "model=tiny", "student=true", "prompt=cat", *options)
    assert len(list((tmp_path / "drawn").glob("cat-*.png"))) == 3
    assert "Error" not in capfd.readouterr().err


def test_a_library_that_closes_what_it_logs_to_closes_no_output(tmp_path: Path):
    """absl's handler, which OpenVINO brings, made before a program's start or in it, and ended by Hydra's logging."""
    absl = pytest.importorskip("absl.logging")
    with (tmp_path / "errors.log").open("w") as stream, redirect_stderr(stream):
        before = absl.PythonHandler(sys.stderr)
        with lasting_output():
            inside = absl.PythonHandler(sys.stderr)
            before.close()
        inside.close()
        print("still open", file=sys.stderr)
    assert (tmp_path / "errors.log").read_text() == "still open\n"
