"""Cases and slices of a publication's figures, and what reaches the page at print size."""

import re
from dataclasses import dataclass

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from matplotlib.image import imread
from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
from torch import nn

from nnunet_diffusion.evaluation.metrics import dice
from nnunet_diffusion.explain.comparison_figure import (
    ComparisonRow,
    comparison_figure,
    process_figure,
    wrapped,
)
from nnunet_diffusion.explain.figures import ERROR_COLOURS
from nnunet_diffusion.explain.shown_cases import (
    ShownCase,
    choose_cases,
    comparison_row,
    most_different_slice,
    process_row,
)
from nnunet_diffusion.inference import DiffusionPredictor
from nnunet_diffusion.model.segmenter import DiffusionSegmenter
from nnunet_diffusion.model.settings import DiffusionSettings

MISSED, TOO_MUCH, WRONG = (ERROR_COLOURS[key] for key in ("missed (A−B)", "over-segmented (B−A)", "wrong class"))


def square(first=0, label=1, shape=(20, 30)):
    labels = np.zeros(shape, int)
    labels[5:15, 5 + first : 15 + first] = label
    return labels


def row(label="case", predictions=None, dice=(0.7, 1.0), aspect=20 / 30, image=None):
    predictions = predictions or (square(3), square())
    image = np.arange(600.0).reshape(20, 30) if image is None else image
    return ComparisonRow(label, image, square(), predictions, dice, aspect)


def shown(axes):
    return np.asarray(axes.images[0].get_array())


# choice


def test_cases_are_those_of_extreme_and_median_difference_of_the_last_and_the_first():
    first = dict(zip("abcde", (0.5, 0.9, 0.8, 0.7, 0.6), strict=True))
    last = dict(zip("abcde", (0.65, 0.5, 0.8, 0.95, 0.7), strict=True))  # +0.15, -0.4, 0, +0.25, +0.1
    between = dict.fromkeys("abcde", 0.0)
    assert choose_cases([first, between, last]) == {
        "d": "largest gain",
        "b": "largest loss",
        "e": "median change",
    }
    assert choose_cases([first]) == {"b": "best Dice", "a": "worst Dice", "d": "median Dice"}


def test_the_reason_is_true_where_all_gain_or_lose_and_with_few_cases():
    assert choose_cases([{"a": 0.5, "b": 0.5}, {"a": 0.6, "b": 0.7}]) == {"b": "largest gain", "a": "smallest gain"}
    assert choose_cases([{"a": 0.5, "b": 0.5}, {"a": 0.4, "b": 0.3}]) == {"a": "smallest loss", "b": "largest loss"}
    assert choose_cases([{"a": 0.5, "b": 0.5}] * 2) == {"a": "no change", "b": "no change"}
    assert choose_cases([{"a": 0.5}] * 2) == {"a": "only case"}


def test_the_slice_has_most_differing_voxels_of_any_prediction():
    truth = np.zeros((4, 5, 6), int)
    truth[2] = 1
    first, second = truth.copy(), truth.copy()
    first[0, 0, :2], second[0, 0, 2:4], second[3, 0, :3] = 1, 1, 1  # 4 voxels in slice 0, 3 in slice 3
    assert most_different_slice(truth, [first, second], 0) == 0
    assert most_different_slice(truth, [second], 0) == 3
    assert most_different_slice(truth, [truth], 0) == 2, "most foreground"
    assert most_different_slice(truth, [second], 2) == 2, "one voxel of slice 3, and one of slice 0"


def case_of(truth, prediction, spacing_mm, channels=1, files=("a_0000.png",)):
    image = np.stack([np.arange(truth.size).reshape(truth.shape) * (1.0 + channel) for channel in range(channels)])
    return ShownCase("a", "why", files, image, truth, [prediction], np.ones(truth.shape, bool), spacing_mm)


