"""Pack the student of a run into a model's folder, in half precision: what `student=true` draws with.

python scripts/pack_student.py --run outputs/quickstart/... --model lcm_lightning/assets/tiny
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

from lcm_lightning.config.model_choice import OWN_STUDENT
from lcm_lightning.errors import UserError
from lcm_lightning.models.lora_files import save_lora
from lcm_lightning.runs.contents import MANIFEST, OVERRIDES, read_manifest


def main() -> None:
    """Write `student/` into the model's folder, with the overrides of the run that made it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, required=True, help="folder of a distillation of the model itself")
    parser.add_argument("--model", type=Path, required=True, help="gets student/")
    arguments = parser.parse_args()
    adapters = read_manifest(arguments.run)
    if [adapter.kind.role for adapter in adapters] != ["student"]:
        raise UserError(
            f"run={arguments.run}: holds more than a student; give a distillation without method.teacher_lora"
        )
    folder = arguments.model / OWN_STUDENT
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "lora").mkdir(parents=True)
    (file,) = (adapter.file for adapter in adapters)
    weights = load_file(arguments.run / "lora" / file)
    save_lora({key: tensor.to(torch.float16) for key, tensor in weights.items()}, folder / "lora" / file)
    shutil.copyfile(arguments.run / "lora" / MANIFEST, folder / "lora" / MANIFEST)
    shutil.copyfile(arguments.run / OVERRIDES, folder / OVERRIDES)
    print(folder, f"{(folder / 'lora' / file).stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
