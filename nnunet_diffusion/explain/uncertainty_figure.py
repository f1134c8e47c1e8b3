"""Figure of one predicted case: planes through its most uncertain place, with all samples; and a sheet of all cases.

Planes are shown in stored order, whatever orientation the header tells: rows and columns are array indices, the first at the
top left. `z = 15` is the index along the last axis of the file, counted from 0 as in SimpleITK, nibabel and 3D Slicer
(ITK-SNAP counts from 1).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.transforms import Bbox
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

PANEL_INCHES, ONLY_PANEL_INCHES = 3.2, 4.8  # of a volume, and of an image with one plane
LEGEND_INCHES = 0.16  # height of a line
SMOOTHING_VOXELS = 1.0
"""The most uncertain place is that of the smoothed map, not a single voxel."""
COLOURS = ("#e69f00", "#56b4e9", "#009e73", "#cc79a7", "#f0e442", "#d55e00", "#0072b2")
"""Of the classes, again from the first after the last; told apart by colour-blind readers (Okabe and Ito 2008)."""
SHEET_COLUMNS = 4
SHEET_INCHES, MOST_TILE_INCHES = 20.0, 10.0  # width of the sheet, and at most of a tile
PANELS = "panels"  # entry of the PNG: left, top, right and bottom pixel of the panels, without title and legend


@dataclass(frozen=True, eq=False)
class Case:
    """What a figure shows. All arrays have one shape (*image) of three axes; a 2D image has (1, H, W).

    Attributes:
        title: title of the figure.
        image: intensities.
        segmentation: label map.
        uncertainty: entropy in nats.
        samples: label maps of the samples.
        spacing_mm: voxel size along each axis.
        classes: text in the legend of each class or region -> its labels.
        highest: entropy at the top of the scale; None for the largest of this case.
    """

    title: str
    image: NDArray
    segmentation: NDArray
    uncertainty: NDArray
    samples: Sequence[NDArray]
    spacing_mm: Sequence[float]
    classes: Mapping[str, Sequence[int]]
    highest: float | None = None


def most_uncertain(uncertainty: NDArray) -> tuple[int, ...]:
    """Return the voxel at which the smoothed map is largest."""
    smooth = ndimage.gaussian_filter(uncertainty.astype(np.float32), SMOOTHING_VOXELS)
    return tuple(int(place) for place in np.unravel_index(int(smooth.argmax()), smooth.shape))


def plane_name(axis: int, number: int) -> str:
    """Return the name of a plane, such as `z = 15`; arrays of nnU-Net's readers have the axes z, y, x."""
    return f"{'zyx'[axis]} = {number}"


def contour_width(shape: Sequence[int]) -> float:
    """Return the width of contours in points: thin in planes of many pixels, so that they do not cover fine structures."""
    return min(max(80 / max(shape), 0.9), 1.8)


def fading(opacity: float) -> ListedColormap:
    """Return the colours of a map over an image, whose opacity grows from 0 and is full from half of the scale."""
    colours = colormaps["plasma"](np.linspace(0, 1, 256))
    colours[:, 3] = np.linspace(0, 2 * opacity, 256).clip(max=opacity)
    return ListedColormap(colours)


def highest_entropy(heads: int, regions: bool) -> float | None:
    """Return the entropy, in nats, of equally likely classes or regions, the same for all cases; None for 0 heads."""
    if not heads:
        return None
    return heads * math.log(2) if regions else math.log(heads)


def uncertainty_figure(case: Case, path: str | Path) -> Figure:
    """Draw contours of segmentation and samples, and the uncertainty, in the planes through the most uncertain place.

    Args:
        case: what to draw.
        path: output file, a PNG whatever its name.

    Returns:
        The figure.
    """
    place = most_uncertain(case.uncertainty)
    planes = [axis for axis in range(3) if all(case.image.shape[other] > 1 for other in range(3) if other != axis)]
    planes = planes or [0]
    figure = Figure(figsize=_inches(case, len(planes)), dpi=130, layout="constrained")
    FigureCanvasAgg(figure)
    # contours above the uncertainty, or beside it if there is one plane
    axes = figure.subplots(2, len(planes), squeeze=False) if len(planes) > 1 else figure.subplots(1, 2).reshape(2, 1)
    for column, axis in enumerate(planes):
        for panel in axes[:, column]:
            _draw_image(panel, case, axis, place)
        _draw_contours(axes[0, column], case, axis, place[axis])
        overlay = _draw_uncertainty(axes[1, column], case, axis, place[axis])
        if case.image.shape[axis] > 1:
            axes[0, column].set_title(plane_name(axis, place[axis]), fontsize=11)
    draw_entropy_bar(figure, overlay, list(axes.ravel()))
    figure.legend(handles=_handles(case), loc="outside lower center", ncols=2, fontsize=7.5, frameon=False)
    figure.suptitle(case.title, fontsize=11)
    figure.draw_without_rendering()  # places the panels
    box = Bbox.union([panel.get_tightbbox() for panel in axes.ravel()])
    corners = (box.x0, figure.bbox.height - box.y1, box.x1, figure.bbox.height - box.y0)
    figure.savefig(path, format="png", metadata={PANELS: " ".join(f"{corner:.0f}" for corner in corners)})
    return figure


