"""Regions, the ignore label, and both: real trainings and predictions by nnU-Net's commands."""

import json
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunet_diffusion.cli.main import main
from nnunet_diffusion.training.checkpoints import read_checkpoint

pytestmark = [pytest.mark.nnunet, pytest.mark.slow]

REGIONS = {"background": 0, "whole": [1, 2], "Posterior": 2}
CLASSES = {"background": 0, "Anterior": 1, "Posterior": 2}
IGNORE = 3


def forget_some_slices(labels):
    """Give every third slice the ignore label."""
    labels = labels.copy()
    labels[::3] = IGNORE
    return labels


KINDS = {
    "regions": ("Dataset041_Regions", None, {"labels": REGIONS, "regions_class_order": [1, 2]}),
    "ignore": ("Dataset042_Ignore", forget_some_slices, {"labels": CLASSES | {"ignore": IGNORE}}),
    "both": (
        "Dataset043_Both",
        forget_some_slices,
        {"labels": REGIONS | {"ignore": IGNORE}, "regions_class_order": [1, 2]},
    ),
}


@pytest.fixture(scope="module", params=list(KINDS))
def trained(request, hippocampus_data, workplace_maker, tmp_path_factory):
    name, alter, description = KINDS[request.param]
    place = workplace_maker(
        hippocampus_data, tmp_path_factory.mktemp(request.param), name, 5, alter, ["2d"], 16, **description
    )
    words = [name, "2d", 0, "-tr", "TinyDiffusionTrainer", "-p", "Tiny", "-device", "cpu", "--npz"]
    done = place.run("nnUNetv2_train", *words)
    return request.param, place, done.stdout


def test_training_logs_finite_terms_and_a_proxy_dice_per_foreground(trained):
    _, place, output = trained
    fold = place.results / "TinyDiffusionTrainer__Tiny__2d" / "fold_0"
    curves = read_checkpoint(fold / "checkpoint_final.pth")["logging"]
    for term in ("train_losses", "denoising_loss", "presence_loss", "location_loss"):
        assert np.isfinite(curves[term]).all(), term
    assert all(len(values) == 2 for values in curves["dice_per_class_or_region"])
    assert "Mean Validation Dice" in output
    assert "Mean Dice by presegmentation_weight" in output


def test_checkpoint_knows_its_kind_of_heads(trained):
    kind, place, _ = trained
    checkpoint = read_checkpoint(place.results / "TinyDiffusionTrainer__Tiny__2d" / "fold_0" / "checkpoint_final.pth")
    section = checkpoint["init_args"]["plans"]["configurations"]["2d"]["diffusion"]
    assert section["network"]["regions"] is (kind != "ignore")
    presence = next(v for k, v in checkpoint["network_weights"].items() if k.startswith("denoiser.prior.presence"))
    assert len(presence) == 2


def test_stock_predict_exports_labels_without_the_ignored_one(trained, tmp_path):
    kind, place, _ = trained
    number = int(place.dataset[7:10])
    place.run(
        "nnUNetv2_predict", "-i", place.raw / "imagesTs", "-o", tmp_path, "-d", number, "-c", "2d", "-p", "Tiny",
        "-tr", "TinyDiffusionTrainer", "-f", 0, "-device", "cpu", "--save_probabilities", "-npp", 1, "-nps", 1,
    )  # fmt: skip
    description = json.loads((place.raw / "dataset.json").read_text())
    manager = LabelManager(description["labels"], description.get("regions_class_order"))
    files = sorted(tmp_path.glob("*.nii.gz"))
    assert len(files) == 2
    for path in files:
        found = sitk.GetArrayFromImage(sitk.ReadImage(str(path)))
        assert set(np.unique(found)) <= {0, 1, 2}
        probabilities = np.load(str(path).replace(".nii.gz", ".npz"))["probabilities"]
        assert len(probabilities) == manager.num_segmentation_heads == (3 if kind == "ignore" else 2)
        assert np.array_equal(manager.convert_probabilities_to_segmentation(probabilities), found)
        if kind == "ignore":
            assert np.allclose(probabilities.sum(0), 1, atol=1e-3)
        else:
            assert not np.allclose(probabilities.sum(0), 1, atol=1e-3)


