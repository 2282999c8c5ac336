"""Quality against processor time: LCM-LoRA here and by diffusers' script, from one teacher, data set and batch.

Each point is a training of its own with its own decay of the learning rate, from the start of its process to the file
it leaves. The script runs on the embedded pipeline with its constant 77 set to the length of that pipeline's captions;
nothing else of it is changed.
"""

from __future__ import annotations

import io
import itertools
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import webdataset as wds
from PIL import Image

from benchmarks.cases import peer_command
from benchmarks.embedded import ROOT, Run, evaluate, train
from lcm_lightning.config.resolvers import package_file
from lcm_lightning.data.datamodule import locate_images
from lcm_lightning.data.images import decode_image
from lcm_lightning.data.shards import image_bytes, open_split, read_samples, sample_captions
from lcm_lightning.errors import UserError

OURS = "ours"
STUDENT_STEPS = (1, 2, 4)
BATCH_SIZE, RANK, LEARNING_RATE, WARMUP = 16, 32, 6e-4, 20
PROCESSES = 2
SAMPLES = 10_000  # more than 400 batches of 16 and the reader's buffer: at the end of a shard it fails, webdataset 1.0

# What each row of the script is given beside teacher, data, batch, adapter and learning rate.
PEERS: Mapping[str, Mapping[str, Any]] = {
    "peer": {"w_min": 5, "w_max": 15, "loss_type": "huber", "num_ddim_timesteps": 50},  # its defaults but Huber
    "peer, our settings": {"w_min": 1, "w_max": 1, "loss_type": "l2", "num_ddim_timesteps": 8},
}


@dataclass(frozen=True)
class Point:
    """A training, and the student it makes.

    Attributes:
        trainer: "ours" or one of `PEERS`.
        steps: optimizer steps.
        run: the training.
        model: the student, as evaluate.py names it.
    """

    trainer: str
    steps: int
    run: Run
    model: str


def our_point(steps: int, work: Path) -> Point:
    """A run of train.py: the quickstart's distillation of the embedded pipeline itself."""
    folder = work / f"ours_{steps}"
    overrides = (
        "experiment=quickstart",
        "data=noto_emoji",
        "data.val_limit=0",
        "callbacks.samples=null",
        f"data.batch_size={BATCH_SIZE}",
        f"method.lora.rank={RANK}",
        f"optimizer.lr={LEARNING_RATE}",
        f"method.warmup_steps={WARMUP}",
        f"max_steps={steps}",
        f"val_every={steps}",
        f"name=ours_{steps}",
        f"hydra.run.dir={folder}",
    )
    run = Run(f"{OURS}, {steps} steps", (sys.executable, str(ROOT / "train.py"), *overrides), folder)
    return Point(OURS, steps, run, f"run:{folder}")


def peer_point(trainer: str, script: Path, shard: Path, steps: int, work: Path) -> Point:
    """A run of the script."""
    folder = work / f"{trainer.replace(', ', '_').replace(' ', '_')}_{steps}"
    settings = {
        "pretrained_teacher_model": package_file("assets/tiny"),
        "output_dir": folder,
        "train_shards_path_or_url": shard,
        "max_train_samples": SAMPLES,
        "resolution": 64,
        "train_batch_size": BATCH_SIZE,
        "max_train_steps": steps,
        "lora_rank": RANK,
        "lora_alpha": RANK,
        "learning_rate": LEARNING_RATE,
        "lr_scheduler": "cosine",
        "lr_warmup_steps": WARMUP,
        "mixed_precision": "bf16",
        "dataloader_num_workers": 1,
        "validation_steps": 10**9,  # it draws four captions about people otherwise
        "checkpointing_steps": 10**9,
        "seed": 0,
        **PEERS[trainer],
    }
    run = Run(f"{trainer}, {steps} steps", (sys.executable, *peer_command(script, settings)), folder)
    return Point(trainer, steps, run, f"lcm:{folder}")


def fitted_script(script: Path, work: Path) -> Path:
    """A copy of the script for captions as long as the embedded pipeline's.

    Raises:
        UserError: it lacks the places that say 77.
    """
    tokenizer = json.loads(Path(package_file("assets/tiny"), "tokenizer", "tokenizer_config.json").read_text())
    text, length = script.read_text(), tokenizer["model_max_length"]
    for place in ("MAX_SEQ_LENGTH = 77\n", "max_length=77\n"):
        if place not in text:
            raise UserError(f"peer={script}: no {place.strip()!r} in it; give train_lcm_distill_lora_sd_wds.py")
        text = text.replace(place, place.replace("77", str(length)))
    work.mkdir(parents=True, exist_ok=True)
    fitted = work / script.name
    fitted.write_text(text)
    return fitted


def peer_shard(path: Path) -> Path:
    """Noto's training pictures over and over, with one of their captions each; made where it is missing."""
    if not path.is_file():
        unfinished = path.with_suffix(".part")
        with wds.TarWriter(str(unfinished), encoder=False) as writer:
            for number, (picture, caption) in enumerate(itertools.islice(_captioned(), SAMPLES)):
                writer.write({"__key__": f"{number:06d}", "png": picture, "txt": caption.encode()})
        unfinished.rename(path)
    return path


def _captioned() -> Iterator[tuple[bytes, str]]:
    shards = open_split(locate_images("noto_emoji", package_file("assets/data/noto_emoji")), "train")
    samples = [sample for shard in shards for sample in read_samples(shard.path)]
    for turn in itertools.count():
        for sample in samples:
            captions = sample_captions(sample)
            yield _png(decode_image(image_bytes(sample))), captions[turn % len(captions)]


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def measure(script: Path | None, work: Path, training_steps: Sequence[int], num_images: int) -> dict[str, Any]:
    """Train and evaluate all points.

    Returns:
        `rows`, each with trainer, steps, processor seconds, memory and `fid` by the student's steps; the teacher's
        `fid`, and `n_images`.
    """
    points = [our_point(steps, work) for steps in training_steps]
    if script is not None:
        fitted, shard = fitted_script(script, work), peer_shard(work / "train-000000.tar")
        points += [peer_point(name, fitted, shard, steps, work) for name in PEERS for steps in training_steps]
    with ThreadPoolExecutor(PROCESSES) as pool:
        list(pool.map(train, [point.run for point in points]))
    metrics = evaluate(
        [point.model for point in points],
        work / "evaluation",
        num_images=num_images,
        student_steps=STUDENT_STEPS,
        processes=PROCESSES,
    )
    return summary(points, metrics)


def summary(points: Sequence[Point], metrics: Mapping[str, Any]) -> dict[str, Any]:
    """What is kept of an evaluation; see `measure`."""
    models = metrics["models"]
    teacher = next(model for model in models if model["role"] == "base")
    names = {source["spec"]: source["name"] for source in metrics["sources"]}
    rows = []
    for point in points:
        students = [m for m in models if m["role"] == "student" and m["source"] == names[point.model]]
        fid = {str(model["steps"]): model["fid"] for model in students}
        rows.append({"trainer": point.trainer, "steps": point.steps, **point.run.cost(), "fid": fid})
    return {"rows": rows, "teacher": teacher["fid"], "n_images": teacher["n_images"]}
