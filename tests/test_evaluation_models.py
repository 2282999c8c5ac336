"""What `models=`, `run=`, `model=` and `lora=` mean, and what mistakes in them say."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.utils import instantiate
from lightning.fabric.utilities.rank_zero import rank_zero_only
from omegaconf import DictConfig, OmegaConf, open_dict
from rich.progress import Progress, TaskID
from torch import Tensor

from lcm_lightning import evaluate
from lcm_lightning.config.model_choice import evaluation_data, find_models
from lcm_lightning.config.resolvers import register_resolvers
from lcm_lightning.data.shards import Shard
from lcm_lightning.errors import UserError
from lcm_lightning.evaluation import drawing as drawing_module
from lcm_lightning.evaluation import evaluation, reference
from lcm_lightning.evaluation.contenders import Contender, Lineup
from lcm_lightning.evaluation.drawing import Drawing, Drawn, ModelImages, distinguish, image_folder
from lcm_lightning.evaluation.model_sources import LoadedModel, ModelSource
from lcm_lightning.evaluation.protocol import Protocol, PublishedTable
from lcm_lightning.evaluation.reference import RealImages, fit_size
from lcm_lightning.methods.lcm_lora import LCM, LcmLoraDistillation
from lcm_lightning.models.adapters import LoraSettings, add_lora, lora_layers, lora_parameters
from lcm_lightning.models.identity import adapter_digest, model_digest, token_embeddings_digest
from lcm_lightning.models.sampling import DDIM
from lcm_lightning.models.stable_diffusion import StableDiffusion, load_stable_diffusion

CONF = Path(__file__).parent.parent / "conf"


@pytest.fixture
def composed() -> Iterator[Callable[..., DictConfig]]:
    """Composes evaluate.py's configuration from overrides, as its main function gets it."""
    register_resolvers()
    before = HydraConfig.instance().cfg
    with initialize_config_dir(str(CONF), version_base="1.3"):

        def config(*overrides: str) -> DictConfig:
            cfg = compose("evaluate", overrides=list(overrides), return_hydra_config=True)
            HydraConfig.instance().set_config(cfg)
            with open_dict(cfg):
                del cfg["hydra"]
            return cfg

        yield config
    HydraConfig.instance().cfg = before


def make_run(folder: Path, data: str = "flickr8k", adapters: tuple[str, ...] = ("lcm",)) -> Path:
    """A run folder without weights."""
    (folder / "lora").mkdir(parents=True)
    config = {"name": f"lcm_{data}", "data": {"name": data, "source": None, "resolution": 64}, "model": {}}
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(config))
    listed = [{"name": name, "file": f"{name}.safetensors"} for name in adapters]
    (folder / "lora" / "adapters.json").write_text(json.dumps({"adapters": listed}))
    return folder


def test_any_number_of_models_are_found_without_loading_one(composed, tmp_path: Path):
    run = make_run(tmp_path / "a")
    (tmp_path / "x.safetensors").touch()
    models = f"models=[sd15,tiny,run:{run},lcm:{tmp_path}/x.safetensors,lora:{run}]"
    found = find_models(composed(models, "model=tiny"))
    assert [source.name for source in found] == ["sd15", "tiny", "lcm_flickr8k", "x", "a"]
    assert [source.data and source.data.name for source in found] == [None, None, "flickr8k", None, "flickr8k"]


def test_another_copy_of_a_run_s_model_is_drawn_with_the_run_s_guidance(composed, tmp_path: Path, monkeypatch):
    run = make_run(tmp_path / "a")
    loaded: list[dict[str, Any]] = []
    model = SimpleNamespace(eval=lambda: None)
    answer = SimpleNamespace(model=model, adapters=())
    monkeypatch.setattr("lcm_lightning.runs.loading.load_run", lambda run, **asked: loaded.append(asked) or answer)
    for typed in ((), ("model.guidance_scale=3",)):
        (source,) = find_models(composed(f"run={run}", "model=sd15", "model.path=/copy", *typed))
        source.load()
    assert [asked.get("guidance_scale") for asked in loaded] == [None, 3]
    assert all(asked["path"] == "/copy" for asked in loaded)


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("a/lora", "a"),
        ("a/lora/pytorch_lora_weights.safetensors", "a"),
        ("b", "b"),
        ("b/pytorch_lora_weights.safetensors", "b"),
        ("b/mine.safetensors", "mine"),
    ],
)
def test_a_lora_is_called_by_its_file_or_the_folder_that_tells_it_from_others(composed, tmp_path, place, name):
    for folder in (tmp_path / "a" / "lora", tmp_path / "b"):
        folder.mkdir(parents=True)
        (folder / "pytorch_lora_weights.safetensors").touch()
    (tmp_path / "b" / "mine.safetensors").touch()
    (found,) = find_models(composed("model=tiny", f"lora={tmp_path}/{place}", "lora_role=lcm"))
    assert found.name == name


