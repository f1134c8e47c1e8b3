"""The cascade: real trainings of both stages, the reverse process starting from either segmentation."""

import json

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from nnunet_diffusion.cli.main import main
from nnunet_diffusion.training import DiffusionTrainer
from nnunet_diffusion.training.checkpoints import read_checkpoint

pytestmark = [pytest.mark.nnunet, pytest.mark.slow]

CONFIGURATION = "3d_cascade_fullres"
# without mirroring, which takes eight times as long in 3D
FIRST, OURS = "TinynnUNetTrainerNoMirroring", "TinyDiffusionTrainerNoMirroring"


def add_cascade(place, name, **section):
    """Write plans with a coarse first stage and the cascade, as nnU-Net's own integration test makes them."""
    plans = json.loads((place.preprocessed / "Tiny3d.json").read_text())
    plans["plans_name"] = name
    fullres = plans["configurations"]["3d_fullres"]
    plans["configurations"] |= {
        "3d_lowres": {
            **fullres,
            "data_identifier": "Tiny_3d_lowres",
            "spacing": [2.0, 2.0, 2.0],
            "patch_size": [16, 24, 16],
            "next_stage": CONFIGURATION,
        },
        CONFIGURATION: {"inherits_from": "3d_fullres", "previous_stage": "3d_lowres", "diffusion": section},
    }
    (place.preprocessed / f"{name}.json").write_text(json.dumps(plans))


@pytest.fixture(scope="module")
def place(hippocampus_data, workplace_maker, tmp_path_factory):
    """Four cases in two folds, with plans whose first stage is not trained."""
    place = workplace_maker(
        hippocampus_data, tmp_path_factory.mktemp("cascade"), "Dataset044_Cascade", 4, None, ["3d_fullres"], 20
    )
    cases = sorted(path.name.removesuffix(".nii.gz") for path in (place.raw / "labelsTr").iterdir())
    folds = [{"train": cases[:2], "val": cases[2:]}, {"train": cases[2:], "val": cases[:2]}]
    (place.preprocessed / "splits_final.json").write_text(json.dumps(folds))
    add_cascade(place, "Cascade")
    add_cascade(place, "CascadeStart", start_from="previous_stage")
    place.run("nnUNetv2_preprocess", "-d", 44, "-c", "3d_lowres", "-plans_name", "Cascade", "-np", 1)
    return place


def train(place, plans, configuration, fold, trainer, check=True):
    words = [44, configuration, fold, "-tr", trainer, "-p", plans, "-device", "cpu"]
    return place.run("nnUNetv2_train", *words, check=check)


@pytest.fixture(scope="module")
def trained(place):
    refused = train(place, "Cascade", CONFIGURATION, 0, OURS, check=False)
    for fold in (0, 1):
        train(place, "Cascade", "3d_lowres", fold, FIRST)
    # the same first stage under the other plans' name
    name = f"{FIRST}__{{}}__3d_lowres"
    (place.results / name.format("CascadeStart")).symlink_to(place.results / name.format("Cascade"))
    train(place, "Cascade", CONFIGURATION, 0, OURS)
    # and the same pre-segmentor
    name = f"{FIRST}__{{}}__{CONFIGURATION}"
    (place.results / name.format("CascadeStart")).symlink_to(place.results / name.format("Cascade"))
    train(place, "CascadeStart", CONFIGURATION, 0, OURS)
    return place, refused


@pytest.mark.parametrize("plans", ["Cascade", "CascadeStart"])
def test_verdict_compares_the_networks_and_the_weights(trained, plans):
    place, _ = trained
    fold = place.results / f"{OURS}__{plans}__{CONFIGURATION}" / "fold_0"
    content = json.loads((fold / "validation" / "comparison.json").read_text())
    assert content["n"] == 2
    rows = {row["weight"]: row for row in content["presegmentation_weights"]["table"]}
    # nnU-Net alone, here on the preprocessed grid, is what its own validation measured
    assert rows[1.0]["mean"] == pytest.approx(content["nnunet_mean"], abs=0.02)


def test_missing_first_stage_is_refused_with_the_commands(trained):
    _, refused = trained
    assert refused.returncode != 0
    assert "4 of 4 cases" in refused.stderr
    command = f"nnUNetv2_train Dataset044_Cascade 3d_lowres $fold -tr {FIRST} -p Cascade -device cpu"
    assert f"for fold in 0 1; do {command}; done" in refused.stderr


