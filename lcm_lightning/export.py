"""`python -m lcm_lightning.export run=outputs/... format=kohya`: a run, or any LoRA, as other programs open it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from omegaconf import DictConfig, OmegaConf

from lcm_lightning.config.checks import check_writable, resolve
from lcm_lightning.config.entry import command
from lcm_lightning.errors import UserError

if TYPE_CHECKING:
    import torch

    from lcm_lightning.exports.metadata import Described
    from lcm_lightning.models.kinds import AdapterKind
    from lcm_lightning.models.stable_diffusion import StableDiffusion

EXPORT_KEYS = ("run", "model", "lora", "weights", "lora_role", "student", "format", "dtype")
EXPORT_KEYS += ("title", "author", "license", "overwrite", "output")

# Writes a model with its adapters into a folder, in a type, with what its author says; returns what to do with it.
Writer: TypeAlias = "Callable[[StableDiffusion, Sequence[AdapterKind], Path, torch.dtype, Described], str]"


def write_diffusers(
    model: StableDiffusion, kinds: Sequence[AdapterKind], folder: Path, dtype: torch.dtype, described: Described
) -> str:
    """One LoRA that changes the model as all of its adapters do together, under diffusers' keys."""
    from lcm_lightning.exports.adapter_files import joint_state_dict, write_diffusers_lora
    from lcm_lightning.exports.usage import diffusers_lora

    check_loras("diffusers", kinds)
    tensors = joint_state_dict(model, [kind.name for kind in kinds], dtype)
    return diffusers_lora(write_diffusers_lora(tensors, model, kinds, folder, described), model, kinds)


def write_kohya(
    model: StableDiffusion, kinds: Sequence[AdapterKind], folder: Path, dtype: torch.dtype, described: Described
) -> str:
    """The same under the keys of kohya's scripts."""
    from lcm_lightning.exports.adapter_files import joint_state_dict, write_kohya_lora
    from lcm_lightning.exports.usage import kohya_lora

    check_loras("kohya", kinds)
    tensors = joint_state_dict(model, [kind.name for kind in kinds], dtype)
    return kohya_lora(write_kohya_lora(tensors, model, kinds, folder, described), kinds)


def write_fused(
    model: StableDiffusion, kinds: Sequence[AdapterKind], folder: Path, dtype: torch.dtype, described: Described
) -> str:
    """A folder that diffusers loads as it is, LoRAs in its weights, with the scheduler that they are drawn with."""
    from lcm_lightning.exports.fused import write_pipeline
    from lcm_lightning.exports.usage import diffusers_folder

    write_pipeline(model, kinds, folder, dtype)
    return diffusers_folder(folder, kinds, dtype)


def write_single_file(
    model: StableDiffusion, kinds: Sequence[AdapterKind], folder: Path, dtype: torch.dtype, described: Described
) -> str:
    """The same in one file, by the names of Stable Diffusion's own code."""
    from lcm_lightning.exports.single_checkpoint import write_single_file as write
    from lcm_lightning.exports.usage import single_file

    return single_file(write(model, kinds, folder, dtype, described), kinds)


def write_onnx(
    model: StableDiffusion, kinds: Sequence[AdapterKind], folder: Path, dtype: torch.dtype, described: Described
) -> str:
    """The same as ONNX graphs, in optimum's layout."""
    from lcm_lightning.exports.onnx_folder import write_onnx as write
    from lcm_lightning.exports.usage import differences, optimum_folder

    check_types("onnx", dtype)
    found = write(model, kinds, folder, dtype)
    return f"{differences(found, 'onnxruntime')}\n\n{optimum_folder(folder, kinds)}"


def write_openvino(
    model: StableDiffusion, kinds: Sequence[AdapterKind], folder: Path, dtype: torch.dtype, described: Described
) -> str:
    """The same as OpenVINO's graphs, in the layout of optimum-intel and OpenVINO GenAI."""
    from lcm_lightning.exports.openvino_folder import write_openvino as write
    from lcm_lightning.exports.usage import differences, openvino_folder

    check_types("openvino", dtype)
    found = write(model, kinds, folder, dtype)
    return f"{differences(found, 'OpenVINO')}\n\n{openvino_folder(folder, kinds)}"


