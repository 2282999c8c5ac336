"""A run that was stopped and goes on ends as the run that never was."""

from __future__ import annotations

import csv
import resource
import signal
import sys
from collections.abc import Callable
from functools import partial
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning as L
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from helpers.commands import in_process
from helpers.photos import small_batches
from lcm_lightning.callbacks.checkpoints import Checkpoints
from lcm_lightning.callbacks.final_validation import FinalValidation
from lcm_lightning.callbacks.loggers import MetricsFile
from lcm_lightning.config.entry import command
from lcm_lightning.errors import UserError
from lcm_lightning.methods.lora import LoraFinetuning
from lcm_lightning.models.adapters import LoraSettings
from lcm_lightning.models.stable_diffusion import load_stable_diffusion
from lcm_lightning.runs.checkpoint_files import AtomicCheckpointIO, find_checkpoint, global_step
from lcm_lightning.runs.folders import auto_run_folder, check_own_run
from lcm_lightning.runs.preemption import Preempted


class Killed(Exception):
    """Stands for SIGKILL: nothing that hears of it saves anything."""


class Small(L.LightningModule):
    """Trains on all that a batch holds, and writes down which batches it saw."""

    def __init__(self, kill_at: int | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4)
        self.kill_at = kill_at  # batches
        self.seen: list[tuple[int, list[str]]] = []

    def training_step(self, batch: dict[str, Any], batch_index: int) -> Tensor:
        if len(self.seen) == self.kill_at:
            raise Killed
        valid = [key for key, weight in zip(batch["keys"], batch["weight"], strict=True) if weight > 0]
        self.seen.append((self.trainer.global_step, valid))
        pixels = batch["pixel_values"].mean(dim=(2, 3))
        seeds = (batch["seed"] % 1000)[:, None] / 1000
        loss = (self.layer(torch.cat([pixels, seeds], dim=1)).square().mean(dim=1) * batch["weight"]).mean()
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch: dict[str, Any], batch_index: int) -> None:
        self.log("val/loss", self.layer.weight.square().sum(), batch_size=1)

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def train(
    folder: Path,
    shards: Path,
    *,
    max_steps: int = 11,
    kill_at: int | None = None,
    accumulate: int = 1,
    val_every: int = 4,
    every_n_steps: int | None = 1,
    batch_size: int = 4,
    num_workers: int = 0,
    checkpoint: Path | None = None,
    **options: Any,
) -> Small:
    """Go on with the run in `folder`, from its newest checkpoint if none is given, or start it."""
    checkpoint = checkpoint or find_checkpoint("auto", folder)
    module = Small(kill_at)
    trainer = L.Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        max_epochs=-1,
        accumulate_grad_batches=accumulate,
        val_check_interval=val_every * accumulate,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=1,
        logger=MetricsFile(folder, global_step(checkpoint) if checkpoint else 0),
        callbacks=[
            FinalValidation(),
            Checkpoints(str(folder / "checkpoints"), every_n_steps=every_n_steps, **options),
        ],
        plugins=[AtomicCheckpointIO()],
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=folder,
    )
    try:
        datamodule = small_batches(shards, batch_size=batch_size, num_workers=num_workers)
        trainer.fit(module, datamodule=datamodule, ckpt_path=checkpoint, weights_only=True)
    except Killed:
        pass
    return module


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "metrics.csv").open() as file:
        return list(csv.DictReader(file))


