"""Figures of an evaluation: which bins the reliability diagram shows, and what the picture of a case names."""

import numpy as np
import pytest

from nnunet_diffusion.explain.evaluation_figures import case_figure, reliability_diagram


def sums(voxels):
    voxels = np.array(voxels, dtype=float)
    middle = (np.arange(len(voxels)) + 0.5) / len(voxels)
    return [voxels, voxels * middle, voxels / 2]


@pytest.mark.parametrize(
    ("voxels", "points"),
    [((0, 3, 49, 50, 900), [0.7, 0.9]), ((0, 3, 4, 5, 6), [0.3, 0.5, 0.7, 0.9]), ((0, 0, 0, 0, 0), [])],
)
def test_small_bins_are_in_the_histogram_but_not_in_the_line(voxels, points):
    figure = reliability_diagram({"model": sums(voxels)})
    upper, lower = figure.axes
    assert list(upper.lines[1].get_xdata()) == pytest.approx(points)
    assert list(lower.patches[0].get_data().values) == list(voxels)
    if any(voxels):
        assert lower.get_xlim()[0] < 0.2, "all bins of the histogram are in view"


def volumes(depth):
    truth, prediction = np.zeros((2, depth, 20, 24), int)
    truth[-1, 5:15, 5:15], prediction[-1, 8:18, 5:15] = 1, 1
    return truth, prediction


def legend(panel):
    return [] if panel.get_legend() is None else [text.get_text() for text in panel.get_legend().get_texts()]


def test_a_case_names_its_slice_its_map_and_the_colours_that_are_there():
    truth, prediction = volumes(4)
    figure = case_figure(truth * 2.0, truth, prediction, truth * 0.5, (1, 1, 1), 1.5)
    contours, errors, uncertainty, bar = figure.axes
    assert contours.get_title() == "image and contours (z = 3)"
    assert (legend(contours), legend(errors)) == (["truth", "prediction"], ["right", "missed", "too much"])
    assert uncertainty.images[0].get_clim() == (0, 1.5) and bar.get_ylabel() == "entropy (nats)"
    confused = np.where(truth & prediction, 2, prediction)
    assert legend(case_figure(None, truth, confused, None, (1, 1, 1)).axes[1]) == ["missed", "too much", "wrong class"]
    both = case_figure(None, truth, prediction, None, (1, 1, 1), raters=[np.roll(truth, 1, 2)])
    assert legend(both.axes[0]) == ["other raters", "truth", "prediction"]
    assert len(both.axes[0].collections) == len(figure.axes[0].collections) + 1


def test_an_image_has_no_slice_and_what_is_not_there_no_name():
    truth, prediction = volumes(1)
    figure = case_figure(None, truth, prediction * 0, None, (1, 1, 1))
    contours, errors = figure.axes
    assert contours.get_title() == "image and contours"
    assert (legend(contours), legend(errors)) == (["truth"], ["missed"])
    empty = case_figure(None, truth * 0, truth * 0, None, (1, 1, 1))
    assert [legend(panel) for panel in empty.axes] == [[], []]
