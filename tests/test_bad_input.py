"""Every mistake ends a command within seconds with one message that names key, value and remedy, and leaves nothing."""

from __future__ import annotations

import errno
import http.server
import importlib
import json
import logging
import os
import re
import resource
import shlex
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from PIL import Image

from helpers.commands import ROOT, in_process
from lcm_lightning.errors import quoted
from lcm_lightning.methods.lcm_lora import LcmLoraDistillation
from lcm_lightning.models.adapters import LoraSettings, add_lora, lora_state_dict
from lcm_lightning.models.lora_files import save_lora
from lcm_lightning.models.stable_diffusion import load_stable_diffusion
from lcm_lightning.runs.contents import Adapter, write_manifest

SECONDS = 10  # of processor time, since other programs may use the cores, beside that of importing the packages

TRAIN = (
    "model.path=W/pipeline",
    "data.source=W/shards",
    "data.num_workers=0",
    "data.batch_size=2",
    "data.resolution=32",
    "data.val_limit=2",
    "method.lora.rank=4",
    "debug=fdr",
    "logger=csv",
)
GENERATE = ("accelerator=cpu", "prompt=a")
EVALUATE = ("accelerator=cpu", "logger=csv", "evaluation=quick")

# A case a line: what is added to the command, and the pattern that its message must hold where that is not the last
# option as it stands. W stands for the folder of `world`.
TRAIN_CASES = r"""
# keys
foo=1 -> foo=1: there is no such key; there are experiment, model
max_step=1 -> max_step=1: there is no such key; did you mean max_steps\? `.*--cfg job` shows all$
experimnt=quickstart
batch_size=4 -> batch_size=4: there is no such key; did you mean data\.batch_size or callbacks\.samples\.batch_size\?
lr=1e-4 -> lr=1e-4: there is no such key; did you mean optimizer\.lr\?
+lr=1e-4 -> lr=0\.0001: nothing reads this key; did you mean optimizer\.lr\?
rank=8 -> did you mean method\.lora\.rank\?
lora.rank=8 -> lora\.rank=8: there is no such key; did you mean method\.lora\.rank\?
method.rank=8 -> method\.rank=8: there is no such key; did you mean method\.lora\.rank\?
bach_size=4 -> did you mean data\.batch_size or
--experiment=quickstart -> --experiment=quickstart: settings are written without dashes; try experiment=quickstart
--experiment quickstart -> --experiment: settings are written without dashes; try experiment=quickstart
--learning-rate 1e-4 -> --learning-rate: settings are written without dashes; try learning_rate=1e-4
-x -> -x: settings are written without dashes; try x=
optimzer.lr=1
trainer.max_step=1
+foo=1
+seeed=1 -> seeed=1: nothing reads this key; did you mean seed\?
data.bacth_size=1
+data.foo=1
+data.batchsize=1
+model.foo=1
+method.foo=1
+method.lora.foo=1
+method.lora.bias=all
+optimizer.foo=1
+trainer.foo=1
+callbacks.foo=1
+callbacks.samples.foo=1
+callbacks.checkpoint.foo=1
~method.lora -> method:
~nonesuch -> \~nonesuch:
# options
experiment=nonesuch
experiment=8 -> experiment=8: there is no such file in conf/experiment; there are .*quickstart
trainer=gpu method.teacher_lora=W/nowhere -> method\.teacher_lora=.*/nowhere: no such file
trainer=gpu method.w_min=-1 -> method\.w_min=-1
model=true -> model=true: there is no such file in conf/model; there are sd15, sdxl, tiny
method=nonesuch -> method=nonesuch: .*there are .*lcm_lora, lora
method=lcm_lorra -> there is no such file in conf/method; did you mean method=lcm_lora\? there are dmd2_lora, kd_lora
experiment=quickstrat -> did you mean experiment=quickstart\?
debug=profil -> did you mean debug=profile\?
model=SD51 -> did you mean model=sd15\?
--help foo -> foo: --help has no such topic; .*groups are model, method
--help metod=lcm -> metod=lcm: there is no such key; did you mean method\?
--help data=flicker8k -> did you mean data=flickr8k\?
data=nonesuch
trainer=nonesuch
optimizer=nonesuch
hydra/launcher=nonesuch
# what Hydra's grammar does not take, or takes for something else
=3 -> =3: names no key; settings are written key=value, such as seed=1$
@=2 -> @=2: names no key
+= -> \+=: names no key
~ -> ~: names no key
method.lora.rank=[16,32 -> \[ is never closed; close it, or, if it belongs to a text, quote the value twice
data.source="{a} -> quote the value twice
cpu -> cpu: expected key=value; did you mean trainer=cpu\?$
name=a tiny dog -> tiny: expected key=value; .*quote that twice: 'name="a tiny dog"'
data.source={a -> data\.source=\{a: .*quote the value twice: 'data\.source="\{a"'
data.source=it's -> quote the value twice: 'data\.source="it
resume=outputs/lcm_flickr8k/<date_time> -> resume=.*: <date_time> stands for a name that you know; put that in its place
callbacks.samples.prompts=[it's,b] -> quote the texts in it: 'callbacks\.samples\.prompts=\["\.\.\.","\.\.\."\]'
name=my first run seed=1 -> first: expected key=value; .*quote that twice: 'name="my first run"'
seed = 1 -> seed: expected seed=\.\.\., without spaces around the =
optimizer.lr -> expected key=value
trainer.val_check_interval=${nonesuch} -> trainer\.val_check_interval:
# types
data=shards data.source=??? -> data\.source:
data.batch_size=abc -> data\.batch_size=abc: expected a whole number
data.batch_size=1.5
data.batch_size=null -> data\.batch_size=null:
data.num_workers=many
data.resolution=big
data.source=[a] -> data\.source=\['a'\]:
data.flip_probability=often
seed=x
max_steps=1e3 -> max_steps=1000\.0:
val_every=abc
resume=[a] -> resume=\['a'\]:
model.gradient_checkpointing=perhaps
model.unet_init=half
method.w_min=low
method.lora.rank=4.5
method.lora.target_modules=7
method.lora=64
method.warmup_steps=soon
optimizer.lr=fast
optimizer.betas=0.9
trainer.accumulate_grad_batches=some
callbacks.samples.student_steps=4
callbacks.samples.student_steps=[a] -> callbacks\.samples\.student_steps=\['a'\]:
# ranges
model.prompt_chunks=0 -> model\.prompt_chunks=0: expected at least 1, such as model\.prompt_chunks=3
seed=-1 -> seed=-1: expected 0 to 4294967295
max_steps=-5
val_every=0
data.batch_size=0
data.num_workers=-1
data.prefetch_factor=0
data.shuffle_buffer=0
data.flip_probability=1.5
data.caption_dropout=-0.1
data.max_bad_fraction=2
data.val_limit=-1
optimizer.lr=-1
optimizer.betas=[0.9] -> optimizer:
optimizer.betas=[0.9,2] -> optimizer:
trainer.accumulate_grad_batches=0
trainer.gradient_clip_val=-1
trainer.log_every_n_steps=0
trainer.max_steps=-1
callbacks.samples.student_steps=[0]
callbacks.samples.num_prompts=0
callbacks=student_quality callbacks.student_quality.num_images=1
callbacks=student_quality callbacks.student_quality.steps=60
callbacks=student_quality callbacks.student_quality.foo=1
callbacks=student_quality method=lora -> callbacks\.student_quality: method LoraFinetuning trains no student
callbacks=early_stopping callbacks.early_stopping.patience=0
method.lora.rank=0
method.lora.rank=-4
method.lora.alpha=0
method.lora.dropout=1
method.warmup_steps=-1
method.distillation.num_ode_steps=0
method.distillation.num_ode_steps=2000
method.distillation.huber_c=0
method.distillation.solver_steps=0
method.distillation.solver=dpmpp -> method\.distillation\.solver_steps=1: expected at least 2 with .*solver=dpmpp
method.distillation.solver_steps=20 -> method\.distillation\.solver_steps=20: expected at most 19
method=tcd_lora method.gamma=1.5
method=tcd_lora method.schedules=[4] -> method\.schedules=\[4\]: expected the fewest and the most
method=tcd_lora method.schedules=[0,8] -> method\.schedules=\[0, 8\]:
method=tcd_lora method.schedules=[8,4] -> method\.schedules=\[8, 4\]:
method=tcd_lora method.schedules=[4,60] -> method\.schedules=\[4, 60\]: .*num_ode_steps=50
method=tcd_lora method.schedules=8
method=tcd_lora method.student_guidance=0.5
method=tcd_lora method.distillation.num_ode_steps=2000
method=tcd_lora method.distillation.huber_c=0
method=tcd_lora method.w_min=20 -> method\.w_min=20
method=pcm_lora method.phases=0
method=pcm_lora method.phases=3 -> method\.phases=3: expected a divisor of method\.distillation\.num_ode_steps=40
method=pcm_lora method.phases=few
method=pcm_lora +method.schedules=[4,8] -> method\.schedules
method=lcm method.ema_decay=1
method=lcm method.guidance_dimension=7
method=lcm method.w_min=20 -> method\.w_min=20
method=lcm method.distillation.huber_c=0
method=lcm +method.lora.dropout=0 -> method\.lora
method=kd_lora -> method\.teacher_lcm
method=kd_lora method.teacher_lcm=null -> method\.teacher_lcm=null: expected text
method=kd_lora method.teacher_lcm=W/pipeline -> method\.teacher_lcm=.*: no full LCM
method=kd_lora method.teacher_lcm=W/pipeline method.w_min=8
method=lora method.min_snr_gamma=0
method=lora method.noise_offset=-1
method=lora method.timestep_exponent=0
method=dmd2_lora method.distillation.num_steps=0
method=dmd2_lora method.distillation.num_steps=51
method=dmd2_lora method.distillation.min_timestep=-0.1
method=dmd2_lora method.distillation.max_timestep=0.01 -> min_timestep=0\.02, .*max_timestep=0\.01:
method=dmd2_lora method.critic_steps=0
method=dmd2_lora method.critic_lr=0
method=dmd2_lora method.adversarial_weight=-1
method=pcm_lora method.adversarial_weight=-0.1
method=dmd2_lora method.w_max=1 -> method\.w_min=7\.0, method\.w_max=1: expected 0 <= w_min
# names and combinations
method.w_min=20
method.distillation.loss=l1
method.distillation.solver=euler
method.lr_scheduler=fast
method.lr_scheduler=piecewise_constant
method.lora.target_modules=everything
method.lora.target_modules=[to_x] -> method\.lora\.target_modules:
data.resolution=33 -> data\.resolution=33: expected a positive multiple of 8 .*try 32
data.buckets=true data.bucket_step=12 -> data\.bucket_step=12: expected a positive multiple of 8
data.buckets=true data.bucket_step=24 -> data\.bucket_step=24: expected a divisor of data\.resolution=32; null
data.buckets=some
data.crop=smart
data.fresh_fraction=2
data.fresh_fraction=0.5 -> data\.fresh_fraction=0\.5: .*holds no teacher's steps
callbacks.samples.resolution=33
trainer.precision=fp8
trainer.precision=64-true
trainer.accelerator=gpu -> trainer: .*trainer=cpu runs without a GPU
trainer.accelerator=abacus -> trainer:
trainer.strategy=hope -> trainer:
trainer.devices=0 -> trainer:
# files
model.path=./nowhere
model.path=W/good.safetensors -> model\.path=.*good\.safetensors: is a LoRA; give it as lora=
model.path=W/pickled.pt -> model\.path=.*pickled\.pt: a \.pt can run code when it is read.*from_single_file
model.vae=./nowhere
model.vae=W/pickled.pt -> model\.vae=.*pickled\.pt: a \.pt can run code
model.prediction_type=flow
model.path=W/empty
model.path=W/sdxl
model.path=W/flow
model.path=W/cut_pipeline
model.path=W/no_unet
model.path=W/not_json
model.path=owner/name -> model\.path=owner/name: no such folder here, and the hub cannot be reached; .*hf download
method.teacher_lora=./nowhere
method.teacher_lora=W/empty
method.teacher_lora=W/foreign.safetensors -> method\.teacher_lora=.*foreign\.safetensors: .*another base model
method.teacher_lora=W/pickled.pt
method.teacher_lora=W/cut.safetensors
method.teacher_lora=W/dora.safetensors
method.teacher_lora=owner/name
resume=nowhere
resume=W/empty
resume=W/garbage.ckpt
data.source=W/nowhere
data.source=W/empty
data.source=W/photos -> data\.source=.*/photos: a data set in the layout.*\n.*lcm_lightning\.prepare
data.source=W/without_samples
data.source=W/only_test -> data only_test:
data.source=W/only_train
data.source=W/interrupted
data.source=W/bad_index -> data\.source:
data.source=owner/name
data.source=http://127.0.0.1:9/0.tar
data.source=W/nowhere/{0..3}.tar
hydra.run.dir=W/a_file/run -> hydra\.run\.dir: the run folder cannot be made .*a_file
hydra.run.dir=/proc/run -> hydra\.run\.dir:
data.source=W/uncounted data.cache_dir=/proc/cache
"""
GENERATE_CASES = r"""
-> give run=outputs/.*model=sd15
run=nowhere
run=W/empty
run=W/unexported
run=W/moved -> run=.*/moved: model\.path=.*no such folder.*model\.path=
run=W/. -> run=.*: no config\.yaml there; did you mean run=.*/(run|moved)\?
run=W/run/lora -> did you mean run=.*/run\?
run=W/run/lora/pytorch_lora_weights.safetensors -> did you mean run=.*/run\?
run=W/run lora=a
model=sd15 model.path=W/pipeline lora=nope -> lora=nope: no such file or folder
model=sd15 model.path=W/pipeline lora=[W/run,nope] -> lora=nope: no such file or folder
model=sd15 model.path=W/pipeline lora=owner/nope -> lora=owner/nope: no such folder here, and the hub cannot be reached
model=sd15 model.path=W/pipeline lora=W/. -> lora=.*: holds no LoRA; did you mean lora=.*/(run|moved)\?
model=sd15 model.path=W/pipeline lora=W/run/checkpoints lora_role=lcm -> holds no LoRA; did you mean lora=.*/run\?
--help foo -> foo: --help has no such topic
run=W/run num_images=0
run=W/run num_images=few
run=W/run steps=0
run=W/run steps=51 -> steps=51: the sampler LCM takes 1 to 50
run=W/run guidance_scale=-1
run=W/run batch_size=0
run=W/run seed=-1
run=W/run dtype=int8
run=W/run accelerator=abacus
run=W/run accelerator=cuda
run=nowhere accelerator=cuda -> run=nowhere: 
run=W/run resolution=33
run=W/run width=33
run=W/run height=33
run=W/run height=32 resolution=32 -> height=32: beside resolution=32; give width and height alone
run=W/run width=32 init_image=W/photo.png -> width=32: a picture from init_image has the photo's aspect
run=W/run negative_prompt=b
run=W/run output=W/a_file
run=W/run output=/proc/images
run=W/run strength=0.5 -> strength=0\.5: acts with a photo only
run=W/run init_image=W/photo.png strength=1.5 -> strength=1\.5: expected 0 to 1
run=W/run init_image=W/photo.png strength=0 -> strength=0.*: expected above 0
run=W/run init_image=W/photo.png strength=0.2 -> strength=0\.2: takes none of steps=4; expected at least 0\.25
run=W/run init_image=W/nowhere.png
run=W/run init_image=W/empty -> init_image=.*empty: cannot be read
run=W/run init_image=W/a_file -> init_image=.*a_file: undecodable
run=W/run init_image=W/cut.png -> init_image=.*cut\.png: undecodable
run=W/run init_image=W/photo.png resolution=33 -> resolution=33: expected a positive multiple of 8
run=W/run init_image=W/large.png -> init_image=.*large\.png: 100x70 pixels.*set resolution=32
run=W/run init_image=W/strip.png resolution=32 -> init_image=.*strip\.png: 90x10 pixels.*crop it
prompt=red heart run=W/run -> heart: expected key=value; .*, quote that twice: 'prompt="red heart"'
run=outputs/quickstart/<date_time> -> run=outputs/quickstart/<date_time>: <date_time> stands for a name
run=W/run prompt={a:1} -> prompt=\{'a': 1\}:
run=W/run +foo=1
run=W/run --prompt b -> --prompt: settings are written without dashes; try prompt=b
model=sd15 model.path=W/pipeline lora=W/good.safetensors
model=sd15 model.path=W/pipeline lora=W/foreign.safetensors lora_role=lcm -> lora=
model=sd15 model.path=W/pipeline lora=W/cut.safetensors lora_role=lcm -> lora=
model=sd15 model.path=W/pipeline lora=[W/run,W/good.safetensors] -> lora_role=null: say what lora=.*/good\.safetensors
model=sd15 model.path=W/pipeline lora=[W/run,W/cut.safetensors] lora_role=finetuned -> lora=.*/cut\.safetensors
model=sd15 model.path=W/pipeline lora=[W/good.safetensors,W/run] lora_role=[lcm] -> expected as many as there are LoRAs
model=sd15 model.path=W/pipeline lora=[W/run,W/good.safetensors] lora_role=tcd -> LCM-LoRA and TCD-LoRA are drawn
model=sd15 model.path=W/pipeline lora=[] -> lora=\[\]: expected at least one
model=sd15 model.path=W/pipeline lora=W/run weights=[1,0.8] -> weights=\[1, 0\.8\]: expected as many as
model=sd15 model.path=W/pipeline lora=W/run weights=80 -> weights=80: expected -10 to 10
model=sd15 model.path=W/pipeline lora=W/run weights=half
run=W/run weights=0.5 -> weights=0\.5: are those of lora=
run=W/run lora=[a,b] -> run=.* and lora=
"""
PREPARE_CASES = r"""
-> data\.source is not set: .*kaggle.*data\.source=/path
data.source=/no/such
data.source=W/a_file
data.source=W/empty
data.source=[a] -> data\.source=\['a'\]:
data.source=W/photos prepare.foo=1
data.source=W/photos +prepare.foo=1
data.source=W/photos +foo=1
data.source=W/photos prepare.samples_per_shard=0
data.source=W/photos prepare.samples_per_shard=all
data.source=W/photos prepare.quality=101
data.source=W/photos prepare.max_side=20
data.source=W/photos prepare.workers=-1
data.source=W/photos prepare=fast
data.source=W/photos prepare.output=W/a_file
data.source=W/photos prepare.output=/proc/shards
data.source=W/photos prepare.output=[a] -> prepare\.output=\['a'\]:
data.source=W/outside
data.source=W/shards data.name=[a] -> data\.name=\['a'\]:
data=nonesuch
"""
EVALUATE_CASES = r"""
-> give run=outputs/.*model=sd15
run=nowhere
model=tiny -> data:
model=tiny data=twemoji dtype=int8
model=tiny data=twemoji evaluation.num_images=1
model=tiny data=twemoji evaluation.num_images=all
model=tiny data=twemoji evaluation=nonesuch
model=tiny data=twemoji evaluation=quik -> did you mean evaluation=quick\?
model=tiny data=twemoji evaluation.split=dev -> data twemoji:
model=tiny data=twemoji evaluation.clip=./nowhere
model=tiny data=twemoji devices=0
model=tiny data=twemoji run_dir=/proc/evaluation
model=tiny data=twemoji +foo=1
model=tiny data=twemoji num_images=4 -> did you mean evaluation\.num_images\?
model=tiny data=twemoji lora=[a,b] -> lora=\['a', 'b'\]: an evaluation takes one
"""


