"""`python train.py` as it is typed: what a run leaves behind, and what a mistake says."""

from __future__ import annotations

import csv
import importlib.util
import logging
import re
import resource
import shlex
import subprocess
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.utils import get_class, get_method, instantiate
from omegaconf import OmegaConf
from PIL import Image
from safetensors.torch import load_file

from helpers.commands import ROOT, SMALL, in_process
from lcm_lightning.config.hints import next_commands
from lcm_lightning.errors import UserError
from lcm_lightning.methods.lcm_lora import LcmLoraDistillation
from lcm_lightning.methods.lora import LoraFinetuning
from lcm_lightning.models.kinds import TEACHER_FILE, AdapterKind
from lcm_lightning.output.logs import RANKS, logged_errors, logged_warnings
from lcm_lightning.runs.contents import Adapter, read_manifest, write_manifest
from lcm_lightning.runs.loading import load_run
from lcm_lightning.tracking.wandb_logger import wandb_run_id
from lcm_lightning.train import TRAIN_KEYS

Run = Callable[..., Path]
Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def in_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder, no hub and no W&B key."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


@pytest.fixture
def run(in_folder: Path, pipeline_folder: Path, flickr_shards: Path) -> Run:
    """Trains on the tiny pipeline and the small shards; returns the run's folder."""

    def start(name: str, *overrides: str) -> Path:
        folder = in_folder / name
        places = (f"model.path={pipeline_folder}", f"data.source={flickr_shards}", f"hydra.run.dir={folder}")
        in_process("train", *places, *SMALL, *overrides)
        return folder

    return start


def metrics(run: Path) -> list[dict[str, float]]:
    """Rows of metrics.csv without the empty cells."""
    with (run / "metrics.csv").open() as file:
        return [{key: float(cell) for key, cell in row.items() if cell} for row in csv.DictReader(file)]


def assert_complete(run: Path, steps: int) -> None:
    """All that the README promises of a run folder is there and can be read."""
    config = OmegaConf.load(run / "config.yaml")
    assert "${" not in (run / "config.yaml").read_text()
    checkpoint = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == steps
    assert checkpoint["state_dict"] and all(".lora_" in key for key in checkpoint["state_dict"])
    weights = load_file(run / "lora" / "pytorch_lora_weights.safetensors")
    assert any(torch.any(tensor != 0) for key, tensor in weights.items() if ".lora_B." in key)
    rows = metrics(run)
    assert any("train/loss" in row for row in rows) and any("val/loss" in row for row in rows)
    with Image.open(run / "samples" / f"step_{steps:06d}.png") as grid:
        assert grid.width > 200 + 2 * config.data.resolution
    loaded = load_run(run)
    assert loaded.adapters == tuple(adapter.kind for adapter in read_manifest(run))


@pytest.mark.parametrize("experiment", ["lora_flickr8k", "lcm_flickr8k"])
def test_an_experiment_leaves_a_complete_run_folder(run: Run, experiment: str, capfd: pytest.CaptureFixture[str]):
    folder = run("first", f"experiment={experiment}", "debug=fdr", "logger=csv")
    assert_complete(folder, steps=2)
    said = "".join(capfd.readouterr())
    assert "evaluate.py run=first" in said
    for noise in ("litlogger", "eval mode", "weights_only", "limit_val_batches"):
        assert noise not in said


def test_a_finetuned_run_is_distilled_and_both_adapters_are_in_the_student_s_folder(run: Run):
    teacher = run("teacher", "experiment=lora_flickr8k", "debug=fdr", "logger=csv", "method.warmup_steps=0")
    student = run("student", "experiment=lcm_flickr8k", "debug=fdr", "logger=csv", f"method.teacher_lora={teacher}")
    assert_complete(student, steps=2)
    assert [adapter.kind.name for adapter in read_manifest(student)] == ["finetuned", "lcm"]
    original = load_file(teacher / "lora" / "pytorch_lora_weights.safetensors")
    kept = load_file(student / "lora" / "teacher_lora_weights.safetensors")
    assert original.keys() == kept.keys() and all(torch.equal(original[key], kept[key]) for key in original)


