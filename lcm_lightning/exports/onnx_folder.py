"""A pipeline as ONNX graphs, in the layout of optimum's `ORTStableDiffusionPipeline`, for onnxruntime anywhere."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from lcm_lightning.errors import UserError, first_line
from lcm_lightning.exports.fused import fuse
from lcm_lightning.exports.graphs import (
    FLOAT16_LIMIT,
    FLOAT32_LIMIT,
    Graph,
    graphs,
    largest_difference,
    runtime_vae_dtype,
)
from lcm_lightning.exports.network_folder import write_network_folder
from lcm_lightning.models.kinds import AdapterKind
from lcm_lightning.models.stable_diffusion import StableDiffusion

FILE = "model.onnx"
OPSET = 18  # the least that torch's exporter writes without converting


def write_onnx(
    model: StableDiffusion, kinds: Sequence[AdapterKind], folder: Path, dtype: torch.dtype
) -> dict[str, float]:
    """Write the folder, every file whole; the largest difference of each network from torch's, found by onnxruntime.

    The model itself is changed; see `fuse`. Weights lie beside each graph, in `model.onnx.data`.

    Raises:
        UserError: a network is not torch's.
        OSError: it cannot be written.
    """
    pipeline = fuse(model, kinds, dtype, runtime_vae_dtype(model, dtype))
    return write_network_folder(pipeline, graphs(pipeline, timestep_rank=0), folder, export, FILE)


@torch.no_grad()
def export(graph: Graph, folder: Path) -> float:
    """Write a network as `model.onnx` in `folder`; its largest difference from torch's at another size."""
    shapes = {name: dict.fromkeys(axes, torch.export.Dim.DYNAMIC) for name, axes in graph.axes.items()}
    with quiet_exporter():
        program = torch.onnx.export(
            graph.module.eval(),
            tuple(graph.inputs.values()),
            input_names=list(graph.inputs),
            output_names=list(graph.outputs),
            dynamic_shapes=by_argument(shapes),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
        assert program is not None  # of dynamo=True
        for node in program.model.graph.all_nodes():
            node.metadata_props.clear()  # lines of Python code that it stems from, with paths on this machine
        program.save(folder / FILE, external_data=True)
    return difference(graph, folder / FILE)


def by_argument(shapes: dict[str, Any]) -> tuple[Any, ...]:
    """What `shapes` say of the inputs, in the form of the module's arguments: those after the third are gathered."""
    values = list(shapes.values())
    return tuple(values) if len(values) <= 3 else (*values[:3], tuple(values[3:]))


def difference(graph: Graph, file: Path) -> float:
    """The largest by which any output of onnxruntime is off torch's, for inputs of other sizes than were traced."""
    import onnxruntime

    inputs = graph.other_inputs()
    try:
        session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
        found = session.run(list(graph.outputs), {name: tensor.numpy() for name, tensor in inputs.items()})
    except Exception as error:  # of a library in C++
        raise UserError(
            f"format=onnx: onnxruntime does not take {graph.folder} ({first_line(error)[:200]}); set dtype=float32 if "
            "it was not, or format=fused"
        ) from error
    expected = graph.module(*inputs.values())
    limit = FLOAT16_LIMIT if any(tensor.dtype == torch.float16 for tensor in expected) else FLOAT32_LIMIT
    return largest_difference(graph, [torch.from_numpy(value) for value in found], expected, limit)


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """torch's exporter without what it says of its own parts."""
    names = ("torch.onnx", "onnxscript", "onnx_ir")
    before = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for name, level in before.items():
            logging.getLogger(name).setLevel(level)
