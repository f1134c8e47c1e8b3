"""Decisions: the mask of one class that has the largest expected Dice, which need not be where it is probable.

A voxel of probability 0.4 may belong into the mask of a small lesion, and none at all into that of an unlikely one.
"""

from __future__ import annotations

import torch
from torch import Tensor


def largest_expected_dice(masks: Tensor, mean: Tensor) -> Tensor:
    """Return the mask A with the largest mean Dice against joint samples S_k of the truth.

    Candidates are the empty mask and, for each n, the n voxels that most samples contain. Among these the result is exact;
    other masks may be slightly better, unless the samples are nested. Of equally good candidates it is the smallest.

    Args:
        masks: N samples (N, *volume), uint8, 0 and 1.
        mean: (*volume), mean probability of the class, 0..1; of voxels in equally many samples the more probable comes first.

    Returns:
        (*volume), bool. Empty if all samples are: Dice(empty, empty) = 1, so the value of the empty mask is the share of
        empty samples.
    """
    samples = masks.flatten(1)
    counts = torch.zeros_like(samples[0], dtype=torch.int32)
    for sample in samples:
        counts += sample
    # a voxel in no sample can only lower the Dice
    places = counts.nonzero()[:, 0]
    # the mean counts as half a vote, so it only breaks ties
    votes = counts[places] + mean.flatten()[places].double() / 2
    places = places[votes.argsort(descending=True, stable=True)]
    sizes = torch.arange(1, len(places) + 1, device=places.device)
    value = torch.zeros(len(places) + 1, dtype=torch.float64, device=places.device)
    for sample in samples:
        inside = sample[places].cumsum(0, dtype=torch.int64)
        if not len(inside) or not inside[-1]:
            value[0] += 1
            continue
        # Dice(A, S_k) = 2 |A and S_k| / (|A| + |S_k|)
        value[1:] += 2 * inside.double() / (sizes + inside[-1])
    return _first(places, int(value.argmax()), mean)


def rankseg(probability: Tensor) -> Tensor:
    """Return RankSEG's mask of large expected Dice for voxels that are independent of each other.

    The value of the empty mask is 0, so it is chosen only if all probabilities are 0: of a class that is unlikely
    everywhere the mask has many voxels. Ask first whether the class is there.

    Args:
        probability: (*volume), of the class, 0..1.

    Returns:
        (*volume), bool: the tau most probable voxels.

    Source: Dai and Li, RankSEG (2023): the blind approximation, with the sum of the other voxels at its mean.
    """
    flat = probability.flatten()
    total, certain = flat.sum(dtype=torch.float64), flat[flat > 0.5]
    # a further voxel raises the value only if its p exceeds half of it, and these voxels reach this value already
    reached = 2 * certain.sum(dtype=torch.float64) / (total + len(certain) + 1)
    places = (flat > reached / 2).nonzero()[:, 0]
    ordered, order = flat[places].double().sort(descending=True, stable=True)
    # value(tau) = 2 sum_{i <= tau} p_i / (sum_i p_i + tau + 1), and value(0) = 0
    sizes = torch.arange(len(places) + 1, device=places.device)
    value = 2 * torch.cat((ordered.new_zeros(1), ordered.cumsum(0))) / (total + sizes + 1)
    return _first(places[order], int(value.argmax()), probability)


def _first(places: Tensor, number: int, like: Tensor) -> Tensor:
    """Return a mask of the shape of `like` that has the first so many of the places."""
    mask = torch.zeros(like.numel(), dtype=torch.bool, device=like.device)
    mask[places[:number]] = True
    return mask.view(like.shape)
