"""Calibration: does a probability of 0.8 mean right in eight of ten voxels?

All functions take the probabilities (K, N) of K classes in N voxels, which sum to one in each voxel, and labels (N,) of 0..K-1.
Regions are not exclusive: `heads_as_classes` makes each of their heads a problem of two classes.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BINS = 50
"""Bins of equal width for ECE and reliability diagrams, as in the CURVAS challenges."""
EQUAL_MASS_BINS = 20
LOWEST = 1e-7
"""Smallest probability of which a logarithm is taken."""
VOXELS_AT_ONCE = 2**18
TEMPERATURES = tuple(2.0 ** (power / 8) for power in range(-8, 17))
"""Candidates from 0.5 to 4, in steps of 9 %."""


@dataclass(frozen=True, eq=False)
class Reliability:
    """Sums over the voxels of each bin of confidence, all (BINS,), float64. Sums of several cases add up.

    Attributes:
        voxels: number of voxels.
        confidence: sum of the probability of the most likely class.
        right: number of voxels where that class is the true one.
    """

    voxels: NDArray[np.float64]
    confidence: NDArray[np.float64]
    right: NDArray[np.float64]

    def __add__(self, other: Reliability) -> Reliability:
        return Reliability(self.voxels + other.voxels, self.confidence + other.confidence, self.right + other.right)

    def ece(self) -> float:
        """Return the expected calibration error, 0..1; NaN without voxels."""
        total = self.voxels.sum()
        # ECE = sum_b n_b / N |accuracy_b - confidence_b|
        return float(np.abs(self.right - self.confidence).sum() / total) if total else float("nan")


def reliability(probabilities: NDArray, labels: NDArray, bins: int = BINS) -> Reliability:
    """Return the sums of a reliability diagram of the most likely class (Guo et al. 2017, section 2).

    Args:
        probabilities: (K, N).
        labels: (N,).
        bins: bins of equal width in [0, 1]; a confidence of 1 is in the last.
    """
    return _binned(probabilities.max(0), probabilities.argmax(0) == labels, bins)


def _binned(confidence: NDArray, right: NDArray, bins: int) -> Reliability:
    confidence = confidence.astype(np.float64)
    place = np.minimum((confidence * bins).astype(np.intp), bins - 1)
    return Reliability(
        np.bincount(place, minlength=bins).astype(np.float64),
        np.bincount(place, weights=confidence, minlength=bins).astype(np.float64),
        np.bincount(place, weights=right, minlength=bins).astype(np.float64),
    )


def adaptive_calibration_error(probabilities: NDArray, labels: NDArray, bins: int = EQUAL_MASS_BINS) -> float:
    """Return the class-wise calibration error in bins of equal mass, ACE (Nixon et al. 2019); NaN without voxels.

    Args:
        probabilities: (K, N).
        labels: (N,).
        bins: bins of each class, which hold equally many voxels.
    """
    if not labels.size:
        return float("nan")
    errors = []
    for number, values in enumerate(probabilities):
        order = np.argsort(values, kind="stable")
        parts = np.array_split(order, min(bins, order.size))
        errors += [abs(values[part].mean() - (labels[part] == number).mean()) for part in parts]
    # ACE = 1 / (K B) sum_k sum_b |frequency - mean probability|
    return float(np.mean(errors))


def brier(probabilities: NDArray, labels: NDArray) -> float:
    """Return the Brier score, the mean over voxels of sum_k (p_k - y_k)^2, 0..2; NaN without voxels."""
    if not labels.size:
        return float("nan")
    # sum_k (p_k - y_k)^2 = sum_k p_k^2 - 2 p_true + 1
    squares = np.einsum("kn,kn->n", probabilities, probabilities)
    return float((squares - 2 * _of_truth(probabilities, labels) + 1).mean())


def negative_log_likelihood(probabilities: NDArray, labels: NDArray) -> float:
    """Return the mean of -log p of the true class, in nats; NaN without voxels."""
    if not labels.size:
        return float("nan")
    return float(-np.log(np.maximum(_of_truth(probabilities, labels), LOWEST)).mean())


def tempered(probabilities: NDArray, temperature: float) -> NDArray[np.float64]:
    """Return softmax(log p / temperature), (K, N): above 1 it is less certain, below 1 more (Guo et al. 2017, section 4.2).

    Args:
        probabilities: (K, N); values below 1e-7 count as that.
        temperature: above 0.

    Raises:
        ValueError: the temperature is not above 0.
    """
    if not temperature > 0:
        raise ValueError(f"temperature is {temperature}, but must be above 0")
    logits = np.log(np.maximum(probabilities, LOWEST)).astype(np.float64) / temperature
    exponentials = np.exp(logits - logits.max(0))
    return exponentials / exponentials.sum(0)


@dataclass(frozen=True, eq=False)
class Tempering:
    """Sums at each of `TEMPERATURES`, from which a temperature is fitted; those of several cases add up.

    Attributes:
        loss: sum over the voxels of -log p of the true class, one for each temperature.
        reliability: of the tempered probabilities, one for each temperature.
    """

    loss: NDArray[np.float64]
    reliability: list[Reliability]

    def __add__(self, other: Tempering) -> Tempering:
        pairs = zip(self.reliability, other.reliability, strict=True)
        return Tempering(self.loss + other.loss, [one + two for one, two in pairs])

    def best(self) -> int:
        """Return the place of the temperature of smallest loss in `TEMPERATURES`; of 1 without voxels."""
        return int(self.loss.argmin()) if self.reliability[0].voxels.any() else TEMPERATURES.index(1.0)


@dataclass(frozen=True, eq=False)
class Crossed:
    """Two halves of the cases, each scaled by the temperature that is best for the other half.

    Attributes:
        temperatures: best for the first and for the second half.
        loss: sum over the voxels of both halves of -log p of the true class.
        reliability: of both halves.
    """

    temperatures: tuple[float, float]
    loss: float
    reliability: Reliability


def total(sums: Sequence[Tempering]) -> Tempering:
    """Return the sum of at least one case's sums."""
    return functools.reduce(operator.add, sums)


