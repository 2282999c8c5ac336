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
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf
from PIL import Image

from lcm_lightning.errors import quoted
from lcm_lightning.methods.lcm_lora import LcmLoraDistillation
from lcm_lightning.models.adapters import LoraSettings, add_lora, lora_state_dict, save_lora
from lcm_lightning.models.stable_diffusion import load_stable_diffusion
from lcm_lightning.runs.contents import Adapter, write_manifest

ROOT = Path(__file__).parent.parent
SECONDS = 10  # of processor time, since other programs may use the cores, beside that of importing the packages

TRAIN = (
    "model.path=W/pipeline",
    "data.source=W/shards",
    "data.num_workers=0",
    "data.batch_size=2",
    "data.resolution=32",
    "data.val_limit=2",
    "method.lora.rank=4",
    "trainer=debug",
    "logger=csv",
)
GENERATE = ("accelerator=cpu", "prompt=a")
EVALUATE = ("accelerator=cpu", "logger=csv", "evaluation=quick")

Case = tuple[str, str]
# In each case W stands for the folder of `world`. The pattern must be found in the message.
TRAIN_CASES: list[Case] = [
    # keys
    ("foo=1", r"foo=1: there is no such key; there are experiment, model"),
    ("max_step=1", r"max_step=1: there is no such key; did you mean max_steps\? `.*--cfg job` shows all$"),
    ("experimnt=quickstart", r"experimnt=quickstart: there is no such key; did you mean experiment\?"),
    ("optimzer.lr=1", r"optimzer\.lr=1: there is no such key; did you mean optimizer\? [^+]*$"),
    ("trainer.max_step=1", r"trainer\.max_step=1: .* did you mean max_steps\?.*\+trainer\.max_step=1 would add it"),
    ("+foo=1", r"foo=1: nothing reads this key; there are model"),
    ("+seeed=1", r"seeed=1: nothing reads this key; did you mean seed\?"),
    ("data.bacth_size=1", r"data\.bacth_size=1: .*--cfg job"),
    ("+data.foo=1", r"data\.foo=1: nothing reads this key; there are name, source"),
    ("+data.batchsize=1", r"data\.batchsize=1: nothing reads this key; did you mean batch_size\?"),
    ("+model.foo=1", r"model\.foo=1: nothing reads this key"),
    ("+method.foo=1", r"method\.foo=1: nothing reads this key"),
    ("+method.lora.foo=1", r"method\.lora\.foo=1: nothing reads this key; there are rank"),
    ("+method.lora.bias=all", r"method\.lora\.bias=all: nothing reads this key"),
    ("+optimizer.foo=1", r"optimizer\.foo=1: nothing reads this key"),
    ("+trainer.foo=1", r"trainer\.foo=1: nothing reads this key"),
    ("+callbacks.foo=1", r"callbacks\.foo=1: .*expected a section with a _target_"),
    ("+callbacks.samples.foo=1", r"callbacks\.samples\.foo=1: nothing reads this key"),
    ("+callbacks.checkpoint.foo=1", r"callbacks\.checkpoint\.foo=1: nothing reads this key"),
    ("~method.lora", r"method: .*lora.*--cfg job"),
    ("~nonesuch", r"~nonesuch: .*--cfg job"),
    # options
    ("experiment=nonesuch", r"experiment=nonesuch: .*there are .*lcm_flickr30k"),
    ("method=nonesuch", r"method=nonesuch: .*there are lcm_lora, lora"),
    ("data=nonesuch", r"data=nonesuch: .*there are .*flickr8k"),
    ("trainer=nonesuch", r"trainer=nonesuch: .*there are cpu"),
    ("optimizer=nonesuch", r"optimizer=nonesuch: .*there are adamw"),
    ("hydra/launcher=nonesuch", r"hydra/launcher=nonesuch: .*there are basic"),
    ("data.source={a", r"data\.source=\{a: .*quote the value twice: 'data\.source=\"\{a\"'$"),
    ("data.source=a,b", r"data\.source=a,b: quote .* twice: 'data\.source=\"a,b\"'; a list takes \[\], .* -m$"),
    ("trainer.val_check_interval=${nonesuch}", r"nonesuch.*--cfg job"),
    # types
    ("data=shards data.source=???", r"data\.source: has no value; set data\.source="),
    ("data.batch_size=abc", r"data\.batch_size=abc: expected a whole number"),
    ("data.batch_size=1.5", r"data\.batch_size=1\.5: expected a whole number"),
    ("data.batch_size=null", r"data\.batch_size=None: expected a whole number"),
    ("data.num_workers=many", r"data\.num_workers=many: expected a whole number or null"),
    ("data.resolution=big", r"data\.resolution=big: expected a whole number"),
    ("data.source=[a]", r"data\.source=\['a'\]: expected text or null"),
    ("data.flip_probability=often", r"data\.flip_probability=often: expected a number"),
    ("seed=x", r"seed=x: expected a whole number"),
    ("max_steps=1e3", r"max_steps=1000\.0: expected a whole number"),
    ("val_every=abc", r"val_every=abc: expected a whole number"),
    ("resume=[a]", r"resume=\['a'\]: expected text or null"),
    ("model.gradient_checkpointing=perhaps", r"model\.gradient_checkpointing=perhaps: expected true or false"),
    ("model.unet_init=half", r"model\.unet_init=half: expected pretrained or random"),
    ("method.w_min=low", r"method\.w_min=low: expected a number"),
    ("method.lora.rank=4.5", r"method\.lora\.rank=4\.5: expected a whole number"),
    ("method.lora.target_modules=7", r"method\.lora\.target_modules=7: expected text or a list"),
    ("method.lora=64", r"method\.lora=64: expected a section"),
    ("method.warmup_steps=soon", r"method\.warmup_steps=soon: expected a whole number"),
    ("optimizer.lr=fast", r"optimizer\.lr=fast: expected a number"),
    ("optimizer.betas=0.9", r"optimizer\.betas=0\.9: expected a list"),
    ("trainer.accumulate_grad_batches=some", r"trainer\.accumulate_grad_batches=some: expected a whole number"),
    ("callbacks.samples.student_steps=4", r"callbacks\.samples\.student_steps=4: expected a list .* of a whole number"),
    ("callbacks.samples.student_steps=[a]", r"callbacks\.samples\.student_steps=\['a'\]: expected a list"),
    # ranges
    ("seed=-1", r"seed=-1: expected 0 to 4294967295"),
    ("max_steps=-5", r"max_steps=-5: expected at least 1, such as max_steps=1000"),
    ("val_every=0", r"val_every=0: expected at least 1"),
    ("data.batch_size=0", r"data\.batch_size=0: expected at least 1"),
    ("data.num_workers=-1", r"data\.num_workers=-1: expected at least 0"),
    ("data.prefetch_factor=0", r"data\.prefetch_factor=0: expected at least 1"),
    ("data.shuffle_buffer=0", r"data\.shuffle_buffer=0: expected at least 1"),
    ("data.flip_probability=1.5", r"data\.flip_probability=1\.5: expected 0 to 1"),
    ("data.caption_dropout=-0.1", r"data\.caption_dropout=-0\.1: expected 0 to 1"),
    ("data.max_bad_fraction=2", r"data\.max_bad_fraction=2: expected 0 to 1"),
    ("data.val_limit=-1", r"data\.val_limit=-1: expected at least 0"),
    ("optimizer.lr=-1", r"optimizer\.lr=-1: expected at least 0"),
    ("optimizer.betas=[0.9]", r"optimizer: .*--cfg job"),
    ("optimizer.betas=[0.9,2]", r"optimizer: Invalid beta parameter at index 1: 2"),
    ("trainer.accumulate_grad_batches=0", r"trainer\.accumulate_grad_batches=0: expected at least 1"),
    ("trainer.gradient_clip_val=-1", r"trainer\.gradient_clip_val=-1: expected at least 0"),
    ("trainer.log_every_n_steps=0", r"trainer\.log_every_n_steps=0: expected at least 1"),
    ("trainer.max_steps=-1", r"trainer\.max_steps=-1: the run would never end"),
    ("callbacks.samples.student_steps=[0]", r"callbacks\.samples\.student_steps=\[0\]: expected 1 to 50"),
    ("callbacks.samples.num_prompts=0", r"callbacks\.samples\.num_prompts=0: expected at least 1"),
    ("method.lora.rank=0", r"method\.lora\.rank=0: expected .*at least 1"),
    ("method.lora.rank=-4", r"method\.lora\.rank=-4: expected .*at least 1"),
    ("method.lora.alpha=0", r"method\.lora\.alpha=0: expected a positive number"),
    ("method.lora.dropout=1", r"method\.lora\.dropout=1: expected"),
    ("method.warmup_steps=-1", r"method\.warmup_steps=-1: expected at least 0"),
    ("method.distillation.num_ode_steps=0", r"method\.distillation\.num_ode_steps=0: expected 1 to 1000"),
    ("method.distillation.num_ode_steps=2000", r"method\.distillation\.num_ode_steps=2000: expected 1 to 1000"),
    ("method.distillation.huber_c=0", r"method\.distillation\.huber_c=0: expected a positive number"),
    ("method=lora method.min_snr_gamma=0", r"method\.min_snr_gamma=0: expected a positive number"),
    ("method=lora method.noise_offset=-1", r"method\.noise_offset=-1: expected at least 0"),
    # names and combinations
    ("method.w_min=20", r"method\.w_min=20, method\.w_max=15\.0: expected 0 <= w_min <= w_max"),
    ("method.distillation.loss=l1", r"method\.distillation\.loss=l1: expected huber or l2"),
    ("method.lr_scheduler=fast", r"method\.lr_scheduler=fast: expected one of .*cosine"),
    ("method.lr_scheduler=piecewise_constant", r"method\.lr_scheduler=piecewise_constant: expected one of .*cosine"),
    ("method.lora.target_modules=everything", r"method\.lora\.target_modules=everything: expected attention or"),
    ("method.lora.target_modules=[to_x]", r"method\.lora\.target_modules: no .* named to_x; there are .*to_q"),
    ("data.resolution=33", r"data\.resolution=33: expected a positive multiple of 8 .*try 32"),
    ("callbacks.samples.resolution=33", r"callbacks\.samples\.resolution=33: expected a positive multiple of 8"),
    ("trainer.precision=fp8", r"trainer\.precision=fp8: expected 32-true or bf16-mixed or 16-mixed"),
    ("trainer.precision=64-true", r"trainer\.precision=64-true: expected 32-true"),
    ("trainer.accelerator=gpu", r"trainer: .*trainer=cpu runs without a GPU"),
    ("trainer.accelerator=abacus", r"trainer: .*abacus"),
    ("trainer.strategy=hope", r"trainer: .*hope"),
    ("trainer.devices=0", r"trainer: .*0"),
    # files
    ("model.path=./nowhere", r"model\.path=\./nowhere: no such folder; give"),
    ("model.path=W/empty", r"model\.path=.*/empty: holds no model_index\.json"),
    ("model.path=W/sdxl", r"model\.path=.*/sdxl: is a StableDiffusionXLPipeline; only"),
    ("model.path=W/flow", r"model\.path=.*/flow: prediction_type=flow_prediction is none of epsilon"),
    ("model.path=W/cut_pipeline", r"model\.path=.*/cut_pipeline: cannot be loaded"),
    ("model.path=W/no_unet", r"model\.path=.*/no_unet: cannot be loaded"),
    ("model.path=W/not_json", r"model\.path=.*/not_json: .*model_index\.json"),
    ("model.path=owner/name", r"model\.path=owner/name: cannot be loaded .*hf download"),
    ("method.teacher_lora=./nowhere", r"method\.teacher_lora=\./nowhere: no such file or folder"),
    ("method.teacher_lora=W/empty", r"method\.teacher_lora=.*/empty: holds neither"),
    ("method.teacher_lora=W/foreign.safetensors", r"method\.teacher_lora=.*foreign\.safetensors: .*another base model"),
    ("method.teacher_lora=W/pickled.pt", r"method\.teacher_lora=.*pickled\.pt: only \.safetensors is read"),
    ("method.teacher_lora=W/cut.safetensors", r"method\.teacher_lora=.*cut\.safetensors: cannot be loaded"),
    ("method.teacher_lora=W/dora.safetensors", r"method\.teacher_lora=.*dora\.safetensors: is a DoRA"),
    ("method.teacher_lora=owner/name", r"method\.teacher_lora=owner/name: no such folder here.*hf auth login"),
    ("resume=nowhere", r"resume=nowhere: neither a \.ckpt file nor a run folder"),
    ("resume=W/empty", r"resume=.*/empty: neither a \.ckpt file nor a run folder"),
    ("resume=W/garbage.ckpt", r"resume=.*garbage\.ckpt is no checkpoint"),
    ("data.source=W/nowhere", r"data\.source=.*/nowhere: no shards found"),
    ("data.source=W/empty", r"data\.source=.*/empty: no shards found"),
    ("data.source=W/photos", r"data\.source=.*/photos: a data set in the layout.*\n.*lcm_lightning\.prepare"),
    ("data.source=W/without_samples", r"the training shards hold no samples"),
    ("data.source=W/only_test", r"no split 'train'; it has test"),
    ("data.source=W/only_train", r"data\.source=.*without val or test split.*data\.val_limit=0"),
    ("data.source=W/interrupted", r"data\.source=.*/interrupted: .*run it again"),
    ("data.source=W/bad_index", r"data\.source: .*bad_index/index\.json is not what .*run prepare again"),
    ("data.source=owner/name", r"data\.source=owner/name: .*HF_TOKEN"),
    ("data.source=http://127.0.0.1:9/0.tar", r"http://127\.0\.0\.1:9/0\.tar: .*refused"),
    ("data.source=W/nowhere/{0..3}.tar", r"data\.source=.*: no shard .*0\.tar|quote"),
    ("hydra.run.dir=W/a_file/run", r"hydra\.run\.dir: the run folder cannot be made .*a_file"),
    ("hydra.run.dir=/proc/run", r"hydra\.run\.dir: the run folder cannot be made .*/proc/run"),
    ("data.source=W/uncounted data.cache_dir=/proc/cache", r"data\.cache_dir=/proc/cache: .*set"),
]
GENERATE_CASES: list[Case] = [
    ("", r"give run=outputs/.*model=sd15"),
    ("run=nowhere", r"run=nowhere: no config\.yaml there; give a run folder"),
    ("run=W/empty", r"run=.*/empty: no config\.yaml there"),
    ("run=W/unexported", r"run=.*/unexported: no lora/adapters\.json there"),
    ("run=W/moved", r"run=.*/moved: model\.path=.*no such folder.*model\.path="),
    ("run=W/run lora=a", r"run=.*/run and lora=a: a run brings its own LoRA"),
    ("run=W/run num_images=0", r"num_images=0: expected at least 1"),
    ("run=W/run num_images=few", r"num_images=few: expected a whole number"),
    ("run=W/run steps=0", r"steps=0: expected 1 to 1000"),
    ("run=W/run steps=51", r"steps=51: multistep consistency sampling takes at most 50"),
    ("run=W/run guidance_scale=-1", r"guidance_scale=-1: expected at least 0"),
    ("run=W/run batch_size=0", r"batch_size=0: expected at least 1"),
    ("run=W/run seed=-1", r"seed=-1: expected 0 to"),
    ("run=W/run dtype=int8", r"dtype=int8: expected bfloat16"),
    ("run=W/run accelerator=abacus", r"accelerator=abacus"),
    ("run=W/run accelerator=cuda", r"accelerator=cuda .*accelerator=cpu runs anywhere"),
    ("run=W/run resolution=33", r"resolution=33: expected a positive multiple of 8"),
    ("run=W/run negative_prompt=b", r"negative_prompt=b: acts with guidance_scale above 1"),
    ("run=W/run output=W/a_file", r"output=.*/a_file: .*set it to a folder"),
    ("run=W/run output=/proc/images", r"output=/proc/images: .*set it to a folder"),
    ("run=W/run prompt={a:1}", r"prompt=\{'a': 1\}: expected text or a list"),
    ("run=W/run +foo=1", r"foo=1: nothing reads this key"),
    ("model=sd15 model.path=W/pipeline lora=W/good.safetensors", r"lora_role=None: say what lora="),
    ("model=sd15 model.path=W/pipeline lora=W/foreign.safetensors lora_role=lcm", r"lora=.*another base model"),
    ("model=sd15 model.path=W/pipeline lora=W/cut.safetensors lora_role=lcm", r"lora=.*cannot be loaded"),
]
PREPARE_CASES: list[Case] = [
    ("", r"data\.source is not set: .*kaggle.*data\.source=/path"),
    ("data.source=/no/such", r"data\.source=/no/such: no such folder"),
    ("data.source=W/a_file", r"data\.source=.*/a_file: a file; give the folder"),
    ("data.source=W/empty", r"data\.source=.*/empty: no captioned images recognised"),
    ("data.source=[a]", r"data\.source=\['a'\]: expected text or null"),
    ("data.source=W/photos prepare.foo=1", r"prepare\.foo=1: there is no such key; there are output, samples"),
    ("data.source=W/photos +prepare.foo=1", r"prepare\.foo=1: nothing reads a key"),
    ("data.source=W/photos +foo=1", r"foo=1: nothing reads a key"),
    ("data.source=W/photos prepare.samples_per_shard=0", r"prepare\.samples_per_shard=0: .*at least 1; try 500"),
    ("data.source=W/photos prepare.samples_per_shard=all", r"prepare\.samples_per_shard=all: expected a whole number"),
    ("data.source=W/photos prepare.quality=101", r"prepare\.quality=101: .*1 to 100"),
    ("data.source=W/photos prepare.max_side=20", r"prepare\.max_side=20: .*at least 32"),
    ("data.source=W/photos prepare.workers=-1", r"prepare\.workers=-1: .*at least 1"),
    ("data.source=W/photos prepare=fast", r"prepare=fast"),
    ("data.source=W/photos prepare.output=W/a_file", r"prepare\.output=.*/a_file: .*cannot be written"),
    ("data.source=W/photos prepare.output=/proc/shards", r"prepare\.output=/proc/shards: .*cannot be written"),
    ("data.source=W/photos prepare.output=[a]", r"prepare\.output=\['a'\]: expected text or null"),
    ("data.source=W/outside", r"outside.*metadata\.jsonl.*outside the folder"),
    ("data.source=W/shards data.name=[a]", r"data\.name=\['a'\]: expected text"),
    ("data=nonesuch", r"data=nonesuch: .*there are .*flickr8k"),
]
EVALUATE_CASES: list[Case] = [
    ("", r"give run=outputs/.*model=sd15"),
    ("run=nowhere", r"run=nowhere: no config\.yaml there"),
    ("model=tiny", r"data: a model without a run needs a data set"),
    ("model=tiny data=twemoji dtype=int8", r"dtype=int8: expected bfloat16"),
    ("model=tiny data=twemoji evaluation.num_images=1", r"evaluation\.num_images=1: expected at least 2"),
    ("model=tiny data=twemoji evaluation.num_images=all", r"evaluation\.num_images=all: expected a whole number"),
    ("model=tiny data=twemoji evaluation=nonesuch", r"evaluation=nonesuch: .*there are .*quick"),
    ("model=tiny data=twemoji evaluation.split=dev", r"no split 'dev'; it has"),
    ("model=tiny data=twemoji evaluation.clip=./nowhere", r"evaluation\.clip=\./nowhere"),
    ("model=tiny data=twemoji devices=0", r"devices=0"),
    ("model=tiny data=twemoji run_dir=/proc/evaluation", r"run_dir=/proc/evaluation"),
    ("model=tiny data=twemoji +foo=1", r"foo=1: nothing reads this key"),
]


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
    kept = [option for option in defaults if option.partition("=")[0] not in {o.partition("=")[0] for o in own}]
    return [re.sub(r"(?<=[=/])W(?=/)", str(world), option) for option in (*kept, *own)]


