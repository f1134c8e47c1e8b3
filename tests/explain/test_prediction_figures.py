"""Figures from the files of a prediction: what titles and legends say, the order of the sheet."""

import json

import nibabel
import numpy as np
import pytest
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from nnunet_diffusion.explain import prediction_figures

LABELS = {"background": 0, "head": 1, "tail": 2}
SCORES = {"a": 0.9, "b": 0.7, "c": 0.8}


@pytest.fixture
def prediction(tmp_path):
    """Three cases of (z, y, x) = (4, 10, 12) with two samples, and their images."""
    labels = np.zeros((12, 10, 4), np.uint8)
    labels[2:5, 2:8], labels[5:9, 2:8] = 1, 2
    volume = {"mean": 1763.4, "low": 10.95, "high": 2480.2, "interval": "range of 2 samples"}
    for folder in ("out/uncertainty", "out/samples/sample_0", "out/samples/sample_1", "images"):
        (tmp_path / folder).mkdir(parents=True)
    for name, score in SCORES.items():
        for file, values in (
            (f"out/{name}", labels),
            (f"out/samples/sample_0/{name}", labels),
            (f"out/samples/sample_1/{name}", labels),
            (f"out/uncertainty/{name}_entropy", labels / np.float32(4)),
            (f"images/{name}_0000", labels * np.float32(2)),
        ):
            nibabel.save(nibabel.Nifti1Image(values, np.eye(4)), tmp_path / f"{file}.nii.gz")
        numbers = {"score": score, "volume_mm3": {"head": volume, "tail": volume}}
        (tmp_path / "out" / "uncertainty" / f"{name}.json").write_text(json.dumps(numbers))
    (tmp_path / "out" / "dataset.json").write_text(json.dumps({"labels": LABELS}))
    return tmp_path / "out", {name: [str(tmp_path / "images" / f"{name}_0000.nii.gz")] for name in SCORES}


def kept(monkeypatch, name):
    """Return the figures that a function of the module draws from now on."""
    figures, draw = [], getattr(prediction_figures, name)
    monkeypatch.setattr(prediction_figures, name, lambda *arguments: figures.append(draw(*arguments)))
    return figures


def test_titles_legends_and_the_order_of_the_sheet(prediction, monkeypatch):
    folder, images = prediction
    cases, sheets = kept(monkeypatch, "uncertainty_figure"), kept(monkeypatch, "contact_sheet")
    sheet = prediction_figures.draw_predictions(folder, images, ".nii.gz", SimpleITKIO())
    assert sheet == folder / "uncertainty" / "contact_sheet.png" and sheet.is_file()
    assert [figure.get_suptitle() for figure in cases] == [
        f"{name}   mean Dice between the samples: {score:.3f}" for name, score in SCORES.items()
    ]
    classes = [text.get_text() for text in cases[0].legends[0].get_texts()[-2:]]
    assert classes == [f"{name}: mean 1763 mm³ (range of 2 samples: 10.9 to 2480)" for name in ("head", "tail")]
    assert cases[0].axes[3].images[1].get_clim() == (0, pytest.approx(np.log(3)))
    assert sheets[0].get_suptitle() == "Least certain first (mean Dice between the samples)"
    assert [tile.get_title() for tile in sheets[0].axes[:3]] == ["b   0.700", "c   0.800", "a   0.900"]


def test_a_folder_without_dataset_json_is_refused(prediction):
    folder, images = prediction
    (folder / "dataset.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"dataset.json is missing; predict again"):
        prediction_figures.draw_predictions(folder, images, ".nii.gz", SimpleITKIO())
