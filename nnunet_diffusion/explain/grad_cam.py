"""Grad-CAM (Selvaraju et al. 2017) of a denoiser's units in one evaluation of a reverse process, on whole volumes.

The score of a class is its clean estimate's logit, summed over voxels with given weights. A volume's score is that of the
blended tiles, so that a unit's channels have the same weights in all tiles, and its map is blended as predictions are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from nnunet_diffusion.diffusion.predictions import Epsilon, Flip, Logits
from nnunet_diffusion.explain.units import Unit, recorded
from nnunet_diffusion.inference.volume import Tile, VolumeProcess
from nnunet_diffusion.model.segmenter import DiffusionSegmenter

Key = tuple[str, int, bool]


def channel_weights(gradient: Tensor) -> Tensor:
    """Return the weight of each channel, (B, C): the mean over space of the score's gradient (B, C, *spatial), Eq. 1."""
    return gradient.flatten(2).mean(2)


def heat_of(features: Tensor, weights: Tensor) -> Tensor:
    """Return the map (B, *spatial) of features (B, C, *spatial): ReLU of the sum of weighted channels (B, C), Eq. 2."""
    return torch.einsum("bc...,bc->b...", features, weights).relu()


def class_logits(
    segmenter: DiffusionSegmenter, prediction: Tensor, noisy: Tensor, timestep: int, condition: Any
) -> Tensor:
    """Return the logit of each class in the clean estimate, (B, K, *spatial), with the network's gradients.

    A network that predicts the state, the noise or v has no logits: there it is the estimate of the state itself, 2 p - 1.
    """
    kind = segmenter.prediction
    if isinstance(kind, Logits):
        logits = prediction.float()
        if segmenter.settings.regions:
            return logits
        # log p / (1 - p): a class also wins where the others lose
        others = [
            logits[:, [k for k in range(logits.shape[1]) if k != head]].logsumexp(1) for head in range(logits.shape[1])
        ]
        return logits - torch.stack(others, 1)
    if isinstance(kind, Flip):
        return kind.clean_logit(prediction, noisy, timestep, segmenter.process.towards(condition.prior))
    # a clamped estimate has no gradient
    kind = dataclasses.replace(kind, clamp=False) if isinstance(kind, Epsilon) else kind
    return kind.to_clean(prediction, noisy, timestep, segmenter.process)


def heat_maps(
    process: VolumeProcess, units: Sequence[Unit], head: int, target: Tensor, noisy: Tensor, timestep: int
) -> dict[Key, Tensor]:
    """Return the map of each unit (*volume), 0 or more, in one evaluation.

    Args:
        process: the reverse process of the volume.
        units: of the segmenter's denoiser.
        head: index of the class.
        target: weight of each voxel in the score, (*volume); negative where the class should be explained away.
        noisy: state before the evaluation, (1, K, *volume).
        timestep: of the state.
    """
    tiling, total = process.tiling, process.total_weight
    weights: dict[Key, Tensor] = {}
    for tile in tiling.tiles:
        place = tile[1:]
        counted = (target[place] * tiling.weight.to(total) / total[place]).to(tiling.device)
        if not counted.any():
            continue
        with torch.enable_grad():
            found, logits = evaluated(process, units, tile, noisy, timestep)
            features = {key: output for key, (_, output) in found.items()}
            gradients = torch.autograd.grad(
                (logits[0, head] * counted).sum(), list(features.values()), allow_unused=True
            )
        for (key, output), gradient in zip(features.items(), gradients, strict=True):
            # a unit that the score does not depend on has no gradient
            found_weights = output.new_zeros(output.shape[:2]) if gradient is None else channel_weights(gradient)
            weights[key] = weights.get(key, 0) + found_weights
    maps = {unit.key: torch.zeros_like(total) for unit in units}
    for tile in tiling.tiles if weights else []:
        with torch.no_grad():
            found, _ = evaluated(process, units, tile, noisy, timestep)
            for key, (_, output) in found.items():
                heat = enlarged(heat_of(output, weights[key]), tiling.weight.shape)
                maps[key][tile[1:]] += (heat * tiling.weight).to(total)
    return {key: heat / total for key, heat in maps.items()}


def evaluated(
    process: VolumeProcess, units: Sequence[Unit], tile: Tile, noisy: Tensor, timestep: int
) -> tuple[dict[Key, tuple[tuple[Any, ...], Tensor]], Tensor]:
    """Evaluate the denoiser on one tile.

    Returns:
        Inputs and output of each unit, and the class logits (1, K, *patch).
    """
    segmenter, device = process.segmenter, process.tiling.device
    of_tile = (slice(None), *tile)
    state = noisy[of_tile].to(device)
    with recorded(units, True) as found:
        condition = segmenter.encode(process.seen([tile]), timestep)
    with recorded(units, False) as further:
        times = torch.full((len(state),), timestep, device=device)
        prediction = segmenter.denoise(state, times, condition)
    return {**found, **further}, class_logits(segmenter, prediction, state, timestep, condition)


def enlarged(values: Tensor, size: Sequence[int]) -> Tensor:
    """Return a map (1, *spatial) interpolated linearly to another size, (*size)."""
    mode = "bilinear" if len(size) == 2 else "trilinear"
    return interpolate(values[:, None].float(), size=tuple(size), mode=mode, align_corners=False)[0, 0]
