"""A model card: its head is what the hub files by, its program draws, and nothing in it is of this machine."""

from __future__ import annotations

import json
import re
import shutil
import warnings
from pathlib import Path

import diffusers
import pytest
import torch
from huggingface_hub import ModelCard
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from safetensors.torch import load_file, save_file

from helpers.commands import ROOT, SMALL, SMALLER, in_process
from lcm_lightning.errors import UserError
from lcm_lightning.evaluation.tables import REAL
from lcm_lightning.hub import is_hub_id
from lcm_lightning.inspect import describe
from lcm_lightning.models.kinds import LORA_FILE
from lcm_lightning.output.pictures import grid_images, labelled_grid, png_bytes
from lcm_lightning.runs.contents import read_manifest, weights_digest
from lcm_lightning.sharing.base_models import base_model
from lcm_lightning.sharing.model_card import (
    CARD,
    EVALUATION_GRID,
    MARK,
    CardSettings,
    evaluation_of,
    write_card,
)
from lcm_lightning.sharing.redaction import HIDDEN, public, public_overrides, public_text
from lcm_lightning.sharing.training_facts import images_per_step, training_seconds

TINY = ROOT / "lcm_lightning" / "assets" / "tiny"


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, flickr_shards: Path) -> dict[str, Path]:
    """A fine-tuning, and a distillation of what it made, of a step each."""
    folder = tmp_path_factory.mktemp("secret-user")
    shared = ("model=tiny", f"data.source={flickr_shards}", "trainer=cpu", "logger=csv", "max_steps=1", "val_every=1")
    shared += ("method.warmup_steps=0", "optimizer.lr=0.05")  # far enough that its adapter shows in a picture
    places = {name: folder / name for name in ("finetuned", "student")}
    for name, options in {
        "finetuned": ("method=lora",),
        "student": (
            "method=tcd_lora",
            f"method.teacher_lora={places['finetuned']}",
            "callbacks.samples.student_steps=[4]",
        ),
    }.items():
        in_process("lcm_lightning.train", *SMALL, *shared, *options, f"hydra.run.dir={places[name]}")
    return places


