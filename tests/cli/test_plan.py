"""`nnunet_diffusion plan`: what is wrong gets one line with the cure."""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import os

import pytest

from nnunet_diffusion.cli import plan
from nnunet_diffusion.cli.main import main
from nnunet_diffusion.files import PLANS_OF

DATASET = "Dataset007_Toy"
DESCRIPTION = {"labels": {"background": 0}, "channel_names": {"0": "MRI"}, "numTraining": 1, "file_ending": ".nii.gz"}
FINGERPRINT = {"spacings": [], "shapes_after_crop": [], "foreground_intensity_properties_per_channel": {}}
PLANNERS = ["DiffusionPlanner", "DiffusionPlannerResEncL", "DiffusionPlannerResEncM"]


@pytest.fixture
def folders(tmp_path, monkeypatch):
    """nnU-Net's folders with one raw dataset and its fingerprint."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    (tmp_path / "nnUNet_raw" / DATASET).mkdir()
    (tmp_path / "nnUNet_raw" / DATASET / "dataset.json").write_text(json.dumps(DESCRIPTION))
    (tmp_path / "nnUNet_preprocessed" / DATASET).mkdir()
    (tmp_path / "nnUNet_preprocessed" / DATASET / "dataset_fingerprint.json").write_text(json.dumps(FINGERPRINT))
    return tmp_path


def error_of(capsys, *words: str) -> str:
    """The one line that the command prints before it exits with 2."""
    assert main(["plan", *words]) == 2
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("nnunet_diffusion plan: error: ")
    return line


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("-d", "7", "-pl", "MyPlanner"), ["-pl is MyPlanner", *PLANNERS]),
        (("-d", "7", "-step_seconds", "2"), ["-step_seconds plans for a CPU", "add -device cpu"]),
        (("-d", "7", "-gpu_memory_target", "0"), ["-gpu_memory_target is 0", "positive"]),
        (("-d", "7", "-device", "cpu", "-step_seconds", "-1"), ["-step_seconds is -1", "positive"]),
        (("-d", "7", "--preprocess", "-c", "2d", "3d_fullres", "-np", "1", "2", "3"), ["-np has 3 numbers", "2d"]),
        (("-d", "7", "--preprocess", "-np", "0"), ["-np is 0", "at least 1"]),
        (("-d", "7", "-overwrite_target_spacing", "0", "1", "1"), ["-overwrite_target_spacing has 0", "positive"]),
        (("-d", "7", "-overwrite_target_spacing", "1", "-1", "1"), ["-overwrite_target_spacing has -1", "positive"]),
        (("-d", "7", "-c", "2d"), ["-c needs --preprocess"]),
        (("-d", "7", "-overwrite_plans_name", "a/b"), ["-overwrite_plans_name is 'a/b'"]),
        (("-d", "8"), ["dataset 8 is not in", "nnUNet_raw"]),
        (("-d", "seven"), ["'seven'", "Dataset004_Name"]),
    ],
)
def test_wrong_options(folders, capsys, words, told):
    line = error_of(capsys, *words)
    assert all(word in line for word in told), line


def test_missing_fingerprint_names_the_command(folders, capsys):
    (folders / "nnUNet_preprocessed" / DATASET / "dataset_fingerprint.json").unlink()
    assert "nnUNetv2_extract_fingerprint -d 7 --verify_dataset_integrity" in error_of(capsys, "-d", "7")


def test_missing_dataset_json(folders, capsys):
    (folders / "nnUNet_raw" / DATASET / "dataset.json").unlink()
    assert "has no dataset.json" in error_of(capsys, "-d", "7")


@pytest.fixture
def preprocessed_names(folders, monkeypatch):
    """What nnU-Net's preprocessing is asked for, as a list that grows; it does nothing."""
    from nnunetv2.experiment_planning import plan_and_preprocess_api
    from nnunetv2.utilities import utils

    done: list[str] = []
    monkeypatch.setattr(
        plan_and_preprocess_api, "preprocess_dataset", lambda _id, _plans, names, _n: done.extend(names)
    )
    monkeypatch.setattr(utils, "get_filenames_of_train_images_and_targets", lambda _folder: {"case0": {}})
    return done


