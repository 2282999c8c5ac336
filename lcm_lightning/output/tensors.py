"""Files of tensors with a header that says what they are."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from io import BufferedReader
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

from lcm_lightning.output.files import atomic_file

if TYPE_CHECKING:
    from torch import Tensor

SPEC = "modelspec.sai_model_spec"
HASH = "modelspec.hash_sha256"


def save_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write tensors as `path` (.safetensors), whole or not at all, `metadata` sorted in its header.

    The library writes metadata in an order of each process's own. Beside a `modelspec.sai_model_spec` there will be the
    hash of all tensors that this standard asks for (github.com/Stability-AI/ModelSpec). It is taken on the disk: a
    model's tensors would not fit into memory twice.

    Raises:
        OSError: it cannot be written.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.tensors.tmp")  # a killed process's is overwritten by the next one
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, beside, {"format": "pt"})
        with beside.open("rb") as content, atomic_file(path) as file:
            _copy(content, file, {"format": "pt", **metadata})
    except SafetensorError as error:  # of a full disk, for one
        raise OSError(str(error)) from error
    finally:
        beside.unlink(missing_ok=True)


def _copy(content: BufferedReader, file: BinaryIO, metadata: dict[str, str]) -> None:
    """Copy a .safetensors file with other metadata."""
    header = json.loads(content.read(int.from_bytes(content.read(8), "little")))
    start = content.tell()
    if SPEC in metadata:
        metadata[HASH] = f"0x{hashlib.file_digest(content, 'sha256').hexdigest()}"
    header["__metadata__"] = dict(sorted(metadata.items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text = text.ljust(-(-len(text) // 8) * 8)  # so that tensors stay aligned
    content.seek(start)
    file.write(len(text).to_bytes(8, "little") + text)
    shutil.copyfileobj(content, file, 1 << 24)