def complaint(program: str, options: list[str], capfd: pytest.CaptureFixture[str]) -> str:
    """The one message a command ends with, run in this process."""
    main = importlib.import_module(program).main
    GlobalHydra.instance().clear()
    before = sys.argv
    sys.argv = [f"{program}.py", f"--config-path={ROOT / 'conf'}", *options]
    capfd.readouterr()
    started = time.process_time()
    try:
        with pytest.raises(SystemExit) as end:
            main()
    finally:
        sys.argv = before
        GlobalHydra.instance().clear()
    assert time.process_time() - started < SECONDS
    assert end.value.code == 2
    return the_message(capfd.readouterr().err)


def the_message(stderr: str) -> str:
    """What follows "error: ", of which there must be one, without a traceback."""
    assert "Traceback" not in stderr, stderr
    assert len(re.findall(r"^error: ", stderr, re.MULTILINE)) == 1, stderr
    return stderr[stderr.index("error: ") :]


def identified(cases: list[Case]) -> list[object]:
    """The cases under readable names."""
    return [pytest.param(case, pattern, id=case or "nothing") for case, pattern in cases]


@pytest.mark.parametrize(("case", "pattern"), identified(TRAIN_CASES))
def test_training_refuses(case, pattern, world, here, capfd):
    message = complaint("train", overrides(TRAIN, case, world), capfd)
    assert re.search(pattern, message), message
    assert state(here) == {}