PLANS = {
    "dataset_name": DATASET,
    "plans_name": "P",
    "configurations": {
        "2d": {"data_identifier": "P_2d", "architecture": {}},
        "3d_fullres": {"data_identifier": "P_3d_fullres", "architecture": {}},
        "mine": {"inherits_from": "2d", "batch_size": 4},
    },
}


def options_of(*words):
    """Parsed options of `plan`."""
    parser = argparse.ArgumentParser()
    plan.add_parser(parser.add_subparsers())
    return parser.parse_args(["plan", "-d", "7", "--preprocess", *words])


def test_preprocessing_takes_configurations_that_inherit_and_leaves_out_defaults_that_are_not_there(preprocessed_names):
    plan.preprocess(DATASET, PLANS, options_of("-c", "mine"))
    assert preprocessed_names == ["mine"]
    plan.preprocess(DATASET, PLANS, options_of())
    assert preprocessed_names == ["mine", "2d", "3d_fullres"]


def test_preprocessing_refuses_a_configuration_the_plans_lack(preprocessed_names):
    with pytest.raises(plan.CommandError, match=r"no configuration 4d; they have: 2d, 3d_fullres, mine"):
        plan.preprocess(DATASET, PLANS, options_of("-c", "2d", "4d"))
    assert preprocessed_names == []


@pytest.mark.parametrize(("files", "complete"), [(("case0.b2nd", "case0.pkl"), True), (("case0.b2nd",), False)])
def test_only_cases_that_were_written_whole_are_left_alone(folders, preprocessed_names, files, complete):
    folder = folders / "nnUNet_preprocessed" / DATASET / "P_2d"
    folder.mkdir()
    for name in files:
        (folder / name).touch()
    truths = folder.parent / "gt_segmentations"
    truths.mkdir()
    (truths / "case0.nii.gz").touch()
    plan.preprocess(DATASET, PLANS, options_of("-c", "2d"))
    assert preprocessed_names == ([] if complete else ["2d"])
    (truths / "case0.nii.gz").unlink()  # nnU-Net copies the labels at the end, for its validation
    plan.preprocess(DATASET, PLANS, options_of("-c", "2d"))
    assert preprocessed_names == (["2d"] if complete else ["2d", "2d"])


def test_unset_folder_and_ambiguous_number(folders, capsys, monkeypatch):
    (folders / "nnUNet_raw" / "Dataset007_Other").mkdir()
    line = error_of(capsys, "-d", "7")
    assert "ambiguous" in line and "Dataset007_Other" in line
    monkeypatch.delenv("nnUNet_raw")
    assert "nnUNet_raw is not set" in error_of(capsys, "-d", "7")


def test_planners_are_the_modules_of_their_folder():
    assert plan.planner_names() == PLANNERS


@pytest.mark.parametrize("planner", PLANNERS)
def test_messages_name_the_plans_that_a_planner_makes(planner):
    kind = getattr(importlib.import_module(f"nnunet_diffusion.planners.{planner}"), planner)
    assert inspect.signature(kind.__init__).parameters["plans_name"].default == PLANS_OF[planner]


def test_planning_without_augmentation_processes(monkeypatch):
    """nnU-Net's planner would set torch to 0 threads."""
    name = "nnUNet_n_proc_DA"
    monkeypatch.setenv(name, "0")
    with plan.planning_threads():
        assert os.environ[name] == "1"
    assert os.environ[name] == "0"


@pytest.mark.parametrize(
    ("part", "name", "cure"),
    [
        ("nnUNet_raw", "dataset.json", "dataset_format.md"),
        ("nnUNet_preprocessed", "dataset_fingerprint.json", "nnUNetv2_extract_fingerprint -d 7"),
    ],
)
@pytest.mark.parametrize("content", ["{", "[]", "{}"])
def test_damaged_files_are_named_with_the_cure(folders, capsys, part, name, cure, content):
    path = folders / part / DATASET / name
    path.write_text(content)
    line = error_of(capsys, "-d", "7")
    assert str(path) in line and cure in line


def test_preprocessor_that_nnunet_lacks_is_refused():
    plan.check_preprocessor("DefaultPreprocessor")
    with pytest.raises(plan.CommandError, match="-preprocessor_name is Foo"):
        plan.check_preprocessor("Foo")