def test_a_row_has_the_plane_across_the_largest_spacing_with_its_aspect_in_mm():
    truth = np.zeros((4, 5, 6), int)
    truth[1:3, 1:4, 2:5] = 1
    found = comparison_row(case_of(truth, np.where(np.arange(6) == 4, 0, truth), (1.0, 0.5, 2.0)), [0.8])
    assert found.label == "why\na\nx = 4"
    assert found.truth.shape == (4, 5) and found.truth.sum() == 6 and found.predictions[0].sum() == 0
    assert found.aspect == pytest.approx(4 * 1.0 / (5 * 0.5))
    assert comparison_row(case_of(truth, truth, (1.0, 0.5, 2.0)), [1.0], axis=0).truth.shape == (5, 6)
    flat = comparison_row(case_of(truth[1:2], truth[1:2], (1.0, 5.0, 5.0)), [1.0])
    assert flat.label == "why\na" and flat.truth.shape == (5, 6), "a 2D image has one plane"


def test_three_channels_of_one_file_are_colours_and_those_of_three_files_are_not():
    truth = np.zeros((1, 5, 6), int)
    coloured = comparison_row(case_of(truth, truth, (1.0, 1.0, 1.0), 3), [1.0])
    assert coloured.image.shape == (5, 6, 3) and coloured.image[0, 1].tolist() == [1, 2, 3]
    sequences = comparison_row(case_of(truth, truth, (1.0, 1.0, 1.0), 3, ("0", "1", "2")), [1.0])
    assert sequences.image.shape == (5, 6) and sequences.image[0, 1] == 2


# comparison


def test_errors_of_each_model_reach_the_page_in_their_colours(tmp_path):
    predictions = (square(3), square(label=2))
    path = tmp_path / "a.png"
    figure = comparison_figure([row(predictions=predictions, dice=(0.7, 0.0))], ["one", "two"], [path])
    panels = figure.axes
    assert [panel.get_title() for panel in panels] == ["Image", "Truth", "one", "two"]
    assert [panel.get_xlabel() for panel in panels[2:]] == ["Dice 0.700", "Dice 0.000"]
    errors = shown(panels[2])
    assert errors[10, [6, 10, 16, 25]].tolist() == [list(MISSED), [255] * 3, list(TOO_MUCH), [0] * 3]
    assert (shown(panels[3])[5:15, 5:15] == WRONG).all()
    picture = np.round(imread(path)[..., :3] * 255).astype(int)
    height, width = picture.shape[:2]
    box = panels[2].get_position()
    page = picture[
        round((1 - box.y1) * height) : round((1 - box.y0) * height), round(box.x0 * width) : round(box.x1 * width)
    ]
    for colour, share in ((MISSED, 30), (TOO_MUCH, 30), ((255, 255, 255), 70)):
        assert (page == colour).all(-1).mean() == pytest.approx(share / 600, abs=0.01), colour
    assert not (page == WRONG).all(-1).any()


