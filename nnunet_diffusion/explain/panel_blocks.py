"""Pages of blocks: each a heading and rows of panels of one size, placed in the order of reading.

All lengths are in inches, from the top left corner; sizes of text are in points.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg, RendererAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from numpy.typing import NDArray

from nnunet_diffusion.training.checkpoints import write_aside

DPI = 150
AGAIN = "Free some space or choose another folder (-o), then give the command again."
GAP, BLOCK_GAP = 0.07, 0.3  # between panels, between blocks
LEAST_HEADING = 2.0  # width at which headings are broken, unless their block is wider
TITLE_SIZE, HEADING_SIZE, TEXT_SIZE = 13.0, 11.0, 9.0
LINE = 1.3  # height of a line divided by the size of its text


@dataclass(frozen=True, eq=False)
class Panel:
    """The image with a map over it, and contours; the image has its colours only without a map."""

    title: str = ""
    below: str = ""
    heat: NDArray | None = None
    probability: NDArray | None = None
    contours: Sequence[str] = ("explained",)
    cross: bool = False


Row = tuple[str, Sequence[Panel]]  # label, panels


@dataclass(frozen=True, eq=False)
class Block:
    """Heading and rows of panels.

    Attributes:
        heading: of the block.
        rows: label and panels of each.
        scale: of the panels.
        beside: width and least height of what is drawn at the right of the first row.
        draw_beside: draws it, given left and top of the place, and the height of the panels.
    """

    heading: str
    rows: Sequence[Row]
    scale: float = 1.0
    beside: tuple[float, float] = (0.0, 0.0)
    draw_beside: Callable[[Paper, float, float, float], None] = lambda paper, left, top, height: None


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
class Layout:
    """Blocks, their sizes, and the place of the top left corner of each: distance from the left and from the top."""

    blocks: Sequence[Block]
    sizes: Sequence[_Sizes]
    places: Sequence[tuple[float, float]]

    @property
    def width(self) -> float:
        """Width of all blocks."""
        return max(left + size.width for (left, _), size in zip(self.places, self.sizes, strict=True))

    @property
    def height(self) -> float:
        """Height of all blocks."""
        return max(top + size.height for (_, top), size in zip(self.places, self.sizes, strict=True))


def laid_out(blocks: Sequence[Block], panel: tuple[float, float], widest: float) -> Layout:
    """Place blocks beside each other as on lines of text.

    Args:
        blocks: in the order of reading.
        panel: width and height of a panel of scale 1.
        widest: width of the page, unless one block is wider.
    """
    sizes = [_sizes(block, panel) for block in blocks]
    places: list[tuple[float, float]] = []
    left = top = bottom = 0.0
    for size in sizes:
        if left + size.width > widest and left > 0:
            left, top = 0.0, bottom + BLOCK_GAP
        places.append((left, top))
        left, bottom = left + size.width + BLOCK_GAP, max(bottom, top + size.height)
    return Layout(blocks, sizes, places)


def _sizes(block: Block, panel: tuple[float, float]) -> _Sizes:
    width, height = (block.scale * side for side in panel)
    label = max(text_width(text) for text, _ in block.rows)
    label += GAP if label else 0.0
    rows = [
        (
            max((text_height(wrap(each.title, width)) for each in panels), default=0.0),
            max((text_height(each.below) for each in panels), default=0.0),
        )
        for _, panels in block.rows
    ]
    across = label + max(len(panels) for _, panels in block.rows) * (width + GAP)
    down = sum(above + height + below + GAP for above, below in rows)
    whole = across + block.beside[0]
    heading = wrap(block.heading, max(whole, LEAST_HEADING), HEADING_SIZE, "bold")
    return _Sizes(
        heading, label, (width, height), rows,
        width=max(whole, text_width(heading, HEADING_SIZE, "bold")),
        height=text_height(heading, HEADING_SIZE) + max(down, rows[0][0] + block.beside[1]),
    )  # fmt: skip


def text_height(text: str, size: float = TEXT_SIZE) -> float:
    """Return the height of a text of one or more lines; 0 of none."""
    return (text.count("\n") + 1) * LINE * size / 72 if text else 0.0


@cache
def text_width(text: str, size: float = TEXT_SIZE, weight: str = "normal") -> float:
    """Return the width of the longest line of a text."""
    font, dpi = FontProperties(size=size, weight=weight), 720  # fine, since widths are rounded to pixels
    renderer = RendererAgg(1, 1, dpi)
    return 1.03 * max(renderer.get_text_width_height_descent(line, font, False)[0] for line in text.split("\n")) / dpi


@cache
def wrap(text: str, width: float, size: float = TEXT_SIZE, weight: str = "normal") -> str:
    """Break a text into lines of at most this width, but neither in `T = 20` nor in `7 %`; a word may be longer."""
    lines: list[str] = []
    for word in re.split(r"(?<!=) (?![=%])", text):
        if lines and text_width(f"{lines[-1]} {word}", size, weight) <= width:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return "\n".join(lines)


def save_figure(figure: Figure, paths: Sequence[str | Path], dpi: float | None = None) -> None:
    """Write a figure to each path, whose ending selects the format; a file that is there is replaced when it is complete.

    Raises:
        OSError: a file cannot be written. The message names it.
    """
    # letters of a PDF as TrueType, which publishers ask for
    with rc_context({"pdf.fonttype": 42, "svg.fonttype": "none"}):
        for path in map(Path, paths):
            options = {"format": path.suffix.removeprefix("."), "dpi": dpi or figure.dpi}
            write_aside(lambda aside, options=options: figure.savefig(aside, **options), path, AGAIN)  # type: ignore[misc]


class Paper:
    """A figure on which things are placed by their distance from the left and from the top."""

    def __init__(self, width: float, height: float) -> None:
        self.width, self.height = width, height
        self.figure = Figure(figsize=(width, height), dpi=DPI)
        FigureCanvasAgg(self.figure)

    def axes(self, left: float, top: float, width: float, height: float) -> Axes:
        """Return new axes without ticks."""
        box = (left / self.width, 1 - (top + height) / self.height, width / self.width, height / self.height)
        axes = self.figure.add_axes(box)
        axes.set(xticks=[], yticks=[])
        return axes

    def write(self, left: float, top: float, text: str, size: float = TEXT_SIZE, **options: Any) -> None:
        """Write a text whose top is there."""
        options = {"va": "top", "linespacing": 1.15, "fontsize": size, "parse_math": False, **options}
        self.figure.text(left / self.width, 1 - top / self.height, text, **options)


def draw_blocks(
    paper: Paper, layout: Layout, left: float, top: float, draw: Callable[[Axes, Panel, float], None]
) -> None:
    """Draw all blocks.

    Args:
        paper: on which they are drawn.
        layout: where they are.
        left: of the place of all blocks.
        top: of the place of all blocks.
        draw: draws a panel into its axes; the last argument is the scale of its block.
    """
    for block, sizes, (right, down) in zip(layout.blocks, layout.sizes, layout.places, strict=True):
        _draw_block(paper, block, sizes, left + right, top + down, draw)


def _draw_block(
    paper: Paper, block: Block, sizes: _Sizes, left: float, top: float, draw: Callable[[Axes, Panel, float], None]
) -> None:
    top += text_height(sizes.heading, HEADING_SIZE)
    paper.write(left, top - 0.06, sizes.heading, HEADING_SIZE, weight="bold", va="baseline")
    width, height = sizes.panel
    block.draw_beside(paper, left + sizes.label + len(block.rows[0][1]) * (width + GAP), top + sizes.rows[0][0], height)
    for (label, panels), (above, below) in zip(block.rows, sizes.rows, strict=True):
        top += above
        paper.write(left, top + height / 2, label, va="center")
        for column, panel in enumerate(panels):
            place = left + sizes.label + column * (width + GAP)
            title = wrap(panel.title, width)
            paper.write(place + width / 2, top - 0.05, title, va="baseline", ha="center")
            draw(paper.axes(place, top, width, height), panel, block.scale)
            paper.write(place + width / 2, top + height + 0.02, panel.below, ha="center")
        top += height + below + GAP
