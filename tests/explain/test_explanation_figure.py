"""Page of an explained case: all panels and texts are there, none lie over each other, and wrong shapes are named."""

from dataclasses import replace

import numpy as np
import pytest
from matplotlib.colors import to_hex
from matplotlib.image import imread
from matplotlib.transforms import Bbox

from nnunet_diffusion.explain.explanation_figure import HEAT, STYLES, Attention, Flow, Page, Prior, explanation_figure


def page_of(shape=(20, 24), stages=(4, 4, 3), steps=(100, 60, 20), attended=(1, 2, 3, 4), **changes):
    generator = np.random.default_rng(0)
    names = ("condition flow", "denoising flow", "decoder")[: len(stages)]
    flows = {
        name: Flow(range(1, each + 1), generator.random((each, len(steps), *shape)), np.full((each, len(steps)), 0.43))
        for name, each in zip(names, stages, strict=True)
    }
    attention = {
        name: Attention(
            attended, generator.random((2, len(attended), *shape)), np.full((2, len(attended)), 0.43),
            [-0.02] * len(attended),
        )
        for name in names[:2]
    }  # fmt: skip
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
        "expected": 0.07,
        "reference": "result",
        "of_volume": False,
        "attention": attention,
        "prior": Prior(
            0.93, *(value for _ in range(2) for value in (generator.random(shape), 0.43)), generator.random(shape)
        ),
        "rows": {f"{name}, stage {stage}": (generator.random(shape), 0.12) for name in names[:2] for stage in attended},
        "dice_with_result": {"nnU-Net": 0.81, "without the prior branch": 0.99},
        "voxel": (7, 9),
    }
    return Page(**{**found, **changes})


ONLY_FLOWS = {
    "truth": None,
    "attention": {},
    "prior": None,
    "rows": {},
    "dice_with_result": {},
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
        (page_of(), 2 + 3 + 11 * 3 + 2 * 2 * 4 + 8),
        (page_of(stages=(1,), steps=(1000,), **ONLY_FLOWS), 2 + 1),
        (page_of((60, 20), stages=(8,), steps=tuple(range(100, 0, -10)), rows={}, voxel=None), 5 + 80 + 8),
        (page_of(stages=(4, 4), attended=(1, 2), prior=None), 2 + 8 * 3 + 8 + 4),
        (page_of(aspect=3.0, stages=(), attention={}, image=np.ones((20, 24, 3)), title="long name " * 30), 5 + 0),
    ],
)
def test_all_panels_are_there_and_no_text_lies_over_another_or_over_a_panel(page, number):
    figure = explanation_figure(page, [])
    assert len(panels(figure)) == number
    sizes = {tuple(np.round(axes.get_position().size * figure.get_size_inches(), 3)) for axes in panels(figure)}
    assert len(sizes) == (2 if page.flows or page.rows else 1)  # case and prior branch, and all others
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
    flows = {**page.flows, "decoder": replace(page.flows["decoder"], shares=np.full((3, 3), np.nan))}
    found = texts(explanation_figure(replace(page, flows=flows, result=np.zeros((20, 24), bool)), []))
    for once in (
        "case 12, tumour", HEAT, "none", "largest", "Condition flow", "Denoising flow", "Decoder", "nnU-Net's segmentation",
        "truth", "result of the reverse process: empty here", "named voxel",
        "% below a map: share of the heat inside the result; 7 % would be chance.", "what the result takes from it",
        "probability of the location", "Prior branch: class present with probability 0.93", "condition flow before PSA",
        "denoising flow after PSA", "denoising flow, stage 4",
        "Before and after parameter-shared attention (PSA) of weight η, at T = 100",
        "what tells it that the class is present",
        "Dice with the result: nnU-Net 0.81; without the prior branch 0.99.",
    ):  # fmt: skip
        assert found.count(once) == 1, once
    assert [found.count(text) for text in ("43 %", "43 % η -0.020", "12 %", "no heat", "T = 100")] == [
        34,
        8,
        8,
        9,
        3,
    ]
    without = " ".join(texts(explanation_figure(page_of(**ONLY_FLOWS), [])))
    assert not any(word in without for word in ("truth", "PSA", "Prior", "voxel"))
    assert any(
        text.startswith("% below a map: share of the heat of the whole volume inside the changed voxels")
        for text in texts(explanation_figure(page_of(of_volume=True, reference="changed voxels"), []))
    )


def test_maps_have_their_own_scale_with_a_transparent_low_end_and_the_contour_of_the_result():
    page = page_of()
    page.flows["decoder"].heat[0, 0] *= 5
    shown = panels(explanation_figure(page, []))
    (panel,) = (axes for axes in shown if axes.images[-1].get_clim()[1] == page.flows["decoder"].heat[0, 0].max())
    assert (panel.images[-1].get_array() == page.flows["decoder"].heat[0, 0]).all()
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
    nothing = np.zeros_like(page.image)

    def emptied(part):
        return replace(part, heat=np.zeros_like(part.heat), shares=np.full_like(part.shares, np.nan))

    page = replace(
        page,
        image=nothing,
        flows={name: emptied(flow) for name, flow in page.flows.items()},
        attention={name: emptied(each) for name, each in page.attention.items()},
        prior=Prior(0.0, nothing, np.nan, nothing, np.nan, nothing),
        rows={"stage 1": (nothing, np.nan)},
    )
    paths = [tmp_path / "page.png", tmp_path / "page.pdf"]
    figure = explanation_figure(page, paths)
    assert imread(paths[0]).std() > 0.05
    assert paths[1].read_bytes().startswith(b"%PDF")
    assert [texts(figure).count(text) for text in ("no heat", "no attention")] == [33 + 8 + 2, 1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": np.zeros((20, 24, 4))}, r"image has shape \(20, 24, 4\): expected \(H, W\), or \(H, W, 3\)"),
        ({"truth": np.zeros((24, 20), bool)}, r"truth has shape \(24, 20\): expected \(20, 24\)"),
        (
            {"flows": {"decoder": Flow((1, 2), np.zeros((2, 2, 20, 24)), np.zeros((2, 2)))}},
            r"flows\['decoder'\].heat has shape \(2, 2, 20, 24\): expected \(2, 3, 20, 24\)",
        ),
        (
            {"flows": {"decoder": Flow((1, 2), np.zeros((2, 3, 20, 24)), np.zeros(2))}},
            r"flows\['decoder'\].shares has shape \(2,\): expected \(2, 3\)",
        ),
        (
            {"attention": {"condition flow": Attention((1, 2), np.zeros((2, 2, 24, 20)), np.zeros((2, 2)), (0, 0))}},
            r"attention\['condition flow'\].heat .*: expected \(2, 2, 20, 24\)",
        ),
        (
            {"prior": Prior(0.5, np.zeros((20, 24)), 0.5, np.zeros((20, 24)), 0.5, np.zeros((10, 12)))},
            r"prior.location has shape \(10, 12\): expected \(20, 24\)",
        ),
        ({"rows": {"stage 1": (np.zeros(20), 0.5)}}, r"rows\['stage 1'\] has shape \(20,\): expected \(20, 24\)"),
        (
            {"voxel": (20, 3)},
            r"voxel is \(20, 3\): expected a row and a column of the image, which has shape \(20, 24\)",
        ),
    ],
)
def test_shapes_that_contradict_each_other_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        explanation_figure(page_of(**changes), [])
