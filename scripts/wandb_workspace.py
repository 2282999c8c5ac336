"""Make the workspace view that docs/wandb.md describes: ``python scripts/wandb_workspace.py ENTITY PROJECT``.

Needs `pip install wandb-workspaces` and a W&B key.
"""

from __future__ import annotations

import sys

import wandb_workspaces.reports.v2.interface as panels
import wandb_workspaces.workspaces as ws

STEP = "trainer/global_step"
# Section, what its panels plot. A list is one panel of several lines.
CURVES = {
    "Quality": [
        ["val/student_distance"],
        ["val/student_cmmd"],
        ["val/student_kid"],
        ["val/loss"],
    ],
    "Training": [["train/loss"], ["train/grad_norm"], ["lr-AdamW"], ["train/skipped_steps", "train/skipped_samples"]],
    "Speed": [["train/images_per_second"], ["train/data_wait_fraction"], ["train/peak_memory_gb"]],
}


def workspace(entity: str, project: str) -> ws.Workspace:
    """Samples first, then how good the student is, then how training goes; runs of a sweep under each other."""
    samples = ws.Section(
        "Samples",
        is_open=True,
        panels=[
            panels.MediaBrowser(media_keys=["samples/grid"], num_columns=1),
            panels.WeavePanelSummaryTable(table_name="samples/table"),
        ],
    )
    curves = [
        ws.Section(title, is_open=True, panels=[panels.LinePlot(x=STEP, y=keys) for keys in lines])
        for title, lines in CURVES.items()
    ]
    evaluation = ws.Section(
        "Evaluation",
        panels=[
            panels.WeavePanelSummaryTable(table_name="evaluation/table"),
            panels.MediaBrowser(media_keys=["evaluation/pictures"], num_columns=1),
        ],
    )
    return ws.Workspace(
        entity=entity, project=project, name="LCM distillation", sections=[samples, *curves, evaluation]
    )


if __name__ == "__main__":
    print(workspace(*sys.argv[1:3]).save().url)