def test_a_model_may_bring_a_student_of_its_own(composed, tmp_path: Path):
    make_run(tmp_path / "model" / "student")
    model = ("model=tiny", f"model.path={tmp_path}/model")
    (own,) = find_models(composed(*model, "student=true"))
    (named,) = find_models(composed(*model, f"lora={tmp_path}/model/student"))
    assert (own.name, own.spec) == (named.name, named.spec)
    for mistake, said in (
        (("student=true",), "student=true: a model's own student needs its model; add model=tiny"),
        ((*model, "student=true", "lora=x.safetensors"), "student=true and lora=x.safetensors: .*; give one"),
        ((*model, "student=true", "models=[tiny]"), r"student=true and models=\[\.\.\.\]: .*; give one"),
        (("model=tiny", f"model.path={tmp_path}", "student=true"), "student=true: model.path=.* has no student/lora"),
    ):
        with pytest.raises(UserError, match=said):
            find_models(composed(*mistake))


def test_the_shorthands_are_lists_of_one(composed, tmp_path: Path):
    run = make_run(tmp_path / "a")
    (tmp_path / "x.safetensors").touch()
    lora = f"lora={tmp_path}/x.safetensors"
    for shorthand, listed in (
        ([f"run={run}"], [f"models=[run:{run}]"]),
        (["model=tiny"], ["models=[tiny]"]),
        (
            ["model=tiny", lora, "lora_role=lcm"],
            ["model=tiny", f"models=[lora:{tmp_path}/x.safetensors]", "lora_role=lcm"],
        ),
    ):
        (short,), (long,) = find_models(composed(*shorthand)), find_models(composed(*listed))
        assert (short.name, short.spec, short.data) == (long.name, long.spec, long.data)


def test_runs_of_one_experiment_get_names_of_their_own(composed, tmp_path: Path):
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b")
    names = [source.name for source in find_models(composed(f"models=[run:{a},run:{b}]"))]
    assert names == ["lcm_flickr8k-1", "lcm_flickr8k-2"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ["models=[tinny]"],
            "models: no model is called tinny; did you mean tiny? expected the name of a file in conf/model",
        ),
        (["models=[tiny,run:nowhere]"], "run=nowhere: no config.yaml there"),
        (["models=[tiny,tiny]"], "models: names tiny more than once"),
        (["models=tiny"], "models=tiny: expected a list"),
        (["models=[]"], "models=[]: expected a list"),
        (["models=[3]"], "models=[3]: expected a list"),
        (["models=[tiny]", "run=a"], "run=a and models=...: put it into the list, run:a"),
        (["models=[hub:x/y]"], "models: hub:x/y is of no known kind; expected"),
        (["models=[lcm:a.safetensors]"], "lcm:a.safetensors: a LoRA needs the model it belongs on; add model=sd15"),
        (["models=[lora:a]", "model=tiny"], "lora=a: no such file or folder"),
        (["models=[lcm:./a.safetensors]", "model=tiny"], "lora=./a.safetensors: no such file or folder"),
        (["run=a", "lora=b"], "give model=... with lora=..."),
        ([], "or several of them with models=[...]"),
    ],
)
def test_mistakes_in_what_to_evaluate_are_one_message(composed, overrides: list[str], said: str):
    with pytest.raises(UserError) as raised:
        find_models(composed(*overrides))
    assert said in str(raised.value) and "\n" not in str(raised.value)


def test_a_run_without_its_prefix_is_recognised(composed, tmp_path: Path):
    run = make_run(tmp_path / "a")
    with pytest.raises(UserError, match=f"a run is written run:{run}"):
        find_models(composed(f"models=[{run}]"))


def test_the_same_command_finds_its_folder_again(composed, tmp_path: Path):
    def folder(*overrides: str) -> str:
        return composed("model=tiny", "data=twemoji", *overrides).run_dir

    assert folder().startswith("outputs/evaluate/")
    assert folder() == folder("devices=2", "accelerator=cpu", "logger=csv", "evaluation.latency_repeats=3")
    assert len({folder(), folder("evaluation=quick"), folder("seed=1"), folder("model.path=x")}) == 4
    assert composed(f"run={tmp_path}", "evaluation=quick").run_dir == f"{tmp_path}/evaluation/quick"


