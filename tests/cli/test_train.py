"""`nnunet_diffusion train`: what is wrong gets one line with the cure, what is right reaches nnU-Net unchanged."""

from __future__ import annotations

import json
import os
import sys

import nibabel
import numpy as np
import pytest
import torch

from nnunet_diffusion.cli import train
from nnunet_diffusion.cli.main import main
from nnunet_diffusion.cli.trainers_directory import VARIABLE, trainers_directory

DATASET = "Dataset007_Toy"


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """nnU-Net's folders with one dataset that is ready for training in 2d; returns the preprocessed one."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv(VARIABLE, "/elsewhere")
    (tmp_path / "nnUNet_raw" / DATASET).mkdir()
    dataset = tmp_path / "nnUNet_preprocessed" / DATASET
    (dataset / "nnUNetPlans_2d").mkdir(parents=True)
    (dataset / "nnUNetPlans_2d" / "case.b2nd").touch()
    write(dataset / "dataset.json", {})
    write(dataset / "dataset_fingerprint.json", {})
    write(
        dataset / "nnUNetPlans.json",
        {
            "dataset_name": DATASET,
            "configurations": {
                "2d": {"data_identifier": "nnUNetPlans_2d"},
                "child": {"inherits_from": "2d"},
                "3d_fullres": {"data_identifier": "nnUNetPlans_3d_fullres"},
            },
        },
    )
    return dataset


def write(path, content):
    path.write_text(json.dumps(content))


def error_of(capsys, *words: str) -> str:
    """The one line that the command prints before it exits with 2."""
    assert main(["train", *words]) == 2
    captured = capsys.readouterr()
    assert not captured.out
    lines = captured.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("nnunet_diffusion train: error: ")
    return lines[0]


@pytest.mark.parametrize("name", ["nnUNet_preprocessed", "nnUNet_results"])
def test_unset_folder(folders, monkeypatch, capsys, name):
    monkeypatch.delenv(name)
    assert f"export {name}=" in error_of(capsys, "7", "2d", "0")


def test_folder_that_does_not_exist(folders, monkeypatch, capsys):
    monkeypatch.setenv("nnUNet_preprocessed", "/nowhere/at/all")
    line = error_of(capsys, "7", "2d", "0")
    assert "/nowhere/at/all, which is not a folder" in line
    assert "nnUNetv2_extract_fingerprint -d 7 --verify_dataset_integrity && nnunet_diffusion plan -d 7" in line


def test_unknown_dataset(folders, capsys):
    assert "dataset 8 is not in" in error_of(capsys, "8", "2d", "0")
    assert "dataset Dataset008_X is not in" in error_of(capsys, "Dataset008_X", "2d", "0")
    assert "must be a number such as 4" in error_of(capsys, "Toy", "2d", "0")


def test_dataset_that_is_only_raw(folders, capsys):
    (folders.parents[1] / "nnUNet_raw" / "Dataset008_Raw").mkdir()
    extract = "is not preprocessed yet; run: nnUNetv2_extract_fingerprint -d 8 --verify_dataset_integrity && "
    ours = f"{extract}nnunet_diffusion plan -d 8 --preprocess -c 3d_fullres"
    line = error_of(capsys, "8", "3d_fullres", "0")
    assert line.endswith(f"{ours}, then train with -p nnUNetDiffusionPlans")
    assert f"{ours} -device cpu, then" in error_of(capsys, "8", "3d_fullres", "0", "-device", "cpu")
    line = error_of(capsys, "Dataset008_Raw", "3d_fullres", "0", "-p", "nnUNetPlans")
    assert "run: nnUNetv2_plan_and_preprocess -d 8 -c 3d_fullres --verify_dataset_integrity" in line


def test_two_datasets_of_one_number(folders, capsys):
    (folders.parent / "Dataset007_Other").mkdir()
    assert "ambiguous: Dataset007_Other, Dataset007_Toy" in error_of(capsys, "7", "2d", "0")


@pytest.mark.parametrize("name", ["dataset.json", "dataset_fingerprint.json"])
def test_missing_fingerprint(folders, capsys, name):
    (folders / name).unlink()
    line = error_of(capsys, "7", "2d", "0")
    assert f"has no {name}" in line and "run: nnUNetv2_extract_fingerprint -d 7" in line


def test_missing_plans(folders, capsys):
    line = error_of(capsys, "7", "2d", "0", "-p", "nnUNetResEncUNetMPlans")
    assert "with -p nnUNetPlans, or run: nnUNetv2_plan_and_preprocess -d 7 -pl nnUNetPlannerResEncM -c 2d" in line
    (folders / "nnUNetPlans.json").unlink()
    assert "run: nnunet_diffusion plan -d 7 --preprocess -c 2d" in error_of(capsys, "7", "2d", "0")


def test_plans_that_are_no_json(folders, capsys):
    (folders / "nnUNetPlans.json").write_text("{")
    assert "is not valid JSON" in error_of(capsys, "7", "2d", "0")


def test_plans_of_another_dataset(folders, capsys):
    write(folders / "nnUNetPlans.json", {"dataset_name": "Dataset001_Other", "configurations": {"2d": {}}})
    assert "was made for Dataset001_Other, not for Dataset007_Toy" in error_of(capsys, "7", "2d", "0")


def test_unknown_configuration(folders, capsys):
    assert "choose one of: 2d, child, 3d_fullres" in error_of(capsys, "7", "3d_lowres", "0")


def test_configuration_without_preprocessed_cases(folders, capsys):
    line = error_of(capsys, "7", "3d_fullres", "0")
    assert "run: nnUNetv2_preprocess -d 7 -plans_name nnUNetPlans -c 3d_fullres" in line


def test_wrong_fold(folders, capsys):
    assert "fold is 'x'" in error_of(capsys, "7", "2d", "x")


def test_gpu_that_is_not_there(folders, monkeypatch, capsys):
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "add -device cpu" in error_of(capsys, "7", "2d", "0")


def test_pretrained_weights_of_nnunet_itself_and_of_no_checkpoint(folders, tmp_path, capsys):
    import torch

    path = tmp_path / "checkpoint_final.pth"
    words = ["7", "2d", "0", "-device", "cpu", "-pretrained_weights", str(path)]
    assert f"No checkpoint at {path}" in error_of(capsys, *words)
    path.write_bytes(b"PK")
    assert "truncated or damaged" in error_of(capsys, *words)
    torch.save({"network_weights": {}, "trainer_name": "nnUNetTrainer"}, path)
    line = error_of(capsys, *words)
    assert "a checkpoint of nnUNetTrainer, not of a diffusion trainer" in line
    assert "nnUNet_diffusion_presegmentor" in line


def test_pretrained_weights_reach_nnunets_own_trainer(folders, monkeypatch, tmp_path):
    torch.save({"network_weights": {}}, tmp_path / "a.pth")
    run_training = pytest.importorskip("nnunetv2.run.run_training")
    reached = []
    monkeypatch.setattr(run_training, "run_training_entry", lambda: reached.append(sys.argv[-1]))
    words = ["7", "2d", "0", "-device", "cpu", "-tr", "nnUNetTrainer", "-pretrained_weights", str(tmp_path / "a.pth")]
    assert main(["train", *words]) == 0
    assert reached == [str(tmp_path / "a.pth")]


def test_missing_words_are_named(folders, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["train", "7"])
    assert stopped.value.code == 2
    assert "configuration, fold" in capsys.readouterr().err


@pytest.mark.nnunet
@pytest.mark.parametrize("configuration", ["2d", "child"])
@pytest.mark.parametrize("trainer", [[], ["-tr", "DiffusionTrainer_5epochs"]])
def test_everything_reaches_nnunet_unchanged(folders, monkeypatch, trainer, configuration):
    from nnunetv2.run import run_training

    seen = []
    monkeypatch.setattr(run_training, "run_training_entry", lambda: seen.append((sys.argv[1:], os.environ[VARIABLE])))
    monkeypatch.setattr(sys, "argv", ["before"])
    words = ["-device", "cpu", "--c", DATASET, configuration, "all", "--npz", *trainer]
    assert train.run(words) == 0
    expected = words if trainer else [*words, "-tr", "DiffusionTrainer"]
    assert seen == [(expected, os.pathsep.join([str(trainers_directory()), "/elsewhere"]))]


@pytest.mark.parametrize(
    ("plans_name", "command"),
    [
        ("nnUNetPlans", "nnUNetv2_plan_and_preprocess -d 7 -c 2d --verify_dataset_integrity"),
        ("nnUNetDiffusionPlans", "nnunet_diffusion plan -d 7 --preprocess -c 2d"),
        ("myPlans", "nnunet_diffusion plan -d 7 --preprocess -c 2d -overwrite_plans_name myPlans"),
        (
            "nnUNetDiffusionResEncUNetLPlans",
            "nnunet_diffusion plan -d 7 --preprocess -c 2d -pl DiffusionPlannerResEncL",
        ),
    ],
)
def test_the_cure_is_a_command_that_makes_these_plans(folders, capsys, plans_name, command):
    (folders / "nnUNetPlans.json").unlink()
    assert error_of(capsys, "7", "2d", "0", "-p", plans_name).endswith(f"run: {command}")
    (folders / f"{plans_name}.json").write_text("{")
    line = error_of(capsys, "7", "2d", "0", "-p", plans_name)
    assert f"{plans_name}.json is damaged" in line and line.endswith(f"run: {command}")


def test_unknown_trainer_and_device_are_named(folders, capsys):
    line = error_of(capsys, "7", "2d", "0", "-device", "cpu", "-tr", "DiffusionTrainr")
    assert "-tr is DiffusionTrainr" in line and "DiffusionTrainer, DiffusionTrainerNoMirroring" in line
    assert "-device is gpu; choose one of: cuda, cpu, mps" in error_of(capsys, "7", "2d", "0", "-device", "gpu")


def test_help_tells_the_default_trainer(folders, capsys):
    with pytest.raises(SystemExit) as end:
        main(["train", "--help"])
    assert end.value.code == 0
    assert "the default of -tr is DiffusionTrainer" in capsys.readouterr().out


class Bomb:
    """Runs code when it is unpickled."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return os.mkdir, (self.trace,)


