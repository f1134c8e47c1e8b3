"""Modes of nnUNetv2_train that need a training of their own: without mirroring, on all cases, validated by the best."""

import json

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_diffusion.training.checkpoints import read_checkpoint

pytestmark = [pytest.mark.nnunet, pytest.mark.slow]
NAME = "TinyDiffusionTrainerNoMirroring"
TRAIN = [4, "2d", "all", "-tr", NAME, "-p", "Tiny", "-device", "cpu"]


@pytest.fixture(scope="module")
def trained(hippocampus, tmp_path_factory):
    results = tmp_path_factory.mktemp("modes")
    hippocampus.run("nnUNetv2_train", *TRAIN, nnUNet_results=str(results))
    return hippocampus, results


def fold(results, place, trainer):
    return results / place.dataset / f"{trainer}__Tiny__2d" / "fold_all"


def test_neither_network_is_mirrored_in_inference(trained):
    place, results = trained
    for trainer in (NAME, "TinynnUNetTrainerNoMirroring"):
        checkpoint = read_checkpoint(fold(results, place, trainer) / "checkpoint_final.pth")
        assert checkpoint["trainer_name"] == trainer
        assert checkpoint["inference_allowed_mirroring_axes"] is None


def test_fold_all_validates_every_case_and_predicts(trained, tmp_path):
    place, results = trained
    cases = {path.name for path in (place.raw / "labelsTr").iterdir()}
    summary = json.loads((fold(results, place, NAME) / "validation" / "summary.json").read_text())
    assert len(summary["metric_per_case"]) == len(cases)
    words = ["-i", place.raw / "imagesTs", "-o", tmp_path, "-d", 4, "-c", "2d", "-p", "Tiny", "-tr", NAME, "-f", "all"]
    place.run("nnUNetv2_predict", *words, "-device", "cpu", "-npp", 1, "-nps", 1, nnUNet_results=str(results))
    found = sorted(tmp_path.glob("*.nii.gz"))
    assert len(found) == 2
    for path in found:
        image = sitk.ReadImage(str(place.raw / "imagesTs" / path.name.replace(".nii.gz", "_0000.nii.gz")))
        assert sitk.ReadImage(str(path)).GetSize() == image.GetSize()


def test_validation_by_the_best_checkpoint(trained):
    place, results = trained
    summary = fold(results, place, NAME) / "validation" / "summary.json"
    before = summary.stat().st_mtime
    done = place.run("nnUNetv2_train", *TRAIN, "--val", "--val_best", nnUNet_results=str(results))
    assert "Mean Validation Dice" in done.stdout
    assert summary.stat().st_mtime > before
    content = json.loads(summary.with_name("comparison.json").read_text())
    assert content["sentence"] in done.stdout
    assert content["on_training_cases"] is True
    measured = [
        np.nanmean([each["Dice"] for each in case["metrics"].values()])
        for case in json.loads(summary.read_text())["metric_per_case"]
    ]
    assert content["pddpm_mean"] == pytest.approx(np.mean(measured))
