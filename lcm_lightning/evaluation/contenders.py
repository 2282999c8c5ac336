"""Who is compared: one model with different adapters, samplers and numbers of steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

from lcm_lightning.errors import UserError
from lcm_lightning.models.sampling import LCM_STEPS, Sampler, network_evaluations

Role: TypeAlias = Literal["base", "finetuned", "undistilled", "student"]
STUDENT = "lcm"


@dataclass(frozen=True)
class Contender:
    """One way of drawing every prompt.

    Attributes:
        name: of the model; with `steps` it is unique in an evaluation.
        role: what it stands for in the comparison.
        adapters: that act, by name; empty for the base model.
        sampler, steps, guidance_scale: see `lcm_lightning.models.sampling.sample`.
        teacher: slug of the contender it is measured against: the teacher at full length, itself for that one.
    """

    name: str
    role: Role
    adapters: tuple[str, ...]
    sampler: Sampler
    steps: int
    guidance_scale: float
    teacher: str = ""

    @property
    def label(self) -> str:
        """For headings."""
        title = {"base": "base", "finetuned": "fine-tuned", "undistilled": "undistilled", "student": "LCM-LoRA"}
        return f"{title[self.role]}, {self.steps} step{'s' * (self.steps > 1)}"

    @property
    def slug(self) -> str:
        """For file names."""
        return f"{self.name}_{self.steps}"

    @property
    def network_evaluations(self) -> int:
        """UNet passes per image."""
        return network_evaluations(self.steps, self.guidance_scale)


@dataclass(frozen=True)
class Lineup:
    """How each role is sampled.

    Attributes:
        teacher_steps: DDIM steps of base and fine-tuned model.
        guidance_scale: theirs, in diffusers' form; more than 1 takes two network evaluations a step.
        undistilled_steps: DDIM steps of the teacher where it is as hurried as a student.
        student_steps: of the distilled model, which takes no guidance.
    """

    teacher_steps: int = 50
    guidance_scale: float = 7.5
    undistilled_steps: int = 4
    student_steps: Sequence[int] = (1, 2, 4, 8)

    def __post_init__(self) -> None:
        for key in ("teacher_steps", "undistilled_steps"):
            if getattr(self, key) < 1:
                raise UserError(f"evaluation.lineup.{key}={getattr(self, key)}: expected at least 1")
        if any(not 1 <= steps <= LCM_STEPS for steps in self.student_steps):
            raise UserError(
                f"evaluation.lineup.student_steps={list(self.student_steps)}: expected numbers from 1 to {LCM_STEPS}"
            )

    def contenders(self, adapters: Sequence[str]) -> list[Contender]:
        """The comparison that a model with these adapters calls for; all but the distilled one make up the teacher."""
        teacher = tuple(name for name in adapters if name != STUDENT)
        reference = f"{'finetuned' if teacher else 'base'}_{self.teacher_steps}"
        guided = ("ddim", self.teacher_steps, self.guidance_scale, reference)
        lineup = [Contender("base", "base", (), *guided)]
        if teacher:
            lineup.append(Contender("finetuned", "finetuned", teacher, *guided))
        if STUDENT in adapters:
            hurried = ("ddim", self.undistilled_steps, self.guidance_scale, reference)
            lineup.append(Contender("undistilled", "undistilled", teacher, *hurried))
            student = (*teacher, STUDENT)
            distilled = [("lcm", steps, 1.0, reference) for steps in self.student_steps]
            lineup += [Contender("lcm_lora", "student", student, *how) for how in distilled]
        return lineup