def check_types(name: str, dtype: torch.dtype) -> None:
    """Raise a `UserError` for a type that runtimes on a CPU do not compute in."""
    if str(dtype) == "torch.bfloat16":
        raise UserError(f"format={name}: dtype=bfloat16 is not supported; set dtype=float32 or dtype=float16")


def check_installed(name: str) -> None:
    """Raise a `UserError` unless the packages are there that the format `name` needs."""
    for package in PACKAGES.get(name, ()):
        if find_spec(package) is None:
            raise UserError(f"format={name}: needs {package}; pip install 'lcm-lightning[{name}]'")


def check_loras(name: str, kinds: Sequence[AdapterKind]) -> None:
    """Raise a `UserError` unless there are LoRAs, which the format `name` takes, and no whole UNet."""
    if not kinds:
        raise UserError(f"format={name}: writes a LoRA, and there is none; give run=outputs/... or lora=...")
    if any(kind.whole for kind in kinds):
        raise UserError(f"format={name}: writes a LoRA, and this is a whole UNet; set format=fused")


FORMATS: Mapping[str, tuple[Writer, str]] = {  # with the type of what is written where none is asked for
    "diffusers": (write_diffusers, "float32"),
    "kohya": (write_kohya, "float32"),
    "fused": (write_fused, "float16"),
    "single_file": (write_single_file, "float16"),
    "onnx": (write_onnx, "float32"),
    "openvino": (write_openvino, "float32"),
}

PACKAGES = {  # beyond those that everything needs
    "onnx": ("onnx", "onnxscript", "onnxruntime"),
    "openvino": ("openvino", "openvino_tokenizers"),
}


def check_output(folder: Path, *, overwrite: bool) -> None:
    """Raise a `UserError` unless `folder` can be written to, and is empty or may be written over."""
    if folder.is_dir() and any(folder.iterdir()) and not overwrite:
        raise UserError(f"output={folder}: holds files already; set overwrite=true to write over them, or output=...")
    check_writable("output", folder)


def sizes(folder: Path) -> list[str]:
    """A line for each file in `folder`, with its size, and for the folder where there are several."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = [f"{path}  {megabytes(path.stat().st_size)}" for path in files]
    whole = sum(path.stat().st_size for path in files)
    return lines if len(files) == 1 else [*lines, f"{folder}  {megabytes(whole)} in {len(files)} files"]


def megabytes(size: int) -> str:
    """A number of bytes in words."""
    return f"{size / 1e6:.1f} MB" if size >= 1e5 else f"{size / 1e3:.1f} kB"


@command("export")
def main(cfg: DictConfig) -> None:
    """Entry point."""
    resolve(cfg, EXPORT_KEYS)
    if cfg.format not in FORMATS:
        raise UserError(f"format={cfg.format}: expected one of {', '.join(FORMATS)}")
    write, usual_dtype = FORMATS[cfg.format]
    folder = Path(cfg.output).expanduser()
    check_installed(cfg.format)
    check_output(folder, overwrite=cfg.overwrite)
    # Imported once the configuration is right.
    from lcm_lightning.config.instantiate import parse_dtype
    from lcm_lightning.config.model_choice import find_models

    dtype = parse_dtype(cfg.dtype or usual_dtype)
    # Changes are added up in float32, whatever they are stored in at the end.
    (source,) = find_models(OmegaConf.merge(cfg, {"dtype": "float32"}))
    from lcm_lightning.config.quiet import quiet_known_warnings
    from lcm_lightning.exports.metadata import Described

    quiet_known_warnings()
    loaded = source.load()
    usage = write(loaded.model, loaded.adapters, folder, dtype, Described(cfg.title, cfg.author, cfg.license))
    print("\n".join([*sizes(folder), "", usage]))


if __name__ == "__main__":
    main()