@pytest.mark.parametrize("width_mm", [88, 180])
def test_figures_have_the_width_of_the_print(tmp_path, width_mm):
    paths = [tmp_path / f"a.{ending}" for ending in ("png", "pdf", "svg")]
    comparison_figure([row()], ["one", "two"], paths, width_mm, {1: "Anterior", 2: "Posterior"})
    assert imread(paths[0]).shape[1] == pytest.approx(width_mm / 25.4 * 300, abs=1)
    assert b"/FontFile2" in paths[1].read_bytes(), "letters are TrueType"
    assert float(re.search(r'width="([\d.]+)pt"', paths[2].read_text())[1]) == pytest.approx(
        width_mm / 25.4 * 72, abs=1
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pdf", "a.png", "a.svg"]


def test_many_models_widen_a_narrow_figure_and_no_text_leaves_its_place(tmp_path):
    names = ["DiffusionTrainer_250epochs__nnUNetPlans", *"bcdefgh"]
    many = row("largest gain\na_case_of_a_very_long_name", [square()] * 8, [0.123] * 8)
    figure = comparison_figure([many, many], names, [tmp_path / "a.png"], 88)
    assert figure.get_figwidth() * 25.4 > 10 * 14
    figure.draw_without_rendering()
    page, panels = figure.bbox, figure.axes
    for panel in panels:
        for text in (panel.title, panel.xaxis.label, panel.yaxis.label):
            box = text.get_window_extent()
            assert page.x0 <= box.x0 and box.x1 <= page.x1 and page.y0 <= box.y0 and box.y1 <= page.y1, text
        assert panel.title.get_window_extent().width <= panel.bbox.width * 1.1
    upper, lower = (panels[place].yaxis.label.get_window_extent() for place in (0, 10))
    assert upper.y0 >= lower.y1, "labels of two rows do not touch"


def test_a_panel_has_the_aspect_in_mm_whatever_the_number_of_voxels(tmp_path):
    figure = comparison_figure([row(aspect=1.5)], ["one", "two"], [tmp_path / "a.png"])
    figure.draw_without_rendering()
    box = figure.axes[0].get_window_extent()
    assert box.height / box.width == pytest.approx(1.5, rel=0.01)


@pytest.mark.parametrize(("highest", "scale"), [(1, 1), (200, 255), (1000, 1000)])
def test_colours_are_shown_in_their_range(tmp_path, highest, scale):
    colours = np.zeros((20, 30, 3))
    colours[0, 0, 1] = highest
    figure = comparison_figure([row(image=colours)], ["one", "two"], [tmp_path / "a.png"])
    assert shown(figure.axes[0])[0, 0] == pytest.approx([0, highest / scale, 0])


def test_the_legend_names_wrong_classes_only_where_there_are_some(tmp_path):
    def texts(predictions, **more):
        figure = comparison_figure([row(predictions=predictions)], ["one", "two"], [tmp_path / "a.png"], **more)
        return [text.get_text() for legend in figure.legends for text in legend.get_texts()]

    assert texts((square(), square(2))) == ["correct (A∩B)", "missed (A−B)", "over-segmented (B−A)"]
    found = texts((square(), square(2, label=2)), classes={1: "Anterior", 2: "Posterior"})
    assert found[3:] == ["wrong class", "Anterior", "Posterior"]


def test_wrong_rows_are_named(tmp_path):
    with pytest.raises(ValueError, match="rows is empty"):
        comparison_figure([], ["one"], [tmp_path / "a.png"])
    with pytest.raises(ValueError, match="row 'case' has 2 predictions and 2 Dice, but there are 1 names"):
        comparison_figure([row()], ["one"], [tmp_path / "a.png"])
    with pytest.raises(ValueError, match="row 'case': image and label maps must be 2D of one shape"):
        comparison_figure([row(image=np.zeros((5, 5)))], ["one", "two"], [tmp_path / "a.png"])


def test_lines_break_at_words_and_only_then_inside_them():
    assert wrapped("largest gain\na", 100) == ["largest gain", "a"]
    assert wrapped("largest gain", 12) == ["largest", "gain"]
    assert wrapped("my_model", 8) == ["my_", "model"]
    assert len(wrapped("m" * 20, 15)) > 2 and "".join(wrapped("m" * 20, 15)) == "m" * 20


# reverse process


@dataclass(eq=False)
class Condition:
    """The image itself."""

    image: torch.Tensor

    def repeat_interleave(self, samples):
        return Condition(self.image.repeat_interleave(samples, 0))


class Denoiser(nn.Module):
    """Answers with the sign of the image, whatever the state."""

    state_channels = 2

    def encode(self, image, timestep, features=None):
        return Condition(image)

    def forward(self, noisy, timestep, condition):
        sign = condition.image.sign()
        return torch.cat((-sign, sign), 1)


@pytest.fixture
def predictor():
    """A 2D model at half the spacing of the image, with slices along x; both its networks find what is bright."""
    resampling = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}
    kinds = ("data", "seg", "probabilities")
    configuration = {
        "architecture": {"network_class_name": "a.B", "arch_kwargs": {}, "_kw_requires_import": []},
        "preprocessor_name": "DefaultPreprocessor",
        "spacing": [0.5, 0.5],
        "patch_size": [32, 32],
        "batch_size": 2,
        "normalization_schemes": ["ZScoreNormalization"],
        "use_mask_for_norm": [False],
        **{f"resampling_fn_{kind}": "resample_data_or_seg_to_shape" for kind in kinds},
        **{f"resampling_fn_{kind}_kwargs": {**resampling, "is_seg": kind == "seg"} for kind in kinds},
    }
    plans = PlansManager(
        {
            "dataset_name": "Dataset001_A",
            "plans_name": "Plans",
            "image_reader_writer": "SimpleITKIO",
            "transpose_forward": [2, 0, 1],
            "transpose_backward": [1, 2, 0],
            "foreground_intensity_properties_per_channel": {"0": {}},
            "configurations": {"2d": configuration},
        }
    )
    presegmentor = nn.Conv2d(1, 2, 1, bias=False)
    presegmentor.weight.data = torch.tensor([-9.0, 9.0]).reshape(2, 1, 1, 1)
    settings = DiffusionSettings((8,), start_step=600, steps=3, starts={"truth": 1.0}, presegmentation_weight=0.0)
    network = DiffusionSegmenter(presegmentor, Denoiser(), settings).eval()
    description = {"channel_names": {"0": "MR"}, "labels": {"background": 0, "lesion": 1}, "file_ending": ".nii.gz"}
    loaded = DiffusionPredictor(device=torch.device("cpu"), allow_tqdm=False, threads=1)
    loaded.manual_initialization(
        network, plans, plans.get_configuration("2d"), None, description, "DiffusionTrainer", None
    )
    return loaded


