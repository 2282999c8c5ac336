"""A pipeline's folder whose networks are graphs of another runtime's."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from lcm_lightning.exports.graphs import Graph
from lcm_lightning.models.older_readers import add_for_older_readers
from lcm_lightning.models.variants import INDEX, forget_origin
from lcm_lightning.output.files import whole_files


def write_network_folder(
    pipeline: Any,
    networks: Iterable[Graph],
    folder: Path,
    export: Callable[[Graph, Path], float],
    file: str,
    export_tokenizer: Callable[[Any, Path], None] = lambda tokenizer, place: None,
) -> dict[str, float]:
    """Write scheduler, tokenizers, configs and what `export` makes of each network; each file whole, the index last.

    Returns what `export` returned, by the place of `file`. `export_tokenizer` may put more beside a tokenizer's files.
    """
    found = {}
    with whole_files(folder, last=INDEX) as temporary:
        pipeline.save_config(temporary)
        pipeline.scheduler.save_pretrained(temporary / "scheduler")
        for name in ("tokenizer", "tokenizer_2"):
            if getattr(pipeline, name, None) is not None:
                getattr(pipeline, name).save_pretrained(temporary / name)
                export_tokenizer(getattr(pipeline, name), temporary / name)
        for graph in networks:
            place = temporary / graph.folder
            place.mkdir()
            found[f"{graph.folder}/{file}"] = export(graph, place)
            write_config(graph, place / "config.json")
        add_for_older_readers(temporary)
        forget_origin(temporary)
    return found


def write_config(graph: Graph, path: Path) -> None:
    """The config of the network that a graph is a part of, as diffusers or transformers write it."""
    config = graph.config
    if hasattr(config, "to_json_file"):
        config.to_json_file(path, use_diff=False)
        return
    content = {key: value for key, value in config.items() if key != "_name_or_path"}  # which may be no text
    path.write_text(json.dumps(content, indent=2, sort_keys=True, default=list) + "\n", encoding="utf-8")
