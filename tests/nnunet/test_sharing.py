"""A model travels as nnU-Net's zip file to a place that has the packages and nothing else."""

import json
import os
import shutil

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_diffusion.files import PRESEGMENTOR_FOLDER

pytestmark = [pytest.mark.nnunet, pytest.mark.slow]
OURS = "TinyDiffusionTrainer"


def predict(place, out, plans="Tiny", check=True, **variables):
    done = place.run(
        "nnUNetv2_predict", "-i", place.raw / "imagesTs", "-o", out, "-d", 4, "-c", "2d", "-p", plans, "-tr", OURS,
        "-f", 0, "-device", "cpu", "--save_probabilities", "--disable_tta", "-npp", 0, "-nps", 0, check=check, **variables,
    )  # fmt: skip
    return done, sorted(path for path in out.glob("*") if path.suffix in (".gz", ".npz")) if out.is_dir() else []


def assert_identical(one, other):
    assert len(one) == len(other) == 4
    for ours, theirs in zip(one, other, strict=True):
        assert ours.name == theirs.name
        if ours.suffix == ".npz":
            assert np.array_equal(*(np.load(path)["probabilities"] for path in (ours, theirs)))
        else:
            assert ours.read_bytes() == theirs.read_bytes()


def elsewhere(place, root, plans="Tiny"):
    """Export the model, install it below `root`; return the variables of that place."""
    words = ["-d", 4, "-o", root / "model.zip", "-c", "2d", "-f", 0, "-tr", OURS, "-p", plans]
    place.run("nnUNetv2_export_model_to_zip", *words)
    folders = {name: str(root / name) for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")}
    for folder in folders.values():
        os.mkdir(folder)
    place.run("nnUNetv2_install_pretrained_model_from_zip", root / "model.zip", **folders)
    return folders


def test_exported_and_installed_model_predicts_the_same_files(trained_2d, tmp_path):
    place, _ = trained_2d
    (tmp_path / "there").mkdir()
    there = elsewhere(place, tmp_path / "there")
    assert_identical(predict(place, tmp_path / "a")[1], predict(place, tmp_path / "b", **there)[1])

    done, found = predict(place, tmp_path / "c", check=False, **{**there, "nnUNet_extTrainer": ""})
    assert done.returncode != 0
    assert not found
    last = done.stderr.strip().splitlines()[-1]
    assert OURS in last
    assert "nnUNet_extTrainer" in last


CUSTOM = """
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer


class CustomTrainer(nnUNetTrainer):
    def __init__(self, plans, configuration, fold, dataset_json, device=torch.device("cuda")):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 1, 2, 1
"""


@pytest.fixture
def with_residual_presegmentor(hippocampus, tmp_path):
    """A model whose pre-segmentor is a residual network of somebody's own trainer, named by the variable."""
    place = hippocampus
    (tmp_path / "custom").mkdir()
    (tmp_path / "custom" / "CustomTrainer.py").write_text(CUSTOM)
    trainers = os.pathsep.join((place.environment["nnUNet_extTrainer"], str(tmp_path / "custom")))
    place.run("nnUNetv2_plan_experiment", "-d", 4, "-pl", "nnUNetPlannerResEncM", nnUNet_n_proc_DA="1")
    place.write_plans("TinyRes", "2d", base="nnUNetResEncUNetMPlans", patch=[32, 32])
    place.write_plans("TinyGiven", "2d", patch=[32, 32])
    words = [4, "2d", 0, "-p", "TinyRes", "-tr", "CustomTrainer", "-device", "cpu"]
    place.run("nnUNetv2_train", *words, nnUNet_extTrainer=trainers)
    given = place.results / "CustomTrainer__TinyRes__2d"
    words = [4, "2d", 0, "-p", "TinyGiven", "-tr", OURS, "-device", "cpu"]
    place.run("nnUNetv2_train", *words, nnUNet_extTrainer=trainers, **{PRESEGMENTOR_FOLDER: str(given)})
    yield place, trainers, given
    for name in (f"{OURS}__TinyGiven__2d", given.name):
        shutil.rmtree(place.results / name, ignore_errors=True)


def test_given_presegmentor_of_another_architecture_travels_with_the_model(with_residual_presegmentor, tmp_path):
    place, trainers, given = with_residual_presegmentor
    here = predict(place, tmp_path / "a", "TinyGiven", nnUNet_extTrainer=trainers)[1]
    (tmp_path / "there").mkdir()
    there = elsewhere(place, tmp_path / "there", "TinyGiven")
    installed = tmp_path / "there" / "nnUNet_results" / place.dataset / f"{OURS}__TinyGiven__2d"
    section = json.loads((installed / "plans.json").read_text())["configurations"]["2d"]["diffusion"]
    assert section["presegmentor"]["trainer"] == "CustomTrainer"
    assert "ResidualEncoderUNet" in section["presegmentor"]["architecture"]["network_class_name"]
    shutil.rmtree(given)
    assert_identical(here, predict(place, tmp_path / "b", "TinyGiven", nnUNet_extTrainer=trainers, **there)[1])
    for path in here:
        if path.suffix == ".gz":
            assert set(np.unique(sitk.GetArrayFromImage(sitk.ReadImage(str(path))))) <= {0, 1, 2}

    done, _ = predict(place, tmp_path / "c", "TinyGiven", check=False, **there)
    assert done.returncode != 0
    assert "is a network of CustomTrainer, which nnU-Net does not find: install" in done.stderr
