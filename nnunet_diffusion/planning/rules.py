"""Rules for the size and settings of the denoiser; documentation/planning.md shows the measurements behind them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from nnunet_diffusion.model.settings import DENOISERS, DiffusionSettings, default_settings, topology_of
from nnunet_diffusion.networks.attention import pooled_size
from nnunet_diffusion.planning.costs import Cost, denoiser_cost

WIDTHS = range(4, 33)
"""Candidate widths of the denoiser, in 32nds of nnU-Net's (an eighth to all of it)."""
HALF = 16  # half of nnU-Net's width, in 32nds
SDB_DEPTHS = (4, 2)
"""Candidate depths of the slim dense blocks: the paper's 4, and 2, which measured as accurate with less memory.

Depth 2 is chosen if at depth 4 the width would be below half of nnU-Net's."""
FEWEST_CHANNELS = 4
"""Smallest width of a stage, the smallest group of group normalisation. If nnU-Net is narrower, its width is used."""
ATTENTION_TOKENS = (4096, 2048, 1024, 512, 256)  # candidates, in the order tried
ATTENTION_SHARE = 0.05
"""Largest share of the denoiser's FLOPs for attention at one stage; twice that for all stages together."""
EMA_DECAY = 0.9999
"""Decay of the moving average in long trainings. In shorter ones the warm-up (1 + n) / (10 + n) limits the decay, so that
the average covers about the last ninth of the steps."""


@dataclass(frozen=True)
class Sized:
    """A chosen denoiser, with the reasons for the choice.

    Attributes:
        settings: settings for the plans.
        parts: width in 32nds of nnU-Net's.
        cost: cost of its training step at the plan's batch, in half precision if it will train on a GPU.
        reasons: setting -> (value that the rule depends on, rule), as text.
        channels: number of image channels, in the cascade including those of the previous stage.
    """

    settings: DiffusionSettings
    parts: int
    cost: Cost
    reasons: Mapping[str, tuple[str, str]]
    channels: int


def width_at(parts: int, features: tuple[int, ...]) -> tuple[int, ...]:
    """Return `parts` 32nds of nnU-Net's width at each stage, but at least `FEWEST_CHANNELS`."""
    return tuple(max(min(FEWEST_CHANNELS, width), round(width * parts / 32)) for width in features)


def narrowest(
    configuration: Mapping[str, Any], channels: int, heads: int, regions: bool, denoiser: str = DENOISERS[0]
) -> tuple[DiffusionSettings, dict[str, tuple[str, str]]]:
    """Return the settings of the smallest denoiser, which must fit with the chosen patch, and the reasons."""
    base = base_settings(configuration, HALF, regions, denoiser)
    settings, reasons = with_attention(configuration, base, channels, heads)
    width = width_at(WIDTHS[0], tuple(topology_of(configuration)["features_per_stage"]))
    return replace(settings, features_per_stage=width, sdb_depth=SDB_DEPTHS[-1]), reasons


def narrowest_sized(
    configuration: Mapping[str, Any],
    channels: int,
    heads: int,
    regions: bool,
    *,
    gpu: bool = True,
    denoiser: str = DENOISERS[0],
) -> Sized:
    """Return the smallest denoiser that `sized` may choose; the arguments are the same."""
    settings, reasons = narrowest(configuration, channels, heads, regions, denoiser)
    batch = int(configuration["batch_size"])
    cost = denoiser_cost(configuration, settings, channels, heads, batch, amp=gpu, gpu=gpu)
    return Sized(settings, WIDTHS[0], cost, reasons, channels)


def base_settings(
    configuration: Mapping[str, Any], parts: int, regions: bool, denoiser: str = DENOISERS[0]
) -> DiffusionSettings:
    """Return the settings at a width; all others are the best measured ones (`default_settings`)."""
    features = tuple(topology_of(configuration)["features_per_stage"])
    return replace(
        default_settings(configuration, denoiser=denoiser),
        features_per_stage=width_at(parts, features),
        ema_decay=EMA_DECAY,
        regions=regions,
    )


