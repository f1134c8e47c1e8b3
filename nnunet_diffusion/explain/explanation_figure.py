"""Figure of one explained case: Grad-CAM heat maps by stage and noising step (PGDiffSeg Fig. 6, 7 and 8).

The page consists of blocks: case, prior branch, each flow, attention. All lengths are in inches.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import AbstractPathEffect, withStroke
from numpy.typing import NDArray
from scipy.ndimage import binary_erosion

from nnunet_diffusion.explain.panel_blocks import (
    GAP,
    TEXT_SIZE,
    TITLE_SIZE,
    Block,
    Panel,
    Paper,
    Row,
    draw_blocks,
    laid_out,
    save_figure,
    text_height,
    text_width,
    wrap,
)
from nnunet_diffusion.explain.uncertainty_figure import cross, fading

PANEL_INCHES, MOST_INCHES = 1.2, 2.4  # side of a square panel, by its pixels; others have the same area
PIXELS_PER_INCH = 150.0
LONG = 6.0  # length of a contour in sides of the image, from which it would cover what a map shows
LONGEST = 3.0  # ratio of the sides of a panel; a longer image leaves a margin in its panel
CASE_SCALE = 1.75  # of the panels of case and prior branch
MARGIN = 0.2  # around the page
KEY_INCHES = 2.8  # width of legend and explanations beside the image
WIDEST = 19.0  # of the page, unless a block is wider
VOXEL_COLUMNS = 8  # most maps of the named voxel in a row

STYLES: dict[str, tuple[str, Literal["solid"] | tuple[float, tuple[float, ...]]]] = {
    "nnU-Net": ("#e69f00", (0, (3.5, 1.5))),
    "truth": ("#ffffff", (0, (1.2, 1.2))),
    "result": ("#56b4e9", "solid"),
    "explained": ("#56b4e9", "solid"),
}
"""Colour and line style of the contour of each mask. Blue is neither in the image nor in the colours of heat."""
HEAT = (
    "Heat is Grad-CAM: where the features of that layer raise the score of the class; "
    "each map has its own scale, from none to its largest."
)
NO_HEAT = "no heat"
CONTOURS = ("result", "truth", "nnU-Net")  # of the case, the last above the others
BAR_INCHES = 2.6  # width of the scale of heat at the foot, with its texts
BAR_GREY = 0.35  # behind that scale, since its low end is transparent
PROBABILITY, HEAT_OPACITY = "viridis", 0.8


@dataclass(frozen=True, eq=False)
class Flow:
    """Heat maps of the stages of a flow, in rows, at each step, in columns.

    Attributes:
        stages: their numbers.
        heat: (stages, steps, H, W).
        shares: (stages, steps), share of the heat inside the reference mask, 0 to 1; NaN where a map has no heat.
    """

    stages: Sequence[int]
    heat: NDArray
    shares: NDArray


@dataclass(frozen=True, eq=False)
class Attention:
    """Heat maps of the stages of a flow before and after parameter-shared attention, at one step.

    Attributes:
        stages: their numbers.
        heat: (2, stages, H, W), before and after.
        shares: (2, stages), as in `Flow`.
        weights: eta of each stage (Eq. 5), (stages,).
    """

    stages: Sequence[int]
    heat: NDArray
    shares: NDArray
    weights: Sequence[float]


@dataclass(frozen=True, eq=False)
class Prior:
    """What the prior branch says of the class.

    Attributes:
        presence: probability that the class is present.
        presence_heat: heat (H, W) of the presence head.
        presence_share: share of that heat inside the reference mask; NaN without heat.
        heat: heat (H, W) of the branch's last layer in the score of the result.
        share: share of that heat.
        location: probability (H, W), 0 to 1.
    """

    presence: float
    presence_heat: NDArray
    presence_share: float
    heat: NDArray
    share: float
    location: NDArray


@dataclass(frozen=True, eq=False)
class Page:
    """What the page shows: one plane of a case. Maps are (H, W); heat is 0 or more, each map on its own scale.

    Attributes:
        title: title of the page (case, class, target).
        image: (H, W) intensities, or (H, W, 3) of RGB, any range.
        aspect: height of a pixel divided by its width.
        presegmentation: bool mask (H, W), nnU-Net's segmentation of the class.
        result: bool mask (H, W), that of the reverse process.
        truth: bool mask (H, W), or None.
        explained: bool mask (H, W) of the voxels in the score: those of the result, or those that differ from nnU-Net's.
        steps: noising steps T of the columns, from T' downwards.
        flows: name of each flow -> its maps.
        expected: share of the image that the reference mask has, which a map without any preference would have.
        reference: "truth", "result" or "changed voxels", the mask that the shares refer to.
        of_volume: whether shares are those of a whole volume, of which this is one plane.
        attention: name of each flow -> its maps before and after parameter-shared attention at the first step; empty if
            the network has none.
        prior: of the prior branch, or None without one.
        rows: title -> attention (H, W) of the named voxel, on its own scale, and its share; empty if no voxel was named.
        dice_with_result: name -> Dice of nnU-Net's segmentation, and of what the process gives without a part, with the result.
        voxel: (row, column) of the named voxel in this plane, or None.
    """

    title: str
    image: NDArray
    aspect: float
    presegmentation: NDArray
    result: NDArray
    truth: NDArray | None
    explained: NDArray
    steps: Sequence[int]
    flows: Mapping[str, Flow]
    expected: float
    reference: str
    of_volume: bool
    attention: Mapping[str, Attention]
    prior: Prior | None
    rows: Mapping[str, tuple[NDArray, float]]
    dice_with_result: Mapping[str, float]
    voxel: tuple[int, int] | None


def explanation_figure(page: Page, paths: Sequence[str | Path]) -> Figure:
    """Draw the page and write it to each path.

    Args:
        page: what to draw.
        paths: output files, such as a PNG and a PDF; the ending selects the format.

    Returns:
        The figure.

    Raises:
        OSError: a file cannot be written.
        ValueError: the shapes of the page contradict each other.
    """
    _check(page)
    page = replace(page, image=_normalised(page.image))
    layout = laid_out(_blocks(page), _panel_inches(page), WIDEST)
    title = wrap(page.title, layout.width, TITLE_SIZE, "bold")
    foot = wrap(HEAT, layout.width - BAR_INCHES)
    top = MARGIN + text_height(title, TITLE_SIZE) + GAP
    bottom = top + layout.height + GAP
    paper = Paper(layout.width + 2 * MARGIN, bottom + text_height(foot) + MARGIN)
    paper.write(MARGIN, MARGIN, title, TITLE_SIZE, weight="bold")
    draw_blocks(paper, layout, MARGIN, top, lambda axes, panel, scale: _draw_panel(axes, page, panel, scale))
    _draw_foot(paper, foot, bottom)
    save_figure(paper.figure, paths)
    return paper.figure


# What contradicts itself


def _check(page: Page) -> None:
    shape = page.image.shape
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[2] != 3):
        raise ValueError(f"image has shape {shape}: expected (H, W), or (H, W, 3) for RGB")
    plane = shape[:2]
    for name in ("presegmentation", "result", "truth", "explained"):
        _check_shape(name, getattr(page, name), plane)
    if page.prior is not None:
        for name in ("presence_heat", "heat", "location"):
            _check_shape(f"prior.{name}", getattr(page.prior, name), plane)
    for name, flow in page.flows.items():
        number = len(flow.stages) or "stages"
        _check_shape(f"flows[{name!r}].heat", flow.heat, (number, len(page.steps) or "steps", *plane))
        _check_shape(f"flows[{name!r}].shares", flow.shares, flow.heat.shape[:2])
    for name, each in page.attention.items():
        number = len(each.stages) or "stages"
        _check_shape(f"attention[{name!r}].heat", each.heat, (2, number, *plane))
        _check_shape(f"attention[{name!r}].shares", each.shares, (2, number))
        _check_shape(f"attention[{name!r}].weights", np.asarray(each.weights), (number,))
    for title, (row, _) in page.rows.items():
        _check_shape(f"rows[{title!r}]", row, plane)
    if page.voxel is not None and not all(0 <= place < size for place, size in zip(page.voxel, plane, strict=True)):
        raise ValueError(f"voxel is {page.voxel}: expected a row and a column of the image, which has shape {plane}")


def _check_shape(field: str, array: NDArray | None, expected: Sequence[int | str]) -> None:
    """Compare the shape; a word in what is expected stands for any number from 1."""
    if array is None:
        return
    if len(array.shape) != len(expected) or not all(
        size == right if isinstance(right, int) else size > 0 for size, right in zip(array.shape, expected, strict=True)
    ):
        raise ValueError(f"{field} has shape {array.shape}: expected ({', '.join(map(str, expected))})")


# What the blocks contain


def _blocks(page: Page) -> list[Block]:
    blocks = [_case(page), *_prior(page), *(_flow(page, name) for name in page.flows)]
    if page.attention:
        blocks.append(_attention(page))
    if page.rows:
        blocks.append(_voxel(page))
    return blocks


def _case(page: Page) -> Block:
    handles = _legend(page)
    legend_height = len(handles) * 1.5 * TEXT_SIZE / 72 + GAP
    notes = [wrap(note, KEY_INCHES) for note in _notes(page)]
    key_height = legend_height + sum(text_height(note) + GAP for note in notes)

    def key(paper: Paper, left: float, top: float, _: float) -> None:
        axes = paper.axes(left + GAP, top, KEY_INCHES, legend_height)
        axes.set_axis_off()
        axes.legend(
            handles=handles, loc="upper left", bbox_to_anchor=(0, 1), borderaxespad=0, borderpad=0, frameon=False,
            fontsize=TEXT_SIZE, handlelength=2.6, labelspacing=0.35,
        )  # fmt: skip
        top += legend_height
        for note in notes:
            paper.write(left + GAP, top, note)
            top += text_height(note) + GAP

    image, contours = Panel("image", contours=()), Panel("contours", contours=CONTOURS, cross=True)
    return Block("Case", [("", [image, contours])], CASE_SCALE, (KEY_INCHES + GAP, key_height), key)


def _masks(page: Page) -> dict[str, NDArray | None]:
    return {"nnU-Net": page.presegmentation, "truth": page.truth, "result": page.result, "explained": page.explained}


def _legend(page: Page) -> list[Line2D]:
    texts = {"nnU-Net": "nnU-Net's segmentation", "truth": "truth", "result": "result of the reverse process"}
    handles = []
    for name, text in texts.items():
        mask, (colour, style) = _masks(page)[name], STYLES[name]
        if mask is not None:
            text = text if mask.any() else f"{text}: empty here"
            line = Line2D([], [], color=colour, linestyle=style, linewidth=1.8, path_effects=_edge(3.2), label=text)
            handles.append(line)
    if page.voxel is not None:
        handles.append(cross([], [], "named voxel"))
    return handles


def _notes(page: Page) -> list[str]:
    """Return what a reader has to know of the maps."""
    notes = []
    if page.flows:
        chance = f"; {_percent(page.expected)} would be chance" if math.isfinite(page.expected) else ""
        where = " of the whole volume" if page.of_volume else ""
        notes.append(f"% below a map: share of the heat{where} inside the {page.reference}{chance}.")
        onwards = " and goes on from left to right" if len(page.steps) > 1 else ""
        notes.append(f"T: noising steps of the input; the reverse process starts at T = {page.steps[0]}{onwards}.")
    if page.flows or page.attention:
        notes.append("stage: part of the network that works at one resolution, in the order of computing.")
    differs = not np.array_equal(page.explained, page.result)
    if differs:
        outline = "" if _is_long(page.explained) else " They are inside the blue line in the maps."
        notes.append(f"explained: the voxels in which the result differs from nnU-Net's segmentation.{outline}")
    if page.dice_with_result:
        listed = "; ".join(f"{name} {value:.2f}" for name, value in page.dice_with_result.items())
        notes.append(f"Dice with the result: {listed}.")
    return notes


def _prior(page: Page) -> list[Block]:
    prior = page.prior
    if prior is None:
        return []
    panels = [
        _heated("what tells it that the class is present", prior.presence_heat, prior.presence_share),
        _heated("what the result takes from it", prior.heat, prior.share),
        Panel("probability of the location", probability=prior.location),
    ]

    def bar(paper: Paper, left: float, top: float, height: float) -> None:
        axes = paper.axes(left, top, 0.1, height)
        axes.imshow(
            np.linspace(0, 1, 256)[:, None], cmap=PROBABILITY, origin="lower", aspect="auto", extent=(0, 1, 0, 1)
        )
        axes.yaxis.tick_right()
        axes.set_yticks([0, 0.5, 1], ["0", "0.5", "1"])
        axes.tick_params(labelsize=TEXT_SIZE - 1, length=2, pad=2)

    heading = f"Prior branch: class present with probability {prior.presence:.2f}"
    return [Block(heading, [("", panels)], CASE_SCALE, (0.4, 0.0), bar)]


def _flow(page: Page, name: str) -> Block:
    flow, rows = page.flows[name], []
    for stage, heat, shares in zip(flow.stages, flow.heat, flow.shares, strict=True):
        panels = [_heated(f"T = {step}", *each) for step, *each in zip(page.steps, heat, shares, strict=True)]
        rows.append((f"stage {stage}", panels))
    return Block(name[:1].upper() + name[1:], _titles_once(rows))


def _attention(page: Page) -> Block:
    """Return two rows for each flow, and a column for each stage."""
    rows: list[Row] = []
    for name, each in page.attention.items():
        for when, heat, shares in zip(("before", "after"), each.heat, each.shares, strict=True):
            panels = [_heated(f"stage {stage}", *one) for stage, *one in zip(each.stages, heat, shares, strict=True)]
            if when == "after":
                weighted = zip(panels, each.weights, strict=True)
                panels = [replace(panel, below=f"{panel.below}\nη {eta:.3f}") for panel, eta in weighted]
            rows.append((f"{name}\n{when} PSA", panels))
    heading = f"Before and after parameter-shared attention (PSA) of weight η, at T = {page.steps[0]}"
    return Block(heading, _titles_once(rows))


def _voxel(page: Page) -> Block:
    panels = [replace(_heated(title, *each, "no attention"), cross=True) for title, each in page.rows.items()]
    columns = math.ceil(len(panels) / math.ceil(len(panels) / VOXEL_COLUMNS))
    rows = [("", panels[start : start + columns]) for start in range(0, len(panels), columns)]
    return Block("Attention of the named voxel (+): where it takes features from", rows)


def _heated(title: str, heat: NDArray, share: float, nothing: str = NO_HEAT) -> Panel:
    return Panel(title, nothing if math.isnan(share) else _percent(share), heat)


def _titles_once(rows: Sequence[Row]) -> list[Row]:
    return [rows[0], *((label, [replace(panel, title="") for panel in panels]) for label, panels in rows[1:])]


def _percent(share: float) -> str:
    if 0 < share < 0.01:
        return f"{100 * share:.1g} %" if share >= 0.001 else "< 0.1 %"
    return f"{100 * share:.0f} %"


# How they are drawn


def _panel_inches(page: Page) -> tuple[float, float]:
    """Return width and height of a panel."""
    height, width = page.image.shape[:2]
    ratio = math.sqrt(min(max(height * page.aspect / width, 1 / LONGEST), LONGEST))
    side = min(max(math.sqrt(height * width) / PIXELS_PER_INCH, PANEL_INCHES), MOST_INCHES)
    return side / ratio, side * ratio


def _is_long(mask: NDArray) -> bool:
    """Whether a mask has a long border, as of vessels."""
    return bool((mask & ~binary_erosion(mask)).sum() > LONG * math.sqrt(mask.size))


def _draw_panel(axes: Axes, page: Page, panel: Panel, scale: float) -> None:
    mapped = panel.heat is not None or panel.probability is not None
    image = page.image.mean(-1) if mapped and page.image.ndim == 3 else page.image
    axes.imshow(image, cmap="gray", vmin=0, vmax=1, aspect=page.aspect)
    if panel.heat is not None:
        largest = float(panel.heat.max(where=np.isfinite(panel.heat), initial=0))
        axes.imshow(panel.heat, cmap=fading(HEAT_OPACITY), vmin=0, vmax=largest or 1.0, aspect=page.aspect)
    if panel.probability is not None:
        axes.imshow(panel.probability, cmap=PROBABILITY, vmin=0, vmax=1, aspect=page.aspect)
    masks = _masks(page)
    for name in panel.contours:
        mask, (colour, style) = masks[name], STYLES[name]
        if mask is None or not mask.any() or mask.all():
            continue
        long = _is_long(mask)
        if not (mapped and long):
            width = (0.4 + 0.7 * scale) * (0.6 if long else 1)
            drawn = axes.contour(mask, levels=[0.5], colors=[colour], linewidths=width, linestyles=[style])
            drawn.set_path_effects(_edge(width + 0.7))
    if panel.cross and page.voxel is not None:
        row, column = page.voxel
        axes.add_line(cross([column], [row]))
    axes.spines[:].set_visible(False)


def _draw_foot(paper: Paper, text: str, top: float) -> None:
    paper.write(MARGIN, top, "none")
    left = MARGIN + text_width("none") + GAP
    width = BAR_INCHES - 4 * GAP - text_width("none") - text_width("largest")
    axes = paper.axes(left, top + 0.02, width, 0.12)
    axes.set_facecolor(str(BAR_GREY))
    axes.imshow(np.linspace(0, 1, 256)[None], cmap=fading(HEAT_OPACITY), aspect="auto")
    axes.spines[:].set_visible(False)
    paper.write(left + width + GAP, top, "largest")
    paper.write(MARGIN + BAR_INCHES, top, text)


def _normalised(image: NDArray) -> NDArray[np.float64]:
    low, high = np.nanpercentile(image, (1, 99))
    return ((image - low) / max(high - low, 1e-6)).clip(0, 1)


def _edge(width: float) -> list[AbstractPathEffect]:
    return [withStroke(linewidth=width, foreground="black")]
