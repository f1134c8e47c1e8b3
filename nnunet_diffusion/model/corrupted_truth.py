"""Imperfect segmentations made from the truth, so that training shows the denoiser mistakes to repair (layer 2).

PD-DDPM starts the reverse process from another network's output. A denoiser trained on noised truth alone never meets
a mistake there and learns to return its start. Here the truth is given the mistakes segmentations have: borders moved
in and out, parts missing, parts invented, soft transitions; the target stays the truth. How large and how soft they are is
measured on the network's own output (`measure`), so that the denoiser cannot tell one from the other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor
from torch.nn.functional import interpolate, one_hot

from nnunet_diffusion.model import labels

BLUR_CELLS = (2, 4, 8)  # voxels per cell of the grids that soften borders
PART_PROBABILITY = 0.25  # share of samples that lose a part; as many are given one
LARGEST_STRENGTH = 4.0  # strength 1 moves borders by a few voxels
HALVINGS = 8  # of the intervals in which strength and softness are looked for
SHARPEST, SOFTEST = -6.0, 4.0  # log2 of the factors that divide the log-odds
LEAST_SHARE = 1e-3  # of a class where it does not occur, before the mistakes


@dataclass(frozen=True)
class Mistakes:
    """Mistakes of a segmentation network on patches that it was not trained on.

    Attributes:
        dice: mean Dice of the classes in each patch with foreground, (N,); of regions, of each region in each patch.
        softness: of the same patches, (N,): sum over voxels and classes of p (1 - p), per border voxel of the truth.
        false_alarms: share of the patches without foreground in which the network finds some.
    """

    dice: Tensor
    softness: Tensor
    false_alarms: float

    def describe(self) -> str:
        """Return the quartiles of the Dice and the false alarms in words."""
        quartiles = " / ".join(f"{value:.2f}" for value in self.dice.quantile(torch.tensor([0.25, 0.5, 0.75])))
        alarms = f"false alarms in {self.false_alarms:.0%} of patches without foreground"
        return f"Dice {quartiles} (quartiles of {len(self.dice)}), {alarms}"


UNMEASURED = Mistakes(torch.linspace(0.6, 0.98, 20), torch.full((20,), 0.5), 0.1)
"""Where no network was measured: a network as it usually is."""


def measure(pairs: Iterable[tuple[Tensor, Tensor]], regions: bool = False) -> Mistakes:
    """Return the mistakes of a network.

    Args:
        pairs: probabilities and true masks, each (B, K, *spatial), background first unless the heads are regions.
        regions: whether the heads are regions; each is then looked at by itself.

    Returns:
        On the CPU; what no patch can tell is that of `UNMEASURED`.
    """
    dice, softness, alarms = [], [], []
    for probabilities, masks in pairs:
        if regions:
            probabilities, masks = _alone(probabilities), _alone(masks)
        present = masks[:, 1:].flatten(1).any(1)
        found = probabilities.argmax(1)
        dice.append(_dice(found, masks)[present].cpu())
        softness.append((_spread(probabilities) / _border(masks))[present].cpu())
        alarms.append((found > 0).flatten(1).any(1)[~present].float().cpu())
    found, soft, alarm = (torch.cat(values) for values in (dice, softness, alarms))
    rate = float(alarm.mean()) if len(alarm) else UNMEASURED.false_alarms
    return Mistakes(found, soft, rate) if len(found) else Mistakes(UNMEASURED.dice, UNMEASURED.softness, rate)


def corrupt(masks: Tensor, generator: Generator, mistakes: Mistakes = UNMEASURED, regions: bool = False) -> Tensor:
    """Return probabilities of a plausible wrong segmentation for each true one.

    Each sample gets Dice and softness of one patch of `mistakes`, drawn at random, as closely as its shape allows.

    Args:
        masks: (B, K, *spatial) of 0 and 1, background first unless the heads are regions.
        generator: source of all randomness, on the masks' device.
        mistakes: how large the mistakes are.
        regions: whether the heads are regions; each is then spoiled by itself.

    Returns:
        (B, K, *spatial) probabilities, of classes with the sum 1 over K, float32.
    """
    if regions:
        return corrupt(_alone(masks), generator, mistakes)[:, 1].reshape(masks.shape)
    count, device = len(masks), masks.device
    which = torch.randint(0, len(mistakes.dice), (count,), generator=generator, device=device)
    dice, softness = (values.to(device)[which] for values in (mistakes.dice, mistakes.softness))
    present = masks[:, 1:].flatten(1).any(1)
    alarm = torch.rand(count, generator=generator, device=device) < mistakes.false_alarms
    spoil = _spoiled(masks, ~present, generator)

    # Dice falls as the strength grows
    strength = _halve(lambda s: _dice(spoil(s).argmax(1), masks) > dice, 0.0, LARGEST_STRENGTH, masks)
    strength = torch.where(present, strength, LARGEST_STRENGTH * alarm)
    logits = spoil(strength)
    # p (1 - p) grows with the factor by which the log-odds are divided, and the segmentation stays
    # where the truth has no border, that of what is invented
    borders = _border(torch.where(_column(present, masks), masks, labels.hardened(logits)))
    wanted = softness * borders
    factor = 2.0 ** _halve(
        lambda f: _spread((logits / _column(2.0**f, masks)).softmax(1)) < wanted, SHARPEST, SOFTEST, masks
    )
    return (logits / _column(factor, masks)).softmax(1)


def _halve(below: Callable[[Tensor], Tensor], low: float, high: float, like: Tensor) -> Tensor:
    """Return for each sample where `below` turns from true to false between two numbers, by bisection."""
    lower, upper = (like.new_full((len(like),), end) for end in (low, high))
    for _ in range(HALVINGS):
        middle = (lower + upper) / 2
        under = below(middle)
        lower, upper = torch.where(under, middle, lower), torch.where(under, upper, middle)
    return lower


def _spoiled(masks: Tensor, empty: Tensor, generator: Generator) -> Callable[[Tensor], Tensor]:
    """Return the spoiled log-probabilities as a function of the strength (B,): the truth at 0, mistakes that grow with it."""
    soft = _soften(masks, generator)
    # a constant moves all borders of a class in or out, a smooth field moves them here and there
    field = _normal((len(masks), masks.shape[1]), masks, generator)
    field = field + _smooth_field(masks, cells=6, generator=generator)
    # a class that the sample does not have is invented by itself, or not at all
    field = field * _column(masks.flatten(2).any(2) & ~empty[:, None], masks)
    field = field + _erased_part(masks, generator) + _invented_part(masks, empty, generator)

    def spoil(strength: Tensor) -> Tensor:
        scale = _column(strength, masks)
        shares = torch.lerp(masks, soft, scale.clamp(max=1))
        return (shares + LEAST_SHARE).log() + scale * field

    return spoil


def _soften(share: Tensor, generator: Generator) -> Tensor:
    """Mix the label map with itself averaged over coarser grids, in random proportions."""
    weights = torch.rand((len(share), 1 + len(BLUR_CELLS)), generator=generator, device=share.device)
    weights = weights / weights.sum(1, keepdim=True)
    mixed = share * _column(weights[:, 0], share)
    for index, cell in enumerate(BLUR_CELLS, start=1):
        coarse = interpolate(share, size=[max(1, -(-size // cell)) for size in share.shape[2:]], mode="area")
        mixed = mixed + _resize(coarse, share) * _column(weights[:, index], share)
    return mixed


def _erased_part(share: Tensor, generator: Generator) -> Tensor:
    """Background log-odds that grow from a random plane near the foreground's centre to its end, for some samples."""
    foreground = share[:, 1:].sum(1, keepdim=True)
    mass = foreground.flatten(1).sum(1).clamp(min=1)
    beyond = torch.zeros_like(foreground)
    for axis, size in enumerate(share.shape[2:]):
        shape = [1] * share.ndim
        shape[axis + 2] = size
        position = torch.linspace(-0.5, 0.5, size, device=share.device).view(shape)
        centre = (foreground * position).flatten(1).sum(1) / mass
        centre = centre + 0.05 * torch.randn(len(share), generator=generator, device=share.device)
        beyond = beyond + _normal((len(share),), share, generator) * (position - _column(centre, share))
    inside = (beyond * foreground).flatten(1).amax(1).clamp(min=1e-3)
    chosen = _uniform((len(share),), share, generator) < PART_PROBABILITY
    background = torch.zeros_like(share)
    background[:, :1] = 8 * chosen * (beyond / _column(inside, share)).clamp(0, 1)
    return background


