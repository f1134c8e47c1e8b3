"""Members of an ensemble and the resulting prediction."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from nnunet_diffusion.inference.fusion import votes_of
from nnunet_diffusion.inference.uncertainty import CaseUncertainty, Uncertainty
from nnunet_diffusion.inference.volume import Evaluations
from nnunet_diffusion.model import labels


@dataclass(frozen=True, eq=False)
class VolumePrediction:
    """Result on the network's grid.

    Attributes:
        logits: logits of the mean probabilities over all members, (K, *volume), float32.
        decision: logits of the segmentation by votes or without absent classes; None if `logits` give the segmentation.
        samples: name of each sample -> its logits, float16; empty unless samples are kept.
        evaluations: number of patches evaluated by each network.
        seconds: wall-clock time.
        peak_bytes: peak GPU memory for this volume; on a CPU, peak memory of the process; None if unknown.
        notes: notes for the user on changes made for lack of memory.
        uncertainty: maps and counts of the samples; None unless they are asked for.
    """

    logits: Tensor
    decision: Tensor | None
    samples: dict[str, Tensor]
    evaluations: Evaluations
    seconds: float
    peak_bytes: int | None
    notes: list[str]
    uncertainty: CaseUncertainty | None = None


@dataclass
class Members:
    """Running sums over the members of an ensemble."""

    regions: bool
    keep_votes: bool
    keep_samples: bool
    total: Tensor | None = None
    weight: float = 0.0
    votes: list[Tensor] = field(default_factory=list)
    samples: dict[str, Tensor] = field(default_factory=dict)
    uncertainty: Uncertainty | None = None

    def add(self, probabilities: Tensor, weight: float, name: str = "") -> None:
        """Add one member (K, *volume); a member with a name is a sample."""
        if weight > 0:
            weighted = probabilities * weight
            if self.total is not None and self.total.device != weighted.device:  # one of them did not fit on the GPU
                self.total, weighted = self.total.cpu(), weighted.cpu()
            self.total = weighted if self.total is None else self.total.add_(weighted)
            self.weight += weight
        voted = weight > 0 and (self.keep_votes or self.uncertainty is not None)
        kept = self.keep_samples and bool(name)
        if voted or kept:
            logits = labels.probabilities_to_logits(probabilities[None], self.regions)[0].half()
            if voted:
                # votes come from the rounded logits, so that they agree with the file of a kept sample, even for ties
                votes = votes_of(logits, self.regions).cpu()
                if self.keep_votes:
                    self.votes.append(votes)
                if self.uncertainty is not None:
                    self.uncertainty.add(probabilities, votes, weight, name)
            if kept:
                self.samples[name] = logits.cpu()

    def mean(self) -> Tensor:
        """Weighted mean of all members, on the CPU."""
        assert self.total is not None
        return (self.total / self.weight).cpu()