def crossed(sums: Sequence[Tempering]) -> Crossed:
    """Return what temperature scaling gives on cases that it was not fitted on: every second case is one half.

    Args:
        sums: of at least two cases.
    """
    first, second = total(sums[::2]), total(sums[1::2])
    own, other = first.best(), second.best()
    return Crossed(
        (TEMPERATURES[own], TEMPERATURES[other]),
        float(first.loss[other] + second.loss[own]),
        first.reliability[other] + second.reliability[own],
    )


def tempering(probabilities: NDArray, labels: NDArray, bins: int = BINS) -> Tempering:
    """Return loss and reliability at each of `TEMPERATURES`, for probabilities (K, N) and labels (N,)."""
    nothing = Reliability(np.zeros(bins), np.zeros(bins), np.zeros(bins))
    loss, sums = np.zeros(len(TEMPERATURES)), [nothing] * len(TEMPERATURES)
    for first in range(0, labels.size, VOXELS_AT_ONCE):
        part, true = probabilities[:, first : first + VOXELS_AT_ONCE], labels[first : first + VOXELS_AT_ONCE]
        logits = np.log(np.maximum(part, LOWEST)).astype(np.float32)
        logits -= logits.max(0)
        # a temperature changes neither the most likely class nor whether it is right
        right, of_truth = part.argmax(0) == true, _of_truth(logits, true)
        for place, temperature in enumerate(TEMPERATURES):
            partition = np.exp(logits / np.float32(temperature)).sum(0, dtype=np.float64)
            loss[place] += float((np.log(partition) - of_truth / temperature).sum())
            sums[place] = sums[place] + _binned(1 / partition, right, bins)
    return Tempering(loss, sums)


def problem(probabilities: NDArray, masks: NDArray, regions: bool) -> tuple[NDArray, NDArray]:
    """Return probabilities (K, N) and labels (N,) of voxels; regions become one problem of two classes.

    Args:
        probabilities: of the heads, (K, N).
        masks: true masks of the heads, (K, N).
        regions: whether the heads are regions.
    """
    return heads_as_classes(probabilities, masks) if regions else (probabilities, masks.argmax(0))


def heads_as_classes(probabilities: NDArray, masks: NDArray) -> tuple[NDArray, NDArray]:
    """Return regions as a problem of two classes: probabilities (2, R N) and labels (R N,).

    Args:
        probabilities: of R regions, (R, N).
        masks: true masks of the regions, (R, N), boolean.
    """
    flat = probabilities.reshape(-1)
    return np.stack((1 - flat, flat)), masks.reshape(-1).astype(np.intp)


def _of_truth(probabilities: NDArray, labels: NDArray) -> NDArray[np.float64]:
    return np.take_along_axis(probabilities, labels[None].astype(np.intp), 0)[0].astype(np.float64)
