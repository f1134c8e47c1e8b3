"""Figure of one explained case: Grad-CAM heat maps by stage and noising step (PGDiffSeg Fig. 6, 7 and 8).

The page consists of blocks (case, prior branch, each flow, attention), each with a heading and rows of panels. They are placed
in the order of reading, beside or below each other, so that little of the page stays empty. All lengths are in inches, from
the top left corner; sizes of text are in points.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke
from matplotlib.textpath import TextPath
from numpy.typing import NDArray

DPI = 180
PANEL_INCHES = 1.2  # side of a square panel; others have the same area
LONGEST = 3.0  # ratio of the sides of a panel; a longer image leaves a margin in its panel
CASE_SCALES = (1.0, 1.25, 1.5, 1.75, 2.0)  # panels of case and prior branch are larger, if the page is emptier otherwise
MARGIN, GAP, BLOCK_GAP = 0.2, 0.07, 0.3  # around the page, between panels, between blocks
KEY_INCHES = 2.8  # width of legend and explanations beside the image
LEAST_HEADING = 2.0  # width at which headings are broken, unless their block is wider
WIDEST = 21.0  # of the page, unless one block is wider
TITLE_SIZE, HEADING_SIZE, TEXT_SIZE = 13.0, 11.0, 9.0
LINE = 1.3  # height of a line divided by the size of its text
VOXEL_COLUMNS = 6  # most maps of the named voxel in a row

STYLES: dict[str, tuple[str, str | tuple[float, tuple[float, ...]]]] = {
    "nnU-Net": ("#e69f00", (0, (3.5, 1.5))),
    "truth": ("#ffffff", (0, (1.0, 1.0))),
    "result": ("#56b4e9", "solid"),
}
"""Colour and line style of the contour of each mask. Blue is neither in the image nor in the colours of heat."""
HEAT = (
    "Heat is Grad-CAM: where the features of that layer raise the score of the class; "
    "each map has its own scale, from none to its largest."
)
NO_HEAT = "no heat"


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
        steps: noising steps T of the columns, from T' downwards.
        flows: name of each flow -> heat (stages, steps, H, W); flows may have different numbers of stages.
        shares: name of each flow -> (stages, steps), share of the heat inside the reference mask, 0 to 1; NaN where a map
            has no heat.
        expected: share of the image that the reference mask has, which a map without any preference would have.
        reference: "truth" or "result", the mask that the shares refer to.
        attention: name of each flow -> (before, after), each (stages, H, W): heat before and after parameter-shared attention
            at `attention_step`; empty if the network has none.
        attention_stages: their numbers, from 1.
        attention_step: noising step T.
        prior: heat (H, W) of the prior branch's last layer, or None.
        location: probability (H, W), 0 to 1, of the prior branch; or None.
        presence: probability that the class is present, of the prior branch; or None.
        rows: title -> attention (H, W) of the named voxel, on its own scale; empty if no voxel was named.
        voxel: (row, column) of the named voxel in this plane, or None.
    """

    title: str
    image: NDArray
    aspect: float
    presegmentation: NDArray
    result: NDArray
    truth: NDArray | None
    steps: Sequence[int]
    flows: Mapping[str, NDArray]
    shares: Mapping[str, NDArray]
    expected: float
    reference: str
    attention: Mapping[str, tuple[NDArray, NDArray]]
    attention_stages: Sequence[int]
    attention_step: int
    prior: NDArray | None
    location: NDArray | None
    presence: float | None
    rows: Mapping[str, NDArray]
    voxel: tuple[int, int] | None


def explanation_figure(page: Page, paths: Sequence[str | Path]) -> Figure:
    """Draw the page and write it to each path.

    Args:
        page: what to draw.
        paths: output files, such as a PNG and a PDF; the ending selects the format.

    Returns:
        The figure.

    Raises:
        ValueError: the shapes of the page contradict each other.
    """
    _check(page)
    layout = min(_layouts(page), key=lambda each: each.badness)
    title = _wrap(page.title, layout.width, TITLE_SIZE, "bold")
    foot = _wrap(HEAT, layout.width - BAR_INCHES)
    top = MARGIN + _text_height(title, TITLE_SIZE) + GAP
    bottom = top + layout.height + GAP
    paper = _Paper(layout.width + 2 * MARGIN, bottom + _text_height(foot) + MARGIN)
    paper.write(MARGIN, MARGIN, title, TITLE_SIZE, weight="bold")
    for block, sizes, (right, down) in zip(layout.blocks, layout.sizes, layout.places, strict=True):
        _draw_block(paper, page, block, sizes, MARGIN + right, top + down)
    _draw_foot(paper, foot, bottom)
    for path in paths:
        paper.figure.savefig(path)
    return paper.figure


