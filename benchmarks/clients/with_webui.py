"""AUTOMATIC1111's web UI: the code of its built-in Lora extension, on the UNet that it builds for Stable Diffusion 1.

    python with_webui.py INPUTS CHECKOUT CHECKOUT_OF_STABLEDIFFUSION

The last is Stability-AI/stablediffusion at the commit that `modules/launch_utils.py` names, where the UNet's class is.
What the extension imports of the program around it (settings, queues, hashes) is replaced by the values it would find;
the file is read, its keys matched, and the weights patched by its own functions. One layer at a time has weights.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
import torch
import yaml
from common import Inputs, Report, Weights
from safetensors import safe_open
from safetensors.torch import load_file

FOLDER, CHECKOUT, ORIGINAL = sys.argv[1:]
LORA_TAB = "extensions-builtin/Lora"


def replaced(name: str, **values: Any) -> ModuleType:
    """A module of the program that the extension only asks for `values`."""
    module = sys.modules[name] = ModuleType(name)
    vars(module).update(values)
    parent, _, child = name.rpartition(".")
    if parent in sys.modules:
        setattr(sys.modules[parent], child, module)
    return module


def import_extension(model: Any) -> tuple[Any, Any]:
    """Its modules `networks` and `network`, for a loaded `model`."""
    sys.path[:0] = [str(Path(CHECKOUT, LORA_TAB)), CHECKOUT, ORIGINAL]
    replaced("gradio")
    package = replaced("modules")
    package.__path__ = [str(Path(CHECKOUT, "modules"))]  # what is not replaced is its own
    options = SimpleNamespace(lora_in_memory_limit=0, lora_preferred_name="Alias from file")
    arguments = SimpleNamespace(lora_dir=f"{FOLDER}/lora", lyco_dir_backcompat=f"{FOLDER}/lora")
    replaced("modules.shared", sd_model=model, opts=options, cmd_opts=arguments, walk_files=lambda *_, **__: [])
    replaced("modules.devices", cpu=torch.device("cpu"), device=torch.device("cpu"), dtype=torch.float32)
    replaced("modules.sd_models", read_state_dict=load_file, read_metadata_from_safetensors=metadata)
    replaced("modules.cache", cached_data_for_file=lambda title, name, file, read: read())
    replaced("modules.hashes", sha256_from_cache=lambda *_, **__: "", sha256=lambda *_, **__: "")
    replaced("modules.errors", display=lambda error, task: print(task, error, file=sys.stderr))
    replaced("modules.textual_inversion")
    for name in ("scripts", "sd_hijack", "patches", "textual_inversion.textual_inversion"):
        replaced(f"modules.{name}")
    import network
    import networks

    return networks, network


def metadata(file: str) -> dict[str, str]:
    """The header of a file."""
    return safe_open(file, "pt").metadata()


def original_unet() -> torch.nn.Module:
    """Stable Diffusion 1's, of the configuration that ships with the program, without weights."""
    sys.path.append(ORIGINAL)
    from ldm.modules.diffusionmodules.openaimodel import UNetModel

    config = yaml.safe_load(Path(CHECKOUT, "configs/v1-inference.yaml").read_text())
    with torch.device("meta"):
        return UNetModel(**config["model"]["params"]["unet_config"]["params"])


@torch.no_grad()
def main() -> None:
    """Both layouts of the LoRA."""
    inputs = Inputs(FOLDER)
    model = SimpleNamespace(is_sdxl=False, cond_stage_model=torch.nn.Module(), model=torch.nn.Module())
    model.model.diffusion_model = original_unet()
    networks, network = import_extension(model)
    said = Path(CHECKOUT, "CHANGELOG.md").read_text().splitlines()[0].removeprefix("## ")
    report = Report("AUTOMATIC1111 web UI", "torch", webui=said)
    report.listen()
    ours, before = (safe_open(inputs / name, "pt") for name in ("fused.safetensors", "base.safetensors"))
    for file in ("kohya_lora_weights", "pytorch_lora_weights"):
        with report.row(f"{file}.safetensors") as row:
            networks.assign_network_names_to_compvis_modules(model)
            on_disk = network.NetworkOnDisk(file, inputs / f"lora/{file}.safetensors")
            row["listed_as"] = on_disk.sd_version.name
            loaded = networks.load_network(file, on_disk)
            layers = {key.rsplit(".", 2)[0] for key in load_file(on_disk.filename) if not key.endswith("alpha")}
            row |= {"layers_in_file": len(layers), "matched": len(loaded.modules)}
            networks.loaded_networks[:] = [loaded]
            weights = Weights()
            for name, layer in model.model.named_modules():
                if layer.network_layer_name in loaded.modules:
                    stored = before.get_tensor(f"model.{name}.weight").float()
                    was, layer.weight = layer.weight, torch.nn.Parameter(stored.clone())
                    layer.bias, bias = None, layer.bias
                    networks.network_apply_weights(layer)
                    weights.add(layer.weight.numpy(), ours.get_tensor(f"model.{name}.weight").numpy(), stored.numpy())
                    layer.weight, layer.bias, layer.network_current_names = was, bias, ()
                    layer.network_weights_backup = layer.network_bias_backup = None
            if loaded.modules:
                row |= weights.row()
    report.finish()


if __name__ == "__main__":
    main()
