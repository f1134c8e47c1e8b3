"""Figure of one predicted case: three planes through its most uncertain place, with all samples; and a sheet of all cases."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray
from scipy import ndimage

PANEL_INCHES = 2.5
SMOOTHING_VOXELS = 1.0
"""The most uncertain place is that of the smoothed map, not a single voxel."""
SEGMENTATION, SAMPLE = "#ff9f1c", "#4cc9f0"
SHEET_COLUMNS = 4


@dataclass(frozen=True, eq=False)
class Case:
    """What a figure shows. All arrays have one shape (*image) of three axes; a 2D image has (1, H, W).

    Attributes:
        name: name of the case.
        image: intensities.
        segmentation: label map.
        uncertainty: entropy in nats.
        samples: label maps of the samples.
        spacing_mm: voxel size along each axis.
        text: further words for the title, such as the score.
    """

    name: str
    image: NDArray
    segmentation: NDArray
    uncertainty: NDArray
    samples: Sequence[NDArray]
    spacing_mm: Sequence[float]
    text: str = ""


def most_uncertain(uncertainty: NDArray) -> tuple[int, ...]:
    """Return the voxel at which the smoothed map is largest."""
    smooth = ndimage.gaussian_filter(uncertainty.astype(np.float32), SMOOTHING_VOXELS)
    return tuple(int(place) for place in np.unravel_index(int(smooth.argmax()), smooth.shape))


def uncertainty_figure(case: Case, path: str | Path) -> None:
    """Draw contours of segmentation and samples, and the uncertainty, in the planes through the most uncertain place.

    Args:
        case: what to draw.
        path: output file, a PNG whatever its name.
    """
    place = most_uncertain(case.uncertainty)
    planes = [axis for axis in range(3) if all(case.image.shape[other] > 1 for other in range(3) if other != axis)]
    planes = planes or [0]
    figure = Figure(figsize=(PANEL_INCHES * len(planes) + 0.6, PANEL_INCHES * 2 + 0.8), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, len(planes), squeeze=False)
    high = max(float(case.uncertainty.max()), 1e-6)
    for column, axis in enumerate(planes):
        _draw_image(axes[0, column], case, axis, place)
        _draw_contours(axes[0, column], case, axis, place[axis])
        _draw_image(axes[1, column], case, axis, place)
        shown = np.ma.masked_less(_plane(case.uncertainty, axis, place[axis]), 0.02 * high)
        overlay = axes[1, column].imshow(shown, cmap="magma", vmin=0, vmax=high, aspect=_aspect(case, axis), alpha=0.75)
        axes[0, column].set_title(f"axis {axis + 1}, slice {place[axis] + 1}" if len(planes) > 1 else "", fontsize=8)
    bar = figure.colorbar(overlay, ax=list(axes.ravel()), fraction=0.03, pad=0.01)
    bar.set_label("entropy (nats)", fontsize=7)
    bar.ax.tick_params(labelsize=6)
    handles = [Line2D([], [], color=SEGMENTATION, label="segmentation")]
    if case.samples:
        handles.append(Line2D([], [], color=SAMPLE, label=f"{len(case.samples)} samples"))
    axes[0, 0].legend(handles=handles, fontsize=6, loc="lower left", framealpha=0.6)
    figure.suptitle(f"{case.name}   {case.text}".rstrip(), fontsize=9)
    figure.savefig(path, format="png")


def contact_sheet(cases: Sequence[tuple[str, Path]], path: str | Path) -> None:
    """Draw the figures of many cases on one sheet, in their order.

    Args:
        cases: title and PNG file of each case, at least one.
        path: output file, a PNG whatever its name.
    """
    from matplotlib.image import imread

    columns = min(SHEET_COLUMNS, len(cases))
    lines = -(-len(cases) // columns)
    figure = Figure(figsize=(3.4 * columns, 2.7 * lines), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, (title, picture) in zip(axes, cases, strict=False):
        # half of the resolution is enough here, and a quarter of the memory
        axis.imshow(imread(picture)[::2, ::2])
        axis.set_title(title, fontsize=8)
    figure.savefig(path, format="png")


def _plane(volume: NDArray, axis: int, number: int) -> NDArray:
    return np.take(volume, number, axis)


def _aspect(case: Case, axis: int) -> float:
    height, width = (each for other, each in enumerate(case.spacing_mm) if other != axis)
    return height / width


def _draw_image(axes: Axes, case: Case, axis: int, place: Sequence[int]) -> None:
    shown = _plane(case.image, axis, place[axis]).astype(np.float64)
    low, high = np.percentile(shown, (1, 99))
    axes.imshow(shown, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), aspect=_aspect(case, axis))
    axes.set(xticks=[], yticks=[])
    y, x = (each for other, each in enumerate(place) if other != axis)
    axes.plot(x, y, marker="+", color="white", markersize=6, markeredgewidth=0.8)


def _draw_contours(axes: Axes, case: Case, axis: int, number: int) -> None:
    drawn = [(sample, SAMPLE, 0.7) for sample in case.samples] + [(case.segmentation, SEGMENTATION, 1.2)]
    for label_map, colour, width in drawn:
        labels = _plane(label_map, axis, number)
        for label in np.unique(labels[labels > 0]):
            axes.contour(labels == label, levels=[0.5], colors=[colour], linewidths=width)