def _invented_part(share: Tensor, empty: Tensor, generator: Generator) -> Tensor:
    """Log-odds of one foreground class inside random blobs, which grow with the strength, for some samples and all `empty`."""
    hills = _smooth_field(share[:, :1], cells=5, generator=generator)
    blobs = (hills - 0.5 * _column(hills.flatten(1).amax(1), share)).clamp(min=0)
    chosen = (_uniform((len(share),), share, generator) < PART_PROBABILITY) | _column(empty, share)
    classes = torch.randint(1, share.shape[1], (len(share),), generator=generator, device=share.device)
    which = one_hot(classes, share.shape[1]).view(*share.shape[:2], *[1] * (share.ndim - 2))
    return 8 * blobs * chosen * which


def _dice(found: Tensor, masks: Tensor) -> Tensor:
    """Return the mean Dice (B,) of label maps (B, *spatial) over the foreground classes that true masks have."""
    classes = torch.arange(1, masks.shape[1], device=masks.device).view(1, -1, *[1] * (masks.ndim - 2))
    ours, truth = (found.unsqueeze(1) == classes).flatten(2).float(), masks[:, 1:].flatten(2)
    size = truth.sum(2)
    each = 2 * (ours * truth).sum(2) / (ours.sum(2) + size).clamp(min=1)
    return (each * (size > 0)).sum(1) / (size > 0).sum(1).clamp(min=1)