def test_runs_on_different_data_need_a_choice(composed, tmp_path: Path):
    a, b = make_run(tmp_path / "a"), make_run(tmp_path / "b", "flickr30k")
    cfg = composed(f"models=[run:{a},run:{b}]")
    with pytest.raises(UserError, match=r"different data \(run:.*a on flickr8k, run:.*b on flickr30k\); choose"):
        evaluation_data(cfg, find_models(cfg))
    cfg = composed(f"models=[run:{a},run:{b}]", "data=flickr30k")
    assert evaluation_data(cfg, find_models(cfg)).name == "flickr30k"
    cfg = composed(f"models=[tiny,run:{a}]")
    assert evaluation_data(cfg, find_models(cfg)).name == "flickr8k"
    cfg = composed("models=[tiny]")
    with pytest.raises(UserError, match="needs a data set"):
        evaluation_data(cfg, find_models(cfg))


def test_more_images_than_the_split_holds_are_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(reference, "locate", lambda *_: None)
    monkeypatch.setattr(reference, "open_split", lambda *_: (Shard(Path("a"), 60, ""), Shard(Path("b"), 39, "")))
    strict = Protocol("report", "clip")
    for number in (99, None):
        real = RealImages("flickr8k", None, "test", number, 64)
        assert fit_size(real, strict, usual=number) == (real, strict)
    with pytest.raises(UserError, match="num_images=100: flickr8k/test holds 99 images"):
        fit_size(RealImages("flickr8k", None, "test", 100, 64), strict, usual=100)


