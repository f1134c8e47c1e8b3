"""Kinds of images and plans that nnU-Net reads: one small dataset each, planned, trained and predicted by nnU-Net's code."""

import json

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
from nnunetv2.run.run_training import run_training
from PIL import Image

from nnunet_diffusion.inference import DiffusionPredictor
from nnunet_diffusion.training import DiffusionTrainer

pytestmark = [
    pytest.mark.nnunet,
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # nnU-Net's means over classes that no case has
]
CPU = torch.device("cpu")


def write_natural(path, number, truth):
    """An RGB picture with 24 small squares, of which most pictures have none."""
    random = np.random.default_rng(number)
    image, labels = random.normal(90, 12, (48, 56, 3)), np.zeros((48, 56), np.uint8)
    for label in range(1, 25) if number % 3 == 0 else ():
        row, column = 6 + 11 * ((label - 1) // 6), 5 + 8 * ((label - 1) % 6)
        labels[row : row + 6, column : column + 6] = label
        image[labels == label] += random.normal(0, 50, 3)
    Image.fromarray(image.clip(0, 255).astype(np.uint8)).save(path)
    if truth:
        Image.fromarray(labels).save(truth)


def write_volume(path, number, truth, spacing):
    """Two channels of a bright ball in a body that fills a third of the field of view; outside is exactly 0."""
    random = np.random.default_rng(number)
    shape = (10, 44, 44)
    place = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij"))
    body = (place[1:] ** 2).sum(0) < 0.4
    centre = random.uniform(-0.2, 0.2, (3, 1, 1, 1))
    labels = ((((place - centre) * [[[[0.6]]], [[[1.0]]], [[[1.0]]]]) ** 2).sum(0) < 0.1).astype(np.uint8)
    volumes = [np.where(body, random.normal(100 + brighter * labels.astype(float), 10), 0) for brighter in (60, -60)]
    names = [path.with_name(path.name.replace("_0000", f"_{channel:04d}")) for channel in (0, 1)]
    for name, voxels in (*zip(names, volumes, strict=True), *([(truth, labels)] if truth else [])):
        image = sitk.GetImageFromArray(voxels.astype(np.uint8 if voxels is labels else np.float32))
        image.SetSpacing(spacing)
        image.SetOrigin((7.0, -20.0, 3.0))
        sitk.WriteImage(image, str(name))


def anisotropic(path, number, truth):
    write_volume(path, number, truth, (1.0, 1.0, 5.0))


def isotropic(path, number, truth):
    write_volume(path, number, truth, (1.0, 1.0, 1.0))


COLOURS = {"0": "R", "1": "G", "2": "B"}
CHANNELS = {"0": "T1", "1": "T2"}
MANY = {"background": 0, **{f"square {label}": label for label in range(1, 25)}}
BALL = {"background": 0, "ball": 1}
KINDS = {
    "natural, 25 classes, mostly empty": (write_natural, ".tif", "2d", [32, 32], COLOURS, MANY, 9),
    "anisotropic, one-case folds": (anisotropic, ".nrrd", "3d_fullres", [4, 32, 32], CHANNELS, BALL, 5),
    "slices of volumes": (isotropic, ".mha", "2d", [32, 32], CHANNELS, BALL, 5),
}


@pytest.fixture(params=list(KINDS))
def trained(request, workplace_type, tmp_path):
    """Plan, preprocess and train on fold 0; returns the place, the kind and the model's folder."""
    write, ending, configuration, patch, channels, labels, number = KINDS[request.param]
    place = workplace_type(tmp_path, "Dataset051_Kind")
    for folder in ("imagesTr", "labelsTr", "imagesTs"):
        (place.raw / folder).mkdir(parents=True)
    for case in range(number):
        write(
            place.raw / "imagesTr" / f"case_{case:03d}_0000{ending}",
            case,
            place.raw / f"labelsTr/case_{case:03d}{ending}",
        )
    write(place.raw / "imagesTs" / f"case_100_0000{ending}", 102, None)
    description = {"channel_names": channels, "labels": labels, "numTraining": number, "file_ending": ending}
    with place.planned_in_process(tmp_path / "results", configuration, patch, **description):
        run_training("51", configuration, 0, "TinyDiffusionTrainer", "Tiny", device=CPU)
        yield (
            place,
            request.param,
            tmp_path / "results" / place.dataset / f"TinyDiffusionTrainer__Tiny__{configuration}",
        )


def test_trains_validates_and_predicts_in_the_images_own_format(trained, tmp_path):
    place, kind, model = trained
    _, ending, configuration, _, _, labels, _ = KINDS[kind]
    plans = json.loads((model / "plans.json").read_text())["configurations"][configuration]
    if kind.startswith("anisotropic"):
        assert plans["use_mask_for_norm"] == [True, True]
        trainer = place.trainer(DiffusionTrainer, configuration=configuration)
        assert trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()[1], "no dummy-2D augmentation"
    summary = json.loads((model / "fold_0" / "validation" / "summary.json").read_text())
    assert set(summary["mean"]) == {str(label) for label in labels.values() if label}
    folds = json.loads((place.preprocessed / "splits_final.json").read_text())
    assert (
        len(summary["metric_per_case"]) == len(folds[0]["val"]) == (1 if "one-case" in kind or ending == ".mha" else 2)
    )

    predictor = nnUNetPredictor(perform_everything_on_device=False, device=CPU, allow_tqdm=False)
    predictor.initialize_from_trained_model_folder(str(model), (0,), "checkpoint_final.pth")
    (tmp_path / "out").mkdir()
    predictor.predict_from_files_sequential(str(place.raw / "imagesTs"), str(tmp_path / "out"), save_probabilities=True)
    out, image = tmp_path / "out" / f"case_100{ending}", place.raw / "imagesTs" / f"case_100_0000{ending}"
    if ending == ".tif":
        found = np.array(Image.open(out))
        assert found.shape == np.array(Image.open(image)).shape[:2]
    else:
        found, original = sitk.ReadImage(str(out)), sitk.ReadImage(str(image))
        for key in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
            assert getattr(found, key)() == pytest.approx(getattr(original, key)()), key
        found = sitk.GetArrayFromImage(found)
    probabilities = np.load(tmp_path / "out" / "case_100.npz")["probabilities"]
    assert probabilities.shape[0] == len(labels)
    assert np.array_equal(probabilities.argmax(0).reshape(found.shape), found)

    ours = DiffusionPredictor(perform_everything_on_device=False, device=CPU, allow_tqdm=False)
    ours.initialize_from_trained_model_folder(str(model), (0,))
    ours.predict_from_files_sequential(str(place.raw / "imagesTs"), str(tmp_path / "ours"))
    other = tmp_path / "ours" / out.name
    other = np.array(Image.open(other)) if ending == ".tif" else sitk.GetArrayFromImage(sitk.ReadImage(str(other)))
    assert other.shape == found.shape
    assert set(np.unique(other)) <= set(labels.values())
