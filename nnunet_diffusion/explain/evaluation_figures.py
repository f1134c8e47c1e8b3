"""Figures of an evaluation: reliability diagram, risk against coverage, score against Dice, and single cases."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import BinaryIO

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from nnunet_diffusion.evaluation.failure_detection import risk_coverage
from nnunet_diffusion.explain.figures import ERROR_COLOURS, error_map
from nnunet_diffusion.explain.uncertainty_figure import contour_width, draw_entropy_bar, plane_name

COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:purple", "tab:brown", "tab:pink")
PANEL_INCHES = 2.6
FEWEST_VOXELS = 50
"""Of a bin in the line of a reliability diagram; the share of right ones among fewer is mostly chance."""
CONTOUR_COLOURS = {"truth": "#3ddc84", "other raters": "#4dd0e1", "prediction": "#ff9f1c"}
ERROR_NAMES = {
    "correct (A∩B)": "right", "missed (A−B)": "missed", "over-segmented (B−A)": "too much", "wrong class": "wrong class",
}  # fmt: skip


def png(figure: Figure) -> bytes:
    """Return a figure as the content of a PNG file."""
    buffer: BinaryIO = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", dpi=130)
    buffer.seek(0)
    return buffer.read()


def reliability_diagram(series: Mapping[str, Sequence[Sequence[float]]]) -> Figure:
    """Draw accuracy against confidence, and below it the number of voxels of each bin.

    The line leaves out bins of fewer than `FEWEST_VOXELS`, unless all are.

    Args:
        series: name -> voxels, sums of confidence, and numbers of right voxels, each (bins,).
    """
    figure = Figure(figsize=(4.2, 4.4), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle="--", label="perfectly calibrated")
    start = 1.0
    for colour, (name, sums) in zip(COLOURS, series.items(), strict=False):
        voxels, confidence, right = (np.array(each, dtype=np.float64) for each in sums)
        enough = voxels >= FEWEST_VOXELS
        there = enough if enough.any() else voxels > 0
        mean, share = confidence[there] / voxels[there], right[there] / voxels[there]
        upper.plot(mean, share, color=colour, marker="o", markersize=3, linewidth=1.2, label=name)
        edges = np.linspace(0, 1, len(voxels) + 1)
        start = min([start, *edges[:-1][voxels > 0]])
        lower.stairs(voxels, edges, color=colour, linewidth=1.2)
    lower.axhline(FEWEST_VOXELS, color="0.5", linewidth=1, linestyle=":", label="fewest for a point above")
    lower.legend(fontsize=6, frameon=False, loc="upper left")
    upper.set(ylabel="share of right voxels", ylim=(0, 1.02), xlim=(max(0.0, start - 0.05), 1.0))
    upper.legend(fontsize=7, frameon=False, loc="upper left")
    lower.set(xlabel="probability of the most likely class", ylabel="voxels", yscale="log")
    for axis in (upper, lower):
        axis.grid(alpha=0.25)
        axis.tick_params(labelsize=8)
    return figure


def risk_coverage_figure(series: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> Figure:
    """Draw the mean risk of the most trusted cases against their share.

    Args:
        series: name -> scores and risks (1 - mean Dice) of the cases.
    """
    figure = Figure(figsize=(4.2, 3.4), layout="constrained")
    axis = figure.subplots()
    for colour, (name, (scores, risks)) in zip(COLOURS, series.items(), strict=False):
        coverage = np.arange(1, len(risks) + 1) / len(risks)
        axis.plot(coverage, risk_coverage(scores, risks), color=colour, linewidth=1.4, label=name)
        optimal = risk_coverage(-np.asarray(risks), risks)
        axis.plot(coverage, optimal, color=colour, linewidth=1, linestyle=":", label=f"{name}: best possible")
        axis.axhline(float(np.mean(risks)), color=colour, linewidth=1, linestyle="--", label=f"{name}: at random")
    axis.set(xlabel="share of the cases that is kept, most trusted first", ylabel="mean of 1 - Dice", xlim=(0, 1))
    axis.set_ylim(bottom=0)
    axis.legend(fontsize=6, frameon=False)
    axis.grid(alpha=0.25)
    axis.tick_params(labelsize=8)
    return figure


def score_figure(series: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> Figure:
    """Draw the Dice of each case against its score; the arguments are those of `risk_coverage_figure`."""
    figure = Figure(figsize=(4.2, 3.4), layout="constrained")
    axis = figure.subplots()
    for colour, (name, (scores, risks)) in zip(COLOURS, series.items(), strict=False):
        axis.scatter(scores, 1 - np.asarray(risks), s=14, alpha=0.7, color=colour, label=name, edgecolors="none")
    axis.set(xlabel="score of the case, known without the truth", ylabel="mean Dice", ylim=(-0.02, 1.02))
    axis.legend(fontsize=7, frameon=False)
    axis.grid(alpha=0.25)
    axis.tick_params(labelsize=8)
    return figure


def case_figure(
    image: NDArray | None,
    truth: NDArray,
    prediction: NDArray,
    uncertainty: NDArray | None,
    spacing_mm: Sequence[float],
    highest: float | None = None,
    raters: Sequence[NDArray] = (),
) -> Figure:
    """Draw the slice of a case with most errors: image, contours of truth and prediction, errors, and entropy.

    Args:
        image: intensities (*image), 2D as (1, H, W); None if it is not at hand.
        truth: label map (*image).
        prediction: label map (*image).
        uncertainty: entropy in nats (*image); None if it is not at hand.
        spacing_mm: voxel size along each axis.
        highest: entropy at the top of the scale; None for the largest of this slice.
        raters: label maps (*image) of further raters.
    """
    number = worst_slice(truth, prediction)
    true, predicted = truth[number], prediction[number]
    background = np.zeros(true.shape) if image is None else image[number].astype(np.float64)
    where = f" ({plane_name(0, number)})" if len(truth) > 1 else ""
    panels = [f"image and contours{where}", "errors"] + ["uncertainty"] * (uncertainty is not None)
    height, width = true.shape[0] * spacing_mm[1], true.shape[1] * spacing_mm[2]
    aspect = min(max(height / width, 0.4), 2.5)
    figure = Figure(figsize=(PANEL_INCHES * len(panels), PANEL_INCHES * aspect + 0.6), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(panels)))
    pixel = spacing_mm[1] / spacing_mm[2]
    low, high = np.percentile(background, (1, 99))
    axes[0].imshow(background, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), aspect=pixel)
    others = [("other raters", rater[number]) for rater in raters]
    _draw_contours(axes[0], [*others, ("truth", true), ("prediction", predicted)])
    errors = error_map(predicted, true)
    axes[1].imshow(errors, aspect=pixel, interpolation="nearest")
    there = [key for key in ERROR_NAMES if (errors == ERROR_COLOURS[key]).all(-1).any()]
    _draw_legend(axes[1], {ERROR_NAMES[key]: "#{:02x}{:02x}{:02x}".format(*ERROR_COLOURS[key]) for key in there})
    if uncertainty is not None:
        shown = axes[2].imshow(uncertainty[number], cmap="magma", vmin=0, vmax=highest, aspect=pixel)
        draw_entropy_bar(figure, shown, axes[2])
    for axis, title in zip(axes, panels, strict=True):
        axis.set_title(title, fontsize=8)
        axis.set(xticks=[], yticks=[])
    return figure


def _draw_contours(axes: Axes, label_maps: Sequence[tuple[str, NDArray]]) -> None:
    for name, labels in label_maps:
        for label in np.unique(labels[labels > 0]):
            width = contour_width(labels.shape)
            axes.contour(labels == label, levels=[0.5], colors=[CONTOUR_COLOURS[name]], linewidths=width)
    _draw_legend(axes, {name: CONTOUR_COLOURS[name] for name, labels in label_maps if labels.any()})


def _draw_legend(axes: Axes, colours: Mapping[str, str]) -> None:
    """Draw a legend below the panel: name -> colour."""
    handles = [Patch(facecolor=colour, edgecolor="0.4", linewidth=0.5, label=name) for name, colour in colours.items()]
    if handles:
        axes.legend(
            handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0), ncols=4, fontsize=6, frameon=False,
            handlelength=1, columnspacing=1, handletextpad=0.5,
        )  # fmt: skip


def worst_slice(truth: NDArray, prediction: NDArray) -> int:
    """Return the place along the first axis with most wrong voxels; that with most foreground if none is wrong."""
    wrong = (truth != prediction).sum((1, 2))
    return int((wrong if wrong.any() else (truth > 0).sum((1, 2))).argmax())
