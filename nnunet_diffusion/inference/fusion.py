"""Fusion of several samples into one segmentation: mean, majority vote, STAPLE, largest expected Dice."""

from __future__ import annotations

import numpy as np
import SimpleITK as sitk
import torch
from torch import Tensor

from nnunet_diffusion.inference.decisions import largest_expected_dice, rankseg
from nnunet_diffusion.model import labels

FUSIONS = ("mean", "majority", "staple", "dice", "rankseg")
RANKSEG_PRESENCE = 0.5  # RankSEG's published code leaves out classes that are nowhere more probable
STAPLE_ITERATIONS = 50
MARGIN_VOXELS = 2


def needs_votes(fusion: str) -> bool:
    """Return whether a fusion needs each member's vote, and not only the mean."""
    return fusion not in ("mean", "rankseg")


def votes_of(logits: Tensor, regions: bool) -> Tensor:
    """Return a member's vote as integers: a label map (*volume), or masks of regions (K, *volume).

    Args:
        logits: (K, *volume).
        regions: whether the heads are regions.
    """
    if regions:
        return (logits > 0).to(torch.uint8)
    return logits.argmax(0).to(torch.uint8 if len(logits) <= 256 else torch.int16)


def fuse(votes: Tensor | None, mean: Tensor, fusion: str, regions: bool) -> Tensor:
    """Return probabilities (K, *volume) that give the fused segmentation.

    Args:
        votes: (N, *volume) label maps or (N, K, *volume) masks, from `votes_of`; None for "rankseg".
        mean: mean probabilities of the members (K, *volume); they break ties.
        fusion: "majority", "staple", "dice" or "rankseg".
        regions: whether the heads are regions.

    Raises:
        ValueError: the fusion is unknown.
    """
    if fusion == "rankseg":
        return _rankseg(mean, regions)
    assert votes is not None
    if fusion == "majority":
        return _majority(votes, mean, regions)
    if fusion == "staple":
        return _staple(votes, mean, regions)
    if fusion == "dice":
        return _expected_dice(votes, mean, regions)
    raise ValueError(f"fusion is {fusion!r}; known: {', '.join(FUSIONS)}")


def _masks(votes: Tensor, head: int, regions: bool) -> Tensor:
    return votes[:, head] if regions else (votes == head).to(torch.uint8)


def _majority(votes: Tensor, mean: Tensor, regions: bool) -> Tensor:
    # the mean probability counts as half a vote, so it only breaks ties
    counts = torch.stack([_masks(votes, head, regions).sum(0, dtype=torch.float32) for head in range(len(mean))])
    return (counts + mean / 2) / (len(votes) + 0.5)


def _staple(votes: Tensor, mean: Tensor, regions: bool) -> Tensor:
    result = torch.empty_like(mean)
    for head in range(0 if regions else 1, len(mean)):
        result[head] = staple(_masks(votes, head, regions), mean[head])
    if not regions:
        result[0] = (1 - result[1:].sum(0)).clamp(0, 1)
        result = result.clamp(min=labels.LOWEST_PROBABILITY)
        result /= result.sum(0, keepdim=True)
    return result


def _expected_dice(votes: Tensor, mean: Tensor, regions: bool) -> Tensor:
    chosen = torch.zeros_like(mean, dtype=torch.bool)
    for head in range(0 if regions else 1, len(mean)):
        chosen[head] = largest_expected_dice(_masks(votes, head, regions), mean[head])
    return _without_conflicts(chosen, mean, regions)


def _rankseg(mean: Tensor, regions: bool) -> Tensor:
    chosen = torch.zeros_like(mean, dtype=torch.bool)
    for head in range(0 if regions else 1, len(mean)):
        if mean[head].max() > RANKSEG_PRESENCE:
            chosen[head] = rankseg(mean[head])
    return _without_conflicts(chosen, mean, regions)


def _without_conflicts(chosen: Tensor, mean: Tensor, regions: bool) -> Tensor:
    """Return 0 and 1 (K, *volume) of masks that were chosen for each head alone.

    A voxel that several classes claim goes to the most probable of them, one that none claims to the background.
    """
    if regions:
        return chosen.to(mean)
    chosen[0] = ~chosen[1:].any(0)
    winner = torch.where(chosen, mean, -1).argmax(0, keepdim=True)
    return torch.zeros_like(mean).scatter_(0, winner, 1.0)


def absent(mean: Tensor, threshold: float, regions: bool) -> Tensor:
    """Return which classes or regions, (K,), have a largest probability below a threshold; never the background.

    Args:
        mean: mean probabilities of the members (K, *volume).
        threshold: `inference.presence_threshold`.
        regions: whether the heads are regions.
    """
    low = mean.flatten(1).amax(1) < threshold
    if not regions:
        low[0] = False
    return low


def leave_out(probabilities: Tensor, classes: Tensor) -> Tensor:
    """Return probabilities (K, *volume) in which the classes of a mask (K,) are 0 everywhere."""
    return torch.where(classes.view(-1, *[1] * (probabilities.ndim - 1)), 0, probabilities)


def staple(masks: Tensor, fallback: Tensor) -> Tensor:
    """Return STAPLE's foreground probability for several masks (Warfield et al. 2004, implemented by SimpleITK).

    Voxels on which all masks agree keep their value. The algorithm runs on the bounding box of the others, with a margin.

    Args:
        masks: (N, *volume) of 0 and 1.
        fallback: (*volume), used where the algorithm returns no finite value (if a mask is empty in the box).

    Returns:
        (*volume), float32, on the CPU.
    """
    masks = masks.cpu()
    share = masks.float().mean(0)
    disputed = (share > 0) & (share < 1)
    if not disputed.any():
        return share
    places = disputed.nonzero()
    low, high = places.amin(0).tolist(), places.amax(0).tolist()
    box = tuple(slice(max(0, a - MARGIN_VOXELS), b + 1 + MARGIN_VOXELS) for a, b in zip(low, high, strict=True))
    images = [sitk.GetImageFromArray(mask[box].numpy()) for mask in masks]
    algorithm = sitk.STAPLEImageFilter()
    algorithm.SetForegroundValue(1.0)
    algorithm.SetMaximumIterations(STAPLE_ITERATIONS)
    estimate = torch.from_numpy(sitk.GetArrayFromImage(algorithm.Execute(images)).astype(np.float32))
    estimate = torch.where(torch.isfinite(estimate), estimate, fallback.cpu()[box].float())
    share[box] = torch.where(disputed[box], estimate, share[box])
    return share