@pytest.mark.parametrize("fusion", ["mean", "staple", "dice"])  # the others are alike
def test_predictor_fuses_and_starts_from_label_maps(trained, tmp_path, fusion):
    kind, place, _ = trained
    model = str(place.results / "TinyDiffusionTrainer__Tiny__2d")
    words = ["predict", "-i", str(place.raw / "imagesTs"), "-m", model, "-f", "0", "-device", "cpu", "--sequential"]
    words += ["--disable_tta", "--samples", "3", "--fusion", fusion, "--save_probabilities"]
    with place.in_process(place.root / "results"):
        assert main([*words, "-o", str(tmp_path / "a")]) == 0
        assert main([*words, "-o", str(tmp_path / "b"), "--presegmentation", str(tmp_path / "a")]) == 0
        for path in (tmp_path / "a").glob("*.npz"):
            path.unlink()
        assert main([*words, "-o", str(tmp_path / "c"), "--presegmentation", str(tmp_path / "a")]) == 0
    for folder in (tmp_path / name for name in "abc"):
        files = sorted(folder.glob("*.nii.gz"))
        assert len(files) == 2
        for path in files:
            assert set(np.unique(sitk.GetArrayFromImage(sitk.ReadImage(str(path))))) <= {0, 1, 2}
    reports = {name: json.loads(sorted((tmp_path / name / "reports").iterdir())[0].read_text()) for name in "abc"}
    assert [Path(reports[name]["start"]).suffix for name in "bc"] == [".npz", ".gz"]
    assert reports["a"]["network_evaluations"]["presegmentor"] > 0
    assert reports["b"]["network_evaluations"]["presegmentor"] == 0
    assert {report["fusion"] for report in reports.values()} == {fusion}
    written = sorted((tmp_path / "b").glob("*.npz"))
    assert len(written) == 2
    for path in written:
        probabilities = np.load(path)["probabilities"]
        assert len(probabilities) == (3 if kind == "ignore" else 2)
        assert np.isfinite(probabilities).all()


def test_hidiff_trains_and_predicts_with_these_labels(trained, tmp_path):
    kind, place, _ = trained
    if kind == "regions":
        pytest.skip("regions are trained and predicted with the ignore label too")
    done = place.run(
        "nnUNetv2_train", place.dataset, "2d", 0, "-tr", "TinyHiDiffTrainer", "-p", "Tiny", "-device", "cpu"
    )
    assert "segmentor, an ordinary nnU-Net (TinynnUNetTrainer): trained already" in done.stdout
    assert "its nnU-Net alone, trained further in turns" in done.stdout
    model = place.results / "TinyHiDiffTrainer__Tiny__2d"
    curves = read_checkpoint(model / "fold_0" / "checkpoint_final.pth")["logging"]
    for term in ("posterior", "flip", "overlap", "segmentation", "collaboration"):
        assert np.isfinite(curves[f"{term}_loss"]).all(), term
    words = [
        "predict",
        "-i",
        str(place.raw / "imagesTs"),
        "-m",
        str(model),
        "-f",
        "0",
        "-device",
        "cpu",
        "--sequential",
    ]
    with place.in_process(place.root / "results"):
        words += ["--disable_tta", "--samples", "2", "--steps", "3", "--save_probabilities"]
        assert main([*words, "-o", str(tmp_path / "a")]) == 0
        assert main([*words, "-o", str(tmp_path / "b")]) == 0
        assert main([*words, "-o", str(tmp_path / "alone"), "--presegmentation_weight", "1"]) == 0
        assert main([*words, "-o", str(tmp_path / "given"), "--presegmentation", str(tmp_path / "alone")]) == 0
    found = {
        name: [np.load(path)["probabilities"] for path in sorted((tmp_path / name).glob("*.npz"))]
        for name in ("a", "b", "alone", "given")
    }
    for name, cases in found.items():
        assert len(cases) == 2, name
        for probabilities in cases:
            assert len(probabilities) == (3 if kind == "ignore" else 2) and np.isfinite(probabilities).all()
    assert all(np.array_equal(one, same) for one, same in zip(found["a"], found["b"], strict=True))
    assert not all(np.allclose(one, other) for one, other in zip(found["a"], found["alone"], strict=True))
    reports = {
        name: json.loads(sorted((tmp_path / name / "reports").iterdir())[0].read_text())["network_evaluations"]
        for name in ("a", "alone")
    }
    assert reports["alone"]["denoiser"] == 0 < reports["alone"]["presegmentor"]
    # two samples in three steps; the features of the encoder count as an evaluation of nnU-Net
    assert reports["a"]["denoiser"] == 6 * reports["alone"]["presegmentor"]


def test_explain_takes_a_truth_with_ignored_voxels(trained, tmp_path):
    _, place, _ = trained
    case = sorted(path.name.removesuffix("_0000.nii.gz") for path in (place.raw / "imagesTr").iterdir())[0]
    place.run(
        "nnunet_diffusion", "explain", "-i", place.raw / "imagesTr", "-o", tmp_path, "-g", place.raw / "labelsTr", "--cases",
        case, "--steps", 1, "-m", place.results / "TinyDiffusionTrainer__Tiny__2d", "-f", 0, "-device", "cpu",
    )  # fmt: skip
    for path in tmp_path.glob("*.json"):
        assert json.loads(path.read_text())["reference"] == "truth"
