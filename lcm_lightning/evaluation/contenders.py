"""Who is compared: models with different adapters, samplers and numbers of steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias, get_args

from lcm_lightning.errors import UserError
from lcm_lightning.models.kinds import BASE, AdapterKind
from lcm_lightning.models.sampling import DDIM, DPMPP, SOLVERS, Sampler

Role: TypeAlias = Literal["base", "finetuned", "undistilled", "student"]
ROLES: tuple[Role, ...] = get_args(Role)
MOST_STUDENT_STEPS = 50
# It starts at the last timestep, whatever the number of steps; DDIM's leading ones start in the midst of the noise.
UNDISTILLED = DPMPP


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
        title: for headings.
        model: which of the compared models it belongs to, where its role alone does not say.
        teacher_title: of the undistilled one: what it is called at full length.
    """

    name: str
    role: Role
    adapters: tuple[str, ...]
    sampler: Sampler
    steps: int
    guidance_scale: float
    teacher: str = ""
    title: str = ""
    model: str = ""
    teacher_title: str = ""
    teachers: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """For headings."""
        title = " ".join(filter(None, (self.title, self.model)))
        solver = "" if self.role == "student" else f"{self.sampler.title} "
        return f"{title}, {solver}{self.steps} step{'s' * (self.steps > 1)}"

    @property
    def series(self) -> str:
        """What it shares with contenders that differ in steps only; the undistilled one is its teacher, hurried."""
        title = " ".join(filter(None, (self.teacher_title or self.title, self.model)))
        return title if self.role == "student" else f"{title}, {self.sampler.title}"

    @property
    def slug(self) -> str:
        """For file names and for naming it in results."""
        return slug(self.name, self.steps, None if self.role == "student" else self.sampler)

    @property
    def network_evaluations(self) -> int:
        """UNet passes per image."""
        return self.steps * self.sampler.passes(self.guidance_scale)


def slug(name: str, steps: int, solver: Sampler | None) -> str:
    """`lcm_lora_4`, `base_ddim_50`: students have one sampler, teachers several."""
    return f"{name}_{steps}" if solver is None else f"{name}_{solver.name}_{steps}"


@dataclass(frozen=True)
class Lineup:
    """How each role is sampled.

    Attributes:
        teacher_steps: DDIM steps of base and fine-tuned model: the quality a student is to keep.
        guidance_scale: theirs, in diffusers' form; more than 1 takes two network evaluations a step. None for the
            model's own.
        rivals: numbers of steps by sampler ("ddim", "dpmpp") at which the teacher competes with its students: what a
            fast solver reaches without any training.
        undistilled_steps: of the teacher where it is as hurried as a student, by `UNDISTILLED`.
        student_steps: of the distilled model, by its method's own sampler and guidance.
    """

    teacher_steps: int = 50
    guidance_scale: float | None = None
    rivals: Mapping[str, Sequence[int]] = field(default_factory=dict)
    undistilled_steps: Sequence[int] = (4, 2, 1)
    student_steps: Sequence[int] = (8, 4, 2, 1)

    def __post_init__(self) -> None:
        if self.teacher_steps < 1:
            raise UserError(f"evaluation.lineup.teacher_steps={self.teacher_steps}: expected at least 1")
        for key in ("undistilled_steps", "student_steps"):
            asked = list(getattr(self, key))
            if any(not 1 <= steps <= MOST_STUDENT_STEPS for steps in asked):
                raise UserError(f"evaluation.lineup.{key}={asked}: expected numbers from 1 to {MOST_STUDENT_STEPS}")
        for sampler, numbers in self.rivals.items():
            if sampler not in SOLVERS:
                raise UserError(
                    f"evaluation.lineup.rivals.{sampler}: no teacher's solver; there are {' and '.join(SOLVERS)}"
                )
            if any(steps < 1 for steps in numbers):
                raise UserError(f"evaluation.lineup.rivals.{sampler}={list(numbers)}: expected numbers from 1")

    def contenders(
        self, adapters: Sequence[AdapterKind], *, own_guidance: float = BASE.guidance_scale, taught: bool = True
    ) -> list[Contender]:
        """The comparison that a model with these adapters calls for; all but the distilled ones make up the teacher.

        Args:
            own_guidance: the model's (`LatentDiffusionModel.guidance_scale`).
            taught: the teacher is there too; not with the model alone that a teacher was distilled into.
        """
        tuned = [kind for kind in adapters if kind.role != "student"]
        teacher, acting = (tuned[-1] if tuned else BASE), tuple(kind.name for kind in tuned)
        reference = slug(teacher.result, self.teacher_steps, DDIM)
        guidance_scale = own_guidance if self.guidance_scale is None else self.guidance_scale

        def guided(kind: AdapterKind, sampler: Sampler, steps: int) -> Contender:
            own = () if kind is BASE else acting
            settings = (own, sampler, steps, guidance_scale, reference)
            return Contender(kind.result, kind.role, *settings, title=kind.title)

        def student(kind: AdapterKind, steps: int) -> Contender:
            compared = reference if taught else slug(kind.result, steps, None)
            settings = ((*acting, kind.name), kind.sampler, steps, kind.guidance_scale, compared)
            return Contender(kind.result, "student", *settings, title=kind.title)

        students = [kind for kind in adapters if kind.role == "student"]
        # One that takes none of these numbers of steps is drawn in its own.
        steps_of = {kind: kind.sampler.possible(self.student_steps) or [kind.steps] for kind in students}
        tried = [student(kind, steps) for kind, numbers in steps_of.items() for steps in numbers]
        if not taught:
            return tried
        lineup = [guided(BASE, DDIM, self.teacher_steps)]
        if tuned:
            lineup.append(guided(teacher, DDIM, self.teacher_steps))
        rivals = [guided(teacher, SOLVERS[name], steps) for name, numbers in self.rivals.items() for steps in numbers]
        lineup += [rival for rival in dict.fromkeys(rivals) if rival not in lineup]
        if students:
            for steps in dict.fromkeys(self.undistilled_steps):
                hurried = replace(guided(teacher, UNDISTILLED, steps), name="undistilled", role="undistilled")
                lineup.append(replace(hurried, title="undistilled", teacher_title=teacher.title))
        return lineup + tried
