"""Label maps, regions, masks, probabilities and logits: one function for each way between them (layer 2).

Two kinds of heads: K classes with background at index 0 (softmax), or K overlapping regions (sigmoid, no background).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import interpolate, one_hot

LOWEST_PROBABILITY = 1e-6  # log-odds of +-13.8: nnU-Net sums ten-fold weighted logits in float16 (NNUNET_FACTS 19)


@dataclass(frozen=True)
class Target:
    """The truth of a batch.

    Attributes:
        masks: (B, K, *spatial) of 0 and 1, float32; where nothing is known, all 0.
        known: (B, 1, *spatial) bool, False at voxels of the ignore label; None: all are known.
    """

    masks: Tensor
    known: Tensor | None = None


def read_target(target: Tensor, heads: int, regions: bool = False, ignore_label: int | None = None) -> Target:
    """Return the truth of a batch as nnU-Net's loader gives it.

    Args:
        target: (B, 1, *spatial) label map; with regions (B, K, *spatial) masks, or K + 1 with an ignore label, whose mask
            is the last.
        heads: K.
        regions: whether the heads are regions.
        ignore_label: of dataset.json, None without one.
    """
    known = None
    if regions:
        if ignore_label is not None:
            known = target[:, heads:] < 0.5 if target.dtype != torch.bool else ~target[:, heads:]
        masks = target[:, :heads].float()
    else:
        if ignore_label is not None:
            known = target != ignore_label
            target = torch.where(known, target, 0)
        masks = labels_to_masks(target, heads)
    return Target(masks, known) if known is None else Target(torch.where(known, masks, 0.0), known)


def labels_to_masks(labels: Tensor, num_classes: int) -> Tensor:
    """Return the mask of each class, 0 and 1 in float32.

    Args:
        labels: (B, 1, *spatial) class indices 0..num_classes-1, integer or integral float.
        num_classes: K.

    Returns:
        (B, K, *spatial).
    """
    return one_hot(labels[:, 0].long(), num_classes).movedim(-1, 1).float()


def hardened(probabilities: Tensor, regions: bool = False) -> Tensor:
    """Return the masks (B, K, *spatial) of the segmentation that probabilities give, 0 and 1."""
    if regions:
        return (probabilities > 0.5).to(probabilities)
    return labels_to_masks(probabilities.argmax(1, keepdim=True), probabilities.shape[1]).to(probabilities)


def foreground_to_probabilities(masks: Tensor) -> Tensor:
    """Return class probabilities (B, K, *spatial) of foreground masks (B, K - 1, *spatial); the rest is background."""
    masks = masks.float()
    return torch.cat((1 - masks.sum(1, keepdim=True).clamp(0, 1), masks), 1)


def check_labels(
    labels: Tensor, num_classes: int, cases: object, ignore_label: int | None = None, again: str = "nnUNetv2_preprocess"
) -> None:
    """Raise ValueError, naming the value and the cases, if a label is neither one of 0..num_classes-1 nor ignored.

    `again` is the command that preprocesses these data anew, for the text.
    """
    if ignore_label is not None:
        labels = torch.where(labels == ignore_label, 0, labels)
    low, high = labels.min().item(), labels.max().item()
    if low < 0 or high >= num_classes:
        raise ValueError(
            f"Label {low if low < 0 else high:g} in the training batch of cases {cases} is not in dataset.json (0 to "
            f"{num_classes - 1}). Correct the label map, then preprocess again: {again} (nnUNetv2_extract_fingerprint "
            "--verify_dataset_integrity finds all such cases)."
        )


def activate(logits: Tensor, regions: bool = False) -> Tensor:
    """Return probabilities of a network's logits (B, K, *spatial): softmax over K, or a sigmoid per region; float32."""
    return logits.float().sigmoid() if regions else logits.float().softmax(1)


def normalised(shares: Tensor, regions: bool = False) -> Tensor:
    """Return probabilities (B, K, *spatial) of what a state says of each channel: bounded, of classes with the sum 1 over K.

    A voxel where no class has a share gets equal probabilities; regions need not sum to anything. Works in place.
    """
    if regions:
        return shares.clamp_(0, 1)
    shares.clamp_(LOWEST_PROBABILITY, 1)
    return shares.div_(shares.sum(1, keepdim=True))


def probabilities_to_logits(probabilities: Tensor, regions: bool = False) -> Tensor:
    """Return bounded logits that `activate` turns into `probabilities` to within 1e-6; same shape.

    Of classes in [-13.9, 0], argmax is kept; of regions in [-13.9, 13.9].
    """
    if regions:
        return probabilities.logit(LOWEST_PROBABILITY)
    return probabilities.clamp(LOWEST_PROBABILITY, 1).log()


def foreground(heads: Tensor, regions: bool = False) -> Tensor:
    """Return the heads that are no background: (B, K - 1, ...) of classes, all K of regions."""
    return heads if regions else heads[:, 1:]


def presence(target: Target, regions: bool = False) -> tuple[Tensor, Tensor]:
    """Return whether each foreground class or region occurs in the patch (PGDiffSeg Eq. 7), and where that is known.

    Returns:
        Two tensors (B, K - 1 or K) of 0 and 1. What is not seen in a patch with ignored voxels may be there: unknown.
    """
    found = foreground(target.masks, regions).flatten(2).amax(2)
    if target.known is None:
        return found, torch.ones_like(found)
    complete = target.known.flatten(1).all(1, keepdim=True)
    return found, (found.bool() | complete).float()


def location(target: Target, size: torch.Size | tuple[int, ...], regions: bool = False) -> tuple[Tensor, Tensor]:
    """Return the share of each foreground class or region in the cells of a coarser grid (label of Eq. 8-9).

    Returns:
        Shares of the known voxels, (B, K - 1 or K, *size), and the share of voxels known, (B, 1, *size).
    """
    coarse = interpolate(foreground(target.masks, regions), size=list(size), mode="area")
    if target.known is None:
        return coarse, torch.ones_like(coarse[:, :1])
    known = interpolate(target.known.float(), size=list(size), mode="area")
    return coarse / known.clamp(min=LOWEST_PROBABILITY), known
