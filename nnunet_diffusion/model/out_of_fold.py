"""Segmentation of training cases by networks that were not trained on them (layer 2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from nnunet_diffusion.model import labels


class OutOfFold:
    """Networks of which each case has one that was not trained on it.

    Args:
        networks: image (B, C, *spatial) -> logits (B, K, *spatial). Frozen here, in evaluation mode.
        network_of: name of a case -> place of a network that was not trained on it.
        regions: whether the heads are regions.
    """

    def __init__(self, networks: Sequence[nn.Module], network_of: Mapping[str, int], regions: bool) -> None:
        self.networks = [network.requires_grad_(False).eval() for network in networks]
        self.network_of, self.regions = dict(network_of), regions

    def __call__(self, image: Tensor, cases: Sequence[str]) -> Tensor:
        """Return the probabilities (B, K, *spatial) of images (B, C, *spatial) of these cases.

        Raises:
            ValueError: a case has no such network.
        """
        unknown = [case for case in cases if case not in self.network_of]
        if unknown:
            raise ValueError(f"No network is known that was not trained on case {unknown[0]}.")
        found: Tensor | None = None
        with torch.no_grad():
            for number, network in enumerate(self.networks):
                which = [index for index, case in enumerate(cases) if self.network_of[case] == number]
                if not which:
                    continue
                probabilities = labels.activate(network(image[which]), self.regions)
                if found is None:
                    found = probabilities.new_empty(len(image), *probabilities.shape[1:])
                found[which] = probabilities
        assert found is not None  # there is at least one case
        return found
