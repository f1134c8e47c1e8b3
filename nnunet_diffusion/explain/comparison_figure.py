"""Figures at print size: models side by side with their errors (PGDiffSeg Fig. 9), and the reverse process (Fig. 13)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.textpath import TextPath
from numpy.typing import NDArray

from nnunet_diffusion.explain.figures import (
    ERROR_COLOURS,
    LABEL_COLOURS,
    ReportRow,
    add_legends,
    check_rows,
    classes_confused,
    draw_row,
    error_map,
    show_labels,
    write_titles,
)
from nnunet_diffusion.explain.panel_blocks import save_figure

DPI = 300
FONT_POINTS = 7
MM_PER_INCH, MM_PER_POINT = 25.4, 25.4 / 72
LINE_MM = 3.2  # height of a line of text
GAP_MM, EDGE_MM = 0.8, 1.0  # between panels, and around them
UNDER_PANEL_MM = 4.5  # the Dice under a panel
LEAST_PANEL_MM = 14.0  # "Dice 0.934" has 13 mm: the texts of narrower panels would overlap
LEAST_PROCESS_MM = 170.0  # the two legends of the reverse process beside each other
PROCESS_LEGENDS_MM = 11.5
TALLEST, FLATTEST = 2.0, 0.4  # height / width of a panel
HANDLE_MM = 7.0  # colour and space beside a text of a legend


@dataclass(frozen=True, eq=False)
class ComparisonRow:
    """One case of the comparison. Label maps are integers (H, W).

    Attributes:
        label: label at the left of the row; it may have several lines.
        image: grey (H, W), or colours (H, W, 3) in 0..1, in 0..255 or up to the largest value.
        truth: label map.
        predictions: label map of each model.
        dice: Dice under the error map of each model.
        aspect: height / width of the image in mm.
    """

    label: str
    image: NDArray
    truth: NDArray
    predictions: Sequence[NDArray]
    dice: Sequence[float]
    aspect: float


@dataclass(frozen=True, eq=False)
class ProcessRow:
    """One case of the reverse process.

    Attributes:
        row: what is drawn.
        aspect: height / width of the image in mm.
    """

    row: ReportRow
    aspect: float


def comparison_figure(
    rows: Sequence[ComparisonRow],
    names: Sequence[str],
    paths: Sequence[Path],
    width_mm: float = 180.0,
    classes: Mapping[int, str] | None = None,
    note: str = "",
) -> Figure:
    """Draw image, truth and one error map per model with its Dice; one row per case.

    Args:
        rows: the cases, at least one.
        names: title of each model.
        paths: output files; the endings select the formats.
        width_mm: width of the figure. It is wider if the panels would be narrower than `LEAST_PANEL_MM`.
        classes: label -> name, for a legend of the truth's colours; None for no legend.
        note: ends the title of the legend, to say what the Dice is of.

    Returns:
        The figure.

    Raises:
        ValueError: `rows` is empty, or a row does not have a label map of the truth's shape and a Dice for each name.
        OSError: a file cannot be written.
    """
    _check_comparison(rows, names)
    confused = any(_confused(each, row.truth) for row in rows for each in row.predictions)
    kinds = {name: colour for name, colour in ERROR_COLOURS.items() if name != "wrong class" or confused}
    legends = {f"Errors: A = truth, B = prediction{note}": {k: _hex(kinds[k]) for k in kinds if k != "background"}}
    if classes:
        # labels beyond the list reuse its colours, as the panel of the truth does
        legends["Truth"] = {
            name: LABEL_COLOURS[(label - 1) % (len(LABEL_COLOURS) - 1) + 1] for label, name in classes.items()
        }
    width_mm = max(width_mm, _least_width(2 + len(names)))
    heights = [_legend_mm(colours, width_mm) for colours in legends.values()]
    page = _page(
        width_mm, ["Image", "Truth", *names], [row.label for row in rows], [row.aspect for row in rows], sum(heights)
    )
    for row, axes, label in zip(rows, page.axes, page.labels, strict=True):
        _draw_comparison(axes, row, label)
    for axis, title in zip(page.axes[0], page.titles, strict=True):
        axis.set_title(title, fontsize=FONT_POINTS, pad=3, parse_math=False)
    for place, (title, colours) in enumerate(legends.items()):
        _draw_legend(page, title, colours, sum(heights[place:]))
    save_figure(page.figure, paths, DPI)
    return page.figure


def process_figure(rows: Sequence[ProcessRow], paths: Sequence[Path], width_mm: float = 180.0) -> Figure:
    """Draw the panels of `report_figure` at print size.

    Args:
        rows: the cases, at least one, each with a process of the same timesteps.
        paths: output files; the endings select the formats.
        width_mm: width of the figure. It is wider if its texts would overlap.

    Returns:
        The figure.

    Raises:
        ValueError: as `report_figure`.
        OSError: a file cannot be written.
    """
    reports = [each.row for each in rows]
    check_rows(reports)
    columns = 5 + len(reports[0].panels)
    width_mm = max(width_mm, _least_width(columns), LEAST_PROCESS_MM)
    aspects = [each.aspect for each in rows]
    page = _page(width_mm, [""] * columns, [report.name for report in reports], aspects, PROCESS_LEGENDS_MM)
    for place, (each, axes, label) in enumerate(zip(rows, page.axes, page.labels, strict=True)):
        draw_row(axes, replace(each.row, name=label))
        for axis in axes:
            _fit(axis, each.aspect)
        write_titles(axes, each.row, all_columns=place == 0, timesteps=place == 0)
    width, height = page.figure.get_size_inches()
    add_legends(page.figure, width, height, wrong_class=any(classes_confused(report) for report in reports))
    save_figure(page.figure, paths, DPI)
    return page.figure


def wrapped(text: str, width_mm: float) -> list[str]:
    """Return the lines of a text of FONT_POINTS; words, and if need be letters, go to the next line."""
    lines: list[str] = []
    for given in text.split("\n"):
        lines.append("")
        for word in re.split(r"(?<=[ _-])", given):
            for part in [word] if _text_mm(word) <= width_mm else word:
                if lines[-1] and _text_mm(lines[-1] + part) > width_mm:
                    lines.append("")
                lines[-1] += part
    return [line.rstrip() for line in lines]


def _text_mm(text: str) -> float:
    text = text.rstrip().replace("$", "S")  # no mathematics
    return TextPath((0, 0), text, size=FONT_POINTS).get_extents().width * MM_PER_POINT if text else 0.0


def _check_comparison(rows: Sequence[ComparisonRow], names: Sequence[str]) -> None:
    if not rows:
        raise ValueError("rows is empty: give at least one case")
    for row in rows:
        if not len(row.predictions) == len(row.dice) == len(names):
            raise ValueError(
                f"row {row.label!r} has {len(row.predictions)} predictions and {len(row.dice)} Dice, but there are "
                f"{len(names)} names: give one of each"
            )
        shapes = {np.shape(each)[:2] for each in (row.image, row.truth, *row.predictions)}
        if len(shapes) > 1 or np.ndim(row.truth) != 2:
            raise ValueError(f"row {row.label!r}: image and label maps must be 2D of one shape, got {sorted(shapes)}")


def _confused(prediction: NDArray, truth: NDArray) -> bool:
    return bool(np.any((prediction != truth) & (prediction > 0) & (truth > 0)))


@dataclass(frozen=True, eq=False)
class _Page:
    """A figure with a grid of panels; titles and labels have their line breaks."""

    figure: Figure
    axes: list[list[Axes]]
    titles: list[str]
    labels: list[str]
    left: float  # of the panels, as a fraction of the width

    def height_of(self, mm: float) -> float:
        """Return mm as a fraction of the figure's height."""
        return mm / MM_PER_INCH / self.figure.get_figheight()