@pytest.mark.parametrize(("case", "pattern"), identified(GENERATE_CASES))
def test_generating_refuses(case, pattern, world, here, capfd):
    message = complaint("lcm_lightning.generate", overrides(GENERATE, case, world), capfd)
    assert re.search(pattern, message), message
    assert state(here) == {} and not (world / "run" / "generated").exists()


@pytest.mark.parametrize(("case", "pattern"), identified(PREPARE_CASES))
def test_preparing_refuses(case, pattern, world, here, capfd):
    message = complaint("lcm_lightning.prepare.commands", overrides(("prepare.workers=1",), case, world), capfd)
    assert re.search(pattern, message), message
    assert state(here) == {}


@pytest.mark.parametrize(("case", "pattern"), identified(EVALUATE_CASES))
def test_evaluating_refuses(case, pattern, world, here, capfd):
    message = complaint("evaluate", overrides(EVALUATE, case, world), capfd)
    assert re.search(pattern, message), message
    assert state(here) == {}


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
    message = complaint("train", overrides(TRAIN, "hydra.run.dir=there", world), capfd)
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
    """Processor time of importing torch, Lightning and diffusers, most of which is their own dependencies'."""
    seconds, done = processor_seconds("-c", "import train", **{**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr
    return seconds


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "pattern"),
    [
        ((ROOT / "train.py", *TRAIN, "data.batch_size=abc"), r"data\.batch_size=abc"),
        ((ROOT / "train.py", *TRAIN, "experiment=nonesuch"), r"experiment=nonesuch: .*there are .*quickstart"),
        ((ROOT / "train.py", *TRAIN, "model.path=owner/name"), r"model\.path=owner/name: .*hf auth login"),
        ((ROOT / "train.py", *TRAIN, "method.teacher_lora=owner/name"), r"method\.teacher_lora=owner/name: .*hf auth"),
        ((ROOT / "train.py", *TRAIN, "data.source=owner/name"), r"data\.source=owner/name: .*HF_TOKEN"),
        (("-m", "lcm_lightning.prepare", "data.source=/no/such"), r"data\.source=/no/such: no such folder"),
        (("-m", "lcm_lightning.generate", "run=nowhere", "prompt=a"), r"run=nowhere: no config\.yaml"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(map(str, value[-2:])),
)
def test_a_process_ends_within_seconds(arguments, pattern, world, here, refusing_hub, import_seconds):
    """Also with a hub that is there and refuses the token."""
    hub = {"HF_ENDPOINT": refusing_hub, "HF_TOKEN": "hf_wrong", "HF_HUB_OFFLINE": "0"}
    options = [re.sub(r"=W/", f"={world}/", str(argument)) for argument in arguments]
    seconds, done = processor_seconds(*options, **{**os.environ, **hub, "PYTHONPATH": str(ROOT)})
    assert seconds - import_seconds < SECONDS
    assert done.returncode == 2, done.stderr
    assert re.search(pattern, the_message(done.stderr)), done.stderr
    assert state(here) == {}


def test_a_reader_who_has_seen_enough_of_the_help_ends_it_quietly(tmp_path: Path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = shlex.join([sys.executable, "-m", "lcm_lightning.train", "--help"])
    done = subprocess.run(
        f"{command} | true", shell=True, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("", "")
