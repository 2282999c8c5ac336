"""Checkpoint files: written whole or not at all, and the newest usable one of a run found again."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lcm_lightning.errors import UserError, first_line
from lcm_lightning.output.files import atomic_file, replace, write_atomic
from lcm_lightning.runs.folders import AUTO, CHECKPOINTS, checkpoint_files, did_you_mean

log = logging.getLogger(__name__)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes under a temporary name, syncs and renames; never unpickles.

    A checkpoint that cannot be written (a full disk, a lost mount) is a warning: training and the checkpoints before
    it matter more. Whoever needs to know looks for the file.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: object = None) -> None:
        """Write `checkpoint` to `path`, whole or not at all."""
        try:
            with atomic_file(Path(path)) as file:
                target = PatientFile(file)
                torch.save(checkpoint, cast(BinaryIO, target))
                target.check()
        except OSError as error:
            log.warning("checkpoint %s not written (%s); those before it are kept", path, error)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = lambda storage, location: storage, weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Tensors and plain containers of the file at `path`."""
        return super().load_checkpoint(path, map_location, weights_only=True)


class PatientFile:
    """Takes what `torch.save` writes, and keeps the first error of the disk: torch would raise one of its own."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, content: bytes | memoryview) -> int:
        """Write, or drop what follows an error."""
        if self.error is None:
            try:
                self.file.write(content)
            except OSError as error:
                self.error = error
        return memoryview(content).nbytes

    def flush(self) -> None:
        """`atomic_file` does."""

    def check(self) -> None:
        """Raise the error that writing met."""
        if self.error is not None:
            raise self.error


def publish_link(source: Path, target: Path) -> None:
    """Give a file a second name, in place of what had it before; a copy on disks without hard links."""
    temporary = target.with_name(f".{target.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        temporary.hardlink_to(source)
    except OSError:
        write_atomic(temporary, source.read_bytes())
    replace(temporary, target)


def global_step(path: Path) -> int:
    """The optimizer step of a checkpoint file.

    Raises:
        UserError: it is cut off, or no checkpoint of a training run.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)["global_step"]
    except Exception as error:  # zip, pickle and type errors of a damaged file
        raise UserError(
            f"resume={path} is no checkpoint, or cut off ({first_line(error)}); give the run folder, which takes "
            "the one before"
        ) from error


def newest_usable(files: Iterable[Path]) -> Path | None:
    """The checkpoint of the highest step; those that cannot be read are passed over with a warning."""
    steps: dict[Path, int] = {}
    for path in files:
        try:
            steps[path] = global_step(path)
        except UserError as error:
            log.warning("passed over: %s", error)
    return max(steps, key=lambda path: (steps[path], path.name), default=None)


def find_checkpoint(resume: str | None, run_dir: Path) -> Path | None:
    """The checkpoint file that `resume` stands for.

    Args:
        resume: a run folder, a .ckpt file, "auto" for what is in `run_dir` (None if that is nothing), or None.

    Raises:
        UserError: there is no such run or file, or no usable checkpoint in it.
    """
    if resume is None:
        return None
    path = run_dir if resume == AUTO else Path(resume).expanduser()
    if path.is_file():
        global_step(path)
        return path
    files = checkpoint_files(path)
    usable = newest_usable(files)
    if usable is None and (files or resume != AUTO):
        meant = did_you_mean("resume", path, checkpoint_files) or "give one, or resume=auto"
        found = f"neither a .ckpt file nor a run folder with {CHECKPOINTS}/*.ckpt; {meant}"
        broken = f"none of its {len(files)} checkpoints can be read; start anew without resume=, in another folder"
        raise UserError(f"resume={resume}: {broken if files else found}")
    return usable
