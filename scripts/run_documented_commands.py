"""Run the commands that README.md and docs/ show, on tiny settings, in a working folder of their own.

    python scripts/run_documented_commands.py --list           what each command needs, and where it stands
    python scripts/run_documented_commands.py                  run those that can run here (`make docs-commands`)
    python scripts/run_documented_commands.py drawing.md       those of one page; --photos FOLDER takes photos

Commands that need what is not here (documented_commands.py) are listed and not run. Any other that fails is a failure.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import webdataset as wds
from PIL import Image

from documented_commands import (
    ASSIGNMENT,
    NEEDS,
    ROOT,
    SCRIPTS,
    TINY,
    Command,
    configured,
    documented_commands,
    pages,
    programs,
    shrunk,
)
from lcm_lightning.models.architectures import SD15_SCHEDULER

LINKED = ("conf", "lcm_lightning", "benchmarks", "scripts", "tests", "docs", "train.py", "evaluate.py")
LINKED += ("Makefile", "README.md", "pyproject.toml", "constraints.txt")
EMOJI = ROOT / "lcm_lightning" / "assets" / "data" / "twemoji_small"
PIPELINE = ROOT / "lcm_lightning" / "assets" / "tiny"
PREPARE = "-m lcm_lightning.prepare prepare.workers=1 data.source=material/photos"
CACHE = "-m lcm_lightning.prepare model=tiny cache.batch_size=8"
TRAIN = f"train.py data=twemoji_small {TINY['train']}"
READERS = "model.path=material/pipeline"  # which stands for Stable Diffusion v1-5
# What the placeholders of documented_commands.py stand for is made by these, once.
MATERIAL = (
    f"{PREPARE} data=flickr8k",
    f"{PREPARE} data=folder prepare.output=data/flickr30k",  # the photos may be Flickr8k's
    f"{PREPARE} data=folder",
    f"{CACHE} data=flickr8k data.source=data/flickr8k cache=latents",
    f"{CACHE} data=flickr8k data.source=data/flickr8k-latents cache=teacher method=lcm_lora",
    f"{TRAIN} {READERS} experiment=quickstart_lora hydra.run.dir=material/runs/finetuned",
    f"{TRAIN} {READERS} experiment=quickstart method.teacher_lora=material/runs/finetuned "
    "hydra.run.dir=material/runs/student",
    f"{TRAIN} method=lcm hydra.run.dir=material/runs/full_lcm",
)
LIMIT = 900  # seconds a command may take
REFUSED = 2  # exit status of a command that is answered with an error


def main() -> int:
    """List the commands, or run them; exit status 1 if one fails."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", nargs="*", help="parts of the names of pages; all if left out")
    parser.add_argument("--list", action="store_true", help="run nothing")
    parser.add_argument("--photos", type=Path, help="photos in the layout of Kaggle's Flickr8k, instead of emoji")
    arguments = parser.parse_args()
    chosen = [page for page in pages() if not arguments.page or any(part in str(page) for part in arguments.page)]
    commands = [command for page in chosen for command in documented_commands(page)]
    print_table([command for command in commands if command.needs or arguments.list])
    if arguments.list:
        return 0
    failed = run_all([command for command in commands if not command.needs], arguments.photos)
    for command, said in failed:
        print(f"\nFAILED {command}\n{said}")
    return int(bool(failed))


def print_table(commands: Sequence[Command]) -> None:
    """A row of Markdown for each command."""
    print("| needs | where | command |\n| --- | --- | --- |")
    for command in commands:
        print(f"| {', '.join(command.needs) or '-'} | {command.page}:{command.line} | `{command.text}` |")
    print("\n" + "\n".join(f"{need}: {meaning}" for need, meaning in NEEDS.items()) + "\n", flush=True)


def run_all(commands: Sequence[Command], photos: Path | None) -> list[tuple[Command, str]]:
    """Run commands one after the other in one working folder; those that failed, with what they said."""
    failed = []
    with tempfile.TemporaryDirectory() as place:
        make_material(Path(place), photos)
        for command in commands:
            began = time.monotonic()
            said = run(command, Path(place))
            failed += [] if said is None else [(command, said)]
            print(f"{'ran' if said is None else 'FAILED'} {time.monotonic() - began:6.1f} s  {command}", flush=True)
    return failed


