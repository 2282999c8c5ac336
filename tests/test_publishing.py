"""A run on the hub: whole or not at all, taken up where it broke off, without a secret, and usable from there."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline, TCDScheduler
from huggingface_hub import ModelCard, constants, snapshot_download
from omegaconf import OmegaConf
from PIL import Image, ImageChops
from safetensors.torch import load_file, save_file

from helpers.commands import ROOT, in_process
from helpers.hub import Commit, Hub, Repository, Trouble, serve_hub
from lcm_lightning import hub as hub_module
from lcm_lightning.config.model_choice import _lora_files
from lcm_lightning.errors import UserError
from lcm_lightning.methods import adapter_kinds
from lcm_lightning.methods.lora import LoraFinetuning
from lcm_lightning.models.kinds import KOHYA_FILE, LORA_FILE
from lcm_lightning.runs.contents import Adapter, read_manifest, write_manifest
from lcm_lightning.sharing.model_card import CARD, MARK, SAID, CardSettings, renew_card
from lcm_lightning.sharing.publishing import Push, push_run

TOKEN = "hf_" + "a1B2c3D4e5F6g7H8i9J0"
TINY = ROOT / "lcm_lightning" / "assets" / "tiny"
STUDENT = TINY / "student"
REPO = "me/emoji"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """The hub that this process knows, and a token for its user "me"."""
    with serve_hub(owners={TOKEN: "me"}) as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no_token"))
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", served.address + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setattr("time.sleep", lambda seconds: None)
        hub_module._is_reachable.cache_clear()
        yield served
        hub_module._is_reachable.cache_clear()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run as the embedded student's was, with things in its configuration that are nobody's business."""
    folder = tmp_path / "home" / "alice" / "outputs" / "run"
    shutil.copytree(STUDENT, folder)
    save_file({"layer.alpha": torch.ones(1)}, folder / "lora" / KOHYA_FILE)
    config = OmegaConf.create(CONFIG)
    config.run_dir = str(folder)
    config.data.source = str(tmp_path / "home" / "alice" / "photos")
    config.logger = {"wandb": {"api_key": "0123456789abcdef0123456789abcdef01234567", "entity": "alice"}}
    config.note = f"see {folder} or https://alice:pw@example.org/x?sig=1"
    OmegaConf.save(config, folder / "config.yaml")
    return folder


CONFIG = {
    "model": {"_target_": "lcm_lightning.models.stable_diffusion.load_stable_diffusion", "path": str(TINY)},
    "method": {
        "_target_": "lcm_lightning.methods.tcd_lora.TcdLoraDistillation",
        "teacher_lora": None,
        "lora": {"rank": 32, "alpha": 32, "target_modules": "lcm_lora"},
    },
    "optimizer": {"lr": 1e-3},
    "data": {"name": "twemoji_small", "source": None, "resolution": 64, "batch_size": 8},
    "trainer": {
        "accelerator": "cpu",
        "devices": 1,
        "num_nodes": 1,
        "precision": "32",
        "accumulate_grad_batches": 1,
    },
    "name": "student",
    "seed": 0,
    "max_steps": 10,
}


def push(run: Path, **settings: object) -> str:
    return push_run(run, Push(**{"repo_id": REPO, **settings}), CardSettings(repo_id=REPO))


def refusal(run: Path, **settings: object) -> str:
    """What a user reads."""
    with pytest.raises(UserError) as refused:
        push(run, **settings)
    message = str(refused.value)
    assert "\n" not in message and len(message) < 300 and TOKEN not in message
    return message


def test_a_push_is_one_commit_of_both_layouts_card_and_settings(hub: Hub, run: Path):
    address = push(run)
    files = hub.files(REPO)
    assert address == f"{hub.address}/{REPO}"
    assert {LORA_FILE, KOHYA_FILE, "adapters.json", CARD, "config.yaml"} <= set(files)
    assert files[LORA_FILE] == (run / "lora" / LORA_FILE).read_bytes()
    assert len(hub.repositories[REPO].branches["main"]) == 2  # the hub's own first one, and this
    assert hub.repositories[REPO].private
    assert ModelCard(files[CARD].decode()).data.library_name == "diffusers"


def test_a_whole_unet_is_published_as_its_pipeline(hub: Hub, run: Path):
    shutil.rmtree(run / "lora")
    shutil.copytree(TINY / "unet", run / "pipeline" / "unet")
    shutil.copy(TINY / "model_index.json", run / "pipeline")
    write_manifest(run / "pipeline", [Adapter(adapter_kinds()["full_lcm"], "unet", 1)])
    push(run)
    assert {"model_index.json", "unet/config.json", "adapters.json", CARD} <= set(hub.files(REPO))
    assert f'from_pretrained("{REPO}"' in hub.files(REPO)[CARD].decode()
    push(run)
    assert len(hub.repositories[REPO].branches["main"]) == 2
    with pytest.raises(UserError, match=f"holds a whole UNet and no LoRA; give model=sd15 model.path={REPO}"):
        _lora_files(REPO, None, 7.5)


