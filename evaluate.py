"""Evaluate: ``python evaluate.py run=outputs/...`` or ``python evaluate.py model=sd15 lora=... data=flickr8k``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hydra
from lightning.pytorch.loggers import Logger, WandbLogger
from omegaconf import DictConfig, OmegaConf
from rich import print as rich_print

from lcm_lightning.configuration import check_writable
from lcm_lightning.errors import UserError, report_configuration_errors, report_user_errors
from lcm_lightning.evaluation.evaluation import evaluate_model
from lcm_lightning.evaluation.reference import RealImages
from lcm_lightning.evaluation.report import console_table
from lcm_lightning.evaluation.subject import load_subject
from lcm_lightning.resolvers import register_resolvers
from lcm_lightning.training import instantiate_each, instantiate_group, make_fabric, quiet_known_warnings, resolve

register_resolvers()

EVALUATE_KEYS = ("run", "model", "lora", "lora_role", "data", "evaluation", "logger", "seed", "accelerator", "devices")
EVALUATE_KEYS += ("dtype", "name", "run_dir")


@report_configuration_errors
@hydra.main(version_base="1.3", config_path="conf", config_name="evaluate")
@report_user_errors
def main(cfg: DictConfig) -> None:
    """Compose the evaluation, run it on every device, say where its results are."""
    quiet_known_warnings()
    resolve(cfg, EVALUATE_KEYS)
    protocol = instantiate_group(cfg, "evaluation")
    fabric = make_fabric(cfg.accelerator, cfg.devices)
    fabric.launch()
    subject = load_subject(cfg)
    subject.model.to(fabric.device)
    data = cfg.get("data") or subject.data
    if data is None:
        raise UserError("data: a model without a run needs a data set, such as data=flickr8k")
    resolution = data.resolution
    subject.model.check_resolution(resolution)
    loggers = instantiate_each(cfg, "logger") if fabric.is_global_zero else []
    folder = Path(fabric.broadcast(cfg.run_dir))  # the time in its name differs between processes
    if fabric.is_global_zero:
        check_writable("run_dir", folder)
    metrics = evaluate_model(
        subject.model,
        subject.adapters,
        identity=subject.identity,
        protocol=protocol,
        real=RealImages(data.name, data.source, protocol.split, protocol.num_images, resolution, data.get("cache_dir")),
        fabric=fabric,
        folder=folder,
        config=OmegaConf.to_yaml(cfg),
    )
    if fabric.is_global_zero:
        for logger in loggers:
            log_metrics(logger, metrics, folder)
        rich_print(console_table(metrics))
        print(f"\nreport: {(folder / 'report.html').resolve()}")


def log_metrics(logger: Logger, metrics: dict[str, Any], folder: Path) -> None:
    """Send figures, table and pictures to a dashboard."""
    for model in metrics["models"]:
        prefix = f"evaluation/{model['name']}_{model['steps']}"
        logger.log_metrics(
            {f"{prefix}/{key}": model[key]["value"] for key in ("fid", "kid", "clip_score")}
            | {f"{prefix}/seconds_per_image": model["seconds_per_image"]["median"]}
        )
    if isinstance(logger, WandbLogger):
        rows = [[m["label"], m["fid"]["value"], m["kid"]["value"], m["clip_score"]["value"]] for m in metrics["models"]]
        logger.log_table("evaluation/table", columns=["model", "FID", "KID", "CLIP score"], data=rows)
        logger.log_image("evaluation/pictures", [str(folder / "grid.png"), str(folder / "frontier.png")])
    logger.finalize("success")


if __name__ == "__main__":
    main()
