"""Optimizer steps; those whose gradients are not finite are skipped, as torch's GradScaler does, and counted."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

MAXIMAL_NORM = 12.0  # of the gradients, as in nnU-Net
SKIPPED_IN_A_ROW = 20
"""More skipped steps in a row end the training. A GradScaler (float16) that looks for its scale skips up to 16: it begins at
2^16 and halves it each time."""


def take_step(
    loss: Tensor,
    parameters: Iterable[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None = None,
) -> bool:
    """Update the parameters if the norm of their gradients is finite; return whether it was.

    The gradients of distributed training are the same on all ranks, so all ranks take the same decision.

    Args:
        loss: scalar.
        parameters: of the network.
        optimizer: of these parameters; neither changes in a skipped step.
        scaler: of float16; it lowers its scale in a skipped step.
    """
    (loss if scaler is None else scaler.scale(loss)).backward()
    if scaler is not None:
        scaler.unscale_(optimizer)
    finite = bool(torch.isfinite(torch.nn.utils.clip_grad_norm_(parameters, MAXIMAL_NORM)))
    if scaler is None:
        if finite:
            optimizer.step()
        return finite
    if finite:
        scaler.step(optimizer)
    scaler.update()
    return finite


class SkippedSteps:
    """Counts skipped steps: of an epoch, for the log, and in a row, to end a training that learns nothing any more."""

    def __init__(self) -> None:
        self._in_epoch = 0
        self._in_a_row = 0

    def note(self, taken: bool, epoch: int, cases: object) -> None:
        """Count a step.

        Args:
            taken: whether it was not skipped.
            epoch: from 0.
            cases: of its batch, for the message.

        Raises:
            FloatingPointError: more than `SKIPPED_IN_A_ROW` were skipped in a row; names the cases and the cure.
        """
        self._in_epoch += not taken
        self._in_a_row = 0 if taken else self._in_a_row + 1
        if self._in_a_row > SKIPPED_IN_A_ROW:
            raise FloatingPointError(
                f"The gradients of {self._in_a_row} training steps in a row were NaN or infinite (epoch {epoch}, last on cases "
                f"{cases}). These steps were skipped, and the finished epochs are saved: continue with --c. If it happens "
                "again, look for extreme intensities in these cases, or lower diffusion.training.learning_rate under another "
                "plans_name and train anew."
            )

    def told(self, steps: int) -> str | None:
        """Return a line for the log if steps of the epoch that ends were skipped, and begin the next one.

        Args:
            steps: of the epoch.
        """
        skipped, self._in_epoch = self._in_epoch, 0
        if not skipped:
            return None
        return (
            f"{skipped} of {steps} training steps were skipped: their gradients were NaN or infinite (a few are normal in "
            "float16)"
        )
