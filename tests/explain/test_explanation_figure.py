"""Page of an explained case: all panels and texts are there, none lie over each other, and wrong shapes are named."""

from dataclasses import replace

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.image import imread
from matplotlib.transforms import Bbox

from nnunet_diffusion.explain.explanation_figure import HEAT, STYLES, Page, explanation_figure


def page_of(shape=(20, 24), stages=(4, 4, 3), steps=(100, 60, 20), attended=(1, 2, 3, 4), **changes):
    generator = np.random.default_rng(0)
    names = ("condition flow", "denoising flow", "decoder")[: len(stages)]
    flows = {name: generator.random((each, len(steps), *shape)) for name, each in zip(names, stages, strict=True)}
    mask = np.zeros(shape, bool)
    mask[5:12, 6:15] = True
    found = {
        "title": "case 12, tumour",
        "image": generator.random(shape),
        "aspect": 1.0,
        "presegmentation": np.roll(mask, 2, 1),
        "result": mask,
        "truth": np.roll(mask, 1, 0),
        "explained": mask,
        "steps": steps,
        "flows": flows,
        "stages": {name: range(1, len(heat) + 1) for name, heat in flows.items()},
        "shares": {name: np.full(heat.shape[:2], 0.43) for name, heat in flows.items()},
        "expected": 0.07,
        "reference": "result",
        "attention": {name: tuple(generator.random((2, len(attended), *shape))) for name in names[:2]},
        "attention_shares": {name: tuple(np.full((2, len(attended)), 0.43)) for name in names[:2]},
        "attention_stages": attended,
        "attention_step": 60,
        "prior": generator.random(shape),
        "location": generator.random(shape),
        "presence": 0.93,
        "rows": {f"{name}, stage {stage}": generator.random(shape) for name in names[:2] for stage in attended},
        "voxel": (7, 9),
    }
    return Page(**{**found, **changes})


ONLY_FLOWS = {
    "truth": None,
    "attention": {},
    "prior": None,
    "location": None,
    "presence": None,
    "rows": {},
    "voxel": None,
}


def panels(figure):
    """Axes with the image, without legend and scales."""
    return [axes for axes in figure.axes if axes.images and axes.images[0].get_cmap().name == "gray"]


def texts(figure):
    legend = [text for axes in figure.axes if axes.get_legend() for text in axes.get_legend().get_texts()]
    return [text.get_text().replace("\n", " ") for text in [*figure.texts, *legend] if text.get_text()]


@pytest.mark.parametrize(
    ("page", "number"),
    [
        (page_of(), 2 + 2 + 11 * 3 + 2 * 2 * 4 + 8),
        (page_of(stages=(1,), steps=(1000,), **ONLY_FLOWS), 2 + 1),
        (page_of((60, 20), stages=(8,), steps=tuple(range(100, 0, -10)), rows={}, voxel=None), 4 + 80 + 8),
        (page_of(stages=(4, 4), attended=(1, 2), prior=None), 3 + 8 * 3 + 8 + 4),
        (page_of(aspect=3.0, stages=(), attention={}, image=np.ones((20, 24, 3)), title="long name " * 30), 4 + 0),
    ],
)
def test_all_panels_are_there_and_no_text_lies_over_another_or_over_a_panel(page, number):
    figure = explanation_figure(page, [])
    assert len(panels(figure)) == number
    sizes = {tuple(np.round(axes.get_position().size * figure.get_size_inches(), 3)) for axes in panels(figure)}
    assert len(sizes) == (2 if page.flows else 1)  # case and prior branch, and all others
    figure.draw_without_rendering()
    renderer = figure.canvas.get_renderer()
    things = [text.get_window_extent(renderer) for text in figure.texts if text.get_text()]
    things += [axes.get_tightbbox(renderer) for axes in figure.axes]
    for place, thing in enumerate(things):
        assert thing.x0 >= 0 and thing.y0 >= 0 and thing.x1 <= figure.bbox.x1 and thing.y1 <= figure.bbox.y1
        for other in things[:place]:
            shared = Bbox.intersection(thing, other)
            assert shared is None or min(shared.width, shared.height) < 2, (thing, other)


