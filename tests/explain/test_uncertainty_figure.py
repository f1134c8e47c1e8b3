"""Figures of predicted cases: the place they show, and that they can be drawn for all kinds of images."""

import numpy as np
import pytest
from matplotlib.image import imread

from nnunet_diffusion.explain.uncertainty_figure import Case, contact_sheet, most_uncertain, uncertainty_figure


def case_of(shape, samples=3, **changes):
    generator = np.random.default_rng(0)
    labels = (generator.random(shape) > 0.8).astype(int)
    found = {
        "name": "case",
        "image": generator.random(shape),
        "segmentation": labels,
        "uncertainty": generator.random(shape),
        "samples": [np.roll(labels, place, -1) for place in range(samples)],
        "spacing_mm": (2.0, 1.0, 1.0),
    }
    return Case(**{**found, **changes})


def test_the_place_is_that_of_a_region_not_of_one_voxel():
    uncertainty = np.zeros((9, 20, 20))
    uncertainty[4, 3:8, 3:8] = 0.5
    uncertainty[2, 15, 15] = 0.9
    assert most_uncertain(uncertainty) == (4, 5, 5)


@pytest.mark.parametrize(("shape", "columns"), [((6, 20, 24), 3), ((1, 20, 24), 1)])
def test_volumes_have_three_planes_and_images_one(tmp_path, shape, columns):
    uncertainty_figure(case_of(shape), tmp_path / "case.png")
    height, width = imread(tmp_path / "case.png").shape[:2]
    assert width / height == pytest.approx((2.5 * columns + 0.6) / 5.8, rel=0.02)


@pytest.mark.parametrize("changes", [{"uncertainty": np.zeros((4, 9, 9))}, {"segmentation": np.zeros((4, 9, 9), int)},
                                     {"image": np.zeros((4, 9, 9))}])  # fmt: skip
def test_certain_empty_and_constant_cases_can_be_drawn(tmp_path, changes):
    uncertainty_figure(case_of((4, 9, 9), samples=0, **changes), tmp_path / "case.png")
    assert (tmp_path / "case.png").stat().st_size > 1000


def test_a_sheet_has_a_place_for_each_case(tmp_path):
    uncertainty_figure(case_of((1, 20, 24)), tmp_path / "case.png")
    for number, lines in ((1, 1), (5, 2)):
        contact_sheet([(f"case {place}", tmp_path / "case.png") for place in range(number)], tmp_path / "sheet.png")
        assert imread(tmp_path / "sheet.png").shape[0] == pytest.approx(297 * lines, abs=2)
