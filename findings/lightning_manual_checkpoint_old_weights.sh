#!/usr/bin/env bash
# lightning 2.6.6: ModelCheckpoint's own advice for manual optimisation puts the last epoch's weights into this epoch's checkpoints.
#
# With automatic_optimization = False and every_n_train_steps, ModelCheckpoint warns that its files hold the weights after the
# optimiser's step, and says what to write into training_step to have those before it: keep a copy of self.layer's state in
# self.saved_models[batch_idx]. The callback looks for attributes of just these two names and, if they are there, puts the entry
# with the highest key into self.layer while it saves. Keys are numbers of batches, which begin at 0 again in each epoch, and
# nothing removes the high ones; what the docstring adds to save memory deletes those ten batches back. From the second epoch on
# the highest is the end of the epoch before. Every checkpoint but an epoch's last then holds old weights, beside the current
# optimiser and step, without a word; a run that is resumed from it goes on from weights up to an epoch old. During the first
# epoch, where one would check it, the advice is right. And a module that has the two names for reasons of its own gets the same
# unasked.
#
# Output seen (lightning 2.6.6, torch 2.14.1, Python 3.11, Linux, 2026-11-28), a weight that grows by 1 a step, epochs of 4 batches:
#   checkpoint of step: 1 2 3 4 | 5 6 7 8 | 9 10 11 12
#   weight before it: 0 1 2 3 | 4 5 6 7 | 8 9 10 11
#   weight in the file: 0 1 2 3 | 3 3 3 7 | 7 7 7 11
# What helps: no attribute called saved_models; or clear it at the start of an epoch.
set -euo pipefail

folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check lightning==2.6.6 torch==2.14.1

cat > "$folder/train.py" <<'PYTHON'
import logging
import tempfile

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.automatic_optimization = False
        self.layer = torch.nn.Linear(1, 1, bias=False)
        torch.nn.init.zeros_(self.layer.weight)
        self.saved_models = {}
        self.before = []

    def training_step(self, batch, batch_idx):
        self.before.append(self.layer.weight.item())
        self.saved_models[batch_idx] = {name: value.detach().clone() for name, value in self.layer.state_dict().items()}
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(-self.layer(batch[0]).mean())
        optimizer.step()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 1.0)


def show(what, values):
    epochs = [" ".join(f"{value:g}" for value in values[start : start + 4]) for start in range(0, 12, 4)]
    print(f"{what}: {' | '.join(epochs)}")


data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(4, 1)), batch_size=1)
with tempfile.TemporaryDirectory() as folder:
    checkpoint = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=1)
    trainer = lightning.Trainer(max_epochs=3, accelerator="cpu", logger=False, callbacks=[checkpoint],
                                enable_progress_bar=False, enable_model_summary=False)
    module = Module()
    trainer.fit(module, data)
    files = [torch.load(f"{folder}/step={step}.ckpt", weights_only=False) for step in range(1, 13)]
show("checkpoint of step", [file["global_step"] for file in files])
show("weight before it", module.before)
show("weight in the file", [file["state_dict"]["layer.weight"].item() for file in files])
PYTHON

(cd "$folder" && venv/bin/python -W ignore train.py 2> err.log) | tee "$folder/out"
diff - "$folder/out" <<'SEEN'
checkpoint of step: 1 2 3 4 | 5 6 7 8 | 9 10 11 12
weight before it: 0 1 2 3 | 4 5 6 7 | 8 9 10 11
weight in the file: 0 1 2 3 | 3 3 3 7 | 7 7 7 11
SEEN