def test_the_quick_protocol_takes_all_of_a_smaller_split_under_a_name_with_their_number(
    composed: Callable[..., DictConfig], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(reference, "locate", lambda *_: None)
    monkeypatch.setattr(reference, "open_split", lambda *_: (Shard(Path("a"), 60, ""), Shard(Path("b"), 39, "")))
    quick = instantiate(composed("model=tiny", "data=twemoji", "evaluation=quick").evaluation)
    real, protocol = fit_size(RealImages("mine", None, "train", quick.num_images, 64), quick, usual=300)
    assert (real.num_images, protocol.num_images, protocol.name) == (None, None, "quick-99")
    assert "mine/train holds 99 images, fewer than the 300 of quick: all are taken, as protocol quick-99" in caplog.text


@pytest.mark.parametrize(
    ("usual", "typed", "name"),
    [(300, None, "p-99"), (300, 50, "p-50"), (None, 50, "p-50"), (None, 99, "p"), (50, 50, "p"), (99, None, "p")],
)
def test_a_protocol_is_named_by_a_number_of_images_that_is_not_its_own(
    monkeypatch: pytest.MonkeyPatch, usual: int | None, typed: int | None, name: str
):
    monkeypatch.setattr(reference, "locate", lambda *_: None)
    monkeypatch.setattr(reference, "open_split", lambda *_: (Shard(Path("a"), 99, ""),))
    real = RealImages("mine", None, "train", typed, 64)
    assert fit_size(real, Protocol("p", "clip", num_images=typed), usual) == (
        real,
        Protocol(name, "clip", num_images=typed),
    )


def test_the_folder_has_the_protocol_s_name_unless_it_was_typed_and_loggers_write_there(
    composed: Callable[..., DictConfig],
):
    for run_dir in (None, "mine"):
        before = composed(
            "run=a", "evaluation=quick", "logger=tensorboard", *([f"run_dir={run_dir}"] if run_dir else [])
        )
        cfg = before.copy()
        OmegaConf.resolve(cfg)
        evaluate.take_name(cfg, before, "quick-109")
        folder = run_dir or "a/evaluation/quick-109"
        assert (cfg.evaluation.name, cfg.run_dir, cfg.logger.tensorboard.save_dir) == ("quick-109", folder, folder)


def test_the_usual_number_is_the_file_s_whatever_is_typed(composed: Callable[..., DictConfig]):
    for protocol, number in (("quick", 300), ("standard", None), ("report", 100)):
        composed("model=tiny", f"evaluation={protocol}", "evaluation.num_images=7")
        assert evaluate.usual_number() == number


@pytest.mark.parametrize("rank", [0, 1])
def test_one_process_says_that_a_split_is_small(
    rank: int, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.setattr(reference, "locate", lambda *_: None)
    monkeypatch.setattr(reference, "open_split", lambda *_: (Shard(Path("a"), 99, ""),))
    monkeypatch.setattr(rank_zero_only, "rank", rank)
    fit_size(RealImages("mine", None, "train", 300, 64), Protocol("p", "clip", takes_fewer=True), 300)
    assert len(caplog.records) == (rank == 0)


def test_no_more_images_are_counted_than_there_are(
    tiny_model: StableDiffusion, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The first of two processes draws two batches of three; the other's is short."""

    def blank(model: StableDiffusion, prompts: list[str], *, on_latents: Callable[..., None], **_: object) -> Tensor:
        on_latents(torch.zeros(len(prompts), 4, 1, 1))
        return torch.zeros(len(prompts), 3, 8, 8)

    monkeypatch.setattr(drawing_module, "sample", blank)
    fabric = SimpleNamespace(global_rank=0, world_size=2, barrier=lambda: None)
    progress = RecordedProgress(disable=True)
    contender = Contender("base", "base", (), DDIM, 2, 1.0, "base")
    drawing_module.draw_missing(tiny_model, contender, Drawing(["a"] * 7, 0, 8, 2), tmp_path, fabric, progress)
    assert progress.counts[-1] == 7 and max(progress.counts) == 7


class RecordedProgress(Progress):
    """Remembers how far it was."""

    counts: tuple[float, ...] = ()

    def update(self, task_id: TaskID, **changes: Any) -> None:
        super().update(task_id, **changes)
        self.counts += (self.tasks[task_id].completed,)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        self.counts += (self.tasks[task_id].completed,)


@pytest.mark.parametrize(
    ("build", "said"),
    [
        (lambda: Protocol("p", "c", latency_batch_sizes=[0]), r"latency_batch_sizes=\[0\]: expected numbers from 1"),
        (lambda: Protocol("p", "c", latency_batch_sizes=[]), r"latency_batch_sizes=\[\]: expected numbers from 1"),
        (lambda: Lineup(rivals={"lcm": [4]}), "rivals.lcm: no teacher's solver; there are ddim and dpmpp"),
        (lambda: Lineup(rivals={"ddim": [0]}), r"rivals.ddim=\[0\]: expected numbers from 1"),
        (lambda: PublishedTable("t", "c", "n", [{"title": "a"}]), "a row of 't' is .*expected the keys title"),
        (lambda: Lineup(student_steps=[64]), r"student_steps=\[64\]: expected numbers from 1 to 50"),
    ],
)
def test_protocols_that_cannot_be_followed_are_refused(build: Callable[[], object], said: str):
    with pytest.raises(UserError, match=said):
        build()


@pytest.mark.parametrize("protocol", ["report", "standard", "coco30k", "quick"])
def test_every_protocol_composes(composed, protocol: str):
    from lcm_lightning.config.checks import resolve
    from lcm_lightning.config.instantiate import instantiate_group

    cfg = composed(f"evaluation={protocol}", "model=tiny", "data=coco")
    resolve(cfg, cfg.keys())
    built = instantiate_group(cfg, "evaluation")
    assert built.name == protocol and built.lineup.rivals and built.latency_batch_sizes[0] == 1
    (published,) = built.published.values()
    assert (published.datasets is None) == (protocol == "report") and len(published.rows) == 4


def with_lora(model: StableDiffusion, name: str, seed: int, alpha: float = 4) -> StableDiffusion:
    add_lora(model.unet, name, LoraSettings(rank=4, alpha=alpha))
    generator = torch.Generator().manual_seed(seed)
    for parameter in lora_parameters(model.unet, name):
        parameter.data.normal_(0, 0.02, generator=generator)
    return model


def test_identities_know_weights_and_scale_but_not_names(pipeline_folder: Path):
    def fresh() -> StableDiffusion:
        return load_stable_diffusion(str(pipeline_folder))

    plain, lcm = fresh(), with_lora(fresh(), "lcm", seed=1)
    assert any(True for _ in lora_layers(lcm))
    assert model_digest(lcm) == model_digest(plain)
    assert adapter_digest(lcm, "lcm") == adapter_digest(with_lora(fresh(), "other", seed=1), "other")
    assert adapter_digest(lcm, "lcm") != adapter_digest(with_lora(fresh(), "lcm", seed=2), "lcm")
    assert adapter_digest(lcm, "lcm") != adapter_digest(with_lora(fresh(), "lcm", seed=1, alpha=8), "lcm")
    changed = fresh()
    changed.vae.decoder.conv_in.bias.data[0] += 1
    assert model_digest(changed) != model_digest(plain)


def test_identities_know_what_is_no_weight_but_decides_pixels(pipeline_folder: Path, tmp_path: Path):
    def fresh(folder: Path = pipeline_folder) -> StableDiffusion:
        return load_stable_diffusion(str(folder))

    plain, scaled, cut, scheduled = fresh(), fresh(), fresh(), fresh()
    elsewhere = fresh(Path(shutil.copytree(pipeline_folder, tmp_path / "copy")))
    assert model_digest(elsewhere) == model_digest(plain)
    scaled.vae.register_to_config(scaling_factor=0.5)
    cut.tokenizer.model_max_length = 8
    scheduled.scheduler_config["beta_end"] = 0.02
    assert len({model_digest(model) for model in (plain, scaled, cut, scheduled)}) == 4


def test_images_of_another_device_type_version_or_program_are_not_taken(monkeypatch: pytest.MonkeyPatch):
    contender, drawing = Contender("base", "base", (), DDIM, 5, 7.5), Drawing(["a"], 0, 32, 1)

    def folder(weights: str = "w", device: str = "cpu", dtype: torch.dtype = torch.float32) -> Path:
        return image_folder(Path("images"), contender, drawing, weights, device, dtype)

    assert folder() == folder()
    found = {folder(), folder("v"), folder(device="cuda"), folder(dtype=torch.bfloat16)}
    with monkeypatch.context() as other:
        other.setattr(drawing_module, "version", lambda package: "0.0")
        found.add(folder())
    monkeypatch.setattr(drawing_module, "DRAWING", drawing_module.DRAWING + 1)
    assert len({*found, folder()}) == 6


def test_the_clip_warning_names_the_models_that_share_the_encoder(pipeline_folder: Path):
    own, clip = load_stable_diffusion(str(pipeline_folder)), SimpleNamespace(name="clip:x", model=SimpleNamespace())
    clip.model.text_model = load_stable_diffusion(str(pipeline_folder)).text_encoder

    def sharing() -> list[str]:
        embeddings = {"a": token_embeddings_digest(own.text_encoder, own.dtype)}
        return evaluation.sharing_text_tower(Drawn([], embeddings, own.dtype), clip)

    assert sharing() == ["a"]
    own.text_encoder.get_input_embeddings().weight.data[0] += 1
    assert not sharing()
    (said,) = evaluation._warnings(["a", "c"], "clip:x", "inception", 2, 99, 99, "test")
    assert said.startswith("The text encoder of a, c is the text tower of clip:x")
    assert not evaluation._warnings([], "clip:x", "inception", 2, 99, 99, "test")


def test_contenders_that_share_a_name_but_not_weights_are_told_apart_and_keep_their_teacher():
    def source(name: str) -> ModelSource:
        return ModelSource(name, name, lambda: LoadedModel(None, ()))

    def base(name: str, steps: int) -> Contender:
        return Contender("base", "base", (), DDIM, steps, 7.5, "base_ddim_50")

    student = Contender("lcm_lora", "student", ("lcm",), LCM, 4, 1.0, "base_ddim_50")
    a, b, c = source("a"), source("b"), source("c")
    found = {
        "1": ModelImages(base("base", 50), a, "w1", Path("1")),
        "2": ModelImages(student, a, "s1", Path("2")),
        "3": ModelImages(base("base", 50), b, "w2", Path("3")),
        "4": ModelImages(student, c, "s2", Path("4")),  # c has the weights of b
    }
    keys = {("a", "base_ddim_50"): "1", ("b", "base_ddim_50"): "3", ("c", "base_ddim_50"): "3"}
    teachers = {key: [(images.source.name, "base_ddim_50")] for key, images in found.items()}
    named = {images.contender.slug: images.contender.teacher for images in distinguish(found, keys, teachers)}
    assert named == {
        "base-a_ddim_50": "base-a_ddim_50",
        "base-b_ddim_50": "base-b_ddim_50",
        "lcm_lora-a_4": "base-a_ddim_50",
        "lcm_lora-c_4": "base-b_ddim_50",
    }


def test_the_same_weights_drawn_with_another_guidance_are_told_apart(tmp_path: Path):
    """`models=[run:a,run:b]` of one base model, whose `model.guidance_scale` is another in b."""
    lineup = Lineup(rivals={"dpmpp": [10]}, undistilled_steps=[4], student_steps=[4])
    drawing = Drawing(["a cat"], 0, 64, 1)
    found: dict[str, ModelImages] = {}
    keys, teachers = {}, {}
    for name, guidance_scale in (("a", 2.0), ("b", 7.5)):
        source = ModelSource(name, name, lambda: LoadedModel(None, ()))
        for contender in lineup.contenders([LcmLoraDistillation.kind], own_guidance=guidance_scale):
            weights = " ".join(("base", *contender.adapters))
            folder = image_folder(tmp_path, contender, drawing, weights, "cpu", torch.float32)
            keys[name, contender.slug] = key = f"{contender.role} {folder.name}"
            teachers.setdefault(key, []).append((name, contender.teacher))
            found.setdefault(key, ModelImages(contender, source, weights, folder))
    drawn = [images.contender for images in distinguish(found, keys, teachers)]
    assert len({contender.slug for contender in drawn}) == len(drawn) == 7
    guidances = {contender.slug: contender.guidance_scale for contender in drawn}
    assert (guidances["base-a_ddim_50"], guidances["base-b_ddim_50"]) == (2.0, 7.5)
    (shared,) = [contender for contender in drawn if contender.role == "student"]
    assert shared.teachers == ("base-a_ddim_50", "base-b_ddim_50")


def test_a_base_found_first_without_its_run_knows_the_fine_tuned_model_made_from_it():
    """`models=[sd15,run:a]`: alone it is its own teacher, and the fine-tuned one is still held against it."""
    sd15, run = (ModelSource(name, name, lambda: LoadedModel(None, ())) for name in ("sd15", "a"))
    base = Contender("base", "base", (), DDIM, 50, 7.5, "base_ddim_50")
    tuned = Contender("finetuned", "finetuned", ("finetuned",), DDIM, 50, 7.5, "finetuned_ddim_50")
    found = {"b": ModelImages(base, sd15, "w1", Path("b")), "f": ModelImages(tuned, run, "w2", Path("f"))}
    keys = {("sd15", "base_ddim_50"): "b", ("a", "base_ddim_50"): "b", ("a", "finetuned_ddim_50"): "f"}
    teachers = {"b": [("sd15", "base_ddim_50"), ("a", "finetuned_ddim_50")], "f": [("a", "finetuned_ddim_50")]}
    first, second = (images.contender for images in distinguish(found, keys, teachers))
    assert (first.teacher, first.teachers) == ("base_ddim_50", ("base_ddim_50", "finetuned_ddim_50"))
    assert second.teachers == ("finetuned_ddim_50",)


def test_nothing_below_the_entry_points_composes_or_reads_a_configuration():
    for module in (CONF.parent / "lcm_lightning" / "evaluation").glob("*.py"):
        assert not re.search(r"^(from|import) (hydra|omegaconf)", module.read_text(), re.MULTILINE), module.name


@pytest.mark.parametrize(("option", "side"), [("data.resolution=null", 32), ("data.resolution=64", 64)])
def test_photos_are_of_the_first_model_s_own_size_unless_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pipeline_folder: Path, flickr_shards: Path, option: str, side: int
):
    found = []

    class Asked(Exception):
        """All that this test wants to know is known."""

    def asked(real: RealImages, *_: object) -> None:
        found.append(real)
        raise Asked

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lcm_lightning.evaluation.evaluation.read_reference", asked)
    places = (f"model.path={pipeline_folder}", f"data.source={flickr_shards}", "run_dir=here")
    options = (
        "models=[sd15,tiny]",
        "model=sd15",
        "data=flickr8k",
        "logger=csv",
        "accelerator=cpu",
        "evaluation=quick",
        "evaluation.num_images=4",
    )
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *options, *places, option])
    GlobalHydra.instance().clear()
    with pytest.raises(Asked):
        evaluate.main()
    GlobalHydra.instance().clear()
    assert [real.resolution for real in found] == [side]


def test_a_published_table_can_be_left_out(composed: Callable[..., DictConfig]):
    from lcm_lightning.config.instantiate import instantiate_group

    for hidden in ("evaluation.published=null", "evaluation.published.lcm_lora_distillation=null"):
        cfg = composed("model=tiny", "evaluation=standard", hidden)
        assert not any((instantiate_group(cfg, "evaluation").published or {}).values())
