from __future__ import annotations

import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.image import imread

from nnunet_diffusion.explain.figures import ReportRow, curves_figure, error_map, report_figure


def row(name: str = "case", shape: tuple[int, int] = (24, 32)) -> ReportRow:
    generator = np.random.default_rng(0)
    truth = np.zeros(shape, np.uint8)
    truth[5:15, 5:15] = 1
    process = [(timestep, generator.random(shape)) for timestep in (299, 149, -1)]
    return ReportRow(name, generator.random(shape), truth, np.roll(truth, 2, 0), process, np.roll(truth, 1, 1))


def colours_of(path: Path) -> set[tuple[int, ...]]:
    picture = np.round(imread(path)[..., :3] * 255).astype(int)
    return set(map(tuple, picture.reshape(-1, 3)))


def test_error_map_has_the_colours_of_figure_9() -> None:
    prediction, truth = np.array([[0, 1, 0, 1, 2]]), np.array([[0, 1, 1, 0, 1]])
    black, white, red, blue, magenta = error_map(prediction, truth)[0].tolist()
    assert (black, white) == ([0, 0, 0], [255, 255, 255])
    assert red[0] > 200 > 2 * max(red[1:]) and blue[2] > 200 > 2 * blue[0] and magenta[0] == magenta[2] > 3 * magenta[1]
    with pytest.raises(ValueError, match="prediction has shape"):
        error_map(np.zeros((2, 2)), np.zeros((2, 3)))


def test_the_prior_is_a_panel_before_the_states_and_all_rows_have_it_or_none(tmp_path: Path) -> None:
    plain = row()
    with_prior = replace(plain, prior=plain.process[0][1])
    assert [title for title, _ in with_prior.panels] == ["p", "T = 300", "T = 150", "T = 0"]
    for name, rows in (("plain", [plain]), ("prior", [with_prior])):
        report_figure(rows, tmp_path / f"{name}.png")
    widths = [imread(tmp_path / f"{name}.png").shape[1] for name in ("plain", "prior")]
    assert widths[1] > widths[0] + 200
    with pytest.raises(ValueError, match="process of one length"):
        report_figure([plain, with_prior], tmp_path / "x.png")


def test_report_figure_shows_viridis_and_error_colours(tmp_path: Path) -> None:
    path = tmp_path / "report.png"
    two_classes = replace(row("two", (40, 20)), truth=np.full((40, 20), 2))
    report_figure([row(), two_classes], path)
    colours = colours_of(path)
    assert {(68, 1, 84), (253, 231, 36), (225, 30, 30), (30, 90, 235), (200, 40, 200)} <= colours


def test_states_may_have_the_networks_grid(tmp_path: Path) -> None:
    generator = np.random.default_rng(1)
    coarse = [(timestep, generator.choice([-1.0, 1.0], (12, 16))) for timestep in (299, -1)]
    fine = [(timestep, state.repeat(2, 0).repeat(2, 1)) for timestep, state in coarse]
    for name, process in (("coarse", coarse), ("fine", fine)):
        report_figure([replace(row(), process=process)], tmp_path / f"{name}.png")
    differing = (imread(tmp_path / "coarse.png") != imread(tmp_path / "fine.png")).any(-1)
    assert differing.mean() < 0.01, "a coarse state fills its panel as a fine one does"


def test_report_figure_of_one_empty_case(tmp_path: Path) -> None:
    empty = np.zeros((16, 16), np.uint8)
    report_figure([ReportRow("normal", np.ones((16, 16)), empty, empty, [], empty)], tmp_path / "empty.png")
    assert (225, 30, 30) in colours_of(tmp_path / "empty.png"), "the legend stays"


def test_report_figure_names_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="rows is empty"):
        report_figure([], tmp_path / "x.png")
    with pytest.raises(ValueError, match=r"process of one length, got \[3, 0\]"):
        report_figure([row(), replace(row(), process=[])], tmp_path / "x.png")
    with pytest.raises(ValueError, match="row 'case': all maps must be 2D"):
        report_figure([replace(row(), image=np.zeros((1, 24, 32)))], tmp_path / "x.png")
    with pytest.raises(ValueError, match="row 'case': all states must be 2D of one shape"):
        report_figure([replace(row(), process=[(9, np.zeros((24, 32))), (-1, np.zeros((12, 16)))])], tmp_path / "x.png")


@pytest.mark.parametrize("epochs", [0, 1, 12, 1000])
def test_curves_of_any_length(tmp_path: Path, epochs: int) -> None:
    path = tmp_path / "curves.png"
    values = [math.exp(-epoch / 50) if epoch % 7 else math.nan for epoch in range(epochs)]
    curves_figure(
        {"ce": values, "dice": [-1.0] * epochs, "lost": [math.nan] * epochs, "inf": [math.inf] * epochs}, path
    )
    assert path.stat().st_size > 10_000
    assert len(colours_of(path)) > 2


def test_curves_names_an_empty_mapping(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="curves is empty"):
        curves_figure({}, tmp_path / "x.png")


def test_pyplot_is_never_loaded() -> None:
    code = "import sys, nnunet_diffusion.explain.figures; sys.exit('matplotlib.pyplot' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