def _least_width(columns: int) -> float:
    return _left_mm(3) + EDGE_MM + columns * (LEAST_PANEL_MM + GAP_MM)


def _left_mm(lines: int) -> float:
    return EDGE_MM + lines * LINE_MM


def _page(
    width_mm: float, titles: Sequence[str], labels: Sequence[str], aspects: Sequence[float], legends_mm: float
) -> _Page:
    columns, aspects = len(titles), [float(np.clip(aspect, FLATTEST, TALLEST)) for aspect in aspects]

    def panel_mm(lines: int) -> float:
        return (width_mm - _left_mm(lines) - EDGE_MM + GAP_MM) / columns - GAP_MM

    # lines of the labels depend on the height of the rows, and that a little on the lines: three are usual
    broken = [
        wrapped(label, panel_mm(3) * aspect + UNDER_PANEL_MM - 1) for label, aspect in zip(labels, aspects, strict=True)
    ]
    left, panel = _left_mm(max(map(len, broken))), panel_mm(max(map(len, broken)))
    headings = [wrapped(title, panel) for title in titles]
    top = EDGE_MM + max(map(len, headings)) * LINE_MM + 1
    height_mm = top + sum(panel * aspect + UNDER_PANEL_MM for aspect in aspects) + legends_mm + EDGE_MM
    figure = Figure(figsize=(width_mm / MM_PER_INCH, height_mm / MM_PER_INCH), dpi=DPI)
    FigureCanvasAgg(figure)
    axes, above = [], height_mm - top
    for aspect in aspects:
        bottom = above - panel * aspect
        places = [left + column * (panel + GAP_MM) for column in range(columns)]
        boxes = [(x / width_mm, bottom / height_mm, panel / width_mm, panel * aspect / height_mm) for x in places]
        axes.append([figure.add_axes(box) for box in boxes])
        above = bottom - UNDER_PANEL_MM
    return _Page(
        figure, axes, ["\n".join(each) for each in headings], ["\n".join(each) for each in broken], left / width_mm
    )


