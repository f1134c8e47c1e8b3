"""A training in the folder of an earlier one: a warning is logged first, and a finished network is kept.

nnU-Net overwrites the files of an earlier training. Its --c prefers checkpoint_final, so if a second training were
interrupted, it would continue from the checkpoint of the first.
"""

from __future__ import annotations

import os
from pathlib import Path

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

FINAL, KEPT = "checkpoint_final.pth", "checkpoint_replaced.pth"


def what_happens_to_finished(trainer: nnUNetTrainer, resumed: bool) -> list[str]:
    """Return lines for the log if the output folder holds an earlier training of the same network.

    Args:
        trainer: trainer before its training.
        resumed: whether the training continues from a checkpoint.
    """
    folder = Path(trainer.output_folder)
    if resumed:
        if trainer.current_epoch < trainer.num_epochs:
            return []
        return [f"This training is finished ({folder / FINAL}): it is only validated again."]
    if (folder / FINAL).is_file():
        return [
            f"WARNING: {folder} holds a finished training, and this command starts a new one (no --c). After its first epoch "
            f"{FINAL} is renamed to {KEPT}, and all other files are replaced. Press Ctrl-C now to keep the finished training."
        ]
    if (folder / "checkpoint_latest.pth").is_file():
        return [
            f"WARNING: {folder} holds an unfinished training, and this command starts a new one (no --c). After its first "
            "epoch checkpoint_latest.pth is replaced. Press Ctrl-C now and add --c to continue the unfinished training."
        ]
    return []


def keep_finished(folder: Path) -> None:
    """Rename the final checkpoint of an earlier training, so that `--c` continues the current one."""
    if (folder / FINAL).is_file():
        os.replace(folder / FINAL, folder / KEPT)
