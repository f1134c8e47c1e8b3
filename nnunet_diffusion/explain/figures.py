"""Figures made without pyplot: the report of a reverse process (paper Fig. 9 and 13) and the loss curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from numpy.typing import ArrayLike, NDArray

from nnunet_diffusion.evaluation.metrics import dice

# Colours of paper Fig. 9, A = truth and B = prediction; the mixture of red and blue marks a wrong foreground class.
ERROR_COLOURS = {
    "background": (0, 0, 0),
    "correct (A∩B)": (255, 255, 255),
    "missed (A−B)": (225, 30, 30),
    "over-segmented (B−A)": (30, 90, 235),
    "wrong class": (200, 40, 200),
}
LABEL_COLOURS = ["#000000", "#ffffff", "#f0a30a", "#2f9e8f", "#c0504d", "#7e6bc4", "#8fb339", "#d977b5", "#5aa9e6"]
PANEL_INCHES = 1.35
SMOOTHING_FROM_EPOCHS = 50
LOG_SCALE_FROM_RATIO = 100.0


@dataclass(frozen=True, eq=False)
class ReportRow:
    """One case of the report figure. All arrays are 2D; all except the states of the process have one shape (H, W).

    Attributes:
        name: label at the left of the row.
        image: any intensity range.
        truth: integer label map.
        nnunet: nnU-Net's label map, the start of the process.
        process: (timestep, state of one class in [0, 1]) from T' - 1 downwards, on the image's or the network's grid;
            timestep -1 is the clean state.
        result: final label map of the process.
        prior: probability of that class, which HiDiff's process ends at; shown before the process, on its grid.
    """

    name: str
    image: NDArray
    truth: NDArray
    nnunet: NDArray
    process: Sequence[tuple[int, NDArray]]
    result: NDArray
    prior: NDArray | None = None

    @property
    def panels(self) -> list[tuple[str, NDArray]]:
        """Title and content of the panels between nnU-Net's label map and the result."""
        # timestep t has t + 1 steps of noise (t = 0 has one), the clean state none
        states = [(f"T = {timestep + 1}", state) for timestep, state in self.process]
        return states if self.prior is None else [("p", self.prior), *states]


def error_map(prediction_labels: ArrayLike, reference_labels: ArrayLike) -> NDArray[np.uint8]:
    """Colour the agreement of two label maps as the paper's Fig. 9.

    Args:
        prediction_labels: integer label map with background 0, (*spatial).
        reference_labels: integer label map of the same shape.

    Returns:
        RGB (*spatial, 3), 0..255: white where both have the same foreground class, red where only the reference has
        foreground, blue where only the prediction has, magenta where their classes differ, black elsewhere.

    Raises:
        ValueError: the shapes differ.
    """
    predicted, true = np.asarray(prediction_labels), np.asarray(reference_labels)
    if predicted.shape != true.shape:
        raise ValueError(f"prediction has shape {predicted.shape}, the reference {true.shape}: compare on one grid")
    kind = np.zeros(true.shape, dtype=np.intp)
    kind[(predicted == true) & (true != 0)] = 1
    kind[(predicted == 0) & (true != 0)] = 2
    kind[(predicted != 0) & (true == 0)] = 3
    kind[(predicted != true) & (predicted != 0) & (true != 0)] = 4
    return np.array(list(ERROR_COLOURS.values()), dtype=np.uint8)[kind]


def report_figure(rows: Sequence[ReportRow], path: str | Path) -> None:
    """Draw image, truth, nnU-Net, the reverse process, result and error map of several cases.

    Args:
        rows: the cases, at least one, each with a process of the same length.
        path: output file; the ending selects the format.

    Raises:
        ValueError: `rows` is empty, the processes differ in length, or the arrays of a row or the states of a process are
            not 2D of one shape.
    """
    check_rows(rows)
    steps = len(rows[0].panels)
    columns = 5 + steps
    width, height = _figure_inches(rows, columns)
    figure = Figure(figsize=(width, height), dpi=200)
    FigureCanvasAgg(figure)
    grid = figure.add_gridspec(
        len(rows), columns, left=0.3 / width, right=1 - 0.08 / width, top=1 - 0.3 / height, bottom=0.62 / height,
        wspace=0.05, hspace=0.2, height_ratios=[_aspect(row) for row in rows],
    )  # fmt: skip
    same_timesteps = len({tuple(title for title, _ in row.panels) for row in rows}) == 1
    for index, row in enumerate(rows):
        axes = [figure.add_subplot(grid[index, column]) for column in range(columns)]
        draw_row(axes, row)
        write_titles(axes, row, all_columns=index == 0, timesteps=index == 0 or not same_timesteps)
    add_legends(figure, width, height, wrong_class=any(classes_confused(row) for row in rows))
    figure.savefig(path)