def _fit(axis: Axes, aspect: float) -> None:
    """Show an array with the aspect of the image in mm, whatever its grid."""
    array = axis.images[0].get_array()
    assert array is not None
    height, width = array.shape[:2]
    axis.set_aspect(aspect * width / height)


def _draw_comparison(axes: Sequence[Axes], row: ComparisonRow, label: str) -> None:
    if row.image.ndim == 3:
        highest = float(row.image.max())
        scale = next((limit for limit in (1.0, 255.0) if highest <= limit), highest)
        axes[0].imshow(np.clip(row.image / scale, 0, 1))
    else:
        low, high = np.nanpercentile(row.image, [0.5, 99.5])
        axes[0].imshow(row.image, cmap="gray", vmin=low, vmax=max(high, low + 1e-6))
    show_labels(axes[1], row.truth)
    for axis, prediction, dice in zip(axes[2:], row.predictions, row.dice, strict=True):
        axis.imshow(error_map(prediction, row.truth), interpolation="nearest")
        axis.set_xlabel(f"Dice {dice:.3f}", fontsize=FONT_POINTS, labelpad=2)
    axes[0].set_ylabel(label, fontsize=FONT_POINTS, labelpad=3, parse_math=False)
    for axis in axes:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
        _fit(axis, row.aspect)


def _hex(colour: Sequence[int]) -> str:
    return "#{:02x}{:02x}{:02x}".format(*colour)


def _legend_columns(names: Mapping[str, str], width_mm: float) -> int:
    each = max(_text_mm(name) for name in names) + HANDLE_MM
    return min(len(names), max(1, int((width_mm - 2 * EDGE_MM) / each)))


def _legend_mm(names: Mapping[str, str], width_mm: float) -> float:
    return (1.5 + math.ceil(len(names) / _legend_columns(names, width_mm))) * LINE_MM


def _draw_legend(page: _Page, title: str, colours: Mapping[str, str], top_mm: float) -> None:
    """Draw a legend whose top is `top_mm` above the figure's lower edge."""
    patches = [Patch(facecolor=colour, edgecolor="0.6", linewidth=0.5, label=name) for name, colour in colours.items()]
    legend = page.figure.legend(
        handles=patches, title=title, loc="upper left", bbox_to_anchor=(page.left, page.height_of(top_mm)),
        ncols=_legend_columns(colours, page.figure.get_figwidth() * MM_PER_INCH), fontsize=FONT_POINTS,
        title_fontsize=FONT_POINTS, alignment="left", frameon=False, handlelength=1.0, columnspacing=1.2,
        labelspacing=0.3, borderpad=0, borderaxespad=0,
    )  # fmt: skip
    for text in legend.get_texts():
        text.set_parse_math(False)