# What contradicts itself


def _check(page: Page) -> None:
    shape = page.image.shape
    if len(shape) not in (2, 3) or (len(shape) == 3 and shape[2] != 3):
        raise ValueError(f"image has shape {shape}: expected (H, W), or (H, W, 3) for RGB")
    plane = shape[:2]
    for name in ("presegmentation", "result", "truth", "prior", "location"):
        _check_shape(name, getattr(page, name), plane)
    if set(page.flows) != set(page.shares):
        raise ValueError(f"shares has the flows {list(page.shares)}: expected those of flows, {list(page.flows)}")
    for name, heat in page.flows.items():
        _check_shape(f"flows[{name!r}]", heat, ("stages", len(page.steps) or "steps", *plane))
        _check_shape(f"shares[{name!r}]", page.shares[name], heat.shape[:2])
    for name, maps in page.attention.items():
        for when, heat in zip(("before", "after"), maps, strict=True):
            _check_shape(f"attention[{name!r}], {when},", heat, (len(page.attention_stages) or "stages", *plane))
    for title, attention in page.rows.items():
        _check_shape(f"rows[{title!r}]", attention, plane)
    if page.voxel is not None and not all(0 <= place < size for place, size in zip(page.voxel, plane, strict=True)):
        raise ValueError(f"voxel is {page.voxel}: expected a row and a column of the image, which has shape {plane}")


def _check_shape(field: str, array: NDArray | None, expected: Sequence[int | str]) -> None:
    """Compare the shape; a word in what is expected stands for any number from 1."""
    if array is None:
        return
    if len(array.shape) != len(expected) or not all(
        size == right if isinstance(right, int) else size > 0
        for size, right in zip(array.shape, expected, strict=True)
    ):
        raise ValueError(f"{field} has shape {array.shape}: expected ({', '.join(map(str, expected))})")


# What the blocks contain


@dataclass(frozen=True, eq=False)
class _Panel:
    """The image with a map over it, and contours; the image has its colours only without a map."""

    title: str = ""
    below: str = ""
    heat: NDArray | None = None
    probability: NDArray | None = None
    contours: Sequence[str] = ("result",)
    cross: bool = False


_Row = tuple[str, Sequence[_Panel]]  # label, panels


@dataclass(frozen=True, eq=False)
class _Block:
    """Heading and rows of panels.

    Attributes:
        heading: of the block.
        rows: label and panels of each.
        scale: of the panels.
        beside: width and least height of what is drawn at the right of the first row.
        draw_beside: draws it, given left and top of the place, and the height of the panels.
    """

    heading: str
    rows: Sequence[_Row]
    scale: float = 1.0
    beside: tuple[float, float] = (0.0, 0.0)
    draw_beside: Callable[[_Paper, float, float, float], None] = lambda paper, left, top, height: None


def _blocks(page: Page, case_scale: float) -> list[_Block]:
    blocks = [_case(page, case_scale), *_prior(page, case_scale), *(_flow(page, name) for name in page.flows)]
    if page.attention:
        blocks.append(_attention(page))
    if page.rows:
        blocks.append(_voxel(page))
    return blocks


def _case(page: Page, scale: float) -> _Block:
    masks = {"nnU-Net": page.presegmentation, "truth": page.truth, "result": page.result}
    handles = _legend(page, masks)
    legend_height = len(handles) * 1.5 * TEXT_SIZE / 72 + GAP
    notes = "\n".join(_wrap(note, KEY_INCHES) for note in _notes(page))

    def key(paper: _Paper, left: float, top: float, height: float) -> None:
        axes = paper.axes(left + GAP, top, KEY_INCHES, legend_height)
        axes.set_axis_off()
        axes.legend(
            handles=handles, loc="upper left", bbox_to_anchor=(0, 1), borderaxespad=0, borderpad=0, frameon=False,
            fontsize=TEXT_SIZE, handlelength=2.6, labelspacing=0.35,
        )  # fmt: skip
        paper.write(left + GAP, top + legend_height, notes)

    panels = [_Panel("image", contours=()), _Panel("image with contours", contours=tuple(STYLES), cross=True)]
    return _Block("Case", [("", panels)], scale, (KEY_INCHES + GAP, legend_height + _text_height(notes)), key)


