"""Optimizer steps. Steps with gradients that are not finite are skipped, as by torch's GradScaler, and counted."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

MAXIMAL_NORM = 12.0  # norm to which gradients are clipped, as in nnU-Net
SKIPPED_IN_A_ROW = 20
"""Largest accepted number of consecutive skipped steps. While a GradScaler (float16) searches its scale it skips up to 16
steps: it starts at 2^16 and halves the scale each time."""


def take_step(
    loss: Tensor,
    parameters: Iterable[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None = None,
) -> bool:
    """Update the parameters if the norm of their gradients is finite, and return whether it was.

    In distributed training the gradients are the same on all ranks, so all ranks make the same decision.

    Args:
        loss: scalar loss.
        parameters: parameters of the network.
        optimizer: optimizer of these parameters; neither changes in a skipped step.
        scaler: gradient scaler for float16; it lowers its scale in a skipped step.
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
    """Counter of skipped steps: per epoch for the log, and consecutive ones to end a training that no longer learns."""

    def __init__(self) -> None:
        self._in_epoch = 0
        self._in_a_row = 0

    def note(self, taken: bool, epoch: int, cases: object) -> None:
        """Count a step.

        Args:
            taken: False if the step was skipped.
            epoch: number of the epoch, from 0.
            cases: cases of the batch, for the message.

        Raises:
            FloatingPointError: more than `SKIPPED_IN_A_ROW` consecutive steps were skipped. The message names the cases and
                the cure.
        """
        self._in_epoch += not taken
        self._in_a_row = 0 if taken else self._in_a_row + 1
        if self._in_a_row > SKIPPED_IN_A_ROW:
            raise FloatingPointError(
                f"The gradients of {self._in_a_row} training steps in a row were NaN or infinite (epoch {epoch}, last on cases "
                f"{cases}). These steps were skipped, and the finished epochs are saved: continue with --c. If it happens "
                "again, look for extreme intensities in these cases, or start a new training with a lower "
                "diffusion.training.learning_rate under another plans_name."
            )

    def told(self, steps: int) -> str | None:
        """Return a line for the log if steps were skipped in this epoch, else None, and reset the epoch's count.

        Args:
            steps: number of steps in the epoch.
        """
        skipped, self._in_epoch = self._in_epoch, 0
        if not skipped:
            return None
        return (
            f"{skipped} of {steps} training steps were skipped: their gradients were NaN or infinite (a few are normal in "
            "float16)"
        )