COMMON = ["-d", 44, "-f", 0, "-device", "cpu", "-npp", 1, "-nps", 1]


@pytest.fixture(scope="module")
def first_stage(trained, tmp_path_factory):
    """Folder of the test cases' segmentations by the first stage."""
    place, out = trained[0], tmp_path_factory.mktemp("first")
    words = [*COMMON, "-i", place.raw / "imagesTs", "-o", out, "-c", "3d_lowres", "-p", "Cascade", "-tr", FIRST]
    place.run("nnUNetv2_predict", *words)
    return out


@pytest.mark.parametrize("plans", ["Cascade", "CascadeStart"])
def test_prediction_needs_the_previous_stage(trained, first_stage, tmp_path, plans):
    place, _ = trained
    words = [*COMMON, "-i", place.raw / "imagesTs", "-o", tmp_path, "-c", CONFIGURATION, "-p", plans, "-tr", OURS]
    place.run("nnUNetv2_predict", *words, "-prev_stage_predictions", first_stage)
    place.assert_geometry_and_labels({path.name: sitk.ReadImage(str(path)) for path in tmp_path.glob("*.nii.gz")})


@pytest.mark.parametrize("plans", ["Cascade", "CascadeStart"])
def test_predictor_takes_the_previous_stage_as_input_and_as_start(trained, tmp_path, plans):
    """The second stage's reverse process starts from the embedded network, from the input, or from a given folder."""
    place, _ = trained
    previous = tmp_path / "previous"
    previous.mkdir()
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    for path in sorted((place.raw / "imagesTs").iterdir()):  # a label map of that geometry
        image = sitk.ReadImage(str(path))
        bright = sitk.Cast(image > float(np.percentile(sitk.GetArrayFromImage(image), 90)), sitk.sitkUInt8)
        sitk.WriteImage(bright, str(previous / path.name.replace("_0000", "")))
        sitk.WriteImage(bright * 0, str(nothing / path.name.replace("_0000", "")))
    model = str(place.results / f"{OURS}__{plans}__{CONFIGURATION}")
    words = ["predict", "-i", str(place.raw / "imagesTs"), "-m", model, "-f", "0", "-device", "cpu", "--sequential"]
    with place.in_process(place.root / "results"):
        assert main([*words, "-o", str(tmp_path / "none")]) == 2
        words += ["--save_probabilities", "--disable_tta"]
        assert main([*words, "-o", str(tmp_path / "a"), "-prev_stage_predictions", str(previous)]) == 0
        assert main([*words, "-o", str(tmp_path / "c"), "-prev_stage_predictions", str(nothing)]) == 0
        given = ["-prev_stage_predictions", str(previous), "--presegmentation", str(previous)]
        assert main([*words, "-o", str(tmp_path / "b"), *given]) == 0
    starts = [json.loads(next((tmp_path / name / "reports").iterdir()).read_text())["start"] for name in "ab"]
    assert starts[0] == ("previous_stage" if plans == "CascadeStart" else "presegmentor")
    assert starts[1].startswith(str(previous))
    found = {
        name: [np.load(path)["probabilities"] for path in sorted((tmp_path / name).glob("*.npz"))] for name in "abc"
    }
    assert [len(each) for each in found.values()] == [2, 2, 2]
    for other in "bc":  # what is given changes what comes out
        for one, two in zip(found["a"], found[other], strict=True):
            assert np.abs(one - two).max() > 1e-2


def test_previous_stage_that_does_not_lie_on_its_image_is_refused_by_file(trained, tmp_path, capsys):
    place, _ = trained
    previous = tmp_path / "previous"
    previous.mkdir()
    images = sorted((place.raw / "imagesTs").iterdir())
    first, second = (previous / path.name.replace("_0000", "") for path in images)
    stretched = sitk.ReadImage(str(images[0]), sitk.sitkFloat32) * 0
    stretched.SetSpacing([1.0, 2.0, 1.0])
    sitk.WriteImage(sitk.Cast(stretched, sitk.sitkUInt8), str(first))
    sitk.WriteImage(sitk.Cast(sitk.ReadImage(str(images[1])) * 0 + 9, sitk.sitkUInt8), str(second))
    model = str(place.results / f"{OURS}__Cascade__{CONFIGURATION}")
    words = ["predict", "-i", str(place.raw / "imagesTs"), "-m", model, "-f", "0", "-device", "cpu", "--sequential"]
    with place.in_process(place.root / "results"):
        assert main([*words, "-o", str(tmp_path / "out"), "-prev_stage_predictions", str(previous)]) == 1
    message = capsys.readouterr().err
    assert f"The segmentation of the previous stage {first} has spacing" in message
    assert f"The segmentation of the previous stage {second} has label 9" in message