def state(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def assert_same_end(first: Path, second: Path) -> None:
    """The same bits in weights, optimizer and schedule, the same rows of figures, the same place in the data."""
    one, two = state(first), state(second)
    assert one["global_step"] == two["global_step"]
    assert one["state_dict"].keys() == two["state_dict"].keys()
    assert all(torch.equal(one["state_dict"][key], two["state_dict"][key]) for key in one["state_dict"])
    assert str(one["optimizer_states"]) == str(two["optimizer_states"])
    assert one["lr_schedulers"] == two["lr_schedulers"]
    loaders = [s["loops"]["fit_loop"]["state_dict"]["combined_loader"] for s in (one, two)]
    assert loaders[0] == loaders[1]
    assert rows(first) == rows(second)


@pytest.fixture(scope="module")
def whole_runs(tmp_path_factory: pytest.TempPathFactory, flickr_shards: Path):
    """Runs that were never stopped, each made once."""
    made: dict[tuple, tuple[Path, Small]] = {}

    def whole(**options: Any) -> tuple[Path, Small]:
        key = tuple(sorted(options.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp("whole")
            made[key] = (folder, train(folder, flickr_shards, **options))
        return made[key]

    return whole


# 24 samples: 6 batches of 4 an epoch, or 5 of 5, the last of which is short.
@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"every_n_steps": 3},
        {"every_n_steps": None},  # after validations only
        {"val_every": 3},  # at the ends of epochs too
        {"val_every": 1},
        {"batch_size": 5, "accumulate": 2},  # epochs end, and validations fall, within an accumulated step
        {"batch_size": 24},  # an epoch a step
        {"batch_size": 4, "accumulate": 3, "max_steps": 7},
    ],
    ids=str,
)
def test_killed_at_any_batch_a_run_ends_as_if_it_was_not(
    tmp_path: Path, flickr_shards: Path, whole_runs, options: dict[str, Any]
):
    folder, whole = whole_runs(**options)
    batches = len(whole.seen)
    for kill_at in sorted({0, 1, 4, 6, 7, batches - 1} & set(range(batches))):
        stopped = tmp_path / str(kill_at)
        first = train(stopped, flickr_shards, kill_at=kill_at, **options)
        second = train(stopped, flickr_shards, **options)
        assert_same_end(folder, stopped)
        assert second.seen == whole.seen[batches - len(second.seen) :]
        assert len(first.seen) == kill_at
        if (
            options.get("every_n_steps", 1) == 1
        ):  # the step that was running, and the one whose figures were not out yet
            assert len(first.seen) + len(second.seen) <= batches + 2 * options.get("accumulate", 1)


def test_killed_again_and_again_it_gets_there(tmp_path: Path, flickr_shards: Path, whole_runs):
    folder, _ = whole_runs(every_n_steps=2)
    kills = 0
    while not find_checkpoint("auto", tmp_path) or global_step(find_checkpoint("auto", tmp_path)) < 11:
        kills += len(train(tmp_path, flickr_shards, every_n_steps=2, kill_at=3).seen) == 3
    assert kills >= 4
    assert_same_end(folder, tmp_path)


