"""How good a student's pictures are while it trains, which its loss does not say."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import lightning as L
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from lcm_lightning.callbacks.shared_sampling import held_out_captions, sample_shared
from lcm_lightning.data.datamodule import CaptionedImages
from lcm_lightning.errors import UserError
from lcm_lightning.evaluation.contenders import Contender
from lcm_lightning.evaluation.drawing import Drawing, image_folder
from lcm_lightning.evaluation.features import Clip
from lcm_lightning.evaluation.metrics import Estimate
from lcm_lightning.evaluation.reference import RealImages
from lcm_lightning.evaluation.student import FIGURES, StudentMeasure, quality_curves
from lcm_lightning.methods.adapter_training import Training
from lcm_lightning.models.identity import adapter_digest, model_digest
from lcm_lightning.models.sampling import SamplingSetup, check_finite
from lcm_lightning.models.stable_diffusion import StableDiffusion
from lcm_lightning.output.files import write_atomic
from lcm_lightning.output.pictures import figure_bytes, to_bytes

log = logging.getLogger(__name__)

KEY = "callbacks.student_quality"


@dataclass(frozen=True)
class HeldOut:
    """Held-out captions, one a picture, and the photos they describe, uint8 [N, 3, R, R], where there are enough."""

    prompts: list[str]
    photos: Tensor | None


class StudentQuality(L.Callback):
    """After each validation, draw held-out prompts from fixed noise with the student, and measure the pictures.

    Logs, each with the bounds of its 95 % interval as `<name>_low` and `<name>_high`,

    - `val/student_distance`: to the teacher's pictures of the same prompts and noise (`PatchDistance`);
    - `val/student_cmmd`, `val/student_kid`: to the held-out photos that the prompts describe; to the teacher's pictures
      where these are fewer than `min_photos`. See `lcm_lightning.evaluation.student.StudentMeasure`.

    Photos, prompts and noise are the same at every validation, so chance in them shifts all figures of a run together,
    and its order of steps less. The teacher's pictures are drawn at the first validation and kept in `folder`, under a
    digest of all that they depend on. `folder` also gets `quality.png`. The ranks share the drawing; the first one
    measures. A student whose pictures are not finite has NaN for figures. Training draws the same random numbers as
    without.

    Args:
        folder: of what it writes.
        clip: local transformers folder or hub id of a CLIP.
        num_images: so many pictures of each; one a photo.
        steps: the student's; None for its method's usual number.
        seed: picture i starts from the noise of ``seed + i``.
        teacher_steps, guidance_scale: the teacher's DDIM steps and guidance (diffusers' form); None for the model's own
            guidance.
        batch_size: images at a time.
        min_photos: with fewer held-out photos, CMMD and KID are to the teacher's pictures.
        bootstrap_samples: ways to halve the pictures behind each interval; 0 for none.
    """

    def __init__(
        self,
        folder: str,
        clip: str,
        *,
        num_images: int = 64,
        steps: int | None = None,
        seed: int = 0,
        teacher_steps: int = 50,
        guidance_scale: float | None = None,
        batch_size: int = 8,
        min_photos: int = 32,
        bootstrap_samples: int = 100,
    ) -> None:
        self.folder = Path(folder)
        self.clip = clip
        self.num_images = num_images
        self.steps = steps
        self.seed = seed
        self.teacher_steps = teacher_steps
        self.guidance_scale = guidance_scale
        self.batch_size = batch_size
        self.min_photos = min_photos
        self.bootstrap_samples = bootstrap_samples
        self.history: dict[int, dict[str, list[float]]] = {}  # value, and bounds, of each figure by step
        self._found: dict[str, Estimate] = {}  # of the validation that is running
        self._weights = ""  # digest of the teacher's
        self._prompts: list[str] | None = None  # one a picture
        self._measure: StudentMeasure | None = None  # on the first rank

    # ---- what of it is state -------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The figures so far."""
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.history = state_dict["history"]

    # ---- before and after a validation ---------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, module: L.LightningModule, stage: str) -> None:
        """Refuse what cannot be measured; know the teacher by its weights, which some strategies shard after this."""
        if not isinstance(module, Training) or module.kind.role != "student":
            raise UserError(
                f"{KEY}: method {type(module).__name__} trains no student; take callbacks=default, or a distillation"
            )
        module.model.check_steps(self.teacher_steps, f"{KEY}.teacher_steps")
        if self.steps is not None and not module.kind.sampler.possible([self.steps]):
            sampler, most = module.kind.sampler, module.kind.sampler.max_steps
            raise UserError(
                f"{KEY}.steps={self.steps}: the sampler {sampler.title} takes from {sampler.min_steps} to {most}; "
                f"null is this student's usual number, {module.kind.steps}"
            )
        module.model.load_encoders()  # by all ranks: DistributedDataParallel expects the same networks of each
        if trainer.is_global_zero:
            model, names = cast(StableDiffusion, module.model), self._setups(module)[0].adapters
            self._weights = " ".join([model_digest(model), *(adapter_digest(model, name) for name in names)])

    def on_validation_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Draw, measure and log."""
        assert isinstance(module, Training)
        if trainer.sanity_checking:
            return
        if self._prompts is None:
            self._prompts = self._start(trainer, module)
        images = self._draw(trainer, module, self._setups(module)[1], self._prompts)
        found: dict[str, Estimate] = {}
        if self._measure is not None:
            finite = bool(torch.isfinite(images).all())
            unknown = Estimate(math.nan, math.nan, math.nan, len(images), math.nan)
            found = self._measure(to_bytes(images)) if finite else dict.fromkeys(FIGURES, unknown)
        self._found = trainer.strategy.broadcast(found)
        for name, figure in self._found.items():
            bounds = {"": figure.value, "_low": figure.low, "_high": figure.high}
            for end, value in bounds.items() if self.bootstrap_samples > 1 else [("", figure.value)]:
                module.log(f"val/student_{name}{end}", value, sync_dist=trainer.world_size > 1)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        """Keep the figures beside the validation loss, which is known by now, and plot them."""
        if trainer.sanity_checking:
            return
        row = {name: [figure.value, figure.low, figure.high] for name, figure in self._found.items()}
        if (loss := trainer.callback_metrics.get("val/loss")) is not None:
            row["loss"] = [loss.item()]
        self.history[trainer.global_step] = row
        if self._measure is not None:
            against = "the teacher's pictures" if not self._measure.teacher else "held-out photos"
            figure = quality_curves(self.history, self._measure.teacher, against)
            self._write(self.folder / "quality.png", figure_bytes(figure))

    # ---- what the student is held against ------------------------------------------------------------------------

    def _start(self, trainer: L.Trainer, module: Training) -> list[str]:
        """The prompts, on every rank; on the first one also what measures."""
        data = cast(CaptionedImages, trainer.datamodule)  # type: ignore[attr-defined]
        held_out = held_out_samples(data, self.num_images, self.min_photos) if trainer.is_global_zero else None
        prompts: list[str] = trainer.strategy.broadcast(held_out.prompts if held_out else [])
        teacher = self._teacher_pictures(trainer, module, prompts)
        if held_out is not None:
            self._measure = StudentMeasure(
                Clip(self.clip),
                teacher,
                held_out.photos,
                samples=self.bootstrap_samples,
                device=module.device,
                batch_size=self.batch_size,
            )
        return prompts

    def _teacher_pictures(self, trainer: L.Trainer, module: Training, prompts: list[str]) -> Tensor:
        """The teacher's pictures, uint8 [N, 3, H, W]: from the file of this teacher, these prompts and this noise."""
        setup = self._setups(module)[0]
        drawing = Drawing(prompts, self.seed, trainer.datamodule.resolution, self.batch_size)  # type: ignore[attr-defined]
        contender = Contender("teacher", "base", (), setup.sampler, setup.steps, setup.guidance_scale)
        place = (module.device.type, module.model.dtype)
        folder = image_folder(self.folder, contender, drawing, self._weights, *place)
        file = folder.with_name(f"teacher-{folder.name}.safetensors")
        kept = load_file(file)["images"] if trainer.is_global_zero and file.is_file() else None
        if trainer.strategy.broadcast(kept is not None):
            return kept if kept is not None else torch.empty(0)
        images = self._draw(trainer, module, setup, prompts)
        check_finite(setup.label, images)
        pictures = to_bytes(images)
        if trainer.is_global_zero:
            self._write(file, save({"images": pictures.contiguous()}))
        return pictures

    def _setups(self, module: Training) -> tuple[SamplingSetup, SamplingSetup]:
        """How teacher and student are drawn from."""
        steps = self.steps or module.kind.steps
        teacher, student = module.sampling_setups(
            teacher_steps=self.teacher_steps, guidance_scale=self.guidance_scale, student_steps=(steps,)
        )
        return teacher, student

    def _draw(self, trainer: L.Trainer, module: Training, setup: SamplingSetup, prompts: list[str]) -> Tensor:
        resolution: int = trainer.datamodule.resolution  # type: ignore[attr-defined]
        return sample_shared(module, setup, prompts, seed=self.seed, resolution=resolution, batch_size=self.batch_size)

    @staticmethod
    def _write(path: Path, content: bytes) -> None:
        try:
            write_atomic(path, content)
        except OSError as error:
            log.warning("%s not written (%s)", path, error)


def held_out_samples(data: CaptionedImages, count: int, min_photos: int) -> HeldOut:
    """At least `min_photos` and at most `count` held-out captions with the photos they describe.

    Where there are not so many, or none because only their latents are left, `count` captions without photos: those
    that there are, again and again.
    """
    real = RealImages(data.name, data.source, data.val_split, count, data.resolution, data.cache_dir)
    try:
        samples = list(real.samples())
    except UserError as error:
        log.info("no held-out photos: %s", error)
        samples = []
    if len(samples) >= min_photos:
        return HeldOut([s.captions[0] for s in samples], torch.stack([real.square(s) for s in samples]))
    most = max((len(sample.captions) for sample in samples), default=0)
    captions = [sample.captions[n] for n in range(most) for sample in samples if n < len(sample.captions)]
    captions = captions or held_out_captions(data, count)
    log.info(
        "CMMD and KID to the teacher's pictures: %d held-out photos, %s.min_photos=%d", len(samples), KEY, min_photos
    )
    return HeldOut([captions[i % len(captions)] for i in range(count)], None)
