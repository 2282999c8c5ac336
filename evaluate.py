"""Evaluate: ``python evaluate.py run=outputs/...``, ``model=sd15 lora=...``, or any of them in ``models=[...]``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import hydra
from lightning.pytorch.loggers import Logger, WandbLogger
from omegaconf import DictConfig, OmegaConf
from rich import print as rich_print

from lcm_lightning.configuration import check_writable
from lcm_lightning.errors import report_configuration_errors, report_user_errors
from lcm_lightning.evaluation.evaluation import evaluate_models
from lcm_lightning.evaluation.reference import RealImages
from lcm_lightning.evaluation.report import console_table
from lcm_lightning.evaluation.subject import evaluation_data, find_subjects
from lcm_lightning.resolvers import register_resolvers
from lcm_lightning.training import instantiate_each, instantiate_group, make_fabric, quiet_known_warnings, resolve

register_resolvers()

EVALUATE_KEYS = ("models", "run", "model", "lora", "lora_role", "data", "evaluation", "logger", "seed")
EVALUATE_KEYS += ("accelerator", "devices", "dtype", "name", "run_dir")


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
    sources = find_subjects(cfg)
    data = evaluation_data(cfg, sources)
    loggers = instantiate_each(cfg, "logger") if fabric.is_global_zero else []
    folder = Path(fabric.broadcast(cfg.run_dir))
    if fabric.is_global_zero:
        check_writable("run_dir", folder)
    metrics = evaluate_models(
        sources,
        protocol=protocol,
        real=RealImages(
            data.name, data.source, protocol.split, protocol.num_images, data.resolution, data.get("cache_dir")
        ),
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
