"""Train: ``python train.py experiment=lcm_flickr30k``. Composes what `conf/` says and runs Lightning's Trainer."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from lcm_lightning.config.checks import resolve
from lcm_lightning.config.entry import command
from lcm_lightning.config.overview import as_text, overview
from lcm_lightning.errors import UserError
from lcm_lightning.output.logs import SHOWN, logged_errors, logged_warnings

if TYPE_CHECKING:
    import torch

log = logging.getLogger(__name__)

GROUPS = ("model", "method", "optimizer", "data", "trainer", "logger", "callbacks")
TRAIN_KEYS = (
    *GROUPS,
    "name",
    "seed",
    "max_steps",
    "val_every",
    "optimized_metric",
    "resume",
    "print_config",
    "run_dir",
)


@command("train")
@logged_errors()
def main(cfg: DictConfig) -> float | None:
    """Compose the run, train, and say where its results are; returns `optimized_metric`, for sweepers to minimise."""
    resolve(cfg, TRAIN_KEYS)
    # Imported once the configuration is right: Lightning and diffusers take ten seconds.
    import lightning as L

    from lcm_lightning.callbacks.experiment_tracking import ExperimentTracking
    from lcm_lightning.callbacks.loggers import MetricsFile
    from lcm_lightning.callbacks.settings_record import SettingsRecord
    from lcm_lightning.config.hints import next_commands
    from lcm_lightning.config.instantiate import (
        build_module,
        check_settings,
        instantiate_each,
        instantiate_group,
        take_teacher_steps,
    )
    from lcm_lightning.config.quiet import quiet_known_warnings
    from lcm_lightning.runs.checkpoint_files import find_checkpoint, global_step
    from lcm_lightning.runs.folders import check_own_run
    from lcm_lightning.runs.preemption import Preempted, requeue_slurm_job

    quiet_known_warnings()
    check_settings(cfg)  # before devices and networks are asked for
    run_dir = Path(cfg.run_dir)
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        check_own_run(cfg.resume, run_dir, list(HydraConfig.get().overrides.task))
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    checkpoint = find_checkpoint(cfg.resume, run_dir)
    data = instantiate_group(cfg, "data")
    own = checkpoint if checkpoint and checkpoint.resolve().is_relative_to(run_dir.resolve()) else None
    metrics = MetricsFile(run_dir, global_step(own) if own else 0)
    loggers: list[L.pytorch.loggers.Logger] = [metrics, *instantiate_each(cfg, "logger")]
    settings = SettingsRecord(cfg, HydraConfig.get().overrides.task, run_dir, loggers[1:])
    tracking = ExperimentTracking(cfg.optimized_metric)
    # Last: others may refuse to start.
    callbacks = [*instantiate_each(cfg, "callbacks"), settings, tracking]
    trainer = instantiate_group(cfg, "trainer", logger=loggers, callbacks=callbacks)
    data.prepare_data()
    if trainer.is_global_zero:
        announce(cfg)
    module = build_module(cfg, trainer.precision, data.cache)
    take_teacher_steps(module, data)
    # Where they were null, known with the model.
    data.resolution = cfg.data.resolution
    data.buckets, data.bucket_step = cfg.data.buckets, cfg.data.bucket_step
    trainer.ckpt_path = checkpoint  # not an argument of fit, which tells callbacks when it is being loaded
    try:
        with logged_warnings():
            trainer.fit(module, datamodule=data, weights_only=True)
    except Preempted as stop:
        if trainer.is_global_zero:
            stopped = f"{stop} after step {trainer.global_step}; resume=auto goes on: {run_dir}"
            log.warning(stopped, extra=SHOWN)
            print(f"\n{stopped}", file=sys.stderr)
            if stop.requeue:
                requeue_slurm_job()
        sys.exit(128 + stop.number)
    if trainer.is_global_zero:
        ended = next_commands(cfg, run_dir, HydraConfig.get().overrides.task)
        log.info("ended after step %d%s", trainer.global_step, ended, extra=SHOWN)
        print(ended)
    return optimized_value(trainer.callback_metrics, cfg.optimized_metric)


def announce(cfg: DictConfig) -> None:
    """Say in the run's log what it is made of, and on the screen, where `print_config` does not forbid it."""
    tree = as_text(overview(cfg, HydraConfig.get().runtime.choices, HydraConfig.get().overrides.task))
    log.info("started as\n%s", tree, extra=SHOWN)
    if cfg.print_config:
        print(tree)


def optimized_value(metrics: Mapping[str, torch.Tensor], name: str | None) -> float | None:
    """The value of a metric; None for none, or where nothing was validated.

    Raises a `UserError` for one that is not logged.

    NaN, which a student has whose pictures are not finite, becomes infinity: the worst there is, where Optuna takes NaN
    for an error.
    """
    if name is None:
        return None
    validated = sorted(key for key in metrics if key.startswith("val/"))
    if validated and name not in metrics:
        raise UserError(f"optimized_metric={name}: not logged by this run; expected one of {', '.join(validated)}")
    if name not in metrics:
        return None
    value = metrics[name].item()
    return math.inf if math.isnan(value) else value


if __name__ == "__main__":
    main()
