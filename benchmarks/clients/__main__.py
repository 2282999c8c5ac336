"""``python -m benchmarks.clients``: programs that are not ours read our files, each in an environment of its own."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.report import replace_figures
from lcm_lightning.errors import UserError, report_user_errors

PAGE = Path(__file__).parents[2] / "docs" / "clients.md"


@dataclass(frozen=True)
class Client:
    """One program.

    Attributes:
        name: what it is asked for by.
        script: of this folder, which runs in its environment.
        size: of `benchmarks.clients.inputs` that it reads.
        packages: that pip installs for it, on top of this environment unless `alone`.
        checkouts: repositories on GitHub whose folders the script wants, in this order.
        more: further arguments of the script.
        alone: whether it has no torch and nothing else of this environment.
    """

    name: str
    script: str
    size: str
    packages: tuple[str, ...] = ()
    checkouts: tuple[str, ...] = ()
    more: tuple[str, ...] = ()
    alone: bool = False


COMFY = (
    "torchsde",
    "einops",
    "torchaudio",
    "sentencepiece",
    "av",
    "comfy-kitchen",
    "comfy-aimdo",
    "spandrel",
    "kornia",
)
OLD_DIFFUSERS = ("diffusers==0.32.2", "transformers==4.48.3", "peft==0.14.0", "huggingface_hub<1", "accelerate==1.3.0")
CLIENTS = (
    Client("diffusers", "with_diffusers.py", "tiny"),
    Client("diffusers_2024", "with_diffusers.py", "tiny", OLD_DIFFUSERS),
    Client("lycoris", "with_lycoris.py", "tiny", ("lycoris-lora",)),
    Client(
        "sd_scripts",
        "with_sd_scripts.py",
        "tiny",
        ("einops", "toml", "opencv-python-headless"),
        ("kohya-ss/sd-scripts",),
    ),
    Client("comfyui", "with_comfyui.py", "sd15", (*COMFY, "pydantic-settings"), ("comfyanonymous/ComfyUI",)),
    Client(
        "webui",
        "with_webui.py",
        "sd15",
        ("einops",),
        ("AUTOMATIC1111/stable-diffusion-webui", "Stability-AI/stablediffusion"),
    ),
    *(
        Client(name, "with_stable_diffusion_cpp.py", "sd15", (name, "numpy", "safetensors"), more=(name,), alone=True)
        for name in ("cyllama", "inferna")
    ),
    Client("openvino", "with_openvino.py", "small", ("openvino", "openvino-tokenizers", "openvino-genai")),
    Client("onnxruntime", "with_onnxruntime.py", "tiny", ("onnx", "onnxscript", "onnxruntime")),
)


def environment(client: Client, work: Path, python: str) -> Path:
    """The interpreter of a client's environment, made where it is missing."""
    folder = work / "environments" / client.name
    interpreter = folder / "bin" / "python"
    if not client.packages:
        return Path(sys.executable)
    if not (folder / "ready").is_file():
        if client.alone:
            subprocess.run([python, "-m", "venv", folder], check=True)
        else:
            venv.create(folder, with_pip=True)
            (below,) = (folder / "lib").glob("python*/site-packages")
            (below / "this_environment.pth").write_text(sysconfig.get_path("purelib") + "\n")
        subprocess.run([interpreter, "-m", "pip", "install", "-q", *client.packages], check=True)
        (folder / "ready").touch()
    return interpreter


def run(client: Client, work: Path, checkouts: Path | None, python: str) -> dict[str, Any]:
    """What a client's script reports.

    Raises:
        UserError: a repository that it needs is not there, or the script dies.
    """
    folders = []
    for repository in client.checkouts:
        folder = (checkouts or Path("CHECKOUTS")) / repository.rpartition("/")[2]
        if not folder.is_dir():
            raise UserError(
                f"{client.name}: no {folder}; clone github.com/{repository} there, or name its parent with --checkouts"
            )
        folders.append(str(folder))
    from benchmarks.clients.inputs import SIZES, make_inputs  # torch and diffusers, once they are needed

    inputs = make_inputs(work / client.size, SIZES[client.size])
    script = Path(__file__).parent / client.script
    command = [environment(client, work, python), script, inputs, *folders, *client.more]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
    if done.returncode:
        raise UserError(f"{client.name}: its script ended with code {done.returncode}, as said above")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return {**found, "date": datetime.now(UTC).strftime("%Y-%m-%d"), "size": client.size}


def table(results: Iterable[dict[str, Any]]) -> str:
    """Markdown: a row of each file of each client."""
    lines = ["| client | version | read | difference from ours | LoRA's change | date |", "| --- " * 6 + "|"]
    for result in results:
        versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items() if number)
        for row in result["rows"]:
            said, change = cells(row)
            lines.append(
                f"| {result['client']} | {versions} | {row['loaded']} ({result['size']}) | {said} | {change} "
                f"| {result['date']} |"
            )
    return "\n".join(lines)


def cells(row: dict[str, Any]) -> tuple[str, str]:
    """How far a row is from ours, in words, and how much the LoRA changes."""
    if "error" in row:
        return row["error"], ""
    parts, change = [], ""
    if row.get("matched") == 0:
        parts.append(f"none of {row['layers_in_file']} layers applied")
    if "weight_relative" in row:
        parts.append(f"weights {row['weight_relative']:g} of the change, {row['layers']} layers")
    for name in ("base", "picture"):
        if name in row:
            parts.append(
                f"{'without LoRA' if name == 'base' else 'picture'}: max {row[name]['max']:g}, "
                f"mean {row[name]['mean']:g}"
            )
            change = f"{row[name]['change']:g}"
    if unread := sum("key not loaded" in line for line in row["warnings"]):
        parts.append(f"{unread} keys not loaded")
    if "timesteps" in row:
        parts += [f"{name} it t = {', '.join(map(str, found))}" for name, found in row["timesteps"].items()]
    return "; ".join(parts), change


@report_user_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.clients", description=__doc__)
    names = [client.name for client in CLIENTS]
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names)}; without, all")
    parser.add_argument("--work", type=Path, default=Path("outputs/clients"), help="environments, inputs, results")
    parser.add_argument("--checkouts", type=Path, help="folder of cloned repositories, for clients that need theirs")
    parser.add_argument(
        "--python", default=sys.executable, help="for cyllama and inferna, whose wheels want 3.12 or newer"
    )
    parser.add_argument("--page", action="store_true", help=f"only write the results into {PAGE.name}")
    said = parser.parse_args(arguments)
    if unknown := set(said.names) - set(names):
        raise UserError(f"{' '.join(sorted(unknown))}: expected some of {', '.join(names)}")
    results = said.work / "results"
    results.mkdir(parents=True, exist_ok=True)
    for client in CLIENTS if not said.page else ():
        if client.name in (said.names or names):
            try:
                found = run(client, said.work.absolute(), said.checkouts, said.python)
            except UserError as error:
                if said.names:
                    raise
                print(error, file=sys.stderr)
                continue
            (results / f"{client.name}.json").write_text(json.dumps(found, indent=1) + "\n")
    found_files = [results / f"{name}.json" for name in names if (results / f"{name}.json").is_file()]
    written = table(json.loads(file.read_text()) for file in found_files)
    print(written)
    replace_figures(PAGE, written + "\n")


if __name__ == "__main__":
    main()
