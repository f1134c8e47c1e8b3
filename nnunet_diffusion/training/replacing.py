"""A training in the folder of a finished one: said before it happens, and the finished network is kept.

nnU-Net writes over the files of an earlier training. Its --c prefers checkpoint_final, so a second training that is
interrupted would go on from the first one's.
"""

from __future__ import annotations

import os
from pathlib import Path

from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

FINAL, KEPT = "checkpoint_final.pth", "checkpoint_replaced.pth"


def what_happens_to_finished(trainer: nnUNetTrainer, resumed: bool) -> list[str]:
    """Return lines for the log if the output folder holds an earlier training of the same network.

    Args:
        trainer: before it trains.
        resumed: whether it goes on from a checkpoint.
    """
    folder = Path(trainer.output_folder)
    if resumed:
        if trainer.current_epoch < trainer.num_epochs:
            return []
        return [f"This training is finished ({folder / FINAL}): it is only validated again."]
    if (folder / FINAL).is_file():
        return [
            f"WARNING: {folder} holds a finished training, and this one starts anew (without --c). After its first epoch "
            f"{FINAL} is renamed to {KEPT}; all other files are replaced. Press Ctrl-C now to keep the finished one as it is."
        ]
    if (folder / "checkpoint_latest.pth").is_file():
        return [
            f"WARNING: {folder} holds an unfinished training, and this one starts anew (without --c). After its first epoch "
            "checkpoint_latest.pth is replaced. Press Ctrl-C now and add --c to go on from it instead."
        ]
    return []


def keep_finished(folder: Path) -> None:
    """Rename the final checkpoint of an earlier training, so that `--c` goes on from the one that runs."""
    if (folder / FINAL).is_file():
        os.replace(folder / FINAL, folder / KEPT)
