"""`python -m lcm_lightning.export run=outputs/... format=kohya`: a run, or any LoRA, as other programs open it.

`push_to_hub=OWNER/NAME` in the place of a format publishes the run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, TypeAlias

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from lcm_lightning.config.checks import check_writable, resolve
from lcm_lightning.config.entry import command
from lcm_lightning.errors import UserError

if TYPE_CHECKING:
    import torch

    from lcm_lightning.exports.metadata import Described
    from lcm_lightning.models.kinds import AdapterKind
    from lcm_lightning.models.stable_diffusion import StableDiffusion

EXPORT_KEYS: tuple[str, ...] = ("run", "model", "lora", "weights", "lora_role", "student", "format", "dtype")
EXPORT_KEYS += ("title", "author", "license", "overwrite", "output")
EXPORT_KEYS += ("push_to_hub", "private", "revision", "commit_message", "create_pr", "base_model")

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
    return kohya_lora(write_kohya_lora(tensors, model, kinds, folder, described), model, kinds)


def write_fused(
    model: StableDiffusion, kinds: Sequence[AdapterKind], folder: Path, dtype: torch.dtype, described: Described
) -> str:
    """A folder that diffusers loads as it is, LoRAs in its weights, with the scheduler that they are drawn with."""
    from lcm_lightning.exports.fused import write_pipeline
    from lcm_lightning.exports.usage import diffusers_folder

    write_pipeline(model, kinds, folder, dtype)
    return diffusers_folder(folder, model, kinds, dtype)


def write_single_file(
    model: StableDiffusion, kinds: Sequence[AdapterKind], folder: Path, dtype: torch.dtype, described: Described
) -> str:
    """The same in one file, by the names of Stable Diffusion's own code."""
    from lcm_lightning.exports.single_checkpoint import write_single_file as write
    from lcm_lightning.exports.usage import single_file

    return single_file(write(model, kinds, folder, dtype, described), model, kinds)


def write_onnx(
    model: StableDiffusion, kinds: Sequence[AdapterKind], folder: Path, dtype: torch.dtype, described: Described
) -> str:
    """The same as ONNX graphs, in optimum's layout."""
    from lcm_lightning.exports.onnx_folder import write_onnx as write
    from lcm_lightning.exports.usage import differences, optimum_folder

    found = write(model, kinds, folder, dtype)
    return f"{differences(found, 'onnxruntime')}\n\n{optimum_folder(folder, model, kinds)}"


def write_openvino(
    model: StableDiffusion, kinds: Sequence[AdapterKind], folder: Path, dtype: torch.dtype, described: Described
) -> str:
    """The same as OpenVINO's graphs, in the layout of optimum-intel and OpenVINO GenAI."""
    from lcm_lightning.exports.openvino_folder import write_openvino as write
    from lcm_lightning.exports.usage import differences, openvino_folder

    found = write(model, kinds, folder, dtype)
    return f"{differences(found, 'OpenVINO')}\n\n{openvino_folder(folder, model, kinds)}"


def check_loras(name: str, kinds: Sequence[AdapterKind]) -> None:
    """Raise a `UserError` unless there are LoRAs, which the format `name` takes, and no whole UNet."""
    if not kinds:
        raise UserError(f"format={name}: writes a LoRA, and there is none; give run=outputs/... or lora=...")
    if any(kind.whole for kind in kinds):
        raise UserError(f"format={name}: writes a LoRA, and this is a whole UNet; set format=fused")


@dataclass(frozen=True)
class Format:
    """What can be written.

    Attributes:
        write: writes it.
        dtype: of what is written where none is asked for.
        dtypes: those that its readers compute in.
        described: whether it has a header for what its author says.
        packages: needed beyond those that everything needs; an extra of the format's name installs them.
    """

    write: Writer
    dtype: str = "float16"
    dtypes: tuple[str, ...] = ("float32", "float16", "bfloat16")
    described: bool = False
    packages: tuple[str, ...] = ()

    def check(self, cfg: DictConfig) -> None:
        """Raise a `UserError` for what the format does not take, or needs and is not there."""
        if cfg.dtype not in (None, *self.dtypes):
            raise UserError(f"dtype={cfg.dtype}: format={cfg.format} takes {', '.join(self.dtypes)}")
        for key in () if self.described else ("title", "author", "license"):
            if cfg[key] is not None:
                raise UserError(f"{key}={cfg[key]}: format={cfg.format} has no header to say it in; leave it out")
        for package in self.packages:
            if find_spec(package) is None:
                raise UserError(f"format={cfg.format}: needs {package}; pip install 'lcm-lightning[{cfg.format}]'")


