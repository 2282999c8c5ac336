"""What a W&B run file holds, read without W&B's own reader: a log of LevelDB's format, of protobuf records."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto.wandb_internal_pb2 import ArtifactRecord, Record

BLOCK = 32768
HEADER = struct.Struct("<IHB")  # checksum, length, and whether it is a whole record (1), its first part (2) or last (4)


def records(file: Path) -> Iterator[Record]:
    """The records of a .wandb file."""
    data = file.read_bytes()
    assert data[:4] in (b":W&B", b"")  # nothing yet
    place, parts = 7, b""
    while place + HEADER.size <= len(data):
        if BLOCK - place % BLOCK < HEADER.size:  # padding
            place += BLOCK - place % BLOCK
            continue
        _, length, kind = HEADER.unpack_from(data, place)
        parts += data[place + HEADER.size : place + HEADER.size + length]
        place += HEADER.size + length
        if kind in (1, 4):
            record = Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def name(item: Any) -> str:
    """What an item of history or summary is called."""
    return item.key or "/".join(item.nested_key)


class RunFile:
    """A finished offline run of a run folder.

    W&B 0.31 writes the file from a process of its own, which an offline `finish` does not wait for.
    """

    def __init__(self, run_dir: Path) -> None:
        (folder,) = run_dir.glob("wandb/offline-run-*")
        self.files = folder / "files"
        deadline = time.monotonic() + 30
        self.records: list[Record] = []
        while not self.of("exit") and time.monotonic() < deadline:
            self.records = [record for file in folder.glob("*.wandb") for record in records(file)]
            time.sleep(0.05)

    def of(self, kind: str) -> list[Any]:
        """The records of one kind, such as "run", "alert" or "exit"."""
        return [getattr(record, kind) for record in self.records if record.WhichOneof("record_type") == kind]

    @property
    def run(self) -> Any:
        """Who it belongs to."""
        return self.of("run")[0]

    @property
    def config(self) -> dict[str, Any]:
        """The settings, by their first key."""
        return {
            (item.key or item.nested_key[0]): json.loads(item.value_json)
            for config in self.of("config")
            for item in config.update
        }

    @property
    def summary(self) -> dict[str, Any]:
        """What was set of it, the last time; parts of an object under `<key>/<part>`."""
        return {name(item): json.loads(item.value_json) for summary in self.of("summary") for item in summary.update}

    def history(self, key: str) -> list[Any]:
        """The values of a metric, or of a part of an object, in order."""
        rows = [{name(item): json.loads(item.value_json) for item in row.item} for row in self.of("history")]
        return [row[key] for row in rows if key in row]

    def table(self, key: str, row: int = 0) -> dict[str, Any]:
        """What a table's file holds."""
        return json.loads((self.files / self.history(f"{key}/path")[row]).read_text())

    def artifacts(self) -> list[tuple[str, str, list[str], bool]]:
        """Type, name and aliases of each, and whether it is an input."""
        return [(a.type, a.name, list(a.aliases), a.use_after_commit) for a in self.of("artifact")]

    def artifact(self, kind: str) -> ArtifactRecord:
        """The one of that type."""
        (found,) = [a for a in self.of("artifact") if a.type == kind]
        return found
