"""The units of a denoiser that Grad-CAM explains, by flow and stage, and what can be taken away from it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from nnunet_diffusion.networks.attention import ParameterSharedAttention
from nnunet_diffusion.networks.hidiff import HiDiffRefiner
from nnunet_diffusion.networks.noisy_unet import NoisyUNet
from nnunet_diffusion.networks.pgdiffseg import PGDiffSeg

CONDITION, DENOISING = "condition flow", "denoising flow"
BEFORE_DOWNSAMPLING = "{} before downsampling"  # the features that go on, and through the skip
ENCODER, DECODER, PRIOR = "encoder", "decoder", "prior branch"
NO_PRIOR, NO_ATTENTION = "without the prior branch", "without parameter-shared attention"


@dataclass(frozen=True, eq=False)
class Unit:
    """A part of a denoiser whose output is a feature map (B, C, *spatial).

    Attributes:
        flow: name of the row of units that it belongs to.
        stage: its number there, from 1, in the order in which the features go through them.
        module: the part.
        encodes: True if `encode` calls it, False if `forward` does.
        attended: True for the features after parameter-shared attention of a stage, where there is one; False before it.
    """

    flow: str
    stage: int
    module: nn.Module
    encodes: bool
    attended: bool = False

    @property
    def key(self) -> tuple[str, int, bool]:
        """Flow, stage, and whether it is after attention."""
        return self.flow, self.stage, self.attended

    @property
    def eta(self) -> Tensor:
        """Weight of attention in this flow (Eq. 5), of a unit after attention."""
        return self.module.eta[self.flow.removesuffix(" flow")]  # type: ignore[index]


def units_of(denoiser: nn.Module) -> list[Unit]:
    """Return the units of a denoiser in the order of the page: flow by flow, stage by stage.

    Raises:
        NotImplementedError: the network is unknown.
    """
    if isinstance(denoiser, PGDiffSeg):
        return _of_pgdiffseg(denoiser)
    if isinstance(denoiser, HiDiffRefiner):
        return _row(ENCODER, denoiser.blocks, False) + _row(DECODER, denoiser.merge, False)
    if isinstance(denoiser, NoisyUNet):
        network: Any = denoiser.network
        return _row(ENCODER, network.encoder.stages, False) + _row(DECODER, network.decoder.stages, False)
    raise NotImplementedError(
        f"explain knows no units of {type(denoiser).__name__}: it supports PGDiffSeg, HiDiff and nnU-Net"
    )


def _row(flow: str, modules: Any, encodes: bool) -> list[Unit]:
    return [Unit(flow, stage, module, encodes) for stage, module in enumerate(modules, start=1)]


def _of_pgdiffseg(denoiser: PGDiffSeg) -> list[Unit]:
    """Fig. 2: condition flow, denoising flow, their features before downsampling, decoder, last layer of the prior branch."""
    attention: Any = denoiser.attention
    found = []
    if denoiser.adapts:
        found += _row(CONDITION, denoiser.feature_adapters, True)
    flows = {DENOISING: denoiser.denoising_flow}
    if not denoiser.adapts:
        flows = {CONDITION: denoiser.condition_flow, **flows}
    for flow, parts in flows.items():
        for stage, part in enumerate(parts, start=1):
            found.append(Unit(flow, stage, part.down, flow == CONDITION))  # type: ignore[arg-type]
            if str(stage) in attention:
                found.append(Unit(flow, stage, attention[str(stage)], flow == CONDITION, True))
    for flow, parts in flows.items():
        found += _row(BEFORE_DOWNSAMPLING.format(flow), [part.residual for part in parts], flow == CONDITION)
    units: Any = denoiser.prior.units
    return [*found, *_row(DECODER, denoiser.up_units, False), Unit(PRIOR, 1, units[-1], True)]


@contextlib.contextmanager
def recorded(
    units: Sequence[Unit], encodes: bool
) -> Iterator[dict[tuple[str, int, bool], tuple[tuple[Any, ...], Tensor]]]:
    """Keep inputs and output of the units that `encode` calls, or of those that `forward` calls, inside a `with` block."""
    found: dict[tuple[str, int, bool], tuple[tuple[Any, ...], Tensor]] = {}

    def keep(key: tuple[str, int, bool]) -> Any:
        return lambda module, given, output: found.__setitem__(key, (given, output))

    handles = [each.module.register_forward_hook(keep(each.key)) for each in units if each.encodes == encodes]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def ablated(denoiser: nn.Module, name: str) -> Iterator[None]:
    """Take a part of a PGDiffSeg network away inside a `with` block.

    Args:
        denoiser: the network.
        name: NO_PRIOR, whose term in Eq. 6 and location map are then 0, or NO_ATTENTION, whose weights eta (Eq. 5) are.
    """
    if name == NO_PRIOR:
        # a normalised term of 0 would still be the bias
        norms = [*denoiser.guidance_norms][2:]  # type: ignore[misc]

        def silent(module: nn.Module, given: Any, prior: Any) -> Any:
            return dataclasses.replace(
                prior,
                features=torch.zeros_like(prior.features),
                location_logits=torch.zeros_like(prior.location_logits),
            )

        handles = [denoiser.prior.register_forward_hook(silent)]  # type: ignore[union-attr]
        handles += [norm.register_forward_hook(lambda module, given, term: torch.zeros_like(term)) for norm in norms]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
        return
    parts = [part for part in denoiser.modules() if isinstance(part, ParameterSharedAttention)]
    weights = [weight for part in parts for weight in part.eta.values()]
    before = [weight.detach().clone() for weight in weights]
    try:
        for weight in weights:
            weight.data.zero_()
        yield
    finally:
        for weight, value in zip(weights, before, strict=True):
            weight.data.copy_(value)


def ablations_of(denoiser: nn.Module) -> list[str]:
    """Return the names of what `ablated` can take away."""
    if not isinstance(denoiser, PGDiffSeg):
        return []
    return [NO_PRIOR, *([NO_ATTENTION] if len(denoiser.attention) else [])]