@pytest.fixture
def student(runs: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the student's run to write into."""
    return Path(shutil.copytree(runs["student"], tmp_path / "run"))


def card(run: Path) -> ModelCard:
    return ModelCard.load(run / "lora" / CARD)


def set_in_config(run: Path, **values: object) -> None:
    config = OmegaConf.load(run / "config.yaml")
    assert isinstance(config, DictConfig)
    for key, value in values.items():
        OmegaConf.update(config, key.replace("__", "."), value)
    OmegaConf.save(config, run / "config.yaml")


def test_training_writes_a_card_with_a_head_and_pictures_of_its_last_grid(runs: dict[str, Path]):
    head = card(runs["student"]).data.to_dict()
    assert head["library_name"] == "diffusers" and head["pipeline_tag"] == "text-to-image"
    assert {"lora", "text-to-image", "diffusers", "stable-diffusion", "tcd"} <= set(head["tags"])
    assert head["license"] == "apache-2.0"  # the embedded pipeline's
    prompts = [entry["text"] for entry in head["widget"]]
    assert len(prompts) == 2 and all(prompt.startswith("photo") for prompt in prompts)
    for entry in head["widget"]:
        with Image.open(runs["student"] / "lora" / entry["output"]["url"]) as picture:
            assert picture.size == (128, 128)  # of 32 px, enlarged as in the grid


def test_a_card_says_nothing_of_this_machine(runs: dict[str, Path], flickr_shards: Path):
    for run in runs.values():
        text = (run / "lora" / CARD).read_text()
        for private in ("secret-user", str(ROOT), str(flickr_shards.parent), str(Path.home()) + "/"):
            assert private not in text


def program(run: Path) -> str:
    (found,) = re.findall(r"```python\n(.*?)```", (run / "lora" / CARD).read_text(), re.DOTALL)
    return found


@pytest.mark.parametrize("name", ["finetuned", "student"])
def test_the_card_s_program_draws_what_the_run_draws(
    runs: dict[str, Path], name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Only the two places that it leaves open are filled in."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    lora = runs[name] / "lora"
    code = program(runs[name]).replace("path/to/tiny", str(TINY)).replace("path/to/this/folder", str(lora))
    assert code.count("load_lora_weights") == {"finetuned": 1, "student": 2}[name]
    code = re.sub("num_inference_steps=50", "num_inference_steps=10", code)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)  # of what later versions will not take
        exec(compile(code, str(lora / CARD), "exec"), {})

    prompt = card(runs[name]).data.to_dict()["widget"][0]["text"]
    steps = ("steps=10",) if name == "finetuned" else ()
    in_process(
        "lcm_lightning.generate",
        *(f"run={runs[name]}", f'prompt="{prompt}"', "num_images=1", "accelerator=cpu", "dtype=float32"),
        *("resolution=32", *steps, "output=ours"),
    )
    (ours,) = Path("ours").glob("*.png")
    theirs = torch.frombuffer(bytearray(Image.open("image.png").tobytes()), dtype=torch.uint8).short()
    expected = torch.frombuffer(bytearray(Image.open(ours).tobytes()), dtype=torch.uint8).short()
    assert (theirs - expected).abs().max() <= 2


def test_a_fine_tuned_model_is_drawn_with_its_base_model_s_guidance_wherever_it_is_said(runs: dict[str, Path]):
    run = runs["finetuned"]
    assert [adapter.kind.guidance_scale for adapter in read_manifest(run)] == [2.0]
    assert [adapter.kind.guidance_scale for adapter in read_manifest(runs["student"])] == [2.0, 1.0]
    assert "guidance_scale=2.0" in program(run) and "guidance 2.0" in (run / "lora" / CARD).read_text()
    ((_, rows),) = describe(run)
    assert dict(rows)["drawn by"] == "ddim, 50 steps, guidance 2"


def test_settings_are_those_of_the_run(runs: dict[str, Path]):
    text = (runs["student"] / "lora" / CARD).read_text()
    for line in (
        "| method | `TcdLoraDistillation` |",
        "| optimizer steps | 1 |",
        "| images a step | 2 |",
        "| LoRA | rank 4, alpha 4, layers: lcm_lora |",
        "| fine-tuned teacher | `finetuned` |",
    ):
        assert line in text
    assert re.search(r"^    python train\.py .*method=tcd_lora", text, re.MULTILINE)
    assert re.search(r"\| versions \| python 3.*diffusers \d", text)


def test_an_evaluation_adds_its_table_and_grid(student: Path):
    assert "## Evaluation" not in (student / "lora" / CARD).read_text()
    (student / "evaluation" / "quick").mkdir(parents=True)
    images = torch.rand(3, 2, 3, 128, 128)
    grid = labelled_grid(images, [REAL, "base", "TCD-LoRA"], ["a", "b"])
    (student / "evaluation" / "quick" / "grid.png").write_bytes(png_bytes(grid))
    (student / "evaluation" / "metrics.json").write_text(json.dumps(metrics()))
    write_card(student)
    text = (student / "lora" / CARD).read_text()
    assert "| TCD-LoRA, 4 steps | 4 | 0.100 | 10.0× | 12.0 [11.0, 13.0] |" in text
    assert "(evaluation.png)" in text
    with Image.open(student / "lora" / EVALUATION_GRID) as file:  # the photos are not the run's to show
        shown = grid_images(file)
        assert [(image.heading, image.caption) for image in shown[:3]] == [
            ("base", "a"),
            ("TCD-LoRA", "a"),
            ("base", "b"),
        ]
        expected = (images[2, 1] * 255).round().byte().permute(1, 2, 0).numpy().tobytes()
        assert (
            shown[-1].picture.tobytes() == expected and file.size == labelled_grid(images[1:], ["", ""], ["", ""]).size
        )
    assert "/home/alice" not in text and "features tiny_clip" in text


def test_an_evaluation_of_other_weights_is_left_out(student: Path):
    (student / "evaluation").mkdir()
    of_these = metrics() | {"weights": weights_digest(student)}
    (student / "evaluation" / "metrics.json").write_text(json.dumps(of_these))
    assert evaluation_of(student) is not None
    lora = student / "lora" / LORA_FILE  # trained on
    lora.write_bytes(lora.read_bytes() + b" ")
    assert evaluation_of(student) is None


def metrics() -> dict[str, object]:
    entries = []
    for slug, label, evaluations, seconds, fid in (
        ("base", "base, DDIM 50 steps", 100, 1.0, 20.0),
        ("tcd", "TCD-LoRA, 4 steps", 4, 0.1, 12.0),
    ):
        entry = {"slug": slug, "role": "base", "label": label, "network_evaluations": evaluations, "teacher": "base"}
        entry |= {"n_images": 100, "seconds_per_image": {"median": seconds}}
        entries.append(entry | {"fid": {"value": fid, "low": fid - 1, "high": fid + 1}})
    machine = {"cpu": "a CPU", "gpu": None, "dtype": "bfloat16"}
    measured = {"dataset": "flickr8k/test", "protocol": "quick", "features": "/home/alice/tiny_clip", "n_real": 100}
    return {**measured, "resolution": 32, "machine": machine, "warnings": [], "models": entries}


def test_a_card_that_a_person_has_made_their_own_is_kept(student: Path):
    path = student / "lora" / CARD
    path.write_text(path.read_text().replace(MARK, "") + "my words")
    written = path.read_text()
    write_card(student)
    assert path.read_text() == written


def test_a_base_model_of_the_hub_is_in_the_head_and_gives_its_licence(student: Path):
    set_in_config(
        student, model__path="stable-diffusion-v1-5/stable-diffusion-v1-5", data__name="flickr30k", data__source=None
    )
    write_card(student, CardSettings(repo_id="me/student"))
    head = card(student).data.to_dict()
    assert head["base_model"] == "stable-diffusion-v1-5/stable-diffusion-v1-5"
    assert head["base_model_relation"] == "adapter" and head["license"] == "creativeml-openrail-m"
    assert head["datasets"] == ["clip-benchmark/wds_flickr30k"]
    assert 'from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5"' in program(student)
    assert 'lora = "me/student"' in program(student)


def test_a_base_model_in_a_local_folder_is_a_name_and_its_licence_unknown(student: Path, tmp_path: Path):
    set_in_config(student, model__path=str(tmp_path / "my-model"))
    write_card(student)
    head = card(student).data.to_dict()
    assert "base_model" not in head and (head["license"], head["license_name"]) == ("other", "unknown")
    text = (student / "lora" / CARD).read_text()
    assert "lay in a local folder or file, `my-model`" in text and "The licence is not known" in text
    write_card(student, CardSettings(base_model="me/my-model", license="openrail++"))
    for _ in range(2):
        head = card(student).data.to_dict()
        assert (head["base_model"], head["license"]) == ("me/my-model", "openrail++")
        write_card(student)  # renewed, as after an evaluation, it knows what was said
    write_card(student, CardSettings(license="CreativeML Open RAIL-M"))
    head = card(student).data.to_dict()
    assert (head["license"], head["license_name"]) == ("other", "creativeml-open-rail-m")


def test_a_base_model_s_own_card_gives_its_licence(tmp_path: Path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "README.md").write_text("---\nlicense: mit\n---\nwords")
    assert base_model({"path": str(tmp_path / "model")}).license == "mit"


def test_a_model_in_the_hub_s_cache_is_known_by_its_id(tmp_path: Path):
    snapshot = tmp_path / "models--owner--name" / "snapshots" / ("0" * 40)
    assert base_model({"path": str(snapshot)}).hub_id == "owner/name"


@pytest.mark.parametrize("is_here", [True, False])
def test_a_renewed_card_knows_a_folder_from_an_id_as_the_first_one_did(
    is_here: bool, student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Model and data lie where a run is trained, and nothing of them where its card is renewed."""
    set_in_config(student, model__path="some/model", data__source="some/data", data__name="mine")
    (student / "lora" / CARD).unlink()
    (tmp_path / "elsewhere").mkdir()
    for place in ("model", "data") if is_here else ():
        (tmp_path / "some" / place).mkdir(parents=True)
    for folder in (tmp_path, tmp_path / "elsewhere"):
        monkeypatch.chdir(folder)
        write_card(student)
        head = card(student).data.to_dict()
        ids = (head.get("base_model"), head.get("datasets"))
        assert ids == ((None, None) if is_here else ("some/model", ["some/data"]))


@pytest.mark.parametrize(
    ("text", "is_id"),
    [
        ("owner/name", True),
        ("name", False),
        ("a/b/c", False),
        ("./model", False),
        ("~/model", False),
        ("/model", False),
        ("owner/file.safetensors", False),
        ("owner/with space", False),
        ("here/model", False),
        (r"C:\models\sd15", False),
    ],
)
def test_an_id_is_what_the_hub_takes_and_nothing_here_is_called(
    text: str, is_id: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here" / "model").mkdir(parents=True)
    assert is_hub_id(text) == is_id


def test_the_command_is_of_the_model_s_size_whatever_it_is_called(student: Path):
    write_card(student, CardSettings("me/student", "someone/stable-diffusion-xl-like"))
    assert "generate model=sd15 model.path=someone/" in (student / "lora" / CARD).read_text()


def test_a_base_model_that_is_no_id_is_refused(student: Path):
    with pytest.raises(UserError, match=r"base_model=/home/me: expected an id on the hub"):
        write_card(student, CardSettings(base_model="/home/me"))


def test_a_schedule_of_zero_terminal_snr_is_walked_with_trailing_spacing(student: Path, tmp_path: Path):
    folder = tmp_path / "zsnr" / "scheduler"
    folder.mkdir(parents=True)
    (folder / "scheduler_config.json").write_text(json.dumps({"rescale_betas_zero_snr": True}))
    set_in_config(student, model__path=str(folder.parent))
    write_card(student)
    assert "timestep_spacing='trailing'" in program(student)


@pytest.mark.parametrize(("xl", "name"), [(False, "StableDiffusionPipeline"), (True, "StableDiffusionXLPipeline")])
def test_a_base_model_in_one_file_is_loaded_by_its_own_pipeline(
    student: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, xl: bool, name: str
):
    """`DiffusionPipeline` has no `from_single_file`."""
    monkeypatch.setattr("lcm_lightning.sharing.model_card.is_xl", lambda *_: xl)
    set_in_config(student, model__path=str(tmp_path / "mine.safetensors"))
    write_card(student)
    code = program(student)
    assert f"from diffusers import {name}, TCDScheduler" in code
    assert f'pipe = {name}.from_single_file("path/to/mine.safetensors"' in code
    assert callable(getattr(diffusers, name).from_single_file)
    assert "prediction_type='v_prediction'" in code  # of no such file does diffusers know it


def test_a_corrected_prediction_type_is_in_the_program(student: Path):
    assert "prediction_type" not in program(student)
    header = {"modelspec.prediction_type": "v", "modelspec.architecture": "stable-diffusion-v1/lora"}
    save_file(load_file(student / "lora" / LORA_FILE), student / "lora" / LORA_FILE, header)
    set_in_config(student, model__prediction_type="v_prediction")
    write_card(student)
    assert "prediction_type='v_prediction'" in program(student)


def test_an_unguided_teacher_s_guidance_is_not_said(student: Path):
    assert "| teacher's guidance w | " in (student / "lora" / CARD).read_text()
    set_in_config(student, method__student_guidance=4.0)
    write_card(student)
    text = (student / "lora" / CARD).read_text()
    assert "teacher's guidance w" not in text and "| student's guidance | 4, diffusers' form" in text


def test_no_export_or_no_settings_make_no_card(tmp_path: Path, student: Path):
    assert write_card(tmp_path) is None
    (student / "config.yaml").unlink()
    assert write_card(student) is None


def test_a_card_that_cannot_be_written_does_not_end_training(
    runs: dict[str, Path], tmp_path: Path, flickr_shards: Path, monkeypatch: pytest.MonkeyPatch, caplog
):
    def broken(run: Path) -> None:
        raise ValueError("of a library")

    monkeypatch.setattr("lcm_lightning.sharing.model_card.write_card", broken)
    in_process(
        "lcm_lightning.train",
        *(*SMALL, "model=tiny", "method=lora", f"data.source={flickr_shards}", "trainer=cpu", "logger=csv"),
        *("max_steps=1", "val_every=1", f"hydra.run.dir={tmp_path / 'run'}"),
    )
    assert (tmp_path / "run" / "lora" / "adapters.json").is_file()
    assert not (tmp_path / "run" / "lora" / CARD).exists()


@pytest.mark.slow
def test_a_whole_unet_s_card_draws_from_its_folder(
    tmp_path: Path, flickr_shards: Path, monkeypatch: pytest.MonkeyPatch
):
    run = tmp_path / "run"
    in_process(
        "lcm_lightning.train",
        *(*SMALLER, "model=tiny", "method=lcm", f"data.source={flickr_shards}", "trainer=cpu", "logger=csv"),
        *("max_steps=1", "val_every=1", f"hydra.run.dir={run}"),
    )
    text = (run / "pipeline" / CARD).read_text()
    head = ModelCard(text).data.to_dict()
    assert "lora" not in head["tags"] and "full_lcm" in head["tags"]
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    exec(compile(code.replace("path/to/this/folder", str(run / "pipeline")), "card", "exec"), {})
    assert Image.open("image.png").size == (32, 32)


# ---- its parts -----------------------------------------------------------------------------------------------------


def test_a_grid_s_file_can_be_taken_apart_again(tmp_path: Path):
    columns = [torch.rand(3, 3, 160, 200) for _ in range(2)]
    (tmp_path / "grid.png").write_bytes(png_bytes(labelled_grid(columns, ["a\nb", "c"], ["x", "y", "z"])))
    found = grid_images(Image.open(tmp_path / "grid.png"))
    assert [(image.heading, image.caption) for image in found] == [(h, c) for c in "xyz" for h in ("a\nb", "c")]
    for number, image in enumerate(found):
        expected = (columns[number % 2][number // 2] * 255).round().byte().permute(1, 2, 0)
        assert torch.equal(
            torch.frombuffer(bytearray(image.picture.tobytes()), dtype=torch.uint8).view(160, 200, 3), expected
        )
    assert grid_images(Image.new("RGB", (10, 10))) == []


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("/home/alice/models/sd15", "sd15"),
        ("~/models/sd15", "sd15"),
        ("../../alice/sd15", "sd15"),
        (r"C:\Users\alice\sd15", "sd15"),
        ("run:/home/alice/outputs/a and more", "run:a and more"),
        ("[/home/alice/a,/home/alice/b]", "[a,b]"),
        ("https://alice:pw@example.org/x/y.tar?sig=1", "https://example.org/x/y.tar"),
        ("file:///home/alice/x.tar", "x.tar"),
        ("outputs/lcm/2026-01-01", "outputs/lcm/2026-01-01"),
        ("clip-benchmark/wds_flickr8k", "clip-benchmark/wds_flickr8k"),
        ("a photo of 1/2 an apple", "a photo of 1/2 an apple"),
        ("hf_abcdefghijklmnopqrst", HIDDEN),
        ("https://host/train-{000000..000009}.tar?X-Amz-Signature=S", "https://host/train-{000000..000009}.tar"),
        ("[https://a/x?sig=S,https://u:p@b/(y)?sig=S]", "[https://a/x,https://b/(y)]"),
        ("https://a/x::https://u:p@b/y#S", "https://a/x::https://b/y"),
        ("https://u:p?S@host/x", "https://host/x"),
        ("pipe:curl -s https://host/a,b.tar?sig=S", "pipe:curl -s https://host/a,b.tar"),
        ("sqlite:////home/alice/runs.db", "runs.db"),
        ("/home/alice/My Docs/x", "x"),
        ("run:/home/alice/My Own Docs/x and more", "run:x and more"),
        ("see file:///home/alice/My Docs/x", "see x"),
        ("[~alice/x,../../alice/y]", "[x,y]"),
        (r"copied from \\srv\alice\x", "copied from x"),
    ],
)
def test_of_paths_and_addresses_only_what_is_no_secret_is_told(text: str, expected: str):
    assert public_text(text) == expected


def test_values_of_keys_that_name_secrets_are_removed(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("MY_API_KEY", "swordfish-swordfish")
    told = public({"api_key": "x", "hub_token": "y", "num_tokens": 77, "note": "swordfish-swordfish!", "a": ["/b/c"]})
    assert told == {"api_key": HIDDEN, "hub_token": HIDDEN, "num_tokens": 77, "note": f"{HIDDEN}!", "a": ["c"]}
    told = public({"password": 12345678, "tokens": ["a", "b"], "secret": {"x": 1}, "token": None, "tokens_used": 1})
    assert told == {"password": HIDDEN, "tokens": HIDDEN, "secret": HIDDEN, "token": None, "tokens_used": 1}
    overrides = ["experiment=x", "logger.wandb.api_key=abc", "data.source=/a/b", "+logger=csv", "data.token=abc"]
    assert public_overrides(overrides) == ["experiment=x", "data.source=b", f"data.token={HIDDEN}"]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("+x={secret: s3cr3t, y: 1}", r"+x={secret:\(removed\),y:1}"),
        ("data.source='https://h/{0..9}.tar?sig=S'", "data.source='https://h/{0..9}.tar'"),
        ("lora=[/home/alice/My Docs/a,outputs/b]", "lora=[a,outputs/b]"),
        ("optimizer.lr=1e-4", "optimizer.lr=1e-4"),
        ("prompt='two, [words]'", "prompt='two, [words]'"),
        ("a={b: /home/alice/unclosed", f"a={HIDDEN}"),
        ("~callbacks.samples", "~callbacks.samples"),
    ],
)
def test_an_override_is_told_as_hydra_reads_it(override: str, expected: str):
    assert public_overrides([override]) == [expected]


def test_training_time_is_read_from_the_images_a_second(tmp_path: Path):
    (tmp_path / "metrics.csv").write_text("step,train/images_per_second\n9,20\n9,\n19,40\n")
    assert training_seconds(tmp_path / "metrics.csv", 8) == 10 * 8 / 20 + 10 * 8 / 40
    config = {"trainer": {"devices": "auto", "accumulate_grad_batches": 1}, "data": {"batch_size": 8}}
    assert images_per_step(config) is None and training_seconds(tmp_path / "metrics.csv", None) is None
