"""A pipeline as OpenVINO's intermediate representation, in the layout of optimum-intel and OpenVINO GenAI."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lcm_lightning.exports.fused import fuse
from lcm_lightning.exports.graphs import (
    FLOAT16_LIMIT,
    FLOAT32_LIMIT,
    VAE_FOLDERS,
    Graph,
    graphs,
    largest_difference,
    runtime_vae_dtype,
)
from lcm_lightning.exports.network_folder import write_network_folder
from lcm_lightning.models.kinds import AdapterKind, usual_kind
from lcm_lightning.models.sampling import Sampler, make_scheduler
from lcm_lightning.models.stable_diffusion import StableDiffusion

FILE = "openvino_model.xml"
# Those that OpenVINO GenAI 2026 has written anew in C++; it refuses a folder with another.
GENAI_SCHEDULERS = (
    "LCMScheduler",
    "DDIMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "LMSDiscreteScheduler",
    "PNDMScheduler",
)
TRAILING_DDIM = Sampler("ddim", "DDIM", "DDIMScheduler", {"timestep_spacing": "trailing"})

log = logging.getLogger(__name__)


def write_openvino(
    model: StableDiffusion, kinds: Sequence[AdapterKind], folder: Path, dtype: torch.dtype
) -> dict[str, float]:
    """Write the folder, every file whole; the largest difference of each network from torch's, found by OpenVINO.

    Networks compute in float32 on a CPU; with `dtype` float16 their weights are stored so. The model itself is changed;
    see `fuse`. Tokenizers are graphs too, as OpenVINO GenAI takes them.

    Raises:
        UserError: a network is not torch's.
        OSError: it cannot be written.
    """
    vae = runtime_vae_dtype(model, dtype)
    pipeline = fuse(model, kinds, torch.float32)
    pipeline.scheduler = known_scheduler(
        pipeline.scheduler, usual_kind(kinds, model.guidance_scale), model.scheduler_config
    )

    def export(graph: Graph, place: Path) -> float:
        stored = vae if graph.folder in VAE_FOLDERS else dtype
        return export_network(graph, place, half=stored == torch.float16)

    networks = graphs(pipeline, timestep_rank=1)
    return write_network_folder(pipeline, networks, folder, export, FILE, export_tokenizer)


@torch.no_grad()
def export_network(graph: Graph, folder: Path, *, half: bool) -> float:
    """Write a network as `openvino_model.xml` and `.bin`; its largest difference from torch's at another size."""
    import openvino

    examples = list(graph.inputs.values())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = openvino.convert_model(graph.module.eval(), example_input=tuple(examples))
    shapes = {}
    for port, (name, example) in zip(network.inputs, graph.inputs.items(), strict=True):
        port.get_tensor().set_names({name})
        shapes[port] = openvino.PartialShape([-1 if n in graph.axes[name] else s for n, s in enumerate(example.shape)])
    network.reshape(shapes)
    for port, name in zip(network.outputs, graph.outputs, strict=True):
        port.get_tensor().set_names({name})
    save_model(network, folder / FILE, half=half)
    return difference(graph, folder / FILE, FLOAT16_LIMIT if half else FLOAT32_LIMIT)


def save_model(network: Any, file: Path, *, half: bool) -> None:
    """Write a network, weights in float16 if `half`. Raises `OSError`, where OpenVINO says RuntimeError of a disk."""
    import openvino

    try:
        openvino.save_model(network, file, compress_to_fp16=half)
    except RuntimeError as error:
        raise OSError(str(error)) from error


def difference(graph: Graph, file: Path, limit: float) -> float:
    """The largest by which any output of OpenVINO is off torch's, for inputs of other sizes than were traced."""
    import openvino

    inputs = graph.other_inputs()
    # Exact arithmetic: on a CPU with bfloat16 units OpenVINO would take them.
    compiled = openvino.compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    found = compiled({name: tensor.numpy() for name, tensor in inputs.items()})
    expected = graph.module(*inputs.values())
    return largest_difference(graph, [torch.from_numpy(found[name]) for name in graph.outputs], expected, limit)


def export_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write a tokenizer as `openvino_tokenizer.xml` beside its own files; it cuts prompts, its caller pads them."""
    from openvino_tokenizers import convert_tokenizer

    logging.getLogger("openvino_tokenizers").setLevel(logging.WARNING)  # it says what kind of tokenizer it has found
    converted = convert_tokenizer(tokenizer, truncation=True)
    save_model(converted, folder / "openvino_tokenizer.xml", half=True)  # as its own default


def known_scheduler(scheduler: Any, usual: AdapterKind, schedule: Mapping[str, Any]) -> Any:
    """`scheduler`, or where OpenVINO GenAI has none of its class a DDIM that takes the same steps, if there is one.

    Without noise (eta = 0) TCD's step (Zheng et al. 2024, arXiv 2402.19159) is DDIM's (Song et al. 2020, eq. 12), and
    where the usual steps divide the solver's the timesteps are those of trailing spacing.

    Args:
        usual: the kind that the model is drawn as.
        schedule: the model's noise schedule.
    """
    name = type(scheduler).__name__
    if name in GENAI_SCHEDULERS:
        if name == "LCMScheduler" and scheduler.config.prediction_type == "v_prediction":
            log.warning("format=openvino: OpenVINO GenAI cannot draw this model by LCM; optimum-intel reads the folder")
        return scheduler
    if not usual.sampler.settings.get("eta", 0.0):
        ddim: Any = make_scheduler(TRAILING_DDIM, {**schedule, "set_alpha_to_one": False})  # TCD ends at timestep 0
        for each in (scheduler, ddim):
            each.set_timesteps(usual.steps)
        if scheduler.timesteps.tolist() == ddim.timesteps.tolist():
            return ddim
    log.warning("format=openvino: OpenVINO GenAI has no %s and will refuse the folder; optimum-intel reads it", name)
    return scheduler