def test_resumed_training_takes_the_first_stage_of_its_own_presegmentor(trained, tmp_path):
    place, _ = trained
    path = place.results / f"{OURS}__Cascade__{CONFIGURATION}" / "fold_0" / "checkpoint_final.pth"
    arguments = read_checkpoint(path)["init_args"]
    plans = json.loads(json.dumps(arguments["plans"], default=float))
    plans["configurations"][CONFIGURATION]["diffusion"] = {}
    with place.in_process(tmp_path):
        trainer = DiffusionTrainer(
            {**plans, "continue_training": True},
            *(CONFIGURATION, 0, arguments["dataset_json"], torch.device("cpu")),
        )
        assert "/nnUNetTrainer__Cascade__3d_lowres/" in trainer.folder_with_segs_from_previous_stage
        trainer.load_checkpoint(str(path))
        assert f"/{FIRST}__Cascade__3d_lowres/" in trainer.folder_with_segs_from_previous_stage


def test_start_from_the_previous_stage_is_its_label_map(trained):
    place, _ = trained
    path = place.results / f"{OURS}__CascadeStart__{CONFIGURATION}" / "fold_0" / "checkpoint_final.pth"
    arguments = read_checkpoint(path)["init_args"]
    with place.in_process(place.root / "results"):
        trainer = DiffusionTrainer(
            {**arguments["plans"], "continue_training": False},
            CONFIGURATION,
            0,
            arguments["dataset_json"],
            torch.device("cpu"),
        )
        trainer.initialize()
    previous = torch.randint(0, 3, (1, 1, 32, 48, 32))
    masks = torch.cat([previous == 1, previous == 2], 1).float()
    start = trainer.segmenter.own_start(torch.cat([torch.randn(1, 1, 32, 48, 32), masks], 1))
    assert torch.equal(start.argmax(1, keepdim=True), previous)
    assert set(start.unique().tolist()) == {0, 1}


def test_a_start_from_a_previous_stage_that_is_not_there_is_refused(workplace):
    with pytest.raises(ValueError, match="start_from is 'previous_stage', but 2d has no previous stage"):
        workplace.trainer(DiffusionTrainer, start_from="previous_stage")


HIDIFF = "TinyHiDiffTrainerNoMirroring"


def test_hidiff_sees_the_previous_stage_in_both_networks_and_refuses_to_start_from_it(trained, first_stage, tmp_path):
    place, _ = trained
    refused = train(place, "CascadeStart", CONFIGURATION, 0, HIDIFF, check=False)
    assert refused.returncode != 0 and "start_from 'previous_stage' is not supported with HiDiff" in refused.stderr
    assert not (place.results / f"{HIDIFF}__CascadeStart__{CONFIGURATION}").exists()
    train(place, "Cascade", CONFIGURATION, 0, HIDIFF)
    weights = read_checkpoint(
        place.results / f"{HIDIFF}__Cascade__{CONFIGURATION}" / "fold_0" / "checkpoint_final.pth"
    )["network_weights"]
    # the image and two masks of the previous stage; the refiner also sees p and the state
    assert weights["presegmentor.encoder.stages.0.0.convs.0.conv.weight"].shape[1] == 3
    assert weights["denoiser.stem.weight"].shape[1] == 3 + 3 + 3
    words = [*COMMON, "-i", place.raw / "imagesTs", "-o", tmp_path, "-c", CONFIGURATION, "-p", "Cascade", "-tr", HIDIFF]
    place.run("nnUNetv2_predict", *words, "-prev_stage_predictions", first_stage)
    place.assert_geometry_and_labels({path.name: sitk.ReadImage(str(path)) for path in tmp_path.glob("*.nii.gz")})