def _legend(page: Page, masks: Mapping[str, NDArray | None]) -> list[Line2D]:
    texts = {"nnU-Net": "nnU-Net's segmentation", "truth": "truth", "result": "result of the reverse process"}
    handles = []
    for name, (colour, style) in STYLES.items():
        mask = masks[name]
        if mask is not None:
            text = texts[name] if mask.any() else f"{texts[name]}: empty here"
            line = Line2D([], [], color=colour, linestyle=style, linewidth=1.8, path_effects=_edge(3.2), label=text)
            handles.append(line)
    if page.voxel is not None:
        handles.append(_cross(page.voxel, f"named voxel: row {page.voxel[0]}, column {page.voxel[1]}"))
    return handles


def _notes(page: Page) -> list[str]:
    """Return what a reader has to know of the maps."""
    notes = []
    if page.flows:
        chance = f"; {_percent(page.expected)} would be chance" if math.isfinite(page.expected) else ""
        notes.append(f"% below a map: share of the heat inside the {page.reference}{chance}.")
        onwards = " and goes on from left to right" if len(page.steps) > 1 else ""
        notes.append(f"T: noising steps in the input; the reverse process starts at T = {page.steps[0]}{onwards}.")
    if page.flows or page.attention:
        notes.append("stage: part of the network that works at one resolution.")
    return notes


def _prior(page: Page, scale: float) -> list[_Block]:
    heading = "Prior branch"
    if page.presence is not None:
        heading += f": class present with probability {page.presence:.2f}"
    panels = [] if page.prior is None else [_heated("what the prior branch looked at", page.prior)]
    if page.location is not None:
        panels.append(_Panel("probability of the location", probability=page.location))
    if not panels and page.presence is None:
        return []

    def bar(paper: _Paper, left: float, top: float, height: float) -> None:
        if page.location is not None:
            axes = paper.axes(left, top, 0.1, height)
            axes.imshow(
                np.linspace(0, 1, 256)[:, None], cmap=PROBABILITY, origin="lower", aspect="auto", extent=(0, 1, 0, 1)
            )
            axes.yaxis.tick_right()
            axes.set_yticks([0, 0.5, 1], ["0", "0.5", "1"])
            axes.tick_params(labelsize=TEXT_SIZE - 1, length=2, pad=2)

    return [_Block(heading, [("", panels)], scale, (0.4 if page.location is not None else 0.0, 0.0), bar)]


def _flow(page: Page, name: str) -> _Block:
    rows = []
    for stage, (heat, shares) in enumerate(zip(page.flows[name], page.shares[name], strict=True), 1):
        panels = [
            _Panel(f"T = {step}", NO_HEAT if math.isnan(share) else _percent(share), each)
            for step, each, share in zip(page.steps, heat, shares, strict=True)
        ]
        rows.append((f"stage {stage}", panels))
    return _Block(name[:1].upper() + name[1:], _titles_once(rows))


def _attention(page: Page) -> _Block:
    rows = []
    for name, maps in page.attention.items():
        for when, heat in zip(("before", "after"), maps, strict=True):
            stages = zip(page.attention_stages, heat, strict=True)
            rows.append((f"{name}\n{when} PSA", [_heated(f"stage {stage}", each) for stage, each in stages]))
    heading = f"Before and after parameter-shared attention (PSA), at T = {page.attention_step}"
    return _Block(heading, _titles_once(rows))


def _voxel(page: Page) -> _Block:
    panels = [replace(_heated(title, each, "no attention"), cross=True) for title, each in page.rows.items()]
    columns = math.ceil(len(panels) / math.ceil(len(panels) / VOXEL_COLUMNS))
    rows = [("", panels[start : start + columns]) for start in range(0, len(panels), columns)]
    return _Block("Attention of the named voxel: the places whose features it takes over", rows)


def _heated(title: str, heat: NDArray, nothing: str = NO_HEAT) -> _Panel:
    return _Panel(title, "" if (heat > 0).any() else nothing, heat)


