"""Uncertainty of a prediction from the members of its ensemble: maps, and volumes and agreement of the samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from nnunet_diffusion.inference.level_sets import COVERAGE, bounds, level_sets
from nnunet_diffusion.model.drawing import LEVEL
from nnunet_diffusion.model.settings import DiffusionSettings

AGREEMENT = "agreement"
MAPS = ("entropy", "aleatoric", "epistemic", "variance", AGREEMENT)
DEFAULT_SAMPLES = 5  # where neither the user nor the plans ask for several
START_FACTORS = (1, 3, 6)  # T' of the samples in turn, in units of the model's
INTERVAL = round(100 * COVERAGE)  # percent
SAMPLES_FOR_INTERVAL = 20  # with fewer its ends would be the extremes
VOXELS_AT_ONCE = 2**20  # counts of voxels in float32 are exact below 2**24


def default_sampling(settings: DiffusionSettings) -> tuple[dict[str, Any], tuple[int, ...]]:
    """Return the settings and start steps with which samples differ; nothing where the plans ask for several samples.

    Chosen by documentation/experiments/uncertainty.md.

    Args:
        settings: of the plans.
    """
    if settings.samples > 1:
        return {}, ()
    if settings.is_hidiff:
        return {"samples": DEFAULT_SAMPLES, "draw": LEVEL, "steps": max(2, settings.steps)}, ()
    starts = sorted({min(factor * settings.start_step, settings.max_train_step) for factor in START_FACTORS})
    if settings.from_noise or len(starts) == 1:
        return {"samples": DEFAULT_SAMPLES}, ()
    # two of each
    return {"samples": 2 * len(starts), "start_step": starts[-1]}, tuple(starts)


@dataclass(frozen=True, eq=False)
class CaseUncertainty:
    """Uncertainty on the network's grid.

    Attributes:
        maps: each name of `MAPS` -> (*volume), float32.
        shared: (K, N, N), number of voxels that two of the N samples both give to a head; each sample's own on the diagonal.
        members: number of members of the ensemble.
        level_sets: voxels of the level sets of the mean, (K, 2, candidates), see `level_sets`.
    """

    maps: dict[str, Tensor]
    shared: NDArray[np.int64]
    members: int
    level_sets: NDArray[np.int64]


@dataclass
class Uncertainty:
    """Running sums over the members of an ensemble, on the CPU; of each sample only its label map is kept.

    Args:
        regions: whether the heads are regions, each a Bernoulli variable.

    Sources: Depeweg et al., Decomposition of Uncertainty in Bayesian Deep Learning (2018), for entropy = aleatoric +
    epistemic; Gal, Uncertainty in Deep Learning (2016), for the mutual information; Kendall & Gal (2017) for the names.
    """

    regions: bool
    weight: float = 0.0
    members: int = 0
    entropies: Tensor | None = None
    squares: Tensor | None = None
    votes: Tensor | None = None
    samples: list[Tensor] = field(default_factory=list)

    def add(self, probabilities: Tensor, labels: Tensor, weight: float, name: str = "") -> None:
        """Add one member.

        Args:
            probabilities: (K, *volume).
            labels: its segmentation, as `votes_of` returns it, on the CPU.
            weight: of the member, above 0.
            name: of a sample; empty for another member.
        """
        if self.entropies is None or self.squares is None or self.votes is None:
            self.entropies, self.squares = torch.zeros(2, *probabilities.shape[1:])
            self.votes = torch.zeros(probabilities.shape)
        self.weight += weight
        self.members += 1
        self.entropies.add_(entropy(probabilities, self.regions).cpu(), alpha=weight)
        self.squares.add_(_sum_of_squares(probabilities).cpu(), alpha=weight)
        for head, votes in enumerate(self.votes):
            votes.add_(_mask(labels, head, self.regions), alpha=weight)
        if name:
            self.samples.append(labels)

    def result(self, mean: Tensor, inside: tuple[slice, ...]) -> CaseUncertainty:
        """Return maps and counts of the volume.

        Args:
            mean: weighted mean of all members (K, *volume), on the CPU, without padding.
            inside: slices of the volume without padding.
        """
        assert self.entropies is not None and self.squares is not None and self.votes is not None
        # H(mean p) = mean H(p) + mutual information
        whole, aleatoric = entropy(mean, self.regions), self.entropies[inside] / self.weight
        variance = self.squares[inside] / self.weight - _sum_of_squares(mean)
        each_head = (slice(None), *inside)
        shares = self.votes[each_head] / self.weight
        agreement = torch.maximum(shares, 1 - shares).mean(0) if self.regions else shares.amax(0)
        # rounding leaves small negative numbers, and shares above 1
        found = (whole, aleatoric, (whole - aleatoric).clamp(min=0), variance.clamp(min=0), agreement.clamp(max=1))
        maps = {name: values.contiguous() for name, values in zip(MAPS, found, strict=True)}
        kept = [labels[each_head if self.regions else inside] for labels in self.samples]
        return CaseUncertainty(maps, shared_voxels(kept, len(mean), self.regions), self.members, level_sets(mean))


def entropy(probabilities: Tensor, regions: bool = False) -> Tensor:
    """Return the entropy (*volume), in nats, of (K, *volume): of the classes, or the sum of those of all regions."""
    total = torch.zeros_like(probabilities[0])
    for head in probabilities:  # one at a time, because a volume of K channels is large
        head = head.clamp(0, 1)
        total += torch.special.entr(head)
        if regions:
            total += torch.special.entr(1 - head)
    return total


def _sum_of_squares(probabilities: Tensor) -> Tensor:
    total = torch.zeros_like(probabilities[0])
    for head in probabilities:
        total += head.square()
    return total


def _mask(labels: Tensor, head: int, regions: bool) -> Tensor:
    return labels[head] if regions else labels == head


def shared_voxels(samples: Sequence[Tensor], heads: int, regions: bool) -> NDArray[np.int64]:
    """Return the number of voxels (K, N, N) that two of N samples both give to a head.

    Args:
        samples: label map (*volume) or masks (K, *volume) of each sample, as `votes_of` returns them.
        heads: K.
        regions: whether the heads are regions.
    """
    shared = torch.zeros(heads, len(samples), len(samples), dtype=torch.int64)
    for head in range(heads if samples else 0):
        masks = [_mask(each, head, regions).flatten().split(VOXELS_AT_ONCE) for each in samples]
        for parts in zip(*masks, strict=True):
            chunk = torch.stack(parts).float()
            shared[head] += (chunk @ chunk.T).long()
    return shared.numpy()


def pairwise_dice(shared: ArrayLike) -> float:
    """Return the mean Dice coefficient of all pairs of samples.

    Args:
        shared: voxels (N, N) that two samples share, see `shared_voxels`.

    Returns:
        0..1, two empty samples agree (1); NaN for fewer than two samples.

    Source: Roy et al., Bayesian QuickNAT (2019).
    """
    both = np.asarray(shared, dtype=float)
    if len(both) < 2:
        return float("nan")
    one, other = np.triu_indices(len(both), 1)
    total = both.diagonal()[one] + both.diagonal()[other]
    # Dice = 2 |A and B| / (|A| + |B|)
    return float(np.where(total > 0, 2 * both[one, other] / np.maximum(total, 1), 1).mean())


def interval(values: ArrayLike) -> dict[str, Any]:
    """Return mean and interval of the samples' values: the middle 90 % of 20 samples or more, else their range.

    Args:
        values: one of each sample, at least one.
    """
    values = np.asarray(values, dtype=float)
    enough = len(values) >= SAMPLES_FOR_INTERVAL
    beyond = (100 - INTERVAL) / 2 if enough else 0
    low, high = np.percentile(values, [beyond, 100 - beyond])
    text = f"{INTERVAL} %" if enough else f"range of {len(values)} samples"
    return {"mean": float(values.mean()), "low": float(low), "high": float(high), "interval": text}


def numbers_of(
    uncertainty: CaseUncertainty, names: Sequence[str], voxel_mm3: float, half_widths: Sequence[float] = ()
) -> dict[str, Any]:
    """Return what is written of a case: volume and agreement of each class in the samples, JSON-serialisable.

    Args:
        uncertainty: of the case, with two samples or more.
        names: of the foreground classes or regions, in the order of the heads.
        voxel_mm3: volume of a voxel of the network's grid.
        half_widths: of each class, as `nnunet_diffusion calibrate` fitted them: the volumes' intervals are those of the level
            sets; empty for intervals of the samples.
    """
    foreground = dict(zip(names, uncertainty.shared[-len(names) :], strict=True))
    scores = {name: pairwise_dice(shared) for name, shared in foreground.items()}
    volumes = {name: interval(shared.diagonal() * voxel_mm3) for name, shared in foreground.items()}
    if half_widths:
        for name, sets, half_width in zip(names, uncertainty.level_sets[-len(names) :], half_widths, strict=True):
            low, high = bounds(sets * voxel_mm3, half_width)
            volumes[name] |= {"low": low, "high": high, "interval": f"{INTERVAL} %, fitted to validation cases"}
    return {
        "samples": uncertainty.shared.shape[1],
        "members": uncertainty.members,
        "score": float(np.mean(list(scores.values()))),
        "scores": scores,
        "volume_mm3": volumes,
    }
