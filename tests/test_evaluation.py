"""`python evaluate.py` and `python -m lcm_lightning.generate` as they are typed, on the embedded pipeline."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest
import torch
from diffusers import EulerDiscreteScheduler, StableDiffusionPipeline
from peft import LoraConfig, get_peft_model_state_dict
from PIL import Image

from helpers.commands import in_process
from lcm_lightning.errors import UserError
from lcm_lightning.evaluation.contenders import Lineup
from lcm_lightning.evaluation.features import Clip, InceptionFeatures
from lcm_lightning.methods import adapter_kinds
from lcm_lightning.methods.lcm_lora import LCM
from lcm_lightning.models.adapters import (
    LoraSettings,
    active_adapters,
    add_lora,
    as_pipeline,
    load_lora,
    lora_layers,
    lora_parameters,
    lora_state_dict,
    merged_adapters,
)
from lcm_lightning.models.architectures import SD15_SCHEDULER
from lcm_lightning.models.lora_files import save_lora
from lcm_lightning.models.sampling import DDIM, make_scheduler, sample
from lcm_lightning.models.stable_diffusion import StableDiffusion, load_stable_diffusion

ROOT = Path(__file__).parent.parent
ASSETS = ROOT / "lcm_lightning" / "assets"
SCHEMA = ROOT / "lcm_lightning" / "evaluation" / "metrics.schema.json"
SMALL = (
    "data=twemoji",
    "evaluation=quick",
    "evaluation.num_images=6",
    "evaluation.batch_size=2",
    "evaluation.lineup.teacher_steps=3",
    "evaluation.lineup.rivals={ddim:[2],dpmpp:[2]}",
    "evaluation.lineup.undistilled_steps=[2]",
    "evaluation.lineup.student_steps=[1,2]",
    "evaluation.latency_repeats=2",
    "evaluation.latency_batch_sizes=[1,2]",
    "evaluation.bootstrap_samples=5",
    "evaluation.shown=3",
    "logger=csv",
)


def environment(cwd: Path, threads: str | None = "1") -> dict[str, str]:
    inherited = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    limit = {} if threads is None else {"OMP_NUM_THREADS": threads}
    return {**inherited, **limit, "XDG_CACHE_HOME": str(cwd / "cache"), "PYTHONPATH": str(ROOT)}


def python(*arguments: str, cwd: Path, threads: str | None = "1") -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=240,
        stdin=subprocess.DEVNULL,
        env=environment(cwd, threads),
        check=False,
    )


def evaluate(folder: Path, *overrides: str, threads: str | None = "1") -> subprocess.CompletedProcess[str]:
    return python(str(ROOT / "evaluate.py"), *overrides, cwd=folder, threads=threads)


def give_lora(model: StableDiffusion, name: str, seed: int) -> None:
    add_lora(model.unet, name, LoraSettings(rank=4, alpha=4))
    generator = torch.Generator().manual_seed(seed)
    for parameter in lora_parameters(model.unet, name):
        parameter.data.normal_(0, 0.02, generator=generator)
        parameter.requires_grad_(False)


def write_lora(path: Path, seed: int) -> Path:
    """A LoRA of the embedded pipeline, random."""
    model = load_stable_diffusion(str(ASSETS / "tiny"))
    give_lora(model, "lcm", seed)
    save_lora(lora_state_dict(model.unet, "lcm"), path)
    return path


@pytest.fixture(scope="module")
def lora_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_lora(tmp_path_factory.mktemp("lora") / "lora.safetensors", seed=1)


@pytest.fixture(scope="module")
def command(lora_file: Path) -> tuple[str, ...]:
    return ("model=tiny", f"lora={lora_file}", "lora_role=lcm", *SMALL, "run_dir=done")


@pytest.fixture(scope="module")
def evaluated(tmp_path_factory: pytest.TempPathFactory, command: tuple[str, ...]) -> Path:
    """A finished evaluation of the embedded pipeline with a distilled LoRA."""
    folder = tmp_path_factory.mktemp("evaluated")
    finished = evaluate(folder, *command)
    assert finished.returncode == 0, finished.stderr
    assert "report.html" in finished.stdout
    return folder / "done"


def read_metrics(folder: Path) -> dict:
    return json.loads((folder / "metrics.json").read_text())


def figures(folder: Path) -> dict:
    """metrics.json without what a clock or the memory says."""
    metrics = read_metrics(folder)
    del metrics["machine"]
    for model in metrics["models"]:
        for key in ("seconds_per_image", "latency", "peak_memory_mb"):
            del model[key]
    return metrics


@pytest.mark.slow
def test_metrics_json_keeps_its_schema_and_holds_every_role(evaluated: Path):
    metrics = read_metrics(evaluated)
    jsonschema.validate(metrics, json.loads(SCHEMA.read_text()))
    assert metrics["protocol"] == "quick-6" and metrics["features"].endswith(":tiny_clip")
    assert metrics["machine"]["cores"] and metrics["versions"]["torch"]
    found = [(model["slug"], model["role"], model["network_evaluations"]) for model in metrics["models"]]
    assert found == [
        ("base_ddim_3", "base", 6),
        ("base_ddim_2", "base", 4),
        ("base_dpmpp_2", "base", 4),
        ("undistilled_dpmpp_2", "undistilled", 4),
        ("lcm_lora_1", "student", 1),
        ("lcm_lora_2", "student", 2),
    ]
    said = " ".join(metrics["warnings"])
    assert all(words in said for words in ("N=6", "training split", "not on Inception's", "text tower"))


@pytest.mark.slow
def test_every_figure_has_an_interval_and_every_second_a_stage(evaluated: Path):
    for model in read_metrics(evaluated)["models"]:
        assert model["n_images"] == 6 and model["teacher"] == "base_ddim_3"
        for key in ("fid", "kid", "clip_score"):
            assert model[key]["low"] <= model[key]["value"] <= model[key]["high"] and model[key]["n"] == 6
        assert [timed["batch_size"] for timed in model["latency"]] == [1, 2]
        for timed in model["latency"]:
            seconds = timed["seconds_per_image"]
            assert 0 < seconds["low"] <= seconds["median"] <= seconds["high"]
            stages = [timed[stage]["median"] for stage in ("text_encoding", "denoising", "vae_decoding")]
            assert min(stages) > 0 and 0 < timed["fraction_of_peak"] < 2
        assert model["seconds_per_image"].items() >= model["latency"][0]["seconds_per_image"].items()
        assert model["peak_memory_mb"] > 100


@pytest.mark.slow
def test_samplers_with_the_same_steps_draw_the_same_prompts_differently(evaluated: Path):
    """The hurried teacher and the rival by the same solver of as many steps are the same pictures, drawn once."""
    folders = {model["slug"]: evaluated / model["images"] for model in read_metrics(evaluated)["models"]}
    assert folders["undistilled_dpmpp_2"] == folders["base_dpmpp_2"]
    first = {slug: (folder / "000000.png").read_bytes() for slug, folder in folders.items()}
    assert len(set(first.values())) == 5


@pytest.mark.slow
def test_the_report_is_one_file_with_its_pictures(evaluated: Path):
    html = (evaluated / "report.html").read_text()
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", html) and "<script" not in html
    assert html.count('src="data:image/png;base64,') == 3 * (1 + 4) + 3 * (1 + 2)  # photos and contenders, rivals apart
    assert "LCM-LoRA, 2 steps" in html and "LCM-LoRA, 2 steps" in (evaluated / "report.md").read_text()
    grid = Image.open(evaluated / "grid.png")
    assert grid.width > 5 * 128 and grid.height > 3 * 128
    assert (evaluated / "grid-2.png").is_file() and (evaluated / "frontier.png").is_file()
    assert not [path for path in evaluated.rglob(".*") if path.is_file() and path.name.startswith(".report")]


@pytest.mark.slow
def test_a_second_evaluation_draws_only_what_is_missing(evaluated: Path, tmp_path: Path, command: tuple[str, ...]):
    again = tmp_path / "done"
    shutil.copytree(evaluated, again)
    student = next(model for model in read_metrics(evaluated)["models"] if model["slug"] == "lcm_lora_2")
    images = sorted((again / student["images"]).glob("*.png"))
    assert len(images) == 6
    before = {path: path.read_bytes() for path in images}
    stamps = {path: path.stat().st_mtime_ns for path in again.glob("images/*/*.png")}
    images[3].unlink()
    finished = evaluate(tmp_path, *command)
    assert finished.returncode == 0, finished.stderr
    drawn = {path for path in again.glob("images/*/*.png") if path.stat().st_mtime_ns != stamps.get(path)}
    assert drawn == {images[2], images[3]}  # the batch of two that the lost image belongs to
    assert {path: path.read_bytes() for path in images} == before
    assert figures(again) == figures(evaluated)


@pytest.mark.slow
def test_a_killed_evaluation_goes_on_and_draws_at_most_a_batch_again(
    evaluated: Path, tmp_path: Path, command: tuple[str, ...]
):
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "evaluate.py"), *command],
        cwd=tmp_path,
        env=environment(tmp_path),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 240
    while len(drawn := list((tmp_path / "done").glob("images/*/[0-9]*.png"))) < 7 and time.monotonic() < deadline:
        assert process.poll() is None, "it was over before it could be killed"
        time.sleep(0.005)
    process.kill()
    process.wait()
    drawn = list((tmp_path / "done").glob("images/*/[0-9]*.png"))
    assert 7 <= len(drawn) < 30 and not (tmp_path / "done" / "metrics.json").exists()
    stamps = {path: path.stat().st_mtime_ns for path in drawn}
    finished = evaluate(tmp_path, *command)
    assert finished.returncode == 0, finished.stderr
    assert sum(path.stat().st_mtime_ns != stamp for path, stamp in stamps.items()) <= 2  # a batch is two images
    assert figures(tmp_path / "done") == figures(evaluated)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_two_processes_find_what_one_finds(evaluated: Path, tmp_path: Path, command: tuple[str, ...]):
    finished = evaluate(tmp_path, *command, "devices=2", "accelerator=cpu")
    assert finished.returncode == 0, finished.stderr
    assert figures(tmp_path / "done") == figures(evaluated)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_the_number_of_processes_does_not_change_what_is_timed(tmp_path: Path):
    """Without OMP_NUM_THREADS processes that work at once get a share of the cores each; the one that times has all."""
    shortest = ("evaluation.num_images=2", "evaluation.batch_size=1", "evaluation.lineup.teacher_steps=1")
    shortest += ("evaluation.lineup.rivals={ddim:[],dpmpp:[]}", "evaluation.latency_batch_sizes=[1]")
    for devices in ("1", "2"):
        (tmp_path / devices).mkdir()
        command = ("model=tiny", *SMALL, *shortest, "run_dir=done", f"devices={devices}", "accelerator=cpu")
        finished = evaluate(tmp_path / devices, *command, threads=None)
        assert finished.returncode == 0, finished.stderr
    one, two = (tmp_path / devices / "done" for devices in ("1", "2"))
    assert read_metrics(one)["machine"]["threads"] == read_metrics(two)["machine"]["threads"] > 0
    images = [path.relative_to(one) for path in one.glob("images/*/*.png")]
    assert len(images) == 2 and all((one / path).read_bytes() == (two / path).read_bytes() for path in images)


@pytest.mark.slow
@pytest.mark.multiprocess
def test_several_models_are_compared_in_one_call_and_what_they_share_is_drawn_once(
    evaluated: Path, tmp_path: Path, lora_file: Path
):
    other = write_lora(tmp_path / "other.safetensors", seed=2)
    same = shutil.copy(lora_file, tmp_path / "copy.safetensors")
    models = f"models=[tiny,lcm:{lora_file},lora:{other},lcm:{same}]"
    small = [option for option in SMALL if "latency_repeats" not in option]
    finished = evaluate(
        tmp_path,
        models,
        "model=tiny",
        "lora_role=lcm",
        *small,
        "evaluation.latency_repeats=1",
        "devices=2",
        "accelerator=cpu",
        "run_dir=several",
    )
    assert finished.returncode == 0, finished.stderr
    metrics = read_metrics(tmp_path / "several")
    jsonschema.validate(metrics, json.loads(SCHEMA.read_text()))
    by_slug = {model["slug"]: model for model in metrics["models"]}
    assert len(by_slug) == len(metrics["models"]) == 8
    assert list(by_slug)[-4:] == ["lcm_lora-lora_1", "lcm_lora-lora_2", "lcm_lora-other_1", "lcm_lora-other_2"]
    assert by_slug["lcm_lora-other_2"]["label"] == "LCM-LoRA other, 2 steps"
    assert len(list((tmp_path / "several" / "images").iterdir())) == 7
    alone = {model["slug"]: model for model in read_metrics(evaluated)["models"]}
    for here, there in (("base_ddim_3", "base_ddim_3"), ("lcm_lora-lora_2", "lcm_lora_2")):
        assert by_slug[here]["fid"]["value"] == alone[there]["fid"]["value"]
    assert by_slug["lcm_lora-other_2"]["fid"] != by_slug["lcm_lora-lora_2"]["fid"]


@pytest.mark.slow
def test_generate_draws_numbered_images_and_a_sheet(tmp_path: Path, lora_file: Path):
    command = (
        "model=tiny",
        f"lora={lora_file}",
        "lora_role=lcm",
        "prompt=red heart",
        "num_images=2",
        "seed=7",
        "output=drawn",
    )
    finished = python("-m", "lcm_lightning.generate", *command, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    names = sorted(path.name for path in (tmp_path / "drawn").iterdir())
    assert names == ["red-heart-7.png", "red-heart-8.png", "red-heart.png"]
    assert Image.open(tmp_path / "drawn" / "red-heart-7.png").size == (64, 64)


@pytest.mark.slow
def test_generate_draws_several_prompts_into_one_sheet(tmp_path: Path):
    command = ("model=tiny", "prompt=[cat,Cat]", "num_images=1", "steps=1", "sampler=dpmpp", "output=drawn")
    finished = python("-m", "lcm_lightning.generate", *command, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    names = sorted(path.name for path in (tmp_path / "drawn").iterdir())
    assert names == ["cat-0.png", "cat-2-0.png", "prompts.png"]


@pytest.mark.parametrize(
    ("program", "overrides", "said"),
    [
        ("evaluate", (), "give run=outputs/"),
        ("evaluate", ("run=nowhere",), "run=nowhere: no config.yaml there"),
        ("evaluate", ("run=a", "lora=b"), "give model=... with lora=..."),
        ("evaluate", ("model=tiny",), "data: a model without a run needs a data set"),
        ("evaluate", ("model=tiny", "data=twemoji", "+steps=4"), "steps=4: nothing reads this key"),
        ("evaluate", ("model=tiny", "data=twemoji", "evaluation.num_images=1"), "evaluation.num_images=1: expected"),
        ("evaluate", ("model=tiny", "data=twemoji", "+evaluation.foo=1"), "foo"),
        ("evaluate", ("model=tiny", "dtype=int8"), "dtype=int8: expected bfloat16"),
        ("evaluate", ("model=tiny", "data=twemoji", "evaluation=quick", "evaluation.features=vgg"), "features=vgg"),
        ("evaluate", ("model=tiny", "data=twemoji", "evaluation=quick", "evaluation.clip=./none"), "clip=./none"),
        ("evaluate", ("models=[tinny]", "data=twemoji"), "models: no model is called tinny; did you mean tiny?"),
        ("evaluate", ("model=tiny", "data=twemoji", "evaluation=report"), "num_images=100: twemoji/test holds 90"),
        ("generate", ("model=tiny",), "prompt: has no value"),
        ("generate", ("prompt=x",), "give run=outputs/"),
        ("generate", ("model=tiny", "prompt=[]"), "prompt=[]: expected at least one prompt"),
        (
            "generate",
            ("model=tiny", "prompt=x", "sampler=euler"),
            "sampler=euler: expected one of ddim, dpmpp, dmd2, full_lcm, lcm",
        ),
        ("generate", ("model=tiny", "prompt=x", "steps=0"), "steps=0: expected 1 to 1000"),
        ("generate", ("model=tiny", "prompt=x", "negative_prompt=y", "guidance_scale=1"), "negative_prompt=y: acts"),
        ("generate", ("model=tiny", "prompt=x", "accelerator=gpu"), "accelerator=gpu"),
        ("generate", ("model=tiny", "prompt=x", f"lora={ASSETS}"), f"lora={ASSETS}: holds neither lora/"),
        ("evaluate", ("model=tiny", "data=twemoji", "evaluation.lineup.student_steps=[64]"), "student_steps=[64]"),
        (
            "evaluate",
            ("model=tiny", "data=twemoji", "evaluation.lineup.undistilled_steps=[0]"),
            "undistilled_steps=[0]",
        ),
        ("generate", ("model=tiny", "prompt=x", "resolution=65"), "resolution=65: expected a positive multiple"),
    ],
)
def test_mistakes_are_one_message(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    program: str,
    overrides: tuple[str, ...],
    said: str,
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    name = {"evaluate": "evaluate", "generate": "lcm_lightning.generate"}[program]
    with pytest.raises(SystemExit) as end:
        in_process(name, *overrides, *(("logger=csv",) if program == "evaluate" else ()))
    stderr = capfd.readouterr().err
    assert end.value.code not in (0, None)
    assert said in stderr and "Traceback" not in stderr
    assert not [path for path in tmp_path.rglob("*") if path.name != "cache" and "cache" not in path.parts]


def test_merged_adapters_are_the_adapters_and_leave_no_trace(
    tiny_model: StableDiffusion, pipeline_folder: Path, tmp_path: Path
):
    for seed, name in enumerate(("finetuned", "lcm")):
        trained = load_stable_diffusion(str(pipeline_folder))
        give_lora(trained, name, seed)
        save_lora(lora_state_dict(trained.unet, name), tmp_path / f"{name}.safetensors")
        load_lora(tiny_model, tmp_path / f"{name}.safetensors", name)
    settings = {"seeds": [0], "steps": 2, "guidance_scale": 1.0, "sampler": LCM, "resolution": 32}
    weights = {key: value.clone() for key, value in tiny_model.state_dict().items()}
    drawn = {}
    for names in ((), ("finetuned",), ("finetuned", "lcm")):
        with active_adapters(tiny_model, names):
            drawn[names] = sample(tiny_model, ["a dog"], **settings)
        with merged_adapters(tiny_model, names):
            torch.testing.assert_close(sample(tiny_model, ["a dog"], **settings), drawn[names], atol=1e-4, rtol=0)
    assert (drawn[()] - drawn[("finetuned",)]).abs().max() > 0.01
    assert (drawn[("finetuned",)] - drawn[("finetuned", "lcm")]).abs().max() > 0.01
    assert all(torch.equal(value, weights[key]) for key, value in tiny_model.state_dict().items())


def test_a_file_of_rank_and_alpha_means_what_diffusers_takes_it_for(tiny_model: StableDiffusion, tmp_path: Path):
    trained = as_pipeline(tiny_model)
    trained.unet.add_adapter(LoraConfig(r=8, lora_alpha=4, target_modules=["to_q"], init_lora_weights=False), "x")
    layers = get_peft_model_state_dict(trained.unet, adapter_name="x")
    metadata = {"r": 8, "lora_alpha": 4, "target_modules": ["to_q"]}
    StableDiffusionPipeline.save_lora_weights(tmp_path, layers, unet_lora_adapter_metadata=metadata)
    trained.unet.delete_adapters("x")
    load_lora(tiny_model, tmp_path, "loaded")
    assert {layer.scaling["loaded"] for layer in lora_layers(tiny_model)} == {0.5}


def test_a_dora_is_refused(tiny_model: StableDiffusion, tmp_path: Path):
    trained = as_pipeline(tiny_model)
    trained.unet.add_adapter(LoraConfig(r=8, target_modules=["to_q"], use_dora=True), "x")
    StableDiffusionPipeline.save_lora_weights(tmp_path, get_peft_model_state_dict(trained.unet, adapter_name="x"))
    trained.unet.delete_adapters("x")
    with pytest.raises(UserError, match="is a DoRA"):
        load_lora(tiny_model, tmp_path, "loaded")


def test_latents_are_never_clipped():
    """Configs of other schedulers' classes, as many fine-tuned models have them, say nothing of DDIM's settings."""
    euler = {key: value for key, value in SD15_SCHEDULER.items() if key in ("beta_start", "beta_end", "beta_schedule")}
    config = make_scheduler(DDIM, EulerDiscreteScheduler(**euler).config).config
    assert not config.clip_sample and not config.set_alpha_to_one


def test_the_lineup_follows_the_adapters():
    def roles(*adapters: str) -> list[tuple[str, tuple[str, ...]]]:
        kinds = [adapter_kinds()[name] for name in adapters]
        return [(c.role, c.adapters) for c in Lineup(undistilled_steps=(4,), student_steps=(4,)).contenders(kinds)]

    assert roles() == [("base", ())]
    assert roles("finetuned") == [("base", ()), ("finetuned", ("finetuned",))]
    assert roles("lcm") == [("base", ()), ("undistilled", ()), ("student", ("lcm",))]
    both = ("finetuned", "lcm")
    assert roles(*both)[1:] == [
        ("finetuned", ("finetuned",)),
        ("undistilled", ("finetuned",)),
        ("student", both),
    ]


def test_a_student_is_not_asked_for_more_steps_than_its_sampler_takes():
    lcm = adapter_kinds()["lcm"]
    few = replace(lcm, sampler=replace(lcm.sampler, max_steps=2))
    students = [c for c in Lineup(student_steps=(1, 2, 4, 8)).contenders([few]) if c.role == "student"]
    assert [student.steps for student in students] == [1, 2]
    exact = replace(lcm, sampler=replace(lcm.sampler, min_steps=5, max_steps=5), steps=5)
    students = [c for c in Lineup(student_steps=(1, 2, 4, 8)).contenders([exact]) if c.role == "student"]
    assert [student.steps for student in students] == [5]


def test_rivals_are_the_teacher_by_fast_solvers_and_everyone_knows_the_teacher():
    lineup = Lineup(teacher_steps=50, rivals={"ddim": [10, 50], "dpmpp": [10, 20]}, student_steps=(4,))
    tuned, lcm = (adapter_kinds()[name] for name in ("finetuned", "lcm"))
    slugs = [contender.slug for contender in lineup.contenders((tuned, lcm))]
    rivals = ["finetuned_ddim_10", "finetuned_dpmpp_10", "finetuned_dpmpp_20"]
    hurried = ["undistilled_dpmpp_4", "undistilled_dpmpp_2", "undistilled_dpmpp_1"]
    assert slugs == ["base_ddim_50", "finetuned_ddim_50", *rivals, *hurried, "lcm_lora_4"]
    assert {contender.teacher for contender in lineup.contenders((tuned, lcm))} == {"finetuned_ddim_50"}
    assert {contender.teacher for contender in lineup.contenders((lcm,))} == {"base_ddim_50"}
    assert lineup.contenders(())[1].label == "base, DDIM 10 steps"


def test_clip_features_equal_transformers_own_processing():
    from transformers import CLIPModel, CLIPProcessor

    folder = ASSETS / "tiny_clip"
    pictures = [Image.effect_noise((64, 64), 80 + i).convert("RGB") for i in range(3)]
    captions = ["red heart", "a clock", "grinning face"]
    inputs = CLIPProcessor.from_pretrained(folder)(
        text=captions, images=pictures, return_tensors="pt", padding="max_length", truncation=True
    )
    with torch.no_grad():
        theirs = CLIPModel.from_pretrained(folder)(**inputs)
    clip = Clip(str(folder))
    import numpy as np

    images = torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2)
    ours = torch.nn.functional.normalize(clip(images), dim=1)
    torch.testing.assert_close(ours, theirs.image_embeds, atol=1e-4, rtol=0)
    texts = torch.nn.functional.normalize(clip.text_features(captions), dim=1)
    torch.testing.assert_close(texts, theirs.text_embeds, atol=1e-4, rtol=0)


def test_inception_takes_local_weights_and_unpickles_nothing(tmp_path: Path):
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Harmful:
        def __reduce__(self):
            return (os.mkdir, (str(tmp_path / "harm"),))

    torch.save({"weights": Harmful()}, tmp_path / "bad.pth")
    with pytest.raises(UserError, match="not a file of weights"):
        InceptionFeatures(tmp_path / "bad.pth")
    assert not (tmp_path / "harm").exists()
    with pytest.raises(UserError, match="no such file"):
        InceptionFeatures(tmp_path / "none.pth")
    weights = _random_inception(FeatureExtractorInceptionV3, tmp_path / "random.pth")
    images = torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    features = InceptionFeatures(weights)(images)
    theirs = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], feature_extractor_weights_path=weights)
    assert features.shape == (2, 2048)
    torch.testing.assert_close(features, theirs.eval()(images)[0], atol=1e-5, rtol=1e-5)


def _random_inception(network: type, path: Path) -> Path:
    """A file of random weights in torch-fidelity's layout; the real ones cannot be downloaded here."""
    torch.manual_seed(0)

    class Untrained(network):
        def load_state_dict(self, state_dict, **_):
            return None

    torch.save({}, path)
    torch.save(Untrained("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(path)).state_dict(), path)
    return path