def _titles_once(rows: Sequence[_Row]) -> list[_Row]:
    return [rows[0], *((label, [replace(panel, title="") for panel in panels]) for label, panels in rows[1:])]


def _percent(share: float) -> str:
    if 0 < share < 0.01:
        return f"{100 * share:.1g} %" if share >= 0.001 else "< 0.1 %"
    return f"{100 * share:.0f} %"


# Where the blocks are


@dataclass(frozen=True)
class _Sizes:
    """Sizes of a block.

    Attributes:
        heading: broken into lines.
        label: width of the labels of the rows.
        panel: width and height of a panel.
        rows: height of the titles, and of the texts below the panels, of each row.
        width: of the whole block.
        height: of the whole block.
    """

    heading: str
    label: float
    panel: tuple[float, float]
    rows: Sequence[tuple[float, float]]
    width: float
    height: float


@dataclass(frozen=True, eq=False)
class _Layout:
    """Blocks, their sizes, and the place of the top left corner of each: distance from the left and from the top."""

    blocks: Sequence[_Block]
    sizes: Sequence[_Sizes]
    places: Sequence[tuple[float, float]]

    @property
    def width(self) -> float:
        return max(left + size.width for (left, _), size in zip(self.places, self.sizes, strict=True))

    @property
    def height(self) -> float:
        return max(top + size.height for (_, top), size in zip(self.places, self.sizes, strict=True))

    @property
    def badness(self) -> float:
        """Share of the page that is empty, and a smaller part for pages that are far from square."""
        used = sum((size.width + BLOCK_GAP) * (size.height + BLOCK_GAP) for size in self.sizes)
        page = (self.width + BLOCK_GAP) * (self.height + BLOCK_GAP)
        return 1 - used / page + 0.1 * abs(math.log(self.width / self.height))


def _layouts(page: Page) -> list[_Layout]:
    panel = _panel_inches(page)
    layouts = []
    for scale in CASE_SCALES:
        blocks = _blocks(page, scale)
        sizes = [_sizes(block, panel) for block in blocks]
        widest = max(size.width for size in sizes)
        ends = [0.0]
        for size in sizes:
            ends.append(ends[-1] + size.width + BLOCK_GAP)
        lines = {end - start - BLOCK_GAP for start in ends for end in ends}  # widths of some blocks beside each other
        for width in {widest, *(line for line in lines if widest < line <= WIDEST)}:
            layouts.append(_Layout(blocks, sizes, _places(sizes, width + 1e-6)))
    return layouts


def _places(sizes: Sequence[_Sizes], page_width: float) -> list[tuple[float, float]]:
    """Place each block below the last one if the strip is high enough, else beside it, else in a new strip."""
    places: list[tuple[float, float]] = []
    strip_top = strip_bottom = left = right = top = 0.0  # the next block's place is (left, top), or beyond right
    for size in sizes:
        fits_below = top + size.height <= strip_bottom and left + size.width <= page_width
        if places and not fits_below:
            left, top = right + BLOCK_GAP, strip_top
            if left + size.width > page_width:
                left = right = 0.0
                strip_top = top = strip_bottom + BLOCK_GAP
        places.append((left, top))
        right, strip_bottom = max(right, left + size.width), max(strip_bottom, top + size.height)
        top += size.height + BLOCK_GAP
    return places


def _panel_inches(page: Page) -> tuple[float, float]:
    """Return width and height of a panel."""
    height, width = page.image.shape[:2]
    ratio = math.sqrt(min(max(height * page.aspect / width, 1 / LONGEST), LONGEST))
    return PANEL_INCHES / ratio, PANEL_INCHES * ratio


def _sizes(block: _Block, panel: tuple[float, float]) -> _Sizes:
    width, height = (block.scale * side for side in panel)
    label = max(_text_width(text) for text, _ in block.rows)
    label += GAP if label else 0.0
    rows = [
        (
            max((_text_height(_wrap(each.title, width)) for each in panels), default=0.0),
            max((_text_height(each.below) for each in panels), default=0.0),
        )
        for _, panels in block.rows
    ]
    across = label + max(len(panels) for _, panels in block.rows) * (width + GAP) + block.beside[0]
    down = sum(above + height + below + GAP for above, below in rows) if block.rows[0][1] else 0.0
    down = max(down, rows[0][0] + block.beside[1])
    heading = _wrap(block.heading, max(across, LEAST_HEADING), HEADING_SIZE, "bold")
    return _Sizes(
        heading, label, (width, height), rows, max(across, _text_width(heading, HEADING_SIZE, "bold")),
        _text_height(heading, HEADING_SIZE) + down,
    )  # fmt: skip