RUNTIMES = ("float32", "float16")
FORMATS: Mapping[str, Format] = {
    "diffusers": Format(write_diffusers, "float32", described=True),
    "kohya": Format(write_kohya, "float32", described=True),
    "fused": Format(write_fused),
    "single_file": Format(write_single_file, described=True),
    "onnx": Format(write_onnx, "float32", RUNTIMES, packages=("onnx", "onnxscript", "onnxruntime")),
    "openvino": Format(write_openvino, "float32", RUNTIMES, packages=("openvino", "openvino_tokenizers")),
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


OF_HUB = ("private", "revision", "commit_message", "create_pr", "base_model")  # that a format has no use for
OF_BOTH = ("run", "license", "push_to_hub")
OF_FORMATS = tuple(key for key in EXPORT_KEYS if key not in (*OF_BOTH, *OF_HUB))


def typed() -> set[str]:
    """The keys that this command was given: of some any value is a default too."""
    return {override.partition("=")[0].lstrip("+~").partition(".")[0] for override in HydraConfig.get().overrides.task}


def push_to_hub(cfg: DictConfig) -> str:
    """Publish the run of a command; the address to look at. Raises `UserError`."""
    for key in OF_FORMATS:
        if key in typed() and cfg.get(key) is not None:
            raise UserError(
                f"{key}=... and push_to_hub={cfg.push_to_hub}: a run is published as it is; leave {key} out"
            )
    if cfg.run is None:
        raise UserError(f"push_to_hub={cfg.push_to_hub}: publishes a run; add run=outputs/<experiment>/<date_time>")
    from lcm_lightning.config.quiet import quiet_known_warnings
    from lcm_lightning.sharing.model_card import CardSettings
    from lcm_lightning.sharing.publishing import Push, push_run

    quiet_known_warnings()
    push = Push(cfg.push_to_hub, cfg.private, cfg.revision, cfg.commit_message, cfg.create_pr)
    return push_run(Path(cfg.run).expanduser(), push, CardSettings(cfg.push_to_hub, cfg.base_model, cfg.license))


@command("export")
def main(cfg: DictConfig) -> None:
    """Entry point."""
    resolve(cfg, EXPORT_KEYS)
    if cfg.push_to_hub is not None:
        print(push_to_hub(cfg))
        return
    if cfg.format not in FORMATS:
        raise UserError(f"format={cfg.format}: expected one of {', '.join(FORMATS)}, or push_to_hub=OWNER/NAME")
    format = FORMATS[cfg.format]
    format.check(cfg)
    for key in OF_HUB:
        if key in typed() and cfg[key] is not None:
            raise UserError(
                f"{key}={cfg[key]}: is of push_to_hub=OWNER/NAME, and format={cfg.format} publishes nothing; leave it "
                "out"
            )
    folder = Path(cfg.output).expanduser()
    check_output(folder, overwrite=cfg.overwrite)
    # Imported once the configuration is right.
    from lcm_lightning.config.instantiate import parse_dtype
    from lcm_lightning.config.model_choice import find_models

    dtype = parse_dtype(cfg.dtype or format.dtype)
    exact = cfg.copy()
    exact.dtype = "float32"  # in which changes are added up, whatever they are stored in at the end
    (source,) = find_models(exact)
    from lcm_lightning.config.quiet import quiet_known_warnings
    from lcm_lightning.exports.metadata import Described

    quiet_known_warnings()
    loaded = source.load()
    described = Described(cfg.title, cfg.author, cfg.license)
    try:
        usage = format.write(loaded.model, loaded.adapters, folder, dtype, described)
    except OSError as error:
        raise UserError(f"output={folder}: cannot be written ({error}); make room there, or set output=...") from error
    print("\n".join([*sizes(folder), "", usage]))


if __name__ == "__main__":
    main()
