"""What programs with transformers before version 5 ask of a pipeline's folder that version 5 writes without."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file

IN_TEXT_ENCODER = "text_model."


def add_for_older_readers(folder: Path) -> None:
    """Let transformers 4 read the pipeline in `folder` too, and ComfyUI its text encoder; for 5 nothing changes.

    Transformers 5 writes tokenizers as ``tokenizer.json`` alone, where 4 opens ``vocab.json`` and ``merges.txt`` and
    fails, and may leave ``text_model.`` out of the names of a text encoder's weights, which 4 then sets at random.
    """
    for file in folder.glob("tokenizer*/tokenizer.json"):
        model = json.loads(file.read_text(encoding="utf-8"))["model"]
        (file.parent / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
        merges = (" ".join(merge) if isinstance(merge, list) else merge for merge in model["merges"])
        (file.parent / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n", encoding="utf-8")
    for file in folder.glob("text_encoder*/model.safetensors"):
        name_as_before(file)


def name_as_before(file: Path) -> None:
    """Give a text encoder's weights the names that transformers 4 gives them."""
    with safe_open(file, "pt") as stored:
        tensors, metadata = {key: stored.get_tensor(key) for key in stored.keys()}, stored.metadata()  # noqa: SIM118
    if any(key.startswith(IN_TEXT_ENCODER) for key in tensors):
        return
    outside = ("text_projection.",)
    named = {key if key.startswith(outside) else IN_TEXT_ENCODER + key: value for key, value in tensors.items()}
    save_file(named, file, metadata)