def _text_height(text: str, size: float = TEXT_SIZE) -> float:
    return (text.count("\n") + 1) * LINE * size / 72 if text else 0.0


@cache
def _text_width(text: str, size: float = TEXT_SIZE, weight: str = "normal") -> float:
    font = FontProperties(size=size, weight=weight)
    widths = [TextPath((0, 0), line, prop=font).get_extents().x1 for line in text.split("\n") if line.strip()]
    return 1.04 * max(widths, default=0.0) / 72  # hinted letters are a little wider than their outlines


@cache
def _wrap(text: str, width: float, size: float = TEXT_SIZE, weight: str = "normal") -> str:
    """Break a text into lines of at most this width; a single word may be longer."""
    lines: list[str] = []
    for word in text.split(" "):
        if lines and _text_width(f"{lines[-1]} {word}", size, weight) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return "\n".join(lines)


# How they are drawn


class _Paper:
    """A figure on which things are placed by their distance from the left and from the top."""

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        self.figure = Figure(figsize=(width, height), dpi=DPI)
        FigureCanvasAgg(self.figure)

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        box = (left / self.width, 1 - (top + height) / self.height, width / self.width, height / self.height)
        axes = self.figure.add_axes(box)
        axes.set(xticks=[], yticks=[])
        return axes

    def write(self, left: float, top: float, text: str, size: float = TEXT_SIZE, **options: Any) -> None:
        options = {"va": "top", "linespacing": 1.15, "fontsize": size, **options}
        self.figure.text(left / self.width, 1 - top / self.height, text, **options)


def _draw_block(paper: _Paper, page: Page, block: _Block, sizes: _Sizes, left: float, top: float) -> None:
    paper.write(left, top, sizes.heading, HEADING_SIZE, weight="bold")
    top += _text_height(sizes.heading, HEADING_SIZE)
    width, height = sizes.panel
    block.draw_beside(paper, left + sizes.label + len(block.rows[0][1]) * (width + GAP), top + sizes.rows[0][0], height)
    for (label, panels), (above, below) in zip(block.rows, sizes.rows, strict=True):
        top += above
        paper.write(left, top + height / 2, label, va="center")
        for column, panel in enumerate(panels):
            place = left + sizes.label + column * (width + GAP)
            title = _wrap(panel.title, width)
            paper.write(place + width / 2, top - 0.03, title, va="bottom", ha="center")
            _draw_panel(paper.axes(place, top, width, height), page, panel, block.scale)
            paper.write(place + width / 2, top + height + 0.02, panel.below, ha="center")
        top += height + below + GAP


def _draw_panel(axes: Axes, page: Page, panel: _Panel, scale: float) -> None:
    mapped = panel.heat is not None or panel.probability is not None
    axes.imshow(_grey(page.image) if mapped else _shown(page.image), cmap="gray", vmin=0, vmax=1, aspect=page.aspect)
    if panel.heat is not None:
        largest = float(panel.heat.max(where=np.isfinite(panel.heat), initial=0))
        axes.imshow(panel.heat, cmap=heat_colours(), vmin=0, vmax=largest or 1.0, aspect=page.aspect)
    if panel.probability is not None:
        axes.imshow(panel.probability, cmap=PROBABILITY, vmin=0, vmax=1, aspect=page.aspect)
    masks = {"nnU-Net": page.presegmentation, "truth": page.truth, "result": page.result}
    for name in panel.contours:
        mask, (colour, style) = masks[name], STYLES[name]
        if mask is not None and mask.any() and not mask.all():
            width = 0.9 * scale
            drawn = axes.contour(mask, levels=[0.5], colors=[colour], linewidths=width, linestyles=[style])
            drawn.set_path_effects(_edge(width + 0.8))
    if panel.cross and page.voxel is not None:
        axes.add_line(_cross(page.voxel))
    axes.spines[:].set_visible(False)