def curves_figure(curves: Mapping[str, Sequence[float]], path: str | Path) -> None:
    """Draw one panel per curve over the epochs.

    Args:
        curves: name -> one value per epoch. NaN and infinite values leave gaps. Long curves also show a running mean.
            Positive curves that span two decades have a logarithmic axis.
        path: output file; the ending selects the format.

    Raises:
        ValueError: `curves` is empty.
    """
    if not curves:
        raise ValueError("curves is empty: give at least one named curve")
    columns = min(3, len(curves))
    lines = -(-len(curves) // columns)
    figure = Figure(figsize=(4.2 * columns, 2.9 * lines), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for index, (name, values) in enumerate(curves.items()):
        _draw_curve(figure.add_subplot(lines, columns, index + 1), name, np.asarray(values, dtype=np.float64))
    figure.savefig(path)


def check_rows(rows: Sequence[ReportRow]) -> None:
    """Raise ValueError if there is no row, processes differ in length, or arrays are not 2D of one shape."""
    if not rows:
        raise ValueError("rows is empty: give at least one case")
    if len({len(row.panels) for row in rows}) > 1:
        raise ValueError(f"all rows need a process of one length, got {[len(row.panels) for row in rows]} states")
    for row in rows:
        maps = {np.shape(array) for array in (row.image, row.truth, row.nnunet, row.result)}
        for what, shapes in (("maps", maps), ("states", {np.shape(state) for _, state in row.panels})):
            if len(shapes) > 1 or any(len(shape) != 2 for shape in shapes):
                raise ValueError(f"row {row.name!r}: all {what} must be 2D of one shape, got {sorted(shapes)}")


def _aspect(row: ReportRow) -> float:
    height, width = row.image.shape
    return float(np.clip(height / width, 0.4, 2.0))


def _figure_inches(rows: Sequence[ReportRow], columns: int) -> tuple[float, float]:
    width = PANEL_INCHES * columns + 0.38
    panels = PANEL_INCHES * sum(_aspect(row) for row in rows)
    return width, panels + 0.25 * (len(rows) - 1) + 0.92


def draw_row(axes: Sequence[Axes], row: ReportRow) -> None:
    """Draw image, truth, nnU-Net, states, result and errors, one in each panel."""
    steps = len(row.panels)
    # Clip the intensities at the 0.5th and 99.5th percentile, so that single bright voxels do not darken the rest.
    low, high = np.nanpercentile(row.image, [0.5, 99.5])
    axes[0].imshow(row.image, cmap="gray", vmin=low, vmax=max(high, low + 1e-6), interpolation="nearest")
    for axis, labels in ((axes[1], row.truth), (axes[2], row.nnunet), (axes[3 + steps], row.result)):
        show_labels(axis, labels)
    for axis, (_, state) in zip(axes[3:], row.panels, strict=False):
        axis.imshow(state, cmap="viridis", vmin=0, vmax=1, interpolation="nearest")
    axes[4 + steps].imshow(error_map(row.result, row.truth), interpolation="nearest")
    for axis, labels in ((axes[2], row.nnunet), (axes[3 + steps], row.result)):
        axis.set_xlabel(_agreement(labels, row.truth), fontsize=7, labelpad=2)
    axes[0].set_ylabel(row.name, fontsize=7, labelpad=3)
    for axis in axes:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)


def show_labels(axis: Axes, labels: NDArray) -> None:
    """Draw a label map (H, W) in LABEL_COLOURS."""
    # Labels beyond the list reuse its colours, except the background's.
    index = np.where(labels > 0, (labels - 1) % (len(LABEL_COLOURS) - 1) + 1, 0)
    axis.imshow(
        index, cmap=ListedColormap(LABEL_COLOURS), vmin=-0.5, vmax=len(LABEL_COLOURS) - 0.5, interpolation="nearest"
    )


def _agreement(labels: NDArray, truth: NDArray) -> str:
    classes = np.unique(np.concatenate([labels[labels > 0], truth[truth > 0]]))
    if not classes.size:
        return "rightly empty"
    return f"Dice {np.mean([dice(labels == label, truth == label) for label in classes]):.3f}"


def classes_confused(row: ReportRow) -> bool:
    """Whether the result has another foreground class than the truth somewhere."""
    return bool(np.any((row.result != row.truth) & (row.result > 0) & (row.truth > 0)))


def write_titles(axes: Sequence[Axes], row: ReportRow, *, all_columns: bool, timesteps: bool) -> None:
    """Write the titles of the panels of a row: those of the states, those of the other columns."""
    titles = {3 + index: title for index, (title, _) in enumerate(row.panels)} if timesteps else {}
    if all_columns:
        titles |= {0: "Image", 1: "Truth", 2: "nnU-Net", len(axes) - 2: "Result", len(axes) - 1: "Errors"}
    for column, title in titles.items():
        axes[column].set_title(title, fontsize=8, pad=3)


def add_legends(figure: Figure, width: float, height: float, *, wrong_class: bool) -> None:
    """Draw the legend of the errors and the scale of the states at the foot of a figure; its size is in inches."""
    shown = [name for name in ERROR_COLOURS if name != "background" and (wrong_class or name != "wrong class")]
    patches = [
        Patch(facecolor="#{:02x}{:02x}{:02x}".format(*ERROR_COLOURS[name]), edgecolor="0.6", linewidth=0.5, label=name)
        for name in shown
    ]
    figure.legend(
        handles=patches, loc="lower right", ncols=len(patches), fontsize=7, frameon=False, handlelength=1.0,
        bbox_to_anchor=(1 - 0.05 / width, 0.02 / height), columnspacing=1.2, title="Errors: A = truth, B = result",
        title_fontsize=7,
    )  # fmt: skip
    bar_axis = figure.add_axes((0.35 / width, 0.22 / height, 2.0 / width, 0.09 / height))
    bar = figure.colorbar(
        ScalarMappable(Normalize(0, 1), "viridis"), cax=bar_axis, orientation="horizontal", ticks=[0, 0.5, 1]
    )
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=6, length=2, pad=1)
    bar.ax.set_title("State, from T′ noising steps to 0", fontsize=7, pad=2, loc="left")