@pytest.mark.parametrize("trainer", ["nnUNetTrainer", "DiffusionTrainer_5epochs", "DiffusionTrainerUpright"])
def test_pretrained_weights_are_read_safely_whatever_the_trainer(folders, capsys, monkeypatch, tmp_path, trainer):
    own = tmp_path / "own"
    own.mkdir()
    (own / "DiffusionTrainerUpright.py").write_text(
        "from nnunet_diffusion.training import DiffusionTrainer\nclass DiffusionTrainerUpright(DiffusionTrainer): pass\n"
    )
    monkeypatch.setenv(VARIABLE, str(own))
    path = tmp_path / "strange.pth"
    words = ["7", "2d", "0", "-device", "cpu", "-tr", trainer, "-pretrained_weights", str(path)]
    torch.save({"network_weights": {}, "more": Bomb(tmp_path / "ran")}, path)
    assert f"{path} holds more than tensors" in error_of(capsys, *words)
    network = {"network_class_name": "torch.hub.load", "arch_kwargs": {}, "_kw_requires_import": []}
    plans = {"configurations": {"2d": {"architecture": network}}}
    torch.save({"network_weights": {}, "diffusion": {}, "init_args": {"plans": plans}}, path)
    assert f"{path} names 'torch.hub.load'" in error_of(capsys, *words)
    assert not (tmp_path / "ran").exists()
    if trainer != "nnUNetTrainer":
        torch.save({"network_weights": {}, "trainer_name": "nnUNetTrainer"}, path)
        assert "not of a diffusion trainer" in error_of(capsys, *words)