# ---- the world the mistakes are made in ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(
    tmp_path_factory: pytest.TempPathFactory,
    pipeline_folder: Path,
    saved_pipeline: Callable[..., Path],
    flickr_shards: Path,
) -> Path:
    """A folder with a good pipeline, good shards and a finished run, and with what mistakes are made of."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "pipeline").symlink_to(pipeline_folder)
    (folder / "shards").symlink_to(flickr_shards)
    (folder / "flow").symlink_to(saved_pipeline(prediction_type="flow_prediction"))
    (folder / "empty").mkdir()
    (folder / "a_file").write_text("a file where a folder is wanted")
    (folder / "garbage.ckpt").write_bytes(b"no checkpoint")
    for name, size in {"photo": (40, 32), "large": (100, 70), "strip": (90, 10)}.items():
        Image.effect_noise(size, 50).save(folder / f"{name}.png")
    (folder / "cut.png").write_bytes((folder / "photo.png").read_bytes()[:500])
    loras(folder, pipeline_folder)
    runs(folder)
    pipelines(folder, pipeline_folder)
    data_sets(folder, flickr_shards)
    return folder


def loras(folder: Path, pipeline: Path) -> None:
    """A good LoRA and bad ones."""
    model = load_stable_diffusion(str(pipeline))
    add_lora(model.unet, "lcm", LoraSettings(rank=2, alpha=2))
    state = lora_state_dict(model.unet, "lcm")
    save_lora(state, folder / "good.safetensors")
    save_lora({key: torch.zeros(7, 7) for key in state}, folder / "foreign.safetensors")
    save_lora({**state, "unet.mid_block.dora_scale": torch.zeros(1)}, folder / "dora.safetensors")
    (folder / "cut.safetensors").write_bytes((folder / "good.safetensors").read_bytes()[:500])
    torch.save({"state_dict": {}}, folder / "pickled.pt")


def runs(folder: Path) -> None:
    """A finished run, one that ended before its first export, one whose model is gone."""
    model = {
        "_target_": "lcm_lightning.models.stable_diffusion.load_stable_diffusion",
        "path": str(folder / "pipeline"),
    }
    for name, path in (("run", "pipeline"), ("unexported", "pipeline"), ("moved", "gone")):
        (folder / name / "lora").mkdir(parents=True)
        OmegaConf.save({"model": {**model, "path": str(folder / path)}, "data": {}}, folder / name / "config.yaml")
        if name != "unexported":
            shutil.copy(folder / "good.safetensors", folder / name / "lora" / "pytorch_lora_weights.safetensors")
            write_manifest(folder / name / "lora", [Adapter(LcmLoraDistillation.kind)])


def pipelines(folder: Path, pipeline: Path) -> None:
    """Pipelines of another class, cut off, incomplete and without a readable index."""
    for name in ("sdxl", "cut_pipeline", "no_unet", "not_json"):
        shutil.copytree(pipeline, folder / name)
    index = json.loads((pipeline / "model_index.json").read_text())
    (folder / "sdxl" / "model_index.json").write_text(json.dumps({**index, "_class_name": "StableDiffusionXLPipeline"}))
    (folder / "not_json" / "model_index.json").write_text("<html>404</html>")
    weights = folder / "cut_pipeline" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    shutil.rmtree(folder / "no_unet" / "unet")


def data_sets(folder: Path, shards: Path) -> None:
    """Photos, shards without samples or splits, an interrupted preparation, an index that is none."""
    (folder / "photos").mkdir()
    for number in range(3):
        Image.new("RGB", (40, 40)).save(folder / "photos" / f"{number}.png")
        (folder / "photos" / f"{number}.txt").write_text("a photo")
    for name in (
        "without_samples",
        "only_test",
        "only_train",
        "uncounted",
        "interrupted/.parts",
        "bad_index",
        "outside",
    ):
        (folder / name).mkdir(parents=True)
    for split in ("train", "val"):
        tarfile.open(folder / "without_samples" / f"{split}-0.tar", "w").close()
        shutil.copy(shards / f"{split}-000000.tar", folder / "uncounted")
    shutil.copy(shards / "test-000000.tar", folder / "only_test")
    shutil.copy(shards / "train-000000.tar", folder / "only_train")
    shutil.copy(shards / "train-000000.tar", folder / "interrupted")
    (folder / "bad_index" / "index.json").write_text("{}")
    (folder / "outside" / "metadata.jsonl").write_text('{"file_name": "../photos/0.png", "text": "a photo"}\n')


# ---- running a command ---------------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, no hub, no GPU, no W&B key; home and caches elsewhere."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(logging, "raiseExceptions", False)  # Lightning's handler writes to an earlier test's stderr
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    return folder


def state(folder: Path) -> dict[str, bytes | None]:
    """Every path below a folder, with the bytes of files."""
    paths = sorted(folder.rglob("*"))
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in paths}


def overrides(defaults: tuple[str, ...], case: str, world: Path) -> list[str]:
    """The command line of a case: the defaults it does not set itself, then its own."""
    own = case.split()
    taken = {option.partition("=")[0] for option in own} | ({"method.lora.rank"} if "method=lcm" in own else set())
    kept = [option for option in defaults if option.partition("=")[0] not in taken]
    return [in_world(option, world) for option in (*kept, *own)]


def in_world(option: str, world: Path) -> str:
    """An option with the folder that W stands for."""
    return re.sub(r"(?<=[=/\[,])W(?=/)", str(world), option)


def complaint(program: str, options: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    """The one message a command ends with, run in this process."""
    importlib.import_module(program)
    capfd.readouterr()
    started = time.process_time()
    with pytest.raises(SystemExit) as end:
        in_process(program, *options)
    assert time.process_time() - started < SECONDS
    assert end.value.code == 2
    return the_message(capfd.readouterr().err)


def the_message(stderr: str) -> str:
    """What follows "error: ", of which there must be one, without a traceback."""
    assert "Traceback" not in stderr, stderr
    assert len(re.findall(r"^error: ", stderr, re.MULTILINE)) == 1, stderr
    return stderr[stderr.index("error: ") :]


COMMANDS = {
    "train": (TRAIN, TRAIN_CASES),
    "lcm_lightning.generate": (GENERATE, GENERATE_CASES),
    "lcm_lightning.prepare.commands": (("prepare.workers=1",), PREPARE_CASES),
    "evaluate": (EVALUATE, EVALUATE_CASES),
}


def cases() -> Iterator[object]:
    """Program, case and pattern of every line, under readable names."""
    for program, (_, text) in COMMANDS.items():
        for line in text.strip().splitlines():
            if not line.startswith("#"):
                case, pattern = (part.strip() for part in line.partition("->")[::2])
                yield pytest.param(program, case, pattern, id=f"{program}-{case or 'nothing'}")


@pytest.mark.parametrize(("program", "case", "pattern"), [*cases()])
def test_a_mistake_is_refused(program, case, pattern, world, here, capfd):
    message = complaint(program, overrides(COMMANDS[program][0], case, world), capfd)
    last = in_world(case.split(" ")[-1].lstrip("+~"), world)
    assert re.search(pattern or re.escape(last), message), message
    assert state(here) == {} and not (world / "run" / "generated").exists()


def test_an_optimizer_whose_package_is_missing_is_named(world, here, capfd, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    message = complaint("train", overrides(TRAIN, "optimizer=adamw8bit", world), capfd)
    assert "optimizer: " in message and "bitsandbytes" in message


def test_an_unknown_setting_of_wandb_is_refused_before_the_run(world, here, capfd):
    message = complaint("train", overrides(TRAIN, "logger=wandb +logger.wandb.foo=1", world), capfd)
    assert "logger.wandb.foo=1: no setting of wandb.init" in message
    assert state(here) == {}


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_run_folder_that_takes_no_file_is_one_message(number, world, here, capfd, monkeypatch):
    """A disk that is full when the run has made its folder."""

    def refuse(_: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", refuse)
    message = complaint("train", overrides(TRAIN, "hydra.run.dir=there data.buckets=false", world), capfd)
    assert re.match(rf"error: hydra\.run\.dir=.*there: .*{os.strerror(number)}.*set hydra\.run\.dir=", message)
    assert state(here) == {}


@pytest.mark.parametrize(
    "environment", [{"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "2"}, {"SLURM_STEP_NUM_TASKS": "8"}], ids=str
)
@pytest.mark.parametrize(("option", "key"), [("", "hydra.run.dir"), ("-m", "hydra.sweep.dir")])
def test_processes_started_apart_are_asked_for_the_folder_they_share(
    environment, option, key, world, here, capfd, monkeypatch
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    message = complaint("train", overrides(TRAIN, f"experiment=lora_flickr8k {option}", world), capfd)
    assert message.startswith(f"error: {key}: ") and f"share a run folder; set it, as in {key}=outputs/" in message
    assert state(here) == {}


@pytest.mark.parametrize("value", ["a dog, a cat", "it's a dog", 'the word "dog", red', "a=b: {c", "(dog) [cat]"])
def test_a_quoted_text_passes_the_shell_and_hydra_as_it_is(value: str):
    (argument,) = shlex.split(quoted(f"prompt={value}"))
    assert OverridesParser.create().parse_override(argument).value() == value


def test_the_remedy_for_a_prompt_with_a_comma_is_the_readmes():
    assert quoted("prompt=a dog, a cat") == """'prompt="a dog, a cat"'"""


@pytest.mark.parametrize("program", ["evaluate", "lcm_lightning.generate", "lcm_lightning.prepare.commands", "train"])
def test_ctrl_c_ends_a_command_with_one_word(program, world, here, capfd, monkeypatch):
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    importlib.import_module(program)
    for place in ("generate.resolve", "evaluate.resolve", "train.resolve", "prepare.commands.check_command"):
        monkeypatch.setattr(f"lcm_lightning.{place}", interrupt)
    with pytest.raises(SystemExit) as end:
        in_process(program, *overrides(COMMANDS[program][0], "", world))
    assert end.value.code == 130 and capfd.readouterr().err == "\ninterrupted\n"
    assert state(here) == {}


# ---- as real processes ---------------------------------------------------------------------------------------------


class Refusal(http.server.BaseHTTPRequestHandler):
    """A hub that knows no such token."""

    def do_GET(self) -> None:
        """Answer as the hub does."""
        self.send_response(401)
        self.send_header("X-Error-Message", "Invalid credentials in Authorization header")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        """Keep quiet."""


@pytest.fixture(scope="module")
def refusing_hub() -> Iterator[str]:
    """Address of a hub that refuses every token."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Refusal)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def processor_seconds(*arguments: str, **environment: str) -> tuple[float, subprocess.CompletedProcess[str]]:
    """Processor time of `python ARGUMENTS`, and what came of it."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=600, env=environment, check=False
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, done


@pytest.fixture(scope="module")
def import_seconds() -> float:
    """Processor time of importing what trains and draws, most of which is torch's and diffusers' own."""
    imports = "import lightning, lcm_lightning.methods.lcm_lora, lcm_lightning.models.sampling"
    seconds, done = processor_seconds("-c", imports, **{**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    return seconds


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        (ROOT / "train.py", *TRAIN, "data.batch_size=abc"),
        (ROOT / "train.py", *TRAIN, "experiment=nonesuch"),
        (ROOT / "train.py", *TRAIN, "model.path=owner/name"),
        (ROOT / "train.py", *TRAIN, "method.teacher_lora=owner/name"),
        (ROOT / "train.py", *TRAIN, "data.source=owner/name"),
        ("-m", "lcm_lightning.prepare", "data.source=/no/such"),
        ("-m", "lcm_lightning.generate", "prompt=a", "run=nowhere"),
    ],
    ids=lambda arguments: " ".join(map(str, arguments[-2:])),
)
def test_a_process_ends_within_seconds(arguments, world, here, refusing_hub, import_seconds):
    """Also with a hub that is there and refuses the token."""
    hub = {"HF_ENDPOINT": refusing_hub, "HF_TOKEN": "hf_wrong", "HF_HUB_OFFLINE": "0"}
    options = [in_world(str(argument), world) for argument in arguments]
    seconds, done = processor_seconds(*options, **{**os.environ, **hub, "PYTHONPATH": str(ROOT)})
    assert seconds - import_seconds < SECONDS
    assert done.returncode == 2, done.stderr
    assert options[-1] in the_message(done.stderr)
    assert state(here) == {}


def test_a_reader_who_has_seen_enough_of_the_help_ends_it_quietly(tmp_path: Path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = shlex.join([sys.executable, "-m", "lcm_lightning.train", "--help"])
    done = subprocess.run(
        f"{command} | true", shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("", "")
