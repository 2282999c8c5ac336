#!/usr/bin/env bash
# diffusers 0.42.1: a scheduler that was saved and loaded has the same config as before, and makes another sampler of it.
#
# EulerDiscreteScheduler.from_config(pipe.scheduler.config) is how a pipeline gets another sampler. A config object remembers which of
# its values were not in the file that it came from but are its class's defaults, and from_config leaves those out, so that the new
# class uses its own. save_pretrained writes the defaults like all other values and forgets which they were. Stable Diffusion 1.5's
# file does not say timestep_spacing. From the stock pipeline the solvers therefore take theirs, "linspace", and begin at
# t=999; from that pipeline saved once, fine-tuned or not, they take PNDM's "leading", and the same line begins at t=751 in 4
# steps and at 951 in 20: pure noise under the number of a step at which the model expects to see something of the picture. Comparing
# the two configs shows nothing: all their values are equal. A fine-tuned model and the stock one that it came from are thus compared
# by different samplers, the more so the fewer the steps.
#
# Output seen (diffusers 0.42.1, torch 2.14.1, Python 3.11, Linux, 2026-11-28):
#   configs equal: True
#   EulerDiscreteScheduler, stock: linspace 999 666 333 0; saved: leading 751 501 251 1
#   DPMSolverMultistepScheduler, stock: linspace 999 749 500 250; saved: leading 801 601 401 201
#   UniPCMultistepScheduler, stock: linspace 999 749 500 250; saved: leading 801 601 401 201
#   DDIMScheduler, stock: leading 751 501 251 1; saved: leading 751 501 251 1
# What helps: name it, from_config(config, timestep_spacing="linspace"); or keep the original file beside what is saved.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check diffusers==0.42.1 torch==2.14.1

# what Stable Diffusion 1.5 comes with
mkdir "$folder/stock"
cat > "$folder/stock/scheduler_config.json" <<'JSON'
{"_class_name": "PNDMScheduler", "num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012,
 "beta_schedule": "scaled_linear", "skip_prk_steps": true, "set_alpha_to_one": false, "steps_offset": 1, "clip_sample": false}
JSON

cat > "$folder/swap.py" <<'PYTHON'
import diffusers

stock = diffusers.PNDMScheduler.from_pretrained("stock")
stock.save_pretrained("saved")
saved = diffusers.PNDMScheduler.from_pretrained("saved")

public = [{name: value for name, value in one.config.items() if not name.startswith("_")} for one in (stock, saved)]
print("configs equal:", public[0] == public[1])
for name in ("EulerDiscreteScheduler", "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "DDIMScheduler"):
    seen = []
    for what, old in ("stock", stock), ("saved", saved):
        new = getattr(diffusers, name).from_config(old.config)
        new.set_timesteps(4)
        seen.append(f"{what}: {new.config.timestep_spacing} {' '.join(f'{t:.0f}' for t in new.timesteps.tolist())}")
    print(f"{name}, {'; '.join(seen)}")
PYTHON

(cd "$folder" && venv/bin/python -W ignore swap.py 2> err.log) | tee "$folder/out"
diff - "$folder/out" <<'SEEN'
configs equal: True
EulerDiscreteScheduler, stock: linspace 999 666 333 0; saved: leading 751 501 251 1
DPMSolverMultistepScheduler, stock: linspace 999 749 500 250; saved: leading 801 601 401 201
UniPCMultistepScheduler, stock: linspace 999 749 500 250; saved: leading 801 601 401 201
DDIMScheduler, stock: leading 751 501 251 1; saved: leading 751 501 251 1
SEEN