def _spread(probabilities: Tensor) -> Tensor:
    """Return the sum (B,) over voxels and classes of p (1 - p); the energy of the state 2 p - 1 is K - 4 p (1 - p)."""
    return (probabilities * (1 - probabilities)).flatten(1).sum(1)


def _border(masks: Tensor) -> Tensor:
    """Return the number (B,) of pairs of neighbours of different classes in true masks, at least 1."""
    pairs = [masks.diff(dim=axis).abs().flatten(1).sum(1) / 2 for axis in range(2, masks.ndim)]
    return torch.stack(pairs).sum(0).clamp(min=1)


def _alone(masks: Tensor) -> Tensor:
    """Return each region (B, R, *spatial) with its background: (B * R, 2, *spatial)."""
    each = masks.float().flatten(0, 1).unsqueeze(1)
    return torch.cat((1 - each, each), 1)


def _smooth_field(like: Tensor, cells: int, generator: Generator) -> Tensor:
    """Normal noise on a grid of `cells` per axis, interpolated to `like`'s shape."""
    size = [min(cells, length) for length in like.shape[2:]]
    return _resize(torch.randn((*like.shape[:2], *size), generator=generator, device=like.device), like)


def _resize(field: Tensor, like: Tensor) -> Tensor:
    return interpolate(
        field, size=like.shape[2:], mode="bilinear" if like.ndim == 4 else "trilinear", align_corners=False
    )


def _uniform(shape: tuple[int, ...], like: Tensor, generator: Generator) -> Tensor:
    return _column(torch.rand(shape, generator=generator, device=like.device), like)


def _normal(shape: tuple[int, ...], like: Tensor, generator: Generator) -> Tensor:
    return _column(torch.randn(shape, generator=generator, device=like.device), like)


def _column(values: Tensor, like: Tensor) -> Tensor:
    """Append dimensions until `values` broadcasts against `like`."""
    return values.view(*values.shape, *[1] * (like.ndim - values.ndim))
