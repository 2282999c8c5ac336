"""Evaluate: ``python evaluate.py run=outputs/...``, ``model=sd15 lora=...``, or any of them in ``models=[...]``."""

from __future__ import annotations

from pathlib import Path

from hydra import compose
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from lcm_lightning.config.checks import check_writable, interpolate, resolve
from lcm_lightning.config.entry import command

EVALUATE_KEYS: tuple[str, ...] = ("models", "run", "model", "lora", "lora_role", "student", "data", "evaluation")
EVALUATE_KEYS += ("logger", "seed", "accelerator", "devices", "dtype", "name", "run_dir")


@command("evaluate")
def main(cfg: DictConfig) -> None:
    """Compose the evaluation, run it on every device, say where its results are."""
    composed = cfg.copy()
    resolve(cfg, EVALUATE_KEYS)
    # Imported once the configuration is right, and what takes ten seconds once the models are there.
    from lcm_lightning.config.instantiate import instantiate_each, instantiate_group, make_fabric
    from lcm_lightning.config.model_choice import evaluation_data, find_models

    protocol = instantiate_group(cfg, "evaluation")
    sources = find_models(cfg)
    data = evaluation_data(cfg, sources)
    import torch
    from rich import print as rich_print

    from lcm_lightning.config.quiet import quiet_known_warnings
    from lcm_lightning.evaluation.dashboard import log_evaluation
    from lcm_lightning.evaluation.evaluation import evaluate_models
    from lcm_lightning.evaluation.reference import RealImages, fit_size
    from lcm_lightning.evaluation.report import console_tables, publish
    from lcm_lightning.runs.contents import weights_digest
    from lcm_lightning.sharing.model_card import renew_card
    from lcm_lightning.tracking.tracker import begun

    quiet_known_warnings()
    real = RealImages(data.name, data.source, protocol.split, protocol.num_images, data.resolution, data.cache_dir)
    # Before there are other processes that would wait for one that gave up.
    real, protocol = fit_size(real, protocol, usual_number())
    take_name(cfg, composed, protocol.name)
    fabric = make_fabric(cfg.accelerator, cfg.devices)
    threads = torch.get_num_threads()  # launching several processes shares the cores out between them
    fabric.launch()
    loggers = instantiate_each(cfg, "logger") if fabric.is_global_zero else []
    folder = Path(fabric.broadcast(cfg.run_dir))
    if fabric.is_global_zero:
        check_writable("run_dir", folder)
    run = Path(cfg.run).expanduser() if cfg.run is not None else None
    weights = weights_digest(run) if run and fabric.is_global_zero else None
    with begun(loggers):
        metrics = evaluate_models(
            sources,
            protocol=protocol,
            real=real,
            fabric=fabric,
            folder=folder,
            config=OmegaConf.to_yaml(cfg),
            threads=threads,
        )
    if fabric.is_global_zero:
        if run and folder.parent == run / "evaluation":
            publish(folder, folder.parent, weights)
            renew_card(run)
        runs = [Path(place).expanduser() for place in named_places(cfg)]
        for logger in loggers:
            logger.log_hyperparams(OmegaConf.to_container(cfg))
            log_evaluation(logger, metrics, folder, runs)
        for table in console_tables(metrics):
            rich_print(table)
        print(f"\nreport: {(folder / 'report.html').resolve()}")


def usual_number() -> int | None:
    """Real images of the chosen protocol as its file has them, whatever was typed; None for all of the split."""
    option = HydraConfig.get().runtime.choices["evaluation"]
    return compose(f"evaluation/{option}").evaluation.num_images


def take_name(cfg: DictConfig, composed: DictConfig, protocol: str) -> None:
    """Give the protocol its name, known with the number of images, and so what is called after it: folder, loggers.

    Args:
        cfg: resolved; changed in place.
        composed: the same before its interpolations were computed; changed in place.
    """
    composed.evaluation.name = protocol
    interpolate(composed, EVALUATE_KEYS)
    cfg.evaluation.name, cfg.run_dir, cfg.logger = protocol, composed.run_dir, composed.logger


def named_places(cfg: DictConfig) -> list[str]:
    """The run folders, and others, that `run`, `lora` and `models` name."""
    places = [cfg.run, *(cfg.lora if OmegaConf.is_list(cfg.lora) else [cfg.lora])]
    return [place for place in (*places, *(spec.partition(":")[2] for spec in cfg.models or ())) if place]


if __name__ == "__main__":
    main()