@pytest.mark.parametrize("batch_size", [2, 3, 8])
@pytest.mark.parametrize("kill_at", [3, 8])
def test_other_batches_and_workers_go_on_with_the_samples_that_are_left(
    tmp_path: Path, flickr_shards: Path, batch_size: int, kill_at: int
):
    """As another number of ranks does: 24 samples an epoch, each once, over 3 epochs."""
    seen = train(tmp_path, flickr_shards, kill_at=kill_at).seen
    left = 3 * 24 - 4 * len(seen)
    done = global_step(find_checkpoint("auto", tmp_path))
    assert done == kill_at
    more = train(tmp_path, flickr_shards, max_steps=done + -(-left // batch_size), batch_size=batch_size, num_workers=1)
    keys = [key for _, batch in seen + more.seen for key in batch]
    for epoch in range(3):
        assert len(set(keys[24 * epoch : 24 * (epoch + 1)])) == 24
    assert [int(row["step"]) for row in rows(tmp_path) if row["train/loss"]] == list(range(done + len(more.seen)))


def test_a_longer_run_goes_on_from_the_end_of_a_shorter_one(tmp_path: Path, flickr_shards: Path, whole_runs):
    folder, _ = whole_runs()
    train(tmp_path, flickr_shards, max_steps=8)  # ends on a validation
    train(tmp_path, flickr_shards, max_steps=11)
    assert_same_end(folder, tmp_path)


class Rates(L.Callback):
    """Writes down the learning rate of each step."""

    def __init__(self) -> None:
        self.used: list[float] = []

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, optimizer: Any) -> None:
        self.used.append(optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize(("lr_scheduler", "warmup_steps"), [("cosine", 0), ("linear", 2), ("constant", 0)])
def test_each_step_of_a_run_made_longer_takes_the_rate_of_the_longer_schedule(
    tmp_path: Path, flickr_shards: Path, pipeline_folder: Path, lr_scheduler: str, warmup_steps: int
):
    def rates(max_steps: int, checkpoint: Path | None = None) -> list[float]:
        module = LoraFinetuning(
            load_stable_diffusion(str(pipeline_folder)),
            lora=LoraSettings(rank=2),
            optimizer=partial(torch.optim.AdamW, lr=1e-4),
            lr_scheduler=lr_scheduler,
            warmup_steps=warmup_steps,
        )
        kept = Rates()
        trainer = L.Trainer(
            accelerator="cpu",
            max_steps=max_steps,
            max_epochs=-1,
            limit_val_batches=0,
            logger=False,
            callbacks=[kept],
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, datamodule=small_batches(flickr_shards), ckpt_path=checkpoint, weights_only=True)
        trainer.save_checkpoint(tmp_path / f"{max_steps}.ckpt")
        return kept.used

    whole, first = rates(8), rates(4)
    assert len(first) == 4
    assert rates(8, tmp_path / "4.ckpt") == whole[4:]
    assert whole[4] > 0


@pytest.mark.parametrize(("max_steps", "accumulate"), [(6, 1), (12, 1), (18, 1), (3, 2), (6, 2)])
@pytest.mark.parametrize("val_every", [3, 4])
def test_a_run_that_ended_with_an_epoch_goes_on_with_the_next(
    tmp_path: Path, flickr_shards: Path, max_steps: int, accumulate: int, val_every: int
):
    options = {"accumulate": accumulate, "val_every": val_every}
    whole = train(tmp_path / "whole", flickr_shards, max_steps=20, **options)
    shorter = train(tmp_path / "cut", flickr_shards, max_steps=max_steps, **options)
    longer = train(tmp_path / "cut", flickr_shards, max_steps=20, **options)
    assert shorter.seen + longer.seen == whole.seen
    one, two = ([row for row in rows(tmp_path / name) if row["train/loss"]] for name in ("cut", "whole"))
    assert one == two
    assert torch.equal(longer.layer.weight, whole.layer.weight)


def test_a_finished_run_has_nothing_to_do_and_changes_nothing(tmp_path: Path, flickr_shards: Path):
    train(tmp_path, flickr_shards)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.ckpt")}
    assert train(tmp_path, flickr_shards).seen == []
    assert before == {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.ckpt")}
    assert len(rows(tmp_path)) > 11


@pytest.mark.parametrize("options", [{"val_every": 4}, {"val_every": 6}, {"val_every": 3, "accumulate": 2}], ids=str)
def test_a_signal_where_a_validation_is_due_stops_before_it(
    tmp_path: Path, flickr_shards: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, int]
):
    """Within an epoch of 6 batches, at its end, and at its end with two batches a step."""
    options = {**options, "every_n_steps": None}
    whole = train(tmp_path / "whole", flickr_shards, **options)

    def ask_to_stop(module: Small, batch: dict[str, Any], batch_index: int) -> None:
        if module.trainer.global_step == options["val_every"] - 1:
            module.trainer.checkpoint_callback.signals.received = signal.SIGTERM

    monkeypatch.setattr(Small, "on_train_batch_start", ask_to_stop)
    with pytest.raises(Preempted):
        train(tmp_path / "cut", flickr_shards, **options)
    monkeypatch.undo()
    assert global_step(find_checkpoint("auto", tmp_path / "cut")) == options["val_every"]
    assert not any(row.get("val/loss") for row in rows(tmp_path / "cut"))
    resumed = train(tmp_path / "cut", flickr_shards, **options)
    assert torch.equal(resumed.layer.weight, whole.layer.weight)
    left_out = next(row for row in rows(tmp_path / "whole") if row["val/loss"])
    assert rows(tmp_path / "cut") == [row for row in rows(tmp_path / "whole") if row != left_out]


@pytest.mark.multiprocess
@pytest.mark.parametrize("shared", [True, False])
def test_ranks_that_find_different_checkpoints_are_refused(tmp_path: Path, shared: bool):
    """As where each machine has a run folder of its own."""
    torch.save({"global_step": 3}, tmp_path / "step_000003.ckpt")
    context = torch.multiprocessing.get_context("fork")
    processes = [context.Process(target=start_fit, args=(rank, rank == 0 or shared, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    said = [(tmp_path / str(rank)).read_text() for rank in range(2)]
    refusal = f"hydra.run.dir={tmp_path}: the ranks find checkpoints of different steps to go on from (3, 0;"
    assert said == ["", ""] if shared else all(message.startswith(refusal) for message in said)


def start_fit(rank: int, has_checkpoint: bool, folder: Path) -> None:
    """Write what one of two ranks says when it is about to go on from a checkpoint or none."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
    checkpoint = folder / "step_000003.ckpt" if has_checkpoint else None
    message = ""
    try:
        Checkpoints(str(folder / "checkpoints")).on_fit_start(SimpleNamespace(world_size=2, ckpt_path=checkpoint), None)
    except UserError as error:
        message = str(error)
    (folder / str(rank)).write_text(message)
    torch.distributed.destroy_process_group()


# ---- files ---------------------------------------------------------------------------------------------------------


def test_the_newest_and_the_best_are_kept(tmp_path: Path, flickr_shards: Path):
    train(tmp_path, flickr_shards, keep_last=3, best_by="val/loss")
    folder = tmp_path / "checkpoints"
    steps = ["step_000009.ckpt", "step_000010.ckpt", "step_000011.ckpt"]
    assert sorted(path.name for path in folder.iterdir()) == ["best.ckpt", "last.ckpt", *steps]
    assert global_step(folder / "last.ckpt") == 11
    values = {int(row["step"]) + 1: float(row["val/loss"]) for row in rows(tmp_path) if row["val/loss"]}
    assert global_step(folder / "best.ckpt") == min(values, key=values.__getitem__)


def test_a_validation_between_two_batches_of_a_step_makes_no_checkpoint_the_best(
    tmp_path: Path, flickr_shards: Path, monkeypatch: pytest.MonkeyPatch
):
    """Of 5 batches an epoch, 2 a step: validations after 4 are of steps 2, 7, 12, 14, and within the 5th and 10th."""

    def validation_step(module: Small, batch: dict[str, Any], batch_index: int) -> None:
        module.log("val/loss", float(abs(module.trainer.global_step - 10)), batch_size=1)

    monkeypatch.setattr(Small, "validation_step", validation_step)
    train(tmp_path, flickr_shards, batch_size=5, accumulate=2, val_every=2, max_steps=14, best_by="val/loss")
    values = {int(row["step"]) + 1: float(row["val/loss"]) for row in rows(tmp_path) if row["val/loss"]}
    assert min(values.values()) == 1  # within the 10th step
    assert global_step(tmp_path / "checkpoints" / "best.ckpt") == 12
    assert [part["best_value"] for part in state(tmp_path)["callbacks"].values() if "best_value" in part] == [2]


def test_a_checkpoint_holds_tensors_and_plain_containers_of_what_is_trained_only(tmp_path: Path, flickr_shards: Path):
    train(tmp_path, flickr_shards)
    content = state(tmp_path)  # weights_only
    assert set(content["state_dict"]) == {"layer.weight", "layer.bias"}


def test_a_run_that_went_back_goes_on_from_where_it_went_back_to(tmp_path: Path, flickr_shards: Path, whole_runs):
    """Steps given up, by naming an older checkpoint, come back under no name."""
    folder, _ = whole_runs()
    train(tmp_path, flickr_shards, kill_at=9, keep_last=9, best_by="val/loss")
    checkpoints = tmp_path / "checkpoints"
    assert global_step(checkpoints / "best.ckpt") == 8
    back = checkpoints / "step_000003.ckpt"
    train(tmp_path, flickr_shards, kill_at=0, keep_last=9, checkpoint=back)
    assert global_step(find_checkpoint("auto", tmp_path)) == 3
    assert sorted(path.name for path in checkpoints.glob("*.ckpt")) == [
        "last.ckpt",
        *(f"step_00000{step}.ckpt" for step in (1, 2, 3)),
    ]
    assert (checkpoints / "last.ckpt").samefile(back)
    train(tmp_path, flickr_shards)
    assert_same_end(folder, tmp_path)


@pytest.mark.parametrize("damage", ["cut off", "empty", "noise"])
def test_a_damaged_newest_checkpoint_falls_back_on_the_one_before(
    tmp_path: Path, flickr_shards: Path, whole_runs, caplog: pytest.LogCaptureFixture, damage: str
):
    folder, _ = whole_runs()
    train(tmp_path, flickr_shards, kill_at=7)
    newest = tmp_path / "checkpoints" / "step_000007.ckpt"
    content = newest.read_bytes()
    damaged = {"cut off": content[: len(content) // 2], "empty": b"", "noise": bytes(range(256)) * 40}[damage]
    newest.write_bytes(damaged)  # last.ckpt is the same file
    assert global_step(find_checkpoint("auto", tmp_path)) == 6
    assert f"passed over: resume={newest}" in caplog.text
    train(tmp_path, flickr_shards)
    assert_same_end(folder, tmp_path)


def test_without_any_usable_checkpoint_it_says_so(tmp_path: Path):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.ckpt").write_bytes(b"")
    for resume in ("auto", str(tmp_path)):
        with pytest.raises(UserError, match=f"resume={resume}: none of its 1 checkpoints can be read"):
            find_checkpoint(resume, tmp_path)
    with pytest.raises(UserError, match="is no checkpoint, or cut off"):
        find_checkpoint(str(tmp_path / "checkpoints" / "last.ckpt"), tmp_path)


def test_pickles_are_not_loaded(tmp_path: Path):
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    (tmp_path / "checkpoints").mkdir()
    torch.save({"global_step": 3, "evil": Evil()}, tmp_path / "checkpoints" / "last.ckpt")
    with pytest.raises(UserError):
        find_checkpoint("auto", tmp_path)
    assert not (tmp_path / "executed").exists()


def test_a_full_disk_costs_the_checkpoint_and_not_the_run(
    tmp_path: Path, flickr_shards: Path, whole_runs, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
):
    """No file may grow beyond 4 kB once step 5 is reached: less than a checkpoint, more than the figures."""
    folder, _ = whole_runs()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    written = AtomicCheckpointIO.save_checkpoint

    def save(self: AtomicCheckpointIO, checkpoint: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        limit = 4096 if checkpoint["global_step"] > 5 else soft
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            written(self, checkpoint, *args, **kwargs)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    monkeypatch.setattr(AtomicCheckpointIO, "save_checkpoint", save)
    train(tmp_path, flickr_shards)
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["last.ckpt", "step_000004.ckpt", "step_000005.ckpt"]
    assert "not written" in caplog.text and "File too large" in caplog.text
    monkeypatch.undo()
    train(tmp_path, flickr_shards)
    assert_same_end(folder, tmp_path)


def test_a_checkpoint_goes_to_the_disk_without_a_copy_in_memory(tmp_path: Path):
    """Of 200 MB of tensors, less than a fifth is held again while they are written."""
    checkpoint = {"global_step": 1, "tensors": [torch.full((2_500_000,), float(n)) for n in range(20)]}
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    AtomicCheckpointIO().save_checkpoint(checkpoint, tmp_path / "a.ckpt")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 40_000  # KiB
    read = AtomicCheckpointIO().load_checkpoint(tmp_path / "a.ckpt")
    assert all(torch.equal(*pair) for pair in zip(read["tensors"], checkpoint["tensors"], strict=True))
    assert [path.name for path in tmp_path.iterdir()] == ["a.ckpt"]


def test_figures_that_a_full_disk_refuses_are_written_later(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    logger = MetricsFile(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    logged = [{"a": 0.125}, {"a": 0.25}, {"a": 0.5, "b": 1.0}, {"a": 2.0}]
    for step, (figures, limit, written) in enumerate(zip(logged, (soft, 20, 20, soft), (1, 1, 1, 4), strict=True)):
        logger.log_metrics(figures, step)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            logger.save()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert len(rows(tmp_path)) == written and logger.is_written() == (limit == soft)
    read = [{name: float(cell) for name, cell in row.items() if cell} for row in rows(tmp_path)]
    assert read == [{"step": step} | figures for step, figures in enumerate(logged)]
    assert "2 rows wait to be written" in caplog.text and not list(tmp_path.glob(".*"))


def test_checkpoints_go_by_the_clock_too(tmp_path: Path, flickr_shards: Path, monkeypatch: pytest.MonkeyPatch):
    clock = iter(range(0, 100_000, 40))
    monkeypatch.setattr("lcm_lightning.callbacks.checkpoints.time.monotonic", lambda: next(clock))
    train(tmp_path, flickr_shards, every_n_steps=None, every_n_minutes=2, kill_at=10, val_every=100, keep_last=9)
    steps = [int(path.stem[5:]) for path in sorted((tmp_path / "checkpoints").glob("step_*"))]
    assert steps == [3, 6, 9]


@pytest.mark.parametrize(
    ("key", "value"), [("every_n_steps", 0), ("every_n_minutes", -1), ("keep_last", 0), ("best_by", "val/nonesuch")]
)
def test_settings_that_make_no_sense_are_refused(tmp_path: Path, flickr_shards: Path, key: str, value: object):
    with pytest.raises(UserError, match=rf"callbacks\.checkpoint\.{key}={value}: "):
        train(tmp_path, flickr_shards, max_steps=4, **{key: value})


# ---- resume=auto ---------------------------------------------------------------------------------------------------


def test_auto_finds_the_newest_run_of_the_same_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)

    def run(name: str, overrides: list[str], checkpoint: bool = True) -> str:
        folder = Path("outputs/lcm") / name
        (folder / "checkpoints").mkdir(parents=True)
        (folder / "overrides.yaml").write_text("".join(f"- {override}\n" for override in overrides))
        if checkpoint:
            (folder / "checkpoints" / "last.ckpt").write_text("")
        return str(folder)

    run("1", ["experiment=lcm", "seed=1"])
    wanted = run("2", ["seed=1", "experiment=lcm"])
    run("3", ["experiment=lcm", "seed=2"])
    run("4", ["experiment=lcm", "seed=1"], checkpoint=False)
    assert auto_run_folder("auto", "lcm", ["experiment=lcm", "seed=1", "resume=auto"]) == wanted
    for resume, overrides in (("auto", ["experiment=lcm", "seed=3"]), (None, ["experiment=lcm", "seed=1"])):
        assert not Path(auto_run_folder(resume, "lcm", overrides)).exists()


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[int, Path]]:
    """Runs a sweep of trainings that leave a checkpoint and their overrides; the folder of each by its seed."""
    monkeypatch.chdir(tmp_path)

    def run(*overrides: str) -> dict[int, Path]:
        folders: dict[int, Path] = {}

        @command("train")
        def main(cfg: DictConfig) -> None:
            assert HydraConfig.get().mode == RunMode.MULTIRUN
            folder, own = Path(cfg.run_dir), list(HydraConfig.get().overrides.task)
            check_own_run(cfg.resume, folder, own)
            (folder / "checkpoints").mkdir(exist_ok=True)
            (folder / "checkpoints" / "last.ckpt").touch()
            (folder / "overrides.yaml").write_text(OmegaConf.to_yaml(own))
            folders[cfg.seed] = folder

        monkeypatch.setattr(sys, "argv", ["train.py", "-m", "model=tiny", *overrides])
        monkeypatch.setattr("lcm_lightning.runs.folders.date_and_time", lambda: str(next(clock)))
        GlobalHydra.instance().clear()
        main()
        GlobalHydra.instance().clear()
        return folders

    clock = count()
    return run


def test_every_job_of_a_sweep_finds_its_own_run_again(sweep: Callable[..., dict[int, Path]]):
    first, others = sweep("seed=1,2"), sweep("seed=1,2,3")
    assert len({*first.values(), *others.values()}) == 5
    assert sweep("seed=1,2", "resume=auto") == first
    assert sweep("resume=auto", "seed=1,2,3") == others
    assert not {*sweep("seed=2,1", "resume=auto").values()} & {*first.values()}
    assert not {*sweep("seed=1,2").values()} & {*first.values()}


def test_a_sweep_of_several_methods_goes_on_though_each_has_its_folder(sweep: Callable[..., dict[int, Path]]):
    varied = ("method=lcm_lora,tcd_lora", "seed=1")
    first = sweep(*varied)
    assert first[1].parts[-3] == "tcd_lora"
    assert sweep(*varied, "resume=auto") == first


def test_jobs_of_a_sweep_s_folder_that_is_named_go_on_longer_but_not_with_each_other_s_runs(
    sweep: Callable[..., dict[int, Path]], capfd: pytest.CaptureFixture[str]
):
    first = sweep("seed=1,2", "hydra.sweep.dir=here")
    assert sweep("seed=1,2", "hydra.sweep.dir=here", "resume=auto", "max_steps=2000") == first
    with pytest.raises(SystemExit):
        sweep("seed=2,1", "hydra.sweep.dir=here", "resume=auto")
    assert (
        "here/0 holds a run of another job than this one (seed=2); type what the sweep varies" in capfd.readouterr().err
    )


def test_one_job_of_a_sweep_alone_is_not_taken_for_the_first_job_s_run(
    sweep: Callable[..., dict[int, Path]], capfd: pytest.CaptureFixture[str]
):
    sweep("seed=1,2", "hydra.sweep.dir=here")
    with pytest.raises(SystemExit):
        sweep("seed=2", "hydra.sweep.dir=here", "resume=auto")
    assert "here/0 holds a run of another job than this one (model=tiny seed=2" in capfd.readouterr().err


@pytest.mark.parametrize("content", ["", "hydra:\n  overrides: [", "- 1\n"])
def test_notes_of_a_sweep_that_were_cut_off_are_passed_over(sweep: Callable[..., dict[int, Path]], content: str):
    first, second = sweep("seed=1,2"), sweep("seed=1,2")
    (second[1].parent / "multirun.yaml").write_text(content)
    assert sweep("seed=1,2", "resume=auto") == first


def test_train_refuses_another_job_s_run(sweep: Callable[..., dict[int, Path]], capfd: pytest.CaptureFixture[str]):
    sweep("seed=1,2", "hydra.sweep.dir=here")
    with pytest.raises(SystemExit):
        in_process("train", "-m", "model=tiny", "trainer=cpu", "seed=3,4", "hydra.sweep.dir=here", "resume=auto")
    assert "here/0 holds a run of another job than this one (seed=3)" in capfd.readouterr().err
