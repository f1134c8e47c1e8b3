from __future__ import annotations

import math
from pathlib import Path

import pytest

from nnunet_diffusion.evaluation.sweep_results import NOISE, PRESEGMENTATION, Summary
from nnunet_diffusion.explain.sweep_figure import sweep_figure

NNUNET = Summary("nnU-Net", "none", 0, 0, 0.8, math.nan, 1, 20)


def summaries(starts: tuple[str, ...], variances: tuple[float, ...] = (1e-4, 1e-5, 1e-7)) -> list[Summary]:
    return [NNUNET] + [
        Summary(sampler, start, 100, count, 0.7 + count / 1000, variance, 5, 20)
        for start in starts
        for sampler in ("ddpm", "ddim", "unipc")
        for count, variance in zip((1, 10, 100), variances, strict=True)
    ]


def test_each_start_is_a_column_and_each_sampler_a_line(tmp_path: Path) -> None:
    figure = sweep_figure(summaries((NOISE, PRESEGMENTATION)), "Dataset, model", tmp_path / "sweep.png")
    assert (tmp_path / "sweep.png").stat().st_size > 20_000
    means, variances = figure.axes[:2], figure.axes[2:]
    assert [axis.get_title() for axis in means] == ["from noise (T′ = 100)", "from nnU-Net (T′ = 100)"]
    assert [len(axis.lines) for axis in figure.axes] == [3 + 1, 3 + 1, 3, 3]
    for axis in means:
        assert list(axis.lines[0].get_ydata()) == pytest.approx([0.701, 0.71, 0.8])
        assert list(axis.lines[-1].get_ydata()) == [0.8, 0.8] and axis.lines[-1].get_linestyle() == "--"
    assert figure.axes[0].get_ylabel().startswith("Dice") and figure.axes[2].get_ylabel().startswith("variance")
    for axis in variances:
        assert axis.get_xlabel() == "network evaluations" and axis.get_xscale() == axis.get_yscale() == "log"
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["ddpm", "ddim", "unipc", "nnU-Net"]


def test_starts_share_the_dice_axis_and_equal_curves_show_as_rims(tmp_path: Path) -> None:
    figure = sweep_figure(summaries((NOISE, PRESEGMENTATION)), "title", tmp_path / "sweep.png")
    left, right = figure.axes[:2]
    assert left.get_shared_y_axes().joined(left, right) and left.get_ylim() == right.get_ylim()
    samplers = left.lines[:3]
    for sizes in ([line.get_linewidth() for line in samplers], [line.get_markersize() for line in samplers]):
        assert sizes == sorted(set(sizes), reverse=True), "each curve is thinner than those below it"


def test_one_start_is_one_column_and_no_variance_is_said(tmp_path: Path) -> None:
    figure = sweep_figure(summaries((PRESEGMENTATION,), (math.nan,) * 3), "title", tmp_path / "one.png")
    assert len(figure.axes) == 2 and figure.axes[1].texts[0].get_text() == "one seed: no variance"


def test_a_variance_of_zero_has_a_linear_axis(tmp_path: Path) -> None:
    figure = sweep_figure(summaries((NOISE,), (1e-4, 1e-7, 0.0)), "title", tmp_path / "zero.png")
    assert figure.axes[1].get_yscale() == "linear" and figure.axes[1].get_ylim()[0] == 0


def test_a_figure_without_reverse_process_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="summaries has no reverse process"):
        sweep_figure([NNUNET], "title", tmp_path / "x.png")
