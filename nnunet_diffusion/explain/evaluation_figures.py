"""Figures of an evaluation: reliability diagram, risk against coverage, score against Dice, and single cases."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import BinaryIO

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from numpy.typing import NDArray

from nnunet_diffusion.evaluation.failure_detection import risk_coverage
from nnunet_diffusion.explain.figures import ERROR_COLOURS, error_map

COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:purple", "tab:brown", "tab:pink")
PANEL_INCHES = 2.6


def png(figure: Figure) -> bytes:
    """Return a figure as the content of a PNG file."""
    buffer: BinaryIO = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", dpi=130)
    buffer.seek(0)
    return buffer.read()


def reliability_diagram(series: Mapping[str, Sequence[Sequence[float]]]) -> Figure:
    """Draw accuracy against confidence, and below it the number of voxels of each bin.

    Args:
        series: name -> voxels, sums of confidence, and numbers of right voxels, each (bins,).
    """
    figure = Figure(figsize=(4.2, 4.4), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.plot([0, 1], [0, 1], color="0.6", linewidth=1, linestyle="--", label="perfectly calibrated")
    start = 1.0
    for colour, (name, sums) in zip(COLOURS, series.items(), strict=False):
        voxels, confidence, right = (np.array(each, dtype=np.float64) for each in sums)
        there = voxels > 0
        mean = confidence[there] / voxels[there]
        start = min(start, float(mean.min())) if there.any() else start
        upper.plot(
            mean, right[there] / voxels[there], color=colour, marker="o", markersize=3, linewidth=1.2, label=name
        )
        edges = np.linspace(0, 1, len(voxels) + 1)
        lower.stairs(voxels, edges, color=colour, linewidth=1.2)
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
    image: NDArray | None, truth: NDArray, prediction: NDArray, uncertainty: NDArray | None, spacing_mm: Sequence[float]
) -> Figure:
    """Draw the slice of a case with most errors: image, contours of truth and prediction, errors, and uncertainty.

    Args:
        image: intensities (*image), 2D as (1, H, W); None if it is not at hand.
        truth: label map (*image).
        prediction: label map (*image).
        uncertainty: map (*image); None if it is not at hand.
        spacing_mm: voxel size along each axis.
    """
    number = worst_slice(truth, prediction)
    true, predicted = truth[number], prediction[number]
    background = np.zeros(true.shape) if image is None else image[number].astype(np.float64)
    panels = ["image and contours", "errors"] + ["uncertainty"] * (uncertainty is not None)
    height, width = true.shape[0] * spacing_mm[1], true.shape[1] * spacing_mm[2]
    aspect = min(max(height / width, 0.4), 2.5)
    figure = Figure(figsize=(PANEL_INCHES * len(panels), PANEL_INCHES * aspect + 0.45), layout="constrained")
    axes = np.atleast_1d(figure.subplots(1, len(panels)))
    low, high = np.percentile(background, (1, 99))
    axes[0].imshow(background, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), aspect=spacing_mm[1] / spacing_mm[2])
    for labels, colour in ((true, "#3ddc84"), (predicted, "#ff9f1c")):
        for label in np.unique(labels[labels > 0]):
            axes[0].contour(labels == label, levels=[0.5], colors=[colour], linewidths=1.0)
    axes[1].imshow(error_map(predicted, true), aspect=spacing_mm[1] / spacing_mm[2], interpolation="nearest")
    if uncertainty is not None:
        shown = axes[2].imshow(uncertainty[number], cmap="magma", vmin=0, aspect=spacing_mm[1] / spacing_mm[2])
        figure.colorbar(shown, ax=axes[2], fraction=0.046, pad=0.02).ax.tick_params(labelsize=6)
    for axis, title in zip(axes, panels, strict=True):
        axis.set_title(title, fontsize=8)
        axis.set(xticks=[], yticks=[])
    handles = [Patch(color="#3ddc84", label="truth"), Patch(color="#ff9f1c", label="prediction")]
    axes[0].legend(handles=handles, fontsize=6, loc="lower left", framealpha=0.6, handlelength=1)
    names = {"missed (A−B)": "missed", "over-segmented (B−A)": "too much", "wrong class": "wrong class"}
    if len(np.unique(truth[truth > 0])) < 2:
        del names["wrong class"]
    handles = [
        Patch(color="#{:02x}{:02x}{:02x}".format(*ERROR_COLOURS[key]), label=text) for key, text in names.items()
    ]
    axes[1].legend(handles=handles, fontsize=6, loc="lower left", framealpha=0.6, handlelength=1)
    return figure


def worst_slice(truth: NDArray, prediction: NDArray) -> int:
    """Return the place along the first axis with most wrong voxels; that with most foreground if none is wrong."""
    wrong = (truth != prediction).sum((1, 2))
    return int((wrong if wrong.any() else (truth > 0).sum((1, 2))).argmax())