def draw_entropy_bar(figure: Figure, shown: AxesImage, axes: Axes | list[Axes]) -> None:
    """Draw the colour bar of a map of entropy beside its panels."""
    bar = figure.colorbar(shown, ax=axes, fraction=0.046, pad=0.02)
    bar.set_label("entropy (nats)", fontsize=8)
    bar.ax.tick_params(labelsize=7)


def contact_sheet(cases: Sequence[tuple[str, Path]], headline: str, path: str | Path) -> Figure:
    """Draw the panels of the figures of many cases on one sheet, in their order.

    Args:
        cases: title and PNG file of each case, at least one.
        headline: title of the sheet.
        path: output file, a PNG whatever its name.

    Returns:
        The figure.
    """
    pictures = [_panels(picture) for _, picture in cases]
    columns = min(SHEET_COLUMNS, math.ceil(math.sqrt(len(cases))))
    lines = math.ceil(len(cases) / columns)
    width = min(SHEET_INCHES / columns, MOST_TILE_INCHES)
    height = width * max(len(picture) / picture.shape[1] for picture in pictures) + 0.4
    figure = Figure(figsize=(width * columns, height * lines + 0.5), dpi=110)
    figure.set_layout_engine("constrained", w_pad=0.15, h_pad=0.1)
    FigureCanvasAgg(figure)
    axes = figure.subplots(lines, columns, squeeze=False).ravel()
    for axis in axes:
        axis.set_axis_off()
    for axis, (title, _), picture in zip(axes, cases, pictures, strict=False):
        axis.imshow(picture)
        axis.set_title(title, fontsize=15)
    figure.suptitle(headline, fontsize=18)
    figure.savefig(path, format="png")
    return figure


def _inches(case: Case, planes: int) -> tuple[float, float]:
    """Return width and height of the figure."""
    around = 0.6 + LEGEND_INCHES * math.ceil(len(_handles(case)) / 2)
    if planes > 1:
        return PANEL_INCHES * planes + 0.8, PANEL_INCHES * 2 + around
    _, height, width = (edge * size for edge, size in zip(case.spacing_mm, case.image.shape, strict=True))
    return ONLY_PANEL_INCHES * 2 + 0.8, ONLY_PANEL_INCHES * min(max(height / width, 0.4), 2.0) + around


def _panels(path: Path) -> NDArray:
    with Image.open(path) as picture:
        box = picture.info.get(PANELS)
        whole = picture.convert("RGB")
    if box is None:
        return np.asarray(whole)
    left, top, right, bottom = map(int, box.split())
    return np.asarray(whole.crop((left, top, right, bottom)))


def _plane(volume: NDArray, axis: int, number: int) -> NDArray:
    return np.take(volume, number, axis)


def _aspect(case: Case, axis: int) -> float:
    height, width = (each for other, each in enumerate(case.spacing_mm) if other != axis)
    return height / width


def cross(x: Iterable[float], y: Iterable[float], label: str = "") -> Line2D:
    """Return white crosses with a black edge at these columns and rows."""
    edge = [withStroke(linewidth=2.6, foreground="black")]
    return Line2D(
        [*x], [*y], marker="+", color="white", linestyle="", markersize=8, markeredgewidth=1.2, path_effects=edge,
        zorder=10, label=label,
    )  # fmt: skip


def _draw_image(axes: Axes, case: Case, axis: int, place: Sequence[int]) -> None:
    shown = _plane(case.image, axis, place[axis]).astype(np.float64)
    low, high = np.percentile(shown, (1, 99))
    axes.imshow(shown, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), aspect=_aspect(case, axis))
    axes.set(xticks=[], yticks=[])
    y, x = (each for other, each in enumerate(place) if other != axis)
    axes.add_line(cross([x], [y]))


def _draw_contours(axes: Axes, case: Case, axis: int, number: int) -> None:
    width = contour_width(_plane(case.image, axis, number).shape)
    drawn = [(sample, "dashed", 0.65 * width) for sample in case.samples] + [(case.segmentation, "solid", width)]
    for label_map, style, width in drawn:
        plane = _plane(label_map, axis, number)
        for colour, labels in zip(cycle(COLOURS), case.classes.values()):
            mask = np.isin(plane, labels)
            if mask.any() and not mask.all():
                axes.contour(mask, levels=[0.5], colors=[colour], linewidths=width, linestyles=style)


def _draw_uncertainty(axes: Axes, case: Case, axis: int, number: int) -> AxesImage:
    high = max(float(case.uncertainty.max()), 1e-6) if case.highest is None else case.highest
    shown = _plane(case.uncertainty, axis, number)
    return axes.imshow(shown, cmap=fading(0.9), vmin=0, vmax=high, aspect=_aspect(case, axis))


def _handles(case: Case) -> list[Line2D]:
    """Return the legend: what the styles are, then the classes."""
    segmentation = Line2D([], [], color="black", label="segmentation")
    samples = Line2D([], [], color="black", linestyle="dashed", linewidth=1, label=f"{len(case.samples)} samples")
    classes = [
        Line2D([], [], color=colour, linewidth=3, label=text) for colour, text in zip(cycle(COLOURS), case.classes)
    ]
    return [segmentation, *([samples] if case.samples else []), cross([], [], "most uncertain place"), *classes]