def make_material(folder: Path, photos: Path | None) -> None:
    """Fill a working folder: the clone's files by links, and what stands for a reader's own under material/.

    Args:
        photos: a folder in the layout of Kaggle's Flickr8k; the embedded emoji if None.
    """
    for name in LINKED:
        (folder / name).symlink_to(ROOT / name)
    (folder / "material").mkdir()
    write_emoji(folder / "material")
    write_pipeline(folder / "material" / "pipeline")
    if photos is not None:
        shutil.rmtree(folder / "material" / "photos")
        (folder / "material" / "photos").symlink_to(photos.resolve())
    for line in MATERIAL:
        finished = start([sys.executable, *shlex.split(line)], folder, variables())
        if finished.returncode:
            raise SystemExit(f"{line}\n{finished.stdout}{finished.stderr}")


def write_pipeline(folder: Path) -> None:
    """The embedded networks with Stable Diffusion's schedule and scale of latents, which one file cannot say."""
    shutil.copytree(PIPELINE, folder, ignore=shutil.ignore_patterns("student"))
    said = {"scheduler/scheduler_config.json": SD15_SCHEDULER, "vae/config.json": {"scaling_factor": 0.18215}}
    for name, values in said.items():
        (folder / name).write_text(json.dumps(json.loads((folder / name).read_text()) | values))


def write_emoji(folder: Path) -> None:
    """The embedded emoji: `photos/` in the layout of Kaggle's Flickr8k, `folder/` with a `.txt` beside each.

    One of them, enlarged, is `photo.png`.
    """
    (folder / "photos" / "Images").mkdir(parents=True)
    (folder / "folder").mkdir()
    table = ["image,caption"]
    for name, picture, caption in emoji():
        picture.save(folder / "photos" / "Images" / f"{name}.png")
        picture.save(folder / "folder" / f"{name}.png")
        (folder / "folder" / f"{name}.txt").write_text(caption)
        table.append(f"{name}.png,{caption}")
    (folder / "photos" / "captions.txt").write_text("\n".join(table))
    picture.resize((128, 128)).save(folder / "photo.png")


def emoji() -> Iterator[tuple[str, Image.Image, str]]:
    """Key, picture and first caption of each embedded emoji."""
    for shard in sorted(EMOJI.glob("*.tar")):
        for sample in wds.WebDataset(str(shard), shardshuffle=False, empty_check=False):
            picture = next(value for key, value in sample.items() if key in ("png", "webp", "jpg"))
            caption = json.loads(sample["json"])["captions"][0].replace(",", "")
            yield sample["__key__"], Image.open(io.BytesIO(picture)).convert("RGB"), caption


def run(command: Command, folder: Path) -> str | None:
    """Run a command; what it says if it does not end as its page shows, None if it does."""
    for program in programs(command):
        environment = variables()
        while program and (assigned := ASSIGNMENT.fullmatch(program[0])):
            environment[assigned[1]] = assigned[2]
            program = program[1:]
        typed = runnable(program)
        if not typed:
            continue
        finished = start(typed, folder, environment)
        if finished.returncode != (REFUSED if command.refused else 0):
            said = f"{finished.stdout[-1500:]}{finished.stderr[-1500:]}"
            return f"{shlex.join(typed)}\nended with {finished.returncode}\n{said}"
    return None


def runnable(program: Sequence[str]) -> list[str]:
    """What is run in place of a program: this Python, on tiny settings."""
    found = configured(program)
    words = list(program) if found is None else shrunk(found)
    if words[:1] == ["make"]:  # the environment is this one
        words += ["READY=", f"BIN={Path(sys.executable).parent}"]
    if words and words[0] in SCRIPTS:
        words[:1] = [sys.executable, "-m", SCRIPTS[words[0]]]
    elif words and Path(words[0]).name in ("python", "python3"):
        words[0] = sys.executable
    elif words and words[0].startswith(".venv/bin/"):
        words[:1] = [sys.executable, "-m", Path(words[0]).name]
    elif words[:1] == ["torchrun"]:
        words[:1] = [sys.executable, "-m", "torch.distributed.run"]
    return words


def variables() -> dict[str, str]:
    """The variables of a command: this environment activated, the clone's package, one thread, no hub."""
    here = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    here |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
    return {**os.environ, **here}


def start(program: Sequence[str], folder: Path, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """Run one program to its end; one that takes longer than `LIMIT` counts as failed."""
    try:
        return subprocess.run(
            program,
            cwd=folder,
            env=dict(environment),
            capture_output=True,
            text=True,
            timeout=LIMIT,
            stdin=subprocess.DEVNULL,
            check=False,
        )
    except subprocess.TimeoutExpired as late:
        return subprocess.CompletedProcess(late.cmd, -1, "", f"took longer than {LIMIT} s")


if __name__ == "__main__":
    sys.exit(main())
