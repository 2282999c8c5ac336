"""What LoRAs are for, and how a model is drawn from with them: said by the method that trains them."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, Literal, TypeAlias

from lcm_lightning.models.latent_diffusion import GUIDANCE_SCALE
from lcm_lightning.models.sampling import DDIM, Sampler

LORA_FILE = "pytorch_lora_weights.safetensors"  # what diffusers calls it
KOHYA_FILE = "kohya_lora_weights.safetensors"
TEACHER_FILE = "teacher_lora_weights.safetensors"  # of what a student was distilled from, beside its own

Role: TypeAlias = Literal["base", "finetuned", "student"]


@dataclass(frozen=True)
class AdapterKind:
    """The kind of an adapter. Its defaults are how a model is drawn from that was not distilled.

    Attributes:
        name: of the adapter in a model, and what users type: ``lora_role=lcm``, ``models=[lcm:FILE]``.
        result: name of its rows in metrics.json.
        title: of its rows and columns where people look.
        role: "student" for one that was distilled, and is held against its teacher.
        sampler, steps, guidance_scale: see `lcm_lightning.models.sampling.sample`; where nothing else is asked for.
        whole: its weights are a UNet's, which acts in the place of the model's own, and no LoRA's.
    """

    name: str
    result: str
    title: str
    role: Role
    sampler: Sampler = DDIM
    steps: int = 50
    guidance_scale: float = GUIDANCE_SCALE
    whole: bool = False

    def to_json(self) -> dict[str, Any]:
        """What `from_json` reads."""
        return {**asdict(self), "sampler": {**asdict(self.sampler), "settings": dict(self.sampler.settings)}}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> AdapterKind:
        """The kind that `to_json` wrote; keys of later versions are passed over.

        Names become parts of files' names, so they are held to letters, digits and signs that lead nowhere.

        Raises:
            KeyError, TypeError, ValueError: it lacks something, or holds what no method would say.
        """
        content = {"whole": False, **content}  # of former versions, which knew LoRAs only
        known = {field.name: content[field.name] for field in fields(cls)}
        sampler = {"min_steps": 1, "tells_guidance": False, **content["sampler"]}
        said = {field.name: sampler[field.name] for field in fields(Sampler)}
        for name in (known["name"], known["result"], said["name"], said["scheduler"]):
            if not re.fullmatch(r"[A-Za-z0-9_-]{1,40}", name):
                raise ValueError(f"{name!r} is no name")
        if not all(isinstance(title, str) and title.isprintable() for title in (known["title"], said["title"])):
            raise ValueError("a title is no text")
        if known["role"] not in ("finetuned", "student"):
            raise ValueError(f"role {known['role']!r}: expected finetuned or student")
        numbers = (known["steps"], said["min_steps"], 1000 if said["max_steps"] is None else said["max_steps"])
        if not all(type(number) is int and 1 <= number <= 1000 for number in numbers):
            raise ValueError("a number of steps is none from 1 to 1000")
        if not numbers[1] <= numbers[0] <= numbers[2]:
            raise ValueError("the sampler does not take the usual steps")
        known["guidance_scale"] = float(known["guidance_scale"])
        if not 0 <= known["guidance_scale"] < math.inf or not isinstance(said["settings"], dict):
            raise ValueError("guidance_scale or settings make no sense")
        if not isinstance(known["whole"], bool) or not isinstance(said["tells_guidance"], bool):
            raise ValueError("what is true or false is neither")
        return cls(**{**known, "sampler": Sampler(**said)})

    def label(self, steps: int) -> str:
        """Heading of what is drawn in so many steps."""
        return f"{self.title}, {steps} step{'s' * (steps > 1)}"


BASE = AdapterKind("", "base", "base", "base")


def usual_kind(adapters: Sequence[AdapterKind], guidance_scale: float) -> AdapterKind:
    """How a model with `adapters` is drawn from where nothing else is asked for: as its student, if it has one.

    Args:
        guidance_scale: that of the model without adapters (`LatentDiffusionModel.guidance_scale`).
    """
    students = [kind for kind in adapters if kind.role == "student"]
    return [replace(BASE, guidance_scale=guidance_scale), *adapters, *students][-1]