def test_raw_images_with_nan_are_refused_once_and_remembered_as_good_else(folders, monkeypatch, capsys, tmp_path):
    run_training = pytest.importorskip("nnunetv2.run.run_training")
    monkeypatch.setattr(run_training, "run_training_entry", lambda: None)
    images = tmp_path / "nnUNet_raw" / DATASET / "imagesTr"
    images.mkdir()
    voxels = np.ones((4, 5, 6), np.float32)

    def write_image(name, array):
        nibabel.save(nibabel.Nifti1Image(array, np.eye(4)), images / f"{name}_0000.nii.gz")

    write_image("a", voxels)
    write_image("c", voxels.astype(np.int16))
    bad = voxels.copy()
    bad[1, 2, 3] = np.nan
    write_image("b", bad)
    write_image("d", bad)
    words = ["7", "2d", "0", "-device", "cpu", "-tr", "nnUNetTrainer"]
    line = error_of(capsys, *words)
    assert f"{images / 'b_0000.nii.gz'} has NaN or infinite voxels: replace them (and 1 more), then" in line
    assert "then preprocess again: nnUNetv2_preprocess -d 7" in line

    looked_at = []
    load = nibabel.load
    monkeypatch.setattr(nibabel, "load", lambda path: (looked_at.append(path.name), load(path))[1])
    write_image("b", voxels)
    (images / "d_0000.nii.gz").unlink()
    assert main(["train", *words]) == 0
    assert set(looked_at) == {"b_0000.nii.gz"}  # what was good before is known
    looked_at.clear()
    assert main(["train", *words]) == 0
    assert not looked_at
    (folders / "checked_images.json").write_text("{")
    assert "checked_images.json is damaged" in error_of(capsys, *words)


def test_training_needs_no_raw_images(folders, monkeypatch):
    run_training = pytest.importorskip("nnunetv2.run.run_training")
    monkeypatch.setattr(run_training, "run_training_entry", lambda: None)
    monkeypatch.delenv("nnUNet_raw")
    assert main(["train", "7", "2d", "0", "-device", "cpu", "-tr", "nnUNetTrainer"]) == 0
    assert not (folders / "checked_images.json").exists()


@pytest.mark.parametrize(
    ("words", "continues"),
    [
        ("-tr nnUNetTrainer --c", True),
        ("-tr nnUNetTrainer --c --npz -device cpu", True),
        ("-tr nnUNetTrainer", False),
        ("-tr nnUNetTrainer --c --disable_checkpointing", False),
        ("-tr nnUNetTrainer --c -num_gpus 2", False),
    ],
)
def test_c_saves_each_epoch_of_nnunets_own_trainers_on_one_device(words, continues):
    words = ["7", "2d", "0", *words.split()]
    assert train.continues_nnunet(train.read_options(words), words, object()) is continues
    diffusion = type("Diffusion", (), {"presegmentor_trainer": "nnUNetTrainer"})
    assert not train.continues_nnunet(train.read_options(words), words, diffusion)
