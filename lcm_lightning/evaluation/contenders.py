"""Who is compared: models with different adapters, samplers and numbers of steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from lcm_lightning.errors import UserError
from lcm_lightning.models.sampling import LCM_STEPS, SAMPLERS, Sampler, network_evaluations

Role: TypeAlias = Literal["base", "finetuned", "undistilled", "student"]
STUDENT = "lcm"
TITLES: dict[Role, str] = {
    "base": "base",
    "finetuned": "fine-tuned",
    "undistilled": "undistilled",
    "student": "LCM-LoRA",
}
SOLVERS: dict[Sampler, str] = {"ddim": "DDIM", "dpmpp": "DPM-Solver++", "lcm": "LCM"}


@dataclass(frozen=True)
class Contender:
    """One way of drawing every prompt.

    Attributes:
        name: of what is drawn with; `slug` tells contenders of an evaluation apart.
        role: what it stands for in the comparison.
        adapters: that act, by name; empty for the base model.
        sampler, steps, guidance_scale: see `lcm_lightning.models.sampling.sample`.
        teacher: slug of the contender it is measured against: the teacher at full length, itself for that one.
        teachers: that slug in each of the compared models that has this contender: a base model is its own teacher
            alone, and below a fine-tuned one beside it.
        model: which of the compared models it belongs to, where its role alone does not say.
    """

    name: str
    role: Role
    adapters: tuple[str, ...]
    sampler: Sampler
    steps: int
    guidance_scale: float
    teacher: str = ""
    model: str = ""
    teachers: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """For headings."""
        title = " ".join(filter(None, (TITLES[self.role], self.model)))
        steps = f"{self.steps} step{'s' * (self.steps > 1)}"
        return f"{title}, {steps}" if self.sampler == "lcm" else f"{title}, {SOLVERS[self.sampler]} {steps}"

    @property
    def series(self) -> str:
        """What it shares with contenders that differ in steps only; the undistilled one is its teacher, hurried."""
        role: Role = ("finetuned" if self.adapters else "base") if self.role == "undistilled" else self.role
        title = " ".join(filter(None, (TITLES[role], self.model)))
        return title if self.sampler == "lcm" else f"{title}, {SOLVERS[self.sampler]}"

    @property
    def slug(self) -> str:
        """For file names and for naming it in results."""
        return slug(self.name, self.sampler, self.steps)

    @property
    def network_evaluations(self) -> int:
        """UNet passes per image."""
        return network_evaluations(self.steps, self.guidance_scale)


def slug(name: str, sampler: Sampler, steps: int) -> str:
    """`lcm_lora_4`, `base_ddim_50`: students have one sampler, teachers several."""
    return f"{name}_{steps}" if sampler == "lcm" else f"{name}_{sampler}_{steps}"


@dataclass(frozen=True)
class Lineup:
    """How each role is sampled.

    Attributes:
        teacher_steps: DDIM steps of base and fine-tuned model: the quality a student is to keep.
        guidance_scale: theirs, in diffusers' form; more than 1 takes two network evaluations a step.
        rivals: numbers of steps by sampler ("ddim", "dpmpp") at which the teacher competes with its students: what a
            fast solver reaches without any training.
        undistilled_steps: DDIM steps of the teacher where it is as hurried as a student.
        student_steps: of the distilled model, which takes no guidance.
    """

    teacher_steps: int = 50
    guidance_scale: float = 7.5
    rivals: Mapping[Sampler, Sequence[int]] = field(default_factory=dict)
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
        for sampler, numbers in self.rivals.items():
            if sampler not in SAMPLERS or sampler == "lcm":
                raise UserError(f"evaluation.lineup.rivals.{sampler}: no teacher's solver; there are ddim and dpmpp")
            if any(steps < 1 for steps in numbers):
                raise UserError(f"evaluation.lineup.rivals.{sampler}={list(numbers)}: expected numbers from 1")

    def contenders(self, adapters: Sequence[str]) -> list[Contender]:
        """The comparison that a model with these adapters calls for; all but the distilled one make up the teacher."""
        teacher = tuple(name for name in adapters if name != STUDENT)
        role: Role = "finetuned" if teacher else "base"
        reference = slug(role, "ddim", self.teacher_steps)

        def guided(role: Role, sampler: Sampler, steps: int) -> Contender:
            acting = () if role == "base" else teacher
            return Contender(role, role, acting, sampler, steps, self.guidance_scale, reference)

        lineup = [guided("base", "ddim", self.teacher_steps)]
        if teacher:
            lineup.append(guided("finetuned", "ddim", self.teacher_steps))
        rivals = [guided(role, sampler, steps) for sampler, numbers in self.rivals.items() for steps in numbers]
        lineup += [rival for rival in dict.fromkeys(rivals) if rival not in lineup]
        if STUDENT in adapters:
            lineup.append(guided("undistilled", "ddim", self.undistilled_steps))
            student = (*teacher, STUDENT)
            lineup += [
                Contender("lcm_lora", "student", student, "lcm", steps, 1.0, reference) for steps in self.student_steps
            ]
        return lineup
