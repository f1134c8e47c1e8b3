"""Figure of a sweep: mean and variance of Dice against the number of network evaluations (PGDiffSeg Fig. 10 and 11)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullLocator

from nnunet_diffusion.evaluation.sweep_results import NNUNET, NOISE, PRESEGMENTATION, Summary
from nnunet_diffusion.explain.figures import LOG_SCALE_FROM_RATIO

TITLES = {NOISE: "from noise", PRESEGMENTATION: "from nnU-Net"}
MARKERS = "osD^vPX"
NNUNET_COLOUR = "#404040"
LABELS_APART = 1.25  # ratio of two numbers of evaluations that both have a label


def sweep_figure(summaries: Sequence[Summary], title: str, path: str | Path) -> Figure:
    """Draw mean (above) and variance (below) of Dice, one column for each start and one line for each sampler.

    A dashed line is nnU-Net's mean. The number of evaluations has a logarithmic axis; the variance has one if it is positive
    everywhere and spans two decades. With one seed there is no variance.

    Args:
        summaries: of a sweep; nnU-Net's is the dashed line, if it is among them.
        title: title of the figure.
        path: output file; the ending selects the format.

    Returns:
        The figure.

    Raises:
        ValueError: `summaries` has no reverse process.
    """
    denoised = [each for each in summaries if each.start in TITLES]
    if not denoised:
        raise ValueError("summaries has no reverse process: give at least one")
    nnunet = next((each.mean for each in summaries if each.sampler == NNUNET.sampler), math.nan)
    starts = [start for start in TITLES if any(each.start == start for each in denoised)]
    samplers = list(dict.fromkeys(each.sampler for each in denoised))
    figure = Figure(figsize=(1.6 + 4.2 * len(starts), 6.6), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(starts), sharex="col", sharey="row", squeeze=False)
    for column, start in enumerate(starts):
        here = [each for each in denoised if each.start == start]
        _draw_column(axes[0, column], axes[1, column], here, samplers)
        axes[0, column].axhline(nnunet, color=NNUNET_COLOUR, linestyle="--", linewidth=1.4, label="nnU-Net", zorder=3)
        axes[0, column].set_title(f"{TITLES[start]} (T′ = {here[0].start_step})", fontsize=10)
    axes[0, 0].set_ylabel("Dice, mean over seeds", fontsize=9)
    axes[1, 0].set_ylabel("variance over seeds", fontsize=9)
    _scale_variance(axes[1, 0], [each.variance for each in denoised])
    handles = {line.get_label(): line for axis in axes[0] for line in axis.lines}
    figure.legend(
        handles=list(handles.values()), loc="outside lower center", ncols=3 * len(starts), fontsize=8, frameon=False
    )
    figure.suptitle(title, fontsize=10)
    figure.savefig(path)
    return figure


def _draw_column(mean: Axes, variance: Axes, summaries: Sequence[Summary], samplers: Sequence[str]) -> None:
    for place, sampler in enumerate(samplers):
        below = len(samplers) - 1 - place  # a curve below equal ones is wider, so that its rim shows
        own = sorted((each for each in summaries if each.sampler == sampler), key=lambda each: each.evaluations)
        for axis, values in ((mean, [each.mean for each in own]), (variance, [each.variance for each in own])):
            axis.plot(
                [each.evaluations for each in own], values, color=f"C{place}", label=sampler,
                marker=MARKERS[place % len(MARKERS)], markersize=4 + 2 * below, linewidth=1.2 + 0.9 * below,
            )  # fmt: skip
    counts = _apart({each.evaluations for each in summaries})
    for axis in (mean, variance):
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(FixedLocator(counts))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter("{x:.0f}")
        axis.tick_params(labelsize=8)
        axis.grid(alpha=0.25, linewidth=0.6)
    variance.set_xlabel("network evaluations", fontsize=9)


def _apart(counts: set[int]) -> list[int]:
    """Return the counts whose labels do not overlap on a logarithmic axis, in ascending order."""
    kept: list[int] = []
    for count in sorted(counts):
        if not kept or count >= LABELS_APART * kept[-1]:
            kept.append(count)
    return kept


def _scale_variance(axis: Axes, values: Sequence[float]) -> None:
    known = [value for value in values if not math.isnan(value)]
    if not known:
        axis.text(
            0.5,
            0.5,
            "one seed: no variance",
            transform=axis.transAxes,
            ha="center",
            va="center",
            fontsize=8,
            color="0.5",
        )
        axis.set_yticks([])
    elif min(known) > 0 and max(known) / min(known) > LOG_SCALE_FROM_RATIO:
        axis.set_yscale("log")
    else:
        axis.set_ylim(bottom=0)
        axis.ticklabel_format(axis="y", style="sci", scilimits=(-3, 3))
