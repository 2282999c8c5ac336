"""Train: ``python train.py experiment=lcm_flickr30k``. Composes what `conf/` says and runs Lightning's Trainer."""

from __future__ import annotations

import sys
from pathlib import Path

import hydra
import lightning as L
from hydra.core.hydra_config import HydraConfig
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig

from lcm_lightning.callbacks.loggers import MetricsFile
from lcm_lightning.checkpoints import find_checkpoint, global_step
from lcm_lightning.configuration import resolve
from lcm_lightning.errors import report_configuration_errors, report_user_errors
from lcm_lightning.preemption import Preempted, requeue_slurm_job
from lcm_lightning.resolvers import register_resolvers
from lcm_lightning.training import (
    TRAIN_KEYS,
    SettingsRecord,
    build_module,
    check_settings,
    instantiate_each,
    instantiate_group,
    next_commands,
    quiet_known_warnings,
)

register_resolvers()


@report_configuration_errors
@hydra.main(version_base="1.3", config_path="conf", config_name="train")
@report_user_errors
def main(cfg: DictConfig) -> float | None:
    """Compose the run, train, and say where its results are; the last validation loss, for sweepers to minimise."""
    quiet_known_warnings()
    resolve(cfg, TRAIN_KEYS)
    run_dir = Path(cfg.run_dir)
    L.seed_everything(cfg.seed, workers=True, verbose=False)
    checkpoint = find_checkpoint(cfg.resume, run_dir)
    data = instantiate_group(cfg, "data")
    goes_on = checkpoint is not None and checkpoint.resolve().is_relative_to(run_dir.resolve())
    metrics = MetricsFile(run_dir, global_step(checkpoint) if goes_on else 0)
    loggers: list[Logger] = [metrics, *instantiate_each(cfg, "logger")]
    settings = SettingsRecord(cfg, HydraConfig.get().overrides.task, run_dir, loggers[1:])
    callbacks = [*instantiate_each(cfg, "callbacks"), settings]  # last: others may refuse to start
    trainer = instantiate_group(cfg, "trainer", logger=loggers, callbacks=callbacks)
    check_settings(cfg)
    data.prepare_data()
    module = build_module(cfg, trainer.precision, data.cache)
    trainer.ckpt_path = checkpoint  # not an argument of fit, which tells callbacks when it is being loaded
    try:
        trainer.fit(module, datamodule=data, weights_only=True)
    except Preempted as stop:
        if trainer.is_global_zero:
            print(f"\n{stop} after step {trainer.global_step}; resume=auto goes on: {run_dir}", file=sys.stderr)
            if stop.requeue:
                requeue_slurm_job()
        sys.exit(128 + stop.number)
    if trainer.is_global_zero:
        print(next_commands(cfg, run_dir))
    validation_loss = trainer.callback_metrics.get("val/loss")
    return None if validation_loss is None else validation_loss.item()


if __name__ == "__main__":
    main()