def _draw_curve(axis: Axes, name: str, values: NDArray[np.float64]) -> None:
    epochs = np.arange(1, len(values) + 1)
    finite = np.where(np.isfinite(values), values, np.nan)
    known = finite[~np.isnan(finite)]
    smooth = len(values) >= SMOOTHING_FROM_EPOCHS
    axis.plot(
        epochs, finite, color="tab:blue", linewidth=0.8 if smooth else 1.4, alpha=0.35 if smooth else 1.0,
        marker="o" if len(values) <= 20 else None, markersize=3.5, label=name,
    )  # fmt: skip
    if smooth:
        window = max(5, len(values) // 25) | 1
        axis.plot(
            epochs, _running_mean(finite, window), color="tab:blue", linewidth=1.6, label=f"mean of {window} epochs"
        )
    if known.size and known.min() > 0 and np.divide(*np.quantile(known, [0.99, 0.1])) > LOG_SCALE_FROM_RATIO:
        axis.set_yscale("log")
    if not known.size:
        axis.text(
            0.5, 0.5, "no finite value", transform=axis.transAxes, ha="center", va="center", fontsize=8, color="0.5"
        )
        axis.set_yticks([])
    axis.set_title(f"{name} (last {known[-1]:.4g})" if known.size else name, fontsize=9)
    axis.set_xlabel("epoch", fontsize=8)
    axis.set_xlim(0.5, max(len(values), 1) + 0.5)
    axis.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    axis.tick_params(labelsize=7)
    axis.grid(alpha=0.25, linewidth=0.6)
    axis.legend(fontsize=7, frameon=False, loc="best")


def _running_mean(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    # Centred mean of the finite values, with a narrower window at both ends; NaN only if the window has no finite value.
    known = np.isfinite(values)
    ones, half = np.ones(window), window // 2
    total = np.convolve(np.where(known, values, 0.0), ones)[half : half + len(values)]
    count = np.convolve(known.astype(np.float64), ones)[half : half + len(values)]
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
