"""Members of an ensemble and the prediction that comes of them."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from nnunet_diffusion.inference.fusion import votes_of
from nnunet_diffusion.inference.volume import Evaluations
from nnunet_diffusion.model import labels


@dataclass(frozen=True, eq=False)
class VolumePrediction:
    """Result on the network's grid.

    Attributes:
        logits: (K, *volume), float32, whose probabilities are the mean over all members.
        decision: logits whose decision is the fused segmentation; None where it is that of `logits`.
        samples: name of each sample -> its logits, float16; filled only where samples are kept.
        evaluations: patches that each network has seen.
        seconds: wall-clock time.
        peak_bytes: of the GPU since the volume began, on a CPU of the process since its start; None where unknown.
        notes: what had to give way (memory).
    """

    logits: Tensor
    decision: Tensor | None
    samples: dict[str, Tensor]
    evaluations: Evaluations
    seconds: float
    peak_bytes: int | None
    notes: list[str]


@dataclass
class Members:
    """Sums over the members of an ensemble, as they come."""

    regions: bool
    keep_votes: bool
    keep_samples: bool
    total: Tensor | None = None
    weight: float = 0.0
    votes: list[Tensor] = field(default_factory=list)
    samples: dict[str, Tensor] = field(default_factory=dict)

    def add(self, probabilities: Tensor, weight: float, name: str = "") -> None:
        """Count one member (K, *volume); a named one is a sample."""
        if weight > 0:
            weighted = probabilities * weight
            if self.total is not None and self.total.device != weighted.device:  # one of them had no room on the GPU
                self.total, weighted = self.total.cpu(), weighted.cpu()
            self.total = weighted if self.total is None else self.total.add_(weighted)
            self.weight += weight
        votes, kept = self.keep_votes and weight > 0, self.keep_samples and bool(name)
        if votes or kept:
            logits = labels.probabilities_to_logits(probabilities[None], self.regions)[0].half()
            if votes:  # for what the file of a kept sample says, ties after rounding included
                self.votes.append(votes_of(logits, self.regions).cpu())
            if kept:
                self.samples[name] = logits.cpu()

    def mean(self) -> Tensor:
        """Weighted mean of all members, on the CPU."""
        assert self.total is not None
        return (self.total / self.weight).cpu()