def sized(
    configuration: Mapping[str, Any],
    channels: int,
    heads: int,
    regions: bool,
    need: Callable[[Cost, DiffusionSettings], float],
    *,
    gpu: bool = True,
    denoiser: str = DENOISERS[0],
) -> Sized:
    """Return the widest denoiser whose training step fits at the configuration's patch and batch.

    Args:
        configuration: resolved configuration of the plans, with patch, batch and architecture.
        channels: number of image channels, in the cascade including those of the previous stage.
        heads: K.
        regions: whether the heads are regions.
        need: returns the share of the target that a denoiser of this cost takes; at most 1 fits. It grows with the width.
        gpu: True if the denoiser will train on a GPU, in half precision and with a workspace.
        denoiser: which one.

    Raises:
        ValueError: not even an eighth of nnU-Net's width fits.
    """
    base = base_settings(configuration, HALF, regions, denoiser)
    settings, reasons = with_attention(configuration, base, channels, heads)
    batch, features = int(configuration["batch_size"]), tuple(topology_of(configuration)["features_per_stage"])

    def at(depth: int, parts: int) -> tuple[Sized, float]:
        candidate = replace(settings, features_per_stage=width_at(parts, features), sdb_depth=depth)
        cost = denoiser_cost(configuration, candidate, channels, heads, batch, amp=gpu, gpu=gpu)
        return Sized(candidate, parts, cost, reasons, channels), need(cost, candidate)

    deep, shallow = SDB_DEPTHS
    # with small datasets nnU-Net's full width often fits, so try it first
    if (widest := at(deep, WIDTHS[-1]))[1] <= 1:
        return widest[0]
    if (half := at(deep, HALF))[1] <= 1:
        return _widest(lambda parts: at(deep, parts), half, widest)
    least, widest = at(shallow, WIDTHS[0]), at(shallow, WIDTHS[-1])
    if least[1] > 1:
        raise ValueError("not even a denoiser of an eighth of nnU-Net's width fits")
    found = widest[0] if widest[1] <= 1 else _widest(lambda parts: at(shallow, parts), least, widest)
    as_wide, needed = at(deep, found.parts)
    return as_wide if needed <= 1 else found


def _widest(at: Callable[[int], tuple[Sized, float]], low: tuple[Sized, float], high: tuple[Sized, float]) -> Sized:
    """Return the widest denoiser between `low`, which fits, and `high`, which does not; each is paired with its need."""
    tried = 0
    while (gap := high[0].parts - low[0].parts) > 1:
        # need is nearly linear in the width: interpolate to the target. Every third guess bisects, in case it is not linear
        line = math.floor((1 - low[1]) / (high[1] - low[1]) * gap)
        tried += 1
        guess = gap // 2 if tried % 3 == 0 else line
        found = at(low[0].parts + min(max(guess, 1), gap - 1))
        low, high = (found, high) if found[1] <= 1 else (low, found)
    return low[0]


def with_attention(
    configuration: Mapping[str, Any], settings: DiffusionSettings, channels: int, heads: int
) -> tuple[DiffusionSettings, dict[str, tuple[str, str]]]:
    """Return the settings with stages and tokens of parameter-shared attention, and the reasons; HiDiff has its defaults.

    The number of tokens, to which keys and values are pooled, is the largest whose attention takes a small share of the
    denoiser's FLOPs. A stage that exceeds this share even with the fewest tokens has no attention.
    """
    if settings.is_hidiff:
        rule = "HiDiff: attention at the lowest stage alone"
        return settings, dict.fromkeys(("attention_tokens", "attention_stages"), ("-", rule))
    tokens_of = stage_tokens(configuration)
    whole = denoiser_cost(configuration, settings, channels, heads, 2, amp=False).flops / 2
    limit = ATTENTION_SHARE * whole
    widths = settings.features_per_stage

    def flops(stage: int, most: int) -> float:
        keys = math.prod(pooled_size(tokens_of[stage], most))
        # two flows, each with two matrix products in the forward and five in the backward pass
        return 2 * 2 * (2 + 5) * math.prod(tokens_of[stage]) * keys * widths[stage]

    stages = [stage for stage in range(1, len(widths)) if flops(stage, ATTENTION_TOKENS[-1]) <= limit]
    tokens = next(
        (
            most
            for most in ATTENTION_TOKENS
            if all(flops(stage, most) <= limit for stage in stages)
            and sum(flops(stage, most) for stage in stages) <= 2 * limit
        ),
        ATTENTION_TOKENS[-1],
    )
    stages = stages or [len(widths) - 1]
    seen = ", ".join(f"{stage}: {math.prod(tokens_of[stage])}" for stage in range(1, len(widths)))
    rule = (
        f"attention at most {ATTENTION_SHARE:.0%} of the denoiser's FLOPs at a stage, {2 * ATTENTION_SHARE:.0%} in all"
    )
    reasons = {"attention_tokens": (f"tokens at stages {seen}", rule), "attention_stages": ("the same", rule)}
    return replace(settings, attention_tokens=tokens, attention_stages=tuple(stages)), reasons


def stage_tokens(configuration: Mapping[str, Any]) -> list[tuple[int, ...]]:
    """Return the size in voxels of each stage's feature maps for the configuration's patch."""
    size = tuple(int(edge) for edge in configuration["patch_size"])
    sizes = []
    for stride in topology_of(configuration)["strides"]:
        steps = (stride,) * len(size) if isinstance(stride, int) else stride
        size = tuple(-(-edge // step) for edge, step in zip(size, steps, strict=True))
        sizes.append(size)
    return sizes
