"""Pictures of what the model draws while it trains."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image
from torch import Tensor

from lcm_lightning.callbacks.experiment_tracking import trackers
from lcm_lightning.callbacks.shared_sampling import held_out_captions, sample_shared
from lcm_lightning.methods.adapter_training import Training
from lcm_lightning.models.sampling import SamplingSetup
from lcm_lightning.output.files import write_atomic
from lcm_lightning.output.pictures import labelled_grid, png_bytes, to_pil
from lcm_lightning.tracking.tracker import Sample

log = logging.getLogger(__name__)


class SampleGrid(L.Callback):
    """After each validation, draw the same prompts from the same seeds with teacher and student, side by side.

    A row a prompt, a column a `SamplingSetup` of the module. Columns that no trained adapter takes part in are drawn
    once. The ranks share the prompts. A grid that cannot be written (a full disk) is a warning. Trackers also get each
    picture with its prompt, seed, steps and seconds.

    Args:
        folder: gets `step_<n>.png`.
        resolution: side of the images, px; None for that of the training images.
        prompts: what to draw; the first held-out captions if None.
        num_prompts: how many of these.
        seed: row i starts from the noise of ``seed + i``.
        teacher_steps, guidance_scale: DDIM steps and guidance (diffusers' form) of base and teacher; None for the
            model's own guidance.
        student_steps: of a distilled student, each from 1 to 8.
        batch_size: images at a time.
    """

    def __init__(
        self,
        folder: str,
        resolution: int | None = None,
        *,
        prompts: Sequence[str] | None = None,
        num_prompts: int = 4,
        seed: int = 0,
        teacher_steps: int = 50,
        guidance_scale: float | None = None,
        student_steps: Sequence[int] = (1, 2, 4, 8),
        batch_size: int = 4,
    ) -> None:
        self.folder = Path(folder)
        self.resolution = resolution
        self.prompts = list(prompts) if prompts is not None else None
        self.num_prompts = num_prompts
        self.seed = seed
        self.teacher_steps = teacher_steps
        self.guidance_scale = guidance_scale
        self.student_steps = tuple(student_steps)
        self.batch_size = batch_size
        self._unchanging: dict[str, Tensor] = {}
        self._seconds: dict[str, float] = {}  # an image, by label

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Draw, save and log the grid."""
        assert isinstance(module, Training)
        if trainer.sanity_checking:
            return
        prompts = self._prompts(trainer)
        setups = module.sampling_setups(
            teacher_steps=self.teacher_steps, guidance_scale=self.guidance_scale, student_steps=self.student_steps
        )
        known = {*self._unchanging}
        columns = [self._column(trainer, module, setup, prompts) for setup in setups]
        if trainer.is_global_zero:
            grid = labelled_grid(columns, [setup.label for setup in setups], prompts)
            path = self.folder / f"step_{trainer.global_step:06d}.png"
            try:
                write_atomic(path, png_bytes(grid))
                self._log(trainer, grid)
                new = [n for n, setup in enumerate(setups) if setup.label not in known]
                samples = [sample for n in new for sample in self._samples(setups[n], prompts, columns[n])]
                for tracker in trackers(trainer):
                    tracker.log_samples(grid, samples, trainer.global_step)
            except OSError as error:
                log.warning("%s not written (%s)", path, error)

    def _prompts(self, trainer: L.Trainer) -> list[str]:
        if self.prompts is None:
            captions = held_out_captions(trainer.datamodule, self.num_prompts)  # type: ignore[attr-defined]
            # Ranks hold different validation samples; all must draw the first rank's.
            self.prompts = trainer.strategy.broadcast(captions)
        return self.prompts[: self.num_prompts]

    def _column(self, trainer: L.Trainer, module: Training, setup: SamplingSetup, prompts: list[str]) -> Tensor:
        """Images [N, 3, H, W] of one setup, complete on every rank."""
        if setup.label in self._unchanging:
            return self._unchanging[setup.label]
        started = time.perf_counter()
        images = sample_shared(
            module,
            setup,
            prompts,
            seed=self.seed,
            resolution=self.resolution or trainer.datamodule.resolution,  # type: ignore[attr-defined]
            batch_size=self.batch_size,
            preview=True,
        )
        mine = -(-len(prompts) // trainer.world_size)
        self._seconds[setup.label] = (time.perf_counter() - started) / mine
        if module.kind.name not in setup.adapters:
            self._unchanging[setup.label] = images
        return images

    def _samples(self, setup: SamplingSetup, prompts: Sequence[str], images: Tensor) -> list[Sample]:
        """The pictures of one column, for trackers."""
        drawn = (setup.label, setup.steps, setup.guidance_scale, self._seconds[setup.label])
        return [
            Sample(prompt, self.seed + n, *drawn, to_pil(image))
            for n, (prompt, image) in enumerate(zip(prompts, images, strict=True))
        ]

    @staticmethod
    def _log(trainer: L.Trainer, grid: Image.Image) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):
                pixels = torch.frombuffer(bytearray(grid.tobytes()), dtype=torch.uint8)
                pixels = pixels.reshape(grid.height, grid.width, 3)
                logger.experiment.add_image("samples", pixels, trainer.global_step, dataformats="HWC")