def test_nothing_private_is_published(hub: Hub, run: Path, tmp_path: Path):
    push(run)
    for name, content in hub.files(REPO).items():
        for word in ("alice", str(tmp_path), "0123456789abcdef", ":pw@", "sig=1", TOKEN):
            assert word.encode() not in content, (name, word)
    config = OmegaConf.create(hub.files(REPO)["config.yaml"].decode())
    assert config.data.source == "photos" and config.note == "see run or https://example.org/x"
    assert "logger" not in config and "run_dir" not in config


def test_a_file_with_a_token_in_it_is_not_published(hub: Hub, run: Path):
    (run / "lora" / "notes.txt").write_text(f"token {TOKEN}")
    assert refusal(run).startswith("push_to_hub: notes.txt holds an access token")
    assert not hub.repositories


def test_pushed_again_nothing_is_sent_and_no_commit_is_made(hub: Hub, run: Path):
    push(run)
    hub.log.clear()
    push(run)
    assert hub.asked("^PUT") == 0 and len(hub.repositories[REPO].branches["main"]) == 2


def test_a_push_that_broke_off_shows_nothing_and_goes_on_with_what_is_missing(hub: Hub, run: Path):
    hub.troubles = [Trouble("POST", "/commit/", 0, times=9)]
    message = refusal(run)
    assert "the same command again" in message
    assert set(hub.files(REPO)) == {".gitattributes"}
    sent = hub.asked("^PUT")
    assert sent == len(hub.store) >= 2
    hub.troubles.clear()
    push(run)
    assert hub.asked("^PUT") == sent
    assert LORA_FILE in hub.files(REPO)


def test_a_push_cut_off_between_two_files_sends_the_other_one_only(hub: Hub, run: Path):
    hub.troubles = [Trouble("PUT", "/store/", 403, times=1)]
    refusal(run)
    arrived = set(hub.store)
    hub.log.clear()
    push(run)
    assert hub.asked("^PUT") == len(hub.store) - len(arrived) == 1


def test_a_hub_in_trouble_is_asked_again(hub: Hub, run: Path):
    hub.troubles = [Trouble("POST", "/repos/create", 503), Trouble("POST", "/commit/", 502)]
    hub.troubles += [Trouble("PUT", "/store/", 500), Trouble("POST", "/preupload/", 504)]
    push(run)
    assert LORA_FILE in hub.files(REPO) and len(hub.repositories[REPO].branches["main"]) == 2


def test_changed_weights_replace_those_before_and_stale_pictures_go(hub: Hub, run: Path):
    (run / "lora" / "pictures").mkdir()
    (run / "lora" / "pictures" / "9.png").write_bytes(b"picture")
    push(run)
    assert "pictures/9.png" in hub.files(REPO)
    (run / "lora" / "pictures" / "9.png").unlink()
    changed = {key: tensor + 1 for key, tensor in load_file(run / "lora" / LORA_FILE).items()}
    save_file(changed, run / "lora" / LORA_FILE)
    push(run)
    assert hub.files(REPO)[LORA_FILE] == (run / "lora" / LORA_FILE).read_bytes()
    assert "pictures/9.png" not in hub.files(REPO)


def test_a_card_that_was_edited_on_the_hub_is_kept(hub: Hub, run: Path):
    push(run)
    hub.repositories[REPO].branches["main"].append(Commit(hub.files(REPO) | {CARD: b"# My own words"}))
    push(run, message="again")
    assert hub.files(REPO)[CARD] == b"# My own words"


def test_a_card_that_was_edited_here_is_published_as_it_is(hub: Hub, run: Path):
    (run / "lora" / CARD).write_text("# My own words")
    push(run)
    assert hub.files(REPO)[CARD] == b"# My own words"


def test_a_branch_and_a_pull_request_leave_the_main_branch_alone(hub: Hub, run: Path):
    push(run)
    assert push(run, revision="second", message="on a branch") == f"{hub.address}/{REPO}"
    save_file({"x": torch.zeros(1)}, run / "lora" / KOHYA_FILE)
    assert push(run, create_pr=True).endswith("/discussions/1")
    assert len(hub.repositories[REPO].branches["main"]) == 2