def test_the_page_explains_itself():
    page = page_of()
    shares = {**page.shares, "decoder": np.full((3, 3), np.nan)}
    found = texts(explanation_figure(replace(page, shares=shares, result=np.zeros((20, 24), bool)), []))
    for once in (
        "case 12, tumour", HEAT, "none", "largest", "Condition flow", "Denoising flow", "Decoder", "nnU-Net's segmentation",
        "truth", "result of the reverse process: empty here", "named voxel",
        "% below a map: share of the heat inside the result; 7 % would be chance.", "what the result takes from it",
        "probability of the location", "Prior branch: class present with probability 0.93", "condition flow before PSA",
        "denoising flow after PSA", "denoising flow, stage 4",
        "Before and after parameter-shared attention (PSA), at T = 60",
    ):  # fmt: skip
        assert found.count(once) == 1, once
    assert [found.count(text) for text in ("43 %", "no heat", "T = 100", "stage 3")] == [40, 9, 3, 4]
    without = " ".join(texts(explanation_figure(page_of(**ONLY_FLOWS), [])))
    assert not any(word in without for word in ("truth", "PSA", "Prior", "voxel"))
    assert "Prior branch: class present with probability 0.50." in texts(
        explanation_figure(page_of(**{**ONLY_FLOWS, "presence": 0.5}), [])
    )


def test_maps_have_their_own_scale_with_a_transparent_low_end_and_the_contour_of_the_result():
    page = page_of()
    page.flows["decoder"][0, 0] *= 5
    shown = panels(explanation_figure(page, []))
    (panel,) = (axes for axes in shown if axes.images[-1].get_clim()[1] == page.flows["decoder"][0, 0].max())
    assert (panel.images[-1].get_array() == page.flows["decoder"][0, 0]).all()
    opacity = panel.images[-1].get_cmap()(np.linspace(0, 1, 9))[:, 3]
    assert opacity[0] == 0 and (np.diff(opacity) >= 0).all() and opacity[1] > 0
    assert [to_hex(each.get_edgecolor()[0]) for each in panel.collections] == [STYLES["result"][0]]
    assert {to_hex(each.get_edgecolor()[0]) for each in shown[1].collections} == {
        colour for colour, _ in STYLES.values()
    }
    crosses = [line.get_xydata().tolist() for axes in shown for line in axes.lines]
    assert crosses == [[[9.0, 7.0]]] * 9  # column, row: with the contours, and in the 8 maps of the voxel


def test_files_are_written_even_without_any_heat(tmp_path):
    page = page_of()
    page = replace(
        page,
        image=np.zeros_like(page.image),
        flows={name: np.zeros_like(heat) for name, heat in page.flows.items()},
        attention={name: (np.zeros_like(before), after) for name, (before, after) in page.attention.items()},
        attention_shares={name: (np.full(4, np.nan), after) for name, (_, after) in page.attention_shares.items()},
        prior=np.zeros_like(page.prior),
        rows={"stage 1": np.zeros_like(page.prior)},
    )
    paths = [tmp_path / "page.png", tmp_path / "page.pdf"]
    figure = explanation_figure(page, paths)
    assert imread(paths[0]).std() > 0.05
    assert paths[1].read_bytes().startswith(b"%PDF")
    assert [texts(figure).count(text) for text in ("no heat", "no attention")] == [9, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": np.zeros((20, 24, 4))}, r"image has shape \(20, 24, 4\): expected \(H, W\), or \(H, W, 3\)"),
        ({"truth": np.zeros((24, 20), bool)}, r"truth has shape \(24, 20\): expected \(20, 24\)"),
        (
            {"flows": {"decoder": np.zeros((4, 2, 20, 24))}, "shares": {"decoder": np.zeros((4, 2))}},
            r"flows\['decoder'\] has shape \(4, 2, 20, 24\): expected \(3, 3, 20, 24\)",
        ),
        ({"shares": {}}, r"shares has the flows \[\]: expected those of flows, \['condition flow',"),
        (
            {"attention": {"condition flow": np.zeros((2, 4, 24, 20))}},
            r"attention\['condition flow'\], before, .*: expected \(4, 20, 24\)",
        ),
        ({"rows": {"stage 1": np.zeros(20)}}, r"rows\['stage 1'\] has shape \(20,\): expected \(20, 24\)"),
        (
            {"voxel": (20, 3)},
            r"voxel is \(20, 3\): expected a row and a column of the image, which has shape \(20, 24\)",
        ),
    ],
)
def test_shapes_that_contradict_each_other_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        explanation_figure(page_of(**changes), [])
