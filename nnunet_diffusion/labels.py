"""Label maps, diffusion states, probabilities and logits: one function for each way between them (layer 2).

Regions (sigmoid heads) and the ignore label belong here too once they are supported; until then the trainer refuses
them by name, and every function below is about K classes with background at index 0.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import interpolate, one_hot

LOWEST_PROBABILITY = 1e-6  # log-odds of +-13.8: nnU-Net sums ten-fold weighted logits in float16 (NNUNET_FACTS 19)


def labels_to_state(labels: Tensor, num_classes: int) -> Tensor:
    """Return the clean state in {-1, +1}, float32.

    Args:
        labels: (B, 1, *spatial) class indices 0..num_classes-1, integer or integral float.
        num_classes: K.

    Returns:
        (B, K, *spatial).
    """
    hot = one_hot(labels[:, 0].long(), num_classes).movedim(-1, 1)
    return hot.float() * 2 - 1


def check_labels(labels: Tensor, num_classes: int, cases: object) -> None:
    """Raise ValueError, naming the value and the cases, if a label is not one of 0..num_classes-1."""
    low, high = labels.min().item(), labels.max().item()
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"Label {low if low < 0 else high:g} in the training batch of cases {cases} is not in dataset.json (0 to "
            f"{num_classes - 1}). Correct the label map, then preprocess again (nnUNetv2_plan_and_preprocess "
            "--verify_dataset_integrity finds such cases)."
        )


def probabilities_to_state(probabilities: Tensor) -> Tensor:
    """Return 2 p - 1, the diffusion state of class probabilities; same shape."""
    return probabilities * 2 - 1


def state_to_probabilities(state: Tensor) -> Tensor:
    """Return class probabilities of a clean state (B, K, *spatial): clamp((x + 1) / 2) normalised over K, float32 or better.

    A voxel where every class is at -1 gets equal probabilities.
    """
    positive = ((state + 1) / 2).clamp(LOWEST_PROBABILITY, 1)
    return positive / positive.sum(1, keepdim=True)


def probabilities_to_logits(probabilities: Tensor) -> Tensor:
    """Return bounded logits whose softmax is `probabilities` to within 1e-6; argmax is kept; same shape, in [-13.9, 0]."""
    return probabilities.clamp(LOWEST_PROBABILITY, 1).log()


def presence(state: Tensor) -> Tensor:
    """Return (B, K - 1): 1 where the foreground class occurs in the patch (PGDiffSeg Eq. 7, one entry per class)."""
    return (state[:, 1:].flatten(2).amax(2) > 0).float()


def location(state: Tensor, size: torch.Size | tuple[int, ...]) -> Tensor:
    """Return (B, K - 1, *size): the share of each foreground class in each cell of a coarser grid (Eq. 8-9's label)."""
    share = (state[:, 1:] + 1) / 2
    return interpolate(share, size=list(size), mode="area")