@pytest.mark.parametrize(
    ("trouble", "expected"),
    [
        (Trouble("POST", "/repos/create", 401, 9), "does not know the access token"),
        (Trouble("POST", "/preupload/", 403, 9), "may not write there"),
        (Trouble("POST", "/commit/", 503, 99), r"the hub is in trouble \(it answered 503\)"),
        (Trouble("POST", "/commit/", 409, 9), "the name is taken, or someone else"),
        (Trouble("POST", "/commit/", 413, 9), "the hub refuses it: as the test asks for"),
        (Trouble("GET", "/api/models/", 0, 99), "the connection broke"),
    ],
)
def test_what_the_hub_refuses_is_said_in_a_sentence(hub: Hub, run: Path, trouble: Trouble, expected: str):
    hub.troubles = [trouble]
    assert re.search(expected, refusal(run))


def test_without_a_token_nobody_is_asked(hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("HF_TOKEN")
    assert "there is no access token" in refusal(run) and not hub.log


def test_a_token_that_the_hub_does_not_know(hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "hf_unknownunknownunknown")
    assert "does not know the access token" in refusal(run)


def test_somebody_else_s_name(hub: Hub, run: Path):
    assert "give one with write access for you" in refusal(run, repo_id="you/emoji")


@pytest.mark.parametrize("name", ["emoji", "me/a b", "me/a/b", "me/" + "x" * 100, "me/../x"])
def test_a_name_that_is_none(hub: Hub, run: Path, name: str):
    assert "expected OWNER/NAME" in refusal(run, repo_id=name) and not hub.log


def test_offline(hub: Hub, run: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in refusal(run)


def test_a_repository_of_something_else_is_not_touched(hub: Hub, run: Path):
    hub.repositories[REPO] = Repository(True, {"main": [Commit({"model_index.json": b"{}"})]})
    assert "holds other files (model_index.json)" in refusal(run)
    assert len(hub.repositories[REPO].branches["main"]) == 1


def test_what_is_meant_to_be_private_does_not_go_where_everyone_sees_it(hub: Hub, run: Path):
    push(run, private=False)
    assert "me/emoji is public on the hub" in refusal(run, private=True)


def test_a_run_without_an_export(hub: Hub, tmp_path: Path):
    assert "ended before its first export" in refusal(tmp_path)


def command(*arguments: str, hub: Hub, **environment: str) -> subprocess.CompletedProcess[str]:
    """A command as a user types it, whose hub is `hub`."""
    places = {"HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": TOKEN, "OMP_NUM_THREADS": "1"}
    kept = {key: value for key, value in os.environ.items() if key != "HF_HUB_OFFLINE"}
    return subprocess.run(
        [sys.executable, "-m", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**kept, "PYTHONPATH": str(ROOT), **places, **environment},
        check=False,
        timeout=300,
    )


@pytest.mark.slow
def test_a_published_run_is_drawn_from_by_its_id_alone_here_and_in_diffusers(hub: Hub, run: Path, tmp_path: Path):
    pushed = command("lcm_lightning.export", f"run={run}", f"push_to_hub={REPO}", hub=hub, HF_HOME=str(tmp_path / "a"))
    assert (pushed.returncode, pushed.stdout.strip()) == (0, f"{hub.address}/{REPO}"), pushed.stderr
    assert TOKEN not in pushed.stdout + pushed.stderr
    drawn = command(
        *("lcm_lightning.generate", "model=tiny", f"lora={REPO}", "prompt=frog", "num_images=1", "dtype=float32"),
        *("accelerator=cpu", f"output={tmp_path / 'drawn'}"),
        hub=hub,
        HF_HOME=str(tmp_path / "b"),
    )
    assert drawn.returncode == 0, drawn.stderr
    assert TOKEN not in drawn.stdout + drawn.stderr

    folder = Path(snapshot_download(REPO))
    (adapter,) = json.loads((folder / "adapters.json").read_text())["adapters"]
    pipe = StableDiffusionPipeline.from_pretrained(TINY, safety_checker=None)
    walk = adapter["sampler"]["settings"]["original_inference_steps"]
    pipe.scheduler = TCDScheduler.from_config(pipe.scheduler.config, original_inference_steps=walk)
    pipe.load_lora_weights(REPO, weight_name=LORA_FILE)
    image = pipe(
        "frog",
        num_inference_steps=adapter["steps"],
        guidance_scale=1.0,
        eta=0.0,
        generator=torch.Generator().manual_seed(0),
    ).images[0]
    ours = Image.open(tmp_path / "drawn" / "frog-0.png")
    assert max(high for _, high in ImageChops.difference(ours, image).getextrema()) <= 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("format=kohya", f"push_to_hub={REPO}"), "leave format out"),
        (("overwrite=true", f"push_to_hub={REPO}"), "leave overwrite out"),
        (("output=there", f"push_to_hub={REPO}"), "leave output out"),
        (("student=true", f"push_to_hub={REPO}"), "leave student out"),
        (("lora_role=lcm", f"push_to_hub={REPO}"), "leave lora_role out"),
        (("format=kohya", "private=false"), "private=False: is of push_to_hub=OWNER/NAME"),
        (("format=kohya", "base_model=a/b"), "base_model=a/b: is of push_to_hub=OWNER/NAME"),
    ],
)
def test_the_command_refuses_what_it_would_not_read(
    run: Path, capsys: pytest.CaptureFixture[str], options: tuple[str, ...], message: str
):
    with pytest.raises(SystemExit):
        in_process("lcm_lightning.export", f"run={run}", *options)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("damaged", ["picture", "said", "settings", "metrics"])
