"""Figures of predicted cases: the place they show, colours and names, and that they can be drawn for all kinds of images."""

import math
from dataclasses import replace

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.image import imread

from nnunet_diffusion.explain.uncertainty_figure import (
    COLOURS,
    SHEET_COLUMNS,
    Case,
    contact_sheet,
    highest_entropy,
    most_uncertain,
    uncertainty_figure,
)


def case_of(shape, number=3, **changes):
    generator = np.random.default_rng(0)
    labels = (generator.random(shape) > 0.8).astype(int)
    found = {
        "title": "case",
        "image": generator.random(shape),
        "segmentation": labels,
        "uncertainty": generator.random(shape),
        "samples": [np.roll(labels, place, -1) for place in range(number)],
        "spacing_mm": (2.0, 1.0, 1.0),
        "classes": {"organ": (1,)},
    }
    return Case(**{**found, **changes})


def two_blocks():
    """A class 1 and a class 2 in each plane through the most uncertain voxel (2, 10, 10)."""
    labels, uncertainty = np.zeros((6, 20, 24), int), np.zeros((6, 20, 24))
    labels[1:4, 5:15, 5:11], labels[1:4, 5:15, 11:20] = 1, 2
    uncertainty[2, 10, 10] = 0.5
    classes = {"head": (1,), "tail": (2,)}
    return case_of(labels.shape, segmentation=labels, samples=[labels], uncertainty=uncertainty, classes=classes)


def lines_of(panel):
    """Colour and style of the contours of a panel: solid, or with dashes."""
    return {(to_hex(each.get_edgecolor()[0]), each.get_linestyle()[0][1] is None) for each in panel.collections}


def texts(figure):
    return [text.get_text() for text in figure.legends[0].get_texts()]


def test_the_place_is_that_of_a_region_not_of_one_voxel():
    uncertainty = np.zeros((9, 20, 20))
    uncertainty[4, 3:8, 3:8] = 0.5
    uncertainty[2, 15, 15] = 0.9
    assert most_uncertain(uncertainty) == (4, 5, 5)


def test_each_class_has_a_colour_and_samples_are_dashed(tmp_path):
    case = two_blocks()
    figure = uncertainty_figure(case, tmp_path / "case.png")
    first, second = COLOURS[:2]
    assert lines_of(figure.axes[0]) == {(first, True), (first, False), (second, True), (second, False)}
    assert texts(figure) == ["segmentation", "1 samples", "most uncertain place", "head", "tail"]
    assert [line.get_color() for line in figure.legends[0].get_lines()[-2:]] == [first, second]
    without = uncertainty_figure(case_of((1, 20, 24), number=0), tmp_path / "case.png")
    assert texts(without) == ["segmentation", "most uncertain place", "organ"]


def test_regions_that_overlap_are_both_drawn_and_colours_are_repeated(tmp_path):
    regions = {f"region {place}": (1, 2) for place in range(len(COLOURS))} | {"core": (2,)}
    figure = uncertainty_figure(replace(two_blocks(), samples=[], classes=regions), tmp_path / "x.png")
    assert {colour for colour, _ in lines_of(figure.axes[0])} == set(COLOURS)
    assert figure.legends[0].get_lines()[-1].get_color() == COLOURS[0]


def test_planes_are_named_by_axis_and_index_from_0(tmp_path):
    figure = uncertainty_figure(two_blocks(), tmp_path / "case.png")
    assert [panel.get_title() for panel in figure.axes[:6]] == ["z = 2", "y = 10", "x = 10", "", "", ""]
    for panel in figure.axes[:6]:
        (cross,) = panel.lines
        assert cross.get_marker() == "+" and cross.get_zorder() > max(each.get_zorder() for each in panel.images)
        assert all(cross.get_zorder() > contour.get_zorder() for contour in panel.collections)
    image = uncertainty_figure(case_of((1, 20, 24)), tmp_path / "case.png")
    assert [panel.get_title() for panel in image.axes[:2]] == ["", ""]


def test_the_scale_is_fixed_and_opacity_rises_from_0(tmp_path):
    assert highest_entropy(3, False) == pytest.approx(math.log(3))
    assert highest_entropy(3, True) == pytest.approx(3 * math.log(2))
    assert highest_entropy(0, False) is None
    for highest, top in ((1.5, 1.5), (None, 0.5)):
        figure = uncertainty_figure(replace(two_blocks(), highest=highest), tmp_path / "case.png")
        overlay = figure.axes[3].images[1]
        assert overlay.get_clim() == (0, top)
        opacity = overlay.get_cmap()(np.linspace(0, 1, 9))[:, 3]
        assert opacity[0] == 0 and (np.diff(opacity) >= 0).all() and opacity[1] > 0
        assert figure.axes[-1].get_ylabel() == "entropy (nats)"


@pytest.mark.parametrize(("shape", "ratio"), [((6, 20, 24), 10.4 / 7.32), ((1, 20, 24), 10.4 / 4.92)])
def test_volumes_have_three_planes_and_images_one(tmp_path, shape, ratio):
    figure = uncertainty_figure(case_of(shape), tmp_path / "case.png")
    height, width = imread(tmp_path / "case.png").shape[:2]
    assert width / height == pytest.approx(ratio, rel=0.02)
    assert len(figure.axes) == (7 if shape[0] > 1 else 3)


@pytest.mark.parametrize("changes", [{"uncertainty": np.zeros((4, 9, 9))}, {"segmentation": np.zeros((4, 9, 9), int)},
                                     {"segmentation": np.ones((4, 9, 9), int)}, {"image": np.zeros((4, 9, 9))}])  # fmt: skip
def test_certain_empty_full_and_constant_cases_can_be_drawn(tmp_path, changes):
    uncertainty_figure(case_of((4, 9, 9), number=0, **changes), tmp_path / "case.png")
    assert (tmp_path / "case.png").stat().st_size > 1000


def test_a_sheet_has_tiles_in_order_with_the_panels_alone(tmp_path):
    picture = tmp_path / "case.png"
    uncertainty_figure(case_of((1, 20, 24)), picture)
    whole = imread(picture).shape[:2]
    for number, columns in ((1, 1), (2, 2), (4, 2), (5, 3), (40, SHEET_COLUMNS)):
        titles = [f"case {place}" for place in range(number)]
        figure = contact_sheet([(title, picture) for title in titles], "Least certain first", tmp_path / "sheet.png")
        assert figure.axes[0].get_subplotspec().get_gridspec().ncols == columns
        assert [tile.get_title() for tile in figure.axes[:number]] == titles
        assert figure.get_suptitle() == "Least certain first"
        tile = figure.axes[0].images[0].get_array().shape
        assert tile[0] < whole[0] - 60 and tile[1] < whole[1] - 60, "without title, legend and colour bar"