@pytest.fixture
def volume(tmp_path):
    """A volume of (z, y, x) = (16, 20, 9) whose borders are empty, with a bright block, and a prediction of nothing."""
    voxels = np.zeros((16, 20, 9), np.float32)
    voxels[1:15, 2:18, 2:8] = 10
    truth = np.zeros(voxels.shape, int)
    truth[3:9, 4:14, 3:6] = 1
    truth[3:9, 14, 5] = 1  # largest in x = 5
    voxels[truth == 1] = 200
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing((3.0, 1.0, 1.0))
    path = tmp_path / "a_0000.nii.gz"
    sitk.WriteImage(image, str(path))
    known = np.ones(truth.shape, bool)
    return ShownCase("a", "why", [str(path)], voxels[None], truth, [0 * truth], known, (1.0, 1.0, 3.0))


def test_a_process_is_that_of_the_slice_on_the_grid_of_the_network(predictor, volume):
    found = process_row(volume, predictor)
    report, inside = found.row, volume.truth[1:15, 2:18, 5]  # the image without its empty borders
    assert report.name == "why\na\nx = 5"
    assert np.array_equal(report.truth, inside) and np.array_equal(report.image, volume.image[0, 1:15, 2:18, 5])
    assert [timestep for timestep, _ in report.process] == [599, 399, 199, -1]
    assert {state.shape for _, state in report.process} == {(28, 32)}
    assert found.aspect == pytest.approx(14 / 16)
    for labels in (report.nnunet, report.result):
        assert labels.shape == inside.shape and dice(labels, inside) > 0.9
    clean = report.process[-1][1]
    assert dice(clean > 0.5, inside.repeat(2, 0).repeat(2, 1)) > 0.85


def test_unknown_voxels_are_background_in_the_process(predictor, volume):
    volume.known[3:6], volume.truth[3:6] = False, 0
    report = process_row(volume, predictor).row
    assert not report.result[2:5].any() and report.result[5:8].any()


def test_the_process_is_drawn_at_print_size(predictor, volume, tmp_path):
    figure = process_figure([process_row(volume, predictor)], [tmp_path / "a.png", tmp_path / "a.pdf"])
    titles = [panel.get_title() for panel in figure.axes[:9]]
    assert titles == ["Image", "Truth", "nnU-Net", "T = 600", "T = 400", "T = 200", "T = 0", "Result", "Errors"]
    assert imread(tmp_path / "a.png").shape[1] == pytest.approx(180 / 25.4 * 300, abs=1)
    figure.draw_without_rendering()
    sizes = {
        (round(panel.get_window_extent().width), round(panel.get_window_extent().height)) for panel in figure.axes[:9]
    }
    assert len(sizes) == 1, "states and maps have one size on the page, whatever their grids"
    narrow = process_figure([process_row(volume, predictor)], [tmp_path / "a.png"], 88)
    assert narrow.get_figwidth() * 25.4 == pytest.approx(170)