@pytest.mark.multiprocess
@pytest.mark.slow
@pytest.mark.parametrize("experiment", ["lora_flickr8k", "lcm_flickr8k"])
def test_two_processes_leave_one_run_folder(
    in_folder: Path, pipeline_folder: Path, flickr_shards: Path, train_command: Command, experiment: str
):
    places = (f"model.path={pipeline_folder}", f"data.source={flickr_shards}", "hydra.run.dir=ddp")
    options = (f"experiment={experiment}", "trainer=ddp_sim", "debug=fdr", "logger=csv")
    finished = train_command(*places, *SMALL, *options)
    assert finished.returncode == 0, finished.stderr
    assert finished.stdout.count("evaluate.py run=ddp") == 1
    assert_complete(in_folder / "ddp", steps=2)


@pytest.mark.slow
def test_a_full_disk_costs_files_and_not_the_run(
    in_folder: Path, pipeline_folder: Path, flickr_shards: Path, train_command: Command
):
    """Of what a run writes, only its configuration and figures are below the limit."""
    folder = in_folder / "full"
    places = (f"model.path={pipeline_folder}", f"data.source={flickr_shards}", f"hydra.run.dir={folder}")
    options = (*SMALL, "experiment=lcm_flickr8k", "debug=fdr", "logger=csv", "resume=auto")
    options += ("callbacks.checkpoint.every_n_steps=1", "data.val_limit=1")

    def train_to(step: int) -> subprocess.CompletedProcess[str]:
        return train_command(*places, *options, f"trainer.max_steps={step}")

    assert train_to(2).returncode == 0
    before = {path: path.read_bytes() for path in folder.glob("[!.]*/*") if path.is_file()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (12_000, limits[1]))
    try:
        finished = train_to(4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert finished.returncode == 0, finished.stderr
    for part in ("checkpoint", "lora not written", "step_000004.png not written"):
        assert part in finished.stderr + finished.stdout
    assert {path: path.read_bytes() for path in folder.glob("[!.]*/*") if path.is_file()} == before
    finished = train_to(4)
    assert finished.returncode == 0, finished.stderr
    assert_complete(folder, steps=4)
    assert [row["step"] for row in metrics(folder) if "train/loss" in row] == list(range(4))


def test_a_run_ends_with_a_validation_samples_and_an_export(run: Run):
    folder = run("odd", "debug=fdr", "logger=csv", "trainer.max_steps=3", "method.warmup_steps=0")
    validated = [row["step"] for row in metrics(folder) if "val/loss" in row]
    assert validated == [1, 2]  # Lightning counts from 0: after the second step and after the third
    assert sorted(path.name for path in (folder / "samples").iterdir()) == ["step_000002.png", "step_000003.png"]
    assert_complete(folder, steps=3)
    # What is exported is what the checkpoint holds (alpha = rank, so B is stored as it is).
    state = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    exported = load_file(folder / "lora" / "pytorch_lora_weights.safetensors")
    for key, tensor in state.items():
        assert torch.equal(exported[key.removeprefix("model.").replace(".lcm.", ".")], tensor)


def test_a_run_that_ends_on_a_validation_does_not_validate_twice(run: Run):
    folder = run("even", "debug=fdr", "logger=csv", "trainer.max_steps=2")
    assert [row["step"] for row in metrics(folder) if "val/loss" in row] == [1]


def test_every_figure_is_logged_at_the_interval_over_epochs_and_accumulation(run: Run):
    folder = run(
        "logged",
        "debug=fdr",
        "logger=csv",
        "data.batch_size=4",
        "trainer.accumulate_grad_batches=2",  # 6 batches, 3 optimizer steps an epoch
        "trainer.log_every_n_steps=2",
        "trainer.max_steps=8",
        "trainer.limit_val_batches=0",
    )
    for name in ("train/loss", "train/grad_norm", "train/images_per_second", "train/peak_memory_gb"):
        assert [row["step"] for row in metrics(folder) if name in row] == [1, 3, 5, 7], name
    # Lightning's own callback writes once for each of the accumulated batches.
    assert {row["step"] for row in metrics(folder) if "lr-AdamW" in row} == {1, 3, 5, 7}
    rates = [row["train/images_per_second"] for row in metrics(folder) if "train/images_per_second" in row]
    assert all(rate > 0 for rate in rates)


def test_figures_are_logged_one_below_the_step_that_checkpoints_and_pictures_are_called_by(run: Run):
    """As docs/scaling.md says."""
    folder = run("named", "method=lora", "debug=fdr", "logger=csv")
    assert {row["step"] for row in metrics(folder) if "val/loss" in row} == {1}
    assert max(row["step"] for row in metrics(folder) if "train/loss" in row) == 1
    assert (folder / "checkpoints" / "step_000002.ckpt").is_file()
    assert (folder / "samples" / "step_000002.png").is_file()


def test_the_progress_bar_counts_optimizer_steps(
    run: Run, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("lcm_lightning.callbacks.progress_bar.draws_bars", lambda console: True)
    options = ("method=lora", "debug=fdr", "logger=csv", "callbacks.samples=null")
    steps = (*options, "trainer.accumulate_grad_batches=5", "trainer.val_check_interval=100")
    run("steps", *steps, "trainer.max_steps=3")  # 15 batches, 12 of which are an epoch
    assert re.search(r"Step +\S* 3/3 ", shown := capfd.readouterr().out) and "Epoch" not in shown
    run("steps", *steps, "trainer.max_steps=5", "resume=auto")
    assert re.search(r"Step +\S* 5/5 ", shown := capfd.readouterr().out) and "Epoch" not in shown
    run("epochs", *options, "trainer.max_steps=-1", "trainer.max_epochs=2")
    assert re.search(r"Epoch 1/1 +\S* 12/12 ", capfd.readouterr().out)


def test_where_output_goes_to_a_file_each_tenth_of_a_run_is_a_line(run: Run, capfd: pytest.CaptureFixture[str]):
    options = ("method=lora", "debug=fdr", "logger=csv", "callbacks.samples=null", "trainer.val_check_interval=100")
    run("lines", *options, "trainer.max_steps=20")
    line = r"^step (\d+)/20, loss \d[\d.e-]*, \d[\d.e-]* images/s(?:, \d:\d\d:\d\d left)?$"
    shown = capfd.readouterr().out
    assert [int(step) for step in re.findall(line, shown, re.MULTILINE)] == list(range(2, 21, 2))
    assert "━" not in shown
    run("lines", *options, "trainer.max_steps=40", "resume=auto")  # from step 20
    assert re.findall(r"^step (\d+)/40", capfd.readouterr().out, re.MULTILINE) == ["24", "28", "32", "36", "40"]
    run("epochs", *options, "trainer.max_steps=-1", "trainer.max_epochs=2")
    assert len(re.findall(r"^step \d+/24, ", capfd.readouterr().out, re.MULTILINE)) == 10


def test_a_run_s_log_holds_its_start_its_progress_its_warnings_and_its_end(
    in_folder: Path, pipeline_folder: Path, flickr_shards: Path, train_command: Command
):
    """Whether or not a bar is shown instead."""
    places = (f"model.path={pipeline_folder}", f"data.source={flickr_shards}", "hydra.run.dir=logged")
    options = ("method=lora", "debug=fdr", "logger=csv", "callbacks.samples=null", "trainer.max_steps=4")
    finished = train_command(*places, *SMALL, *options, "optimizer.lr=1e-3", "data.val_limit=1", "print_config=false")
    assert finished.returncode == 0, finished.stderr
    assert "├── " not in finished.stdout
    log = (in_folder / "logged" / "train.log").read_text()
    places = [log.index(text) for text in ("started as\nlora: ", "├── method=lora", "│   └── optimizer.lr=1e-3")]
    places += [log.index(text) for text in ("step 1/4, ", "step 4/4, ", "ended after step 4", "evaluate.py run=logged")]
    assert places == sorted(places)


@pytest.mark.parametrize(
    ("environment", "writes"),
    [
        ({}, True),
        ({"LOCAL_RANK": "1"}, False),  # which Lightning has started
        ({"NODE_RANK": "1"}, False),
        ({"SLURM_PROCID": "0", "LOCAL_RANK": "0"}, True),
        ({"SLURM_PROCID": "3"}, False),
        ({"RANK": "0", "SLURM_PROCID": "1"}, True),  # torchrun, whose first node may be any
        ({"RANK": "4", "LOCAL_RANK": "0"}, False),
    ],
)
def test_only_the_first_process_of_a_run_writes_its_log(
    environment: dict[str, str], writes: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in ("RANK", *RANKS):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    settings = OmegaConf.load(ROOT / "conf" / "hydra" / "job_logging" / "run.yaml")
    log = get_method(settings.handlers.file["()"])(str(tmp_path / "train_ddp_process_1.log"))
    log.handle(logging.makeLogRecord({"msg": "told"}))
    log.close()
    assert [path.read_text() for path in tmp_path.iterdir()] == (["told\n"] if writes else [])


def test_a_warning_goes_to_the_log_and_where_it_went(caplog: pytest.LogCaptureFixture):
    with pytest.warns(UserWarning, match="two"), logged_warnings():
        warnings.warn("one\ntwo", stacklevel=1)
    assert [record.getMessage() for record in caplog.records] == ["UserWarning: one two"]


def test_a_run_begins_with_what_is_chosen_and_changed(run: Run, capfd: pytest.CaptureFixture[str]):
    folder = run("said", "method=lora", "debug=fdr", "logger=csv", "callbacks.samples=null", "max_steps=7")
    tree = capfd.readouterr().out.partition("lora: ")[2].splitlines()
    assert tree[0] == str(folder)
    assert tree.index("├── method=lora") + 1 == tree.index("│   └── method.lora.rank=4")
    assert "├── debug=fdr" in tree and "├── max_steps=7" in tree and "├── callbacks=default" in tree


@pytest.mark.parametrize("experiment", ["lora_flickr8k", "quickstart"])
def test_debug_overfit_draws_and_validates_the_images_that_it_trains_on(experiment: str, flickr_shards: Path):
    small = ("data.num_workers=0", "data.resolution=32", "data.bucket_step=32")
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        typed = (f"experiment={experiment}", "debug=overfit", "data=flickr8k", f"data.source={flickr_shards}", *small)
        cfg = compose("train", overrides=list(typed))
    assert cfg.callbacks.samples.prompts is None  # the first captions of what is validated on
    data = instantiate(cfg.data)
    data.prepare_data()
    data.setup("fit")
    trained, validated = (
        {key for batch in loader for key in batch["keys"]}
        for loader in (data.train_dataloader(), data.val_dataloader())
    )
    assert trained == validated and len(trained) == 4


def test_the_log_says_why_a_run_died(run: Run, in_folder: Path):
    with pytest.raises(SystemExit) as end:
        run("dead", "method=lora", "debug=fdr", "optimizer.lr=1e38", "max_steps=5", "callbacks.faults.max_in_a_row=2")
    last = (in_folder / "dead" / "train.log").read_text().splitlines()[-1]
    assert end.value.code == 2 and "[ERROR] - ended by an error: " in last and "2 steps in a row" in last


@pytest.mark.parametrize(
    ("error", "said"),
    [(ZeroDivisionError("unforeseen"), "unforeseen"), (KeyboardInterrupt(), "interrupted"), (UserError("k=1"), "k=1")],
)
def test_what_ends_a_run_is_logged_and_raised(error: BaseException, said: str, caplog: pytest.LogCaptureFixture):
    with pytest.raises(type(error)), logged_errors():
        raise error
    assert said in caplog.text and (("Traceback" in caplog.text) == (said == "unforeseen"))


def test_debug_profile_leaves_a_table_and_a_trace(run: Run, capfd: pytest.CaptureFixture[str]):
    folder = run("slow", "method=lora", "debug=profile", "logger=csv", "trainer=cpu", "max_steps=6")
    (table,) = (folder / "profile").glob("*.txt")
    assert "Optimizer.step#AdamW.step" in table.read_text()
    assert len(list((folder / "profile").glob("*.pt.trace.json"))) == 1
    assert "  profile   slow/profile/\n" in capfd.readouterr().out


@pytest.mark.parametrize("experiment", sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml")))
@pytest.mark.parametrize("debug", ["fdr", "overfit", "profile"])
def test_a_debug_preset_goes_over_every_experiment_and_under_what_is_typed(experiment: str, debug: str):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        typed = [f"experiment={experiment}", f"debug={debug}", "trainer=ddp_sim", "val_every=7"]
        typed += ["method.vae=v", "method.clip=c"] if experiment == "pretrain_unet" else []
        cfg = compose("train", overrides=typed)
    assert cfg.max_steps == OmegaConf.load(ROOT / "conf" / "debug" / f"{debug}.yaml").max_steps
    assert (cfg.trainer.devices, cfg.trainer.accelerator, cfg.val_every) == (2, "cpu", 7)
    assert set(cfg) <= set(TRAIN_KEYS)


@pytest.mark.parametrize("experiment", sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml")))
def test_a_fast_run_takes_few_passes_of_the_network(experiment: str):
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("train", overrides=[f"experiment={experiment}", "debug=fdr"])
    samples = cfg.callbacks.samples
    assert cfg.data.batch_size * cfg.trainer.accumulate_grad_batches == 1 and not cfg.logger
    assert samples.num_prompts * (samples.teacher_steps + sum(samples.student_steps)) <= 3
    assert (samples["_target_"] is None) == experiment.startswith("pretrain_")


def test_the_end_of_a_run_names_what_it_left(run: Run, capfd: pytest.CaptureFixture[str]):
    small = ("method=lora", "debug=fdr", "logger=csv")
    run("drawn", *small)
    said = capfd.readouterr().out
    assert "look at   drawn/samples/\n" in said and "python evaluate.py run=drawn\n" in said
    run("blind", *small, "callbacks.samples=null", "callbacks.export=null")
    assert capfd.readouterr().out.endswith("run folder: blind\n")


@pytest.mark.parametrize(
    ("choices", "protocol"),
    [
        (["model=tiny", "data=twemoji"], " evaluation=quick"),
        (["model=tiny", "data=flickr8k"], " evaluation=quick"),
        (["model=sd15", "data=twemoji"], ""),
    ],
)
def test_the_quick_evaluation_is_proposed_for_the_embedded_pipeline_on_any_data(
    tmp_path: Path, choices: list[str], protocol: str
):
    write_manifest(tmp_path / "lora", [Adapter(LoraFinetuning.kind)])
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("train", overrides=[*choices, "name=mine"])
    assert f"python evaluate.py run={tmp_path}{protocol}\n" in next_commands(cfg, tmp_path)


@pytest.mark.parametrize(
    ("overrides", "next_one"),
    [
        (["experiment=lora_flickr8k"], "experiment=lcm_flickr8k"),
        (["experiment=quickstart_lora", "seed=3", "trainer=ddp_sim"], "experiment=quickstart trainer=ddp_sim"),
        (
            ["experiment=lora_folder", "data.source=my photos", "model=tiny"],
            "experiment=lcm_folder 'data.source=my photos' model=tiny",
        ),
        (["method=lora", "data=twemoji", "name=mine"], None),
    ],
)
def test_the_end_of_a_fine_tuning_names_its_distillation_with_the_same_model_and_data(
    tmp_path: Path, overrides: list[str], next_one: str | None
):
    write_manifest(tmp_path / "lora", [Adapter(LoraFinetuning.kind)])
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("train", overrides=overrides)
        said = next_commands(cfg, tmp_path, overrides)
        proposed = f"  distil    python train.py {next_one} method.teacher_lora={tmp_path}\n"
        assert (proposed in said) if next_one else ("distil" not in said)
        if next_one:
            compose("train", overrides=shlex.split(next_one))
    write_manifest(tmp_path / "lora", [Adapter(LoraFinetuning.kind), Adapter(LcmLoraDistillation.kind)])
    assert "distil" not in next_commands(cfg, tmp_path, overrides)


def test_the_end_of_a_run_names_its_files(tmp_path: Path):
    cfg = OmegaConf.create({"name": "mine"})
    write_manifest(tmp_path / "lora", [Adapter(LcmLoraDistillation.kind)])
    (tmp_path / "lora" / "kohya_lora_weights.safetensors").touch()
    said = next_commands(cfg, tmp_path)
    assert f"  LoRA      {tmp_path}/lora/pytorch_lora_weights.safetensors\n" in said
    assert f"            {tmp_path}/lora/kohya_lora_weights.safetensors (ComfyUI, A1111)\n" in said
    (tmp_path / "lora" / TEACHER_FILE).touch()
    assert "kohya_lora_weights.safetensors (ComfyUI, A1111; without its teacher's LoRA" in next_commands(cfg, tmp_path)
    assert said.endswith(f"  export    python -m lcm_lightning.export run={tmp_path} format=fused")


@pytest.mark.parametrize(
    ("kind", "seen", "proposed"),
    [
        (LoraFinetuning.kind, 2.0, " guidance_scale=2"),
        (LoraFinetuning.kind, 7.5, ""),
        (LcmLoraDistillation.kind, 2.0, ""),
    ],
)
def test_pictures_are_proposed_under_the_guidance_they_were_seen_with(
    tmp_path: Path, kind: AdapterKind, seen: float, proposed: str
):
    write_manifest(tmp_path / "lora", [Adapter(kind)])
    cfg = OmegaConf.create({"name": "mine", "callbacks": {"samples": {"guidance_scale": seen}}})
    assert f'run={tmp_path}{proposed} prompt="..."' in next_commands(cfg, tmp_path)


def test_resuming_goes_on_where_the_run_stopped(run: Run):
    """5 steps at once are 3 steps, a new process' worth of forgetting, and 2 more; the second stop is in epoch 2."""
    options = ("debug=fdr", "logger=csv", "method.lr_scheduler=constant", "method.warmup_steps=0")
    options += ("data.batch_size=6", "trainer.limit_val_batches=0")  # 4 steps an epoch
    whole = run("whole", *options, "trainer.max_steps=5")
    run("part", *options, "trainer.max_steps=3")
    resumed = run("resumed", *options, "trainer.max_steps=5", "resume=part")
    assert [row["step"] for row in metrics(resumed) if "train/loss" in row] == [3, 4]
    first, second = (load_file(folder / "lora" / "pytorch_lora_weights.safetensors") for folder in (whole, resumed))
    for key in first:
        torch.testing.assert_close(second[key], first[key], rtol=0, atol=1e-6)


def test_a_sweep_without_an_experiment_is_named_by_its_method(
    in_folder: Path, pipeline_folder: Path, flickr_shards: Path
):
    places = (f"model.path={pipeline_folder}", f"data.source={flickr_shards}")
    in_process("train", "-m", *places, *SMALL, "debug=fdr", "trainer.max_steps=1", "logger=csv", "seed=1,2")
    configs = sorted(in_folder.glob("outputs/lcm_lora/*/*/config.yaml"))
    assert [OmegaConf.load(path).seed for path in configs] == [1, 2]
    assert len({path.parents[1] for path in configs}) == 1


def test_resuming_another_adapter_is_refused(run: Run, capfd: pytest.CaptureFixture[str]):
    run("part", "debug=fdr", "logger=csv", "trainer.max_steps=1")
    refused(capfd, run, "resume: the checkpoint's weights differ", "resume=part", "method.lora.rank=8")


def test_a_refused_command_leaves_the_record_of_the_run_it_would_go_on_with(run: Run):
    options = ("debug=fdr", "logger=csv", "resume=auto")
    part = run("part", *options, "trainer.max_steps=1")
    record = [(part / name).read_bytes() for name in ("config.yaml", "overrides.yaml")]
    with pytest.raises(SystemExit):
        run("part", *options, "method.lora.rank=8")
    assert [(part / name).read_bytes() for name in ("config.yaml", "overrides.yaml")] == record
    run("part", *options, "trainer.max_steps=2")
    assert OmegaConf.load(part / "config.yaml").trainer.max_steps == 2
    assert "trainer.max_steps=2" in OmegaConf.load(part / "overrides.yaml")


# ---- mistakes ------------------------------------------------------------------------------------------------------


def refused(capfd: pytest.CaptureFixture[str], run: Run, message: str, *overrides: str) -> str:
    """The run ends with a status other than 0, and says `message` and no traceback; returns what it said."""
    capfd.readouterr()
    with pytest.raises(SystemExit) as exit_:
        run("refused", "debug=fdr", "logger=csv", *overrides)
    assert exit_.value.code not in (0, None)
    said = capfd.readouterr().err
    assert message in said
    assert "Traceback" not in said
    return said


# A key with + is new to the configuration, one without is taken for a misspelt one of the configuration.
@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+foo=1", "foo=1: nothing reads this key"),
        ("foo=1", "foo=1: there is no such key; there are experiment, model"),
        ("+model.foo=1", "model.foo=1: nothing reads this key"),
        ("+method.foo=1", "method.foo=1: nothing reads this key"),
        ("method.foo=1", "method.foo=1: there is no such key; there are teacher_lora"),
        ("+method.lora.foo=1", "method.lora.foo=1: nothing reads this key"),
        ("+method.distillation.foo=1", "method.distillation.foo=1: nothing reads this key"),
        ("+optimizer.foo=1", "optimizer.foo=1: nothing reads this key"),
        ("+data.foo=1", "data.foo=1: nothing reads this key"),
        ("data.bacth_size=1", "data.bacth_size=1: there is no such key; did you mean batch_size"),
        ("+trainer.foo=1", "trainer.foo=1: nothing reads this key"),
        ("+trainer.limit_train_batches=3", "trainer.limit_train_batches=3: a run of epochs cut short"),
        ("+logger.foo=1", "logger.foo=1: nothing reads this"),
        ("+callbacks.foo=1", "callbacks.foo=1: nothing reads this"),
        ("+callbacks.samples.foo=1", "callbacks.samples.foo=1: nothing reads this key"),
        ("+callbacks.export.foo=1", "callbacks.export.foo=1: nothing reads this key"),
        ("+callbacks.checkpoint.foo=1", "callbacks.checkpoint.foo=1: nothing reads this key"),
        (
            "method=nonesuch",
            "method=nonesuch: there is no such file in conf/method; there are dmd2_lora, kd_lora, lcm, lcm_lora, lora",
        ),
        ("data.source=???", "data.source: has no value"),
        ("trainer.val_check_interval=${nonesuch}", "nonesuch"),
        ("trainer.precision=64-true", "trainer.precision=64-true: expected 32-true"),
        ("trainer.accelerator=gpu", "trainer=cpu"),
        ("data.resolution=33", "data.resolution=33: expected a positive multiple of 8"),
        ("resume=nowhere", "resume=nowhere: neither a .ckpt file nor a run folder with"),
        ("method.lora.rank=0", "method.lora.rank=0"),
        ("method.lr_scheduler=fast", "method.lr_scheduler=fast: expected one of"),
        ("method.w_min=20", "method.w_min=20"),
        ("method.teacher_lora=./nowhere", "method.teacher_lora=./nowhere: no such file or folder"),
    ],
)
def test_a_mistake_is_one_clear_message(
    run: Run, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, override: str, message: str
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    refused(capfd, run, message, override)


@pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is not None, reason="bitsandbytes is installed")
def test_an_optimizer_that_is_not_installed_is_named(run: Run, capfd: pytest.CaptureFixture[str]):
    refused(capfd, run, "optimizer: No module named 'bitsandbytes'", "optimizer=adamw8bit")


def test_an_unknown_setting_of_wandb_is_refused_before_the_run(run: Run, capfd: pytest.CaptureFixture[str]):
    refused(capfd, run, "logger.wandb.foo=1: no setting of wandb.init", "logger=wandb", "+logger.wandb.foo=1")


@pytest.mark.parametrize(
    ("override", "message"), [("method.lora.rank=0", "method.lora.rank=0"), ("model.path=./no", "model.path=./no: ")]
)
def test_with_wandb_too_a_refused_run_leaves_no_folder(
    run: Run, capfd: pytest.CaptureFixture[str], in_folder: Path, override: str, message: str
):
    refused(capfd, run, message, "logger=wandb", override)
    assert [path.name for path in in_folder.iterdir() if path.name != ".cache"] == []  # there sizes of images may be


def test_a_run_that_goes_on_in_its_folder_goes_on_in_its_wandb_run(tmp_path: Path):
    first, second = wandb_run_id(tmp_path), wandb_run_id(tmp_path)
    assert first == second and re.fullmatch("[0-9a-f]{8}", first)
    assert wandb_run_id(tmp_path / "other") != first


def test_without_data_it_says_how_to_get_them(in_folder: Path, train_command: Command):
    finished = train_command("experiment=lcm_flickr30k", "trainer=cpu")
    assert finished.returncode not in (0, None)
    assert "Traceback" not in finished.stderr
    for words in ("data/flickr30k", "python -m lcm_lightning.prepare data=flickr30k", "clip-benchmark/wds_flickr30k"):
        assert words in finished.stderr


def test_without_the_model_it_says_how_to_get_it(run: Run, capfd: pytest.CaptureFixture[str], flickr_shards: Path):
    said = refused(
        capfd,
        run,
        "model.path=stable-diffusion-v1-5/stable-diffusion-v1-5: no such folder here, and the hub",
        "experiment=lcm_flickr30k",
        "model.path=stable-diffusion-v1-5/stable-diffusion-v1-5",
    )
    assert "hf download stable-diffusion-v1-5/stable-diffusion-v1-5 --local-dir DIR` and give model.path=DIR" in said


# ---- loggers -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("logger", ["csv", "tensorboard"])
def test_loggers(run: Run, logger: str):
    if logger == "tensorboard":
        pytest.importorskip("tensorboard", reason="the extra `tensorboard` is not installed")
    folder = run("logged", "debug=fdr", f"logger={logger}")
    assert_complete(folder, steps=2)
    assert bool(list(folder.glob("tensorboard/events.out.tfevents.*"))) == (logger == "tensorboard")
    assert not (folder / "wandb").exists()


def test_a_logger_that_is_not_installed_is_named(
    run: Run, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("lightning.fabric.loggers.tensorboard._TENSORBOARD_AVAILABLE", False)
    monkeypatch.setattr("lightning.fabric.loggers.tensorboard._TENSORBOARDX_AVAILABLE", False)
    refused(capfd, run, "logger.tensorboard: ", "logger=tensorboard")


@pytest.mark.slow
def test_wandb_runs_offline_without_a_key_and_without_asking(
    in_folder: Path, pipeline_folder: Path, flickr_shards: Path, train_command: Command
):
    places = (f"model.path={pipeline_folder}", f"data.source={flickr_shards}", "hydra.run.dir=offline")
    finished = train_command(*places, *SMALL, "experiment=lora_flickr8k", "debug=fdr", "logger=wandb")
    assert finished.returncode == 0, finished.stderr
    folder = in_folder / "offline"
    assert_complete(folder, steps=2)
    assert len(list(folder.glob("wandb/offline-run-*/run-*.wandb"))) == 1


# ---- configuration -------------------------------------------------------------------------------------------------

GROUPS = ("model", "method", "optimizer", "data", "trainer", "logger", "callbacks", "experiment", "debug")
OPTIONS = [(path.parent.name, path.stem) for group in GROUPS for path in sorted((ROOT / "conf" / group).glob("*.yaml"))]


@pytest.mark.parametrize(("group", "option"), OPTIONS)
def test_every_option_of_every_group_composes(group: str, option: str):
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        cfg = compose("train", overrides=[f"{group}={option}", "name=name", "run_dir=here"])
    OmegaConf.resolve(cfg)
    # Pretraining builds its own networks.
    assert set(TRAIN_KEYS) - {"model"} <= set(cfg) <= set(TRAIN_KEYS)
    for name in ("method", "data", "trainer"):
        get_class(cfg[name]._target_)