def test_what_cannot_be_made_ready_is_one_sentence(hub: Hub, run: Path, damaged: str):
    if damaged == "picture":
        (run / "samples").mkdir(exist_ok=True)
        (run / "samples" / "step_999999.png").write_bytes(b"\x89PNG cut off")
    elif damaged == "said":
        (run / "lora" / CARD).write_text(f"{MARK}\n{SAID}not json -->\n")
    elif damaged == "settings":
        config = OmegaConf.load(run / "config.yaml")
        del config["optimizer"]
        OmegaConf.save(config, run / "config.yaml")
    else:
        (run / "evaluation").mkdir(exist_ok=True)
        (run / "evaluation" / "metrics.json").write_text("{")
    assert "cannot be made ready to publish" in refusal(run)
    assert not hub.repositories
    renew_card(run)  # of a training or an evaluation: a warning


def test_files_that_the_run_has_no_more_go(hub: Hub, run: Path):
    (run / "lora" / "evaluation.png").write_bytes(b"picture")
    (run / "lora" / "notes.txt").write_text("someone's")
    push(run)
    for name in (KOHYA_FILE, "notes.txt"):
        (run / "lora" / name).unlink()
    push(run)
    assert KOHYA_FILE not in hub.files(REPO) and {LORA_FILE, "notes.txt"} <= set(hub.files(REPO))


def test_the_mark_of_our_cards_is_in_them(hub: Hub, run: Path):
    push(run)
    assert MARK.encode() in hub.files(REPO)[CARD]


def with_teacher(run: Path) -> None:
    """Puts a fine-tuned LoRA below the run's student."""
    shutil.copy(run / "lora" / LORA_FILE, run / "lora" / "teacher_lora_weights.safetensors")
    (student,) = read_manifest(run)
    write_manifest(run / "lora", [Adapter(LoraFinetuning.kind, "teacher_lora_weights.safetensors"), student])


def test_a_published_student_brings_its_teacher_s_lora(hub: Hub, run: Path):
    with_teacher(run)
    push(run)
    found = _lora_files(REPO, None, 7.5)
    assert [(kind.role, file.read_bytes()) for kind, file in found.items()] == [
        ("finetuned", hub.files(REPO)["teacher_lora_weights.safetensors"]),
        ("student", hub.files(REPO)[LORA_FILE]),
    ]


def test_a_downloaded_repository_is_a_lora_that_knows_what_it_is(hub: Hub, run: Path, tmp_path: Path):
    with_teacher(run)
    push(run)
    folder = Path(snapshot_download(REPO, local_dir=tmp_path / "here"))
    assert list(_lora_files(str(folder), None, 7.5).values()) == [
        folder / "teacher_lora_weights.safetensors",
        folder / LORA_FILE,
    ]
    (folder / LORA_FILE).unlink()
    with pytest.raises(
        UserError, match=r"pytorch_lora_weights.safetensors, which its adapters.json names, is not there"
    ):
        _lora_files(str(folder), None, 7.5)


@pytest.mark.parametrize("answer", ["no such file", "trouble"])
def test_a_manifest_out_of_reach_is_told_where_a_role_hides_it(
    hub: Hub, run: Path, answer: str, caplog: pytest.LogCaptureFixture
):
    """A student would be drawn without its teacher's LoRA."""
    push(run)
    if answer == "trouble":
        hub.troubles = [Trouble(method, "adapters.json", 503, times=99) for method in ("GET", "HEAD")]
    else:
        hub.repositories[REPO].branches["main"][-1].files.pop("adapters.json")
    assert next(iter(_lora_files(REPO, "tcd", 7.5).values())).name == LORA_FILE
    assert ("adapters.json is out of reach" in caplog.text) == (answer == "trouble")
