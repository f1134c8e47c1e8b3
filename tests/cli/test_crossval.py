"""`nnunet_diffusion crossval`: wrong arguments get one sentence with the cure; options of Slurm reach submitit."""

from __future__ import annotations

import argparse
import json

import pytest

from nnunet_diffusion.cli import crossval
from nnunet_diffusion.cli.main import main

DATASET = "Dataset007_Toy"
SLURM = ["--executor", "slurm", "--time", "60"]


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(name, str(tmp_path / name))
    (tmp_path / "nnUNet_raw" / DATASET).mkdir()
    return tmp_path


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "-c is missing: give it, or --status"),
        (["-c", "2d"], "-tr is missing"),
        (["-c", "2d", "-tr", "A", "A"], "-tr has A twice"),
        (["-c", "2d", "-tr", "A", "--folds", "-1"], "--folds has -1"),
        (["-c", "2d", "-tr", "A", "--gpus", "0"], "--gpus is 0, but must be 1 or more"),
        (["-c", "2d", "-tr", "A", "--gpus", "2", "-device", "cpu"], "--gpus is 2, but -device is cpu"),
        (["-c", "2d", "-tr", "A", "--partition", "p"], "--partition is for Slurm: add --executor slurm"),
        (["-c", "2d", "-tr", "A", *SLURM, "--at_once", "2"], "--at_once is 2, but Slurm decides"),
        (["-c", "2d", "-tr", "A", "--executor", "slurm"], "--time is missing, but must be more than 10 minutes"),
        (
            ["-c", "2d", "-tr", "A", "--executor", "slurm", "--time", "10"],
            "--time is 10, but must be more than 10 minutes",
        ),
        (["-c", "2d", "-tr", "A", *SLURM, "--slurm", "qos"], "--slurm has qos, but must be KEY=VALUE"),
        (["-c", "2d", "-tr", "A", *SLURM, "--slurm", "time=5"], "--slurm has time=5, but this command sets time"),
        (["--status"], "holds no cross-validation: start one with -c and -tr"),
    ],
)
def test_wrong_arguments_are_named_with_the_cure(words, told, capsys):
    assert main(["crossval", "-d", "7", *words]) == 2
    printed = capsys.readouterr()
    assert len(printed.err.splitlines()) == 1 and told in printed.err and not printed.out


def test_dataset_that_is_not_there(capsys):
    assert main(["crossval", "-d", "8", "--status"]) == 2
    assert "-d is 8, which is neither in" in capsys.readouterr().err


def test_options_of_slurm_reach_submitit():
    options = argparse.Namespace(partition="gpu", time=60, mem="4G", cpus=None, slurm=["account=me", "--mail_type=END"])
    assert crossval.slurm_options(options) == {
        "partition": "gpu", "time": 60, "mem": "4G", "additional_parameters": {"account": "me", "mail-type": "END"},
    }  # fmt: skip


def test_missing_plans_are_made_as_the_training_would_tell(folders):
    both = ["nnUNetTrainer", "HiDiffTrainer"]
    options = argparse.Namespace(c=["2d", "3d_fullres"], tr=both, p="nnUNetHiDiffPlans", device="cpu")
    found = [" ".join(words) for words in crossval.preparation(options, DATASET, None)]
    assert found == [
        "nnUNetv2_extract_fingerprint -d 7 --verify_dataset_integrity",
        "nnunet_diffusion plan -d 7 --preprocess -c 2d 3d_fullres -denoiser hidiff -device cpu",
    ]
    options.p = "nnUNetPlans"
    assert crossval.preparation(options, DATASET, None) == [
        ["nnUNetv2_plan_and_preprocess", "-d", "7", "-c", "2d", "3d_fullres", "--verify_dataset_integrity"]
    ]


def test_only_what_is_not_preprocessed_is(folders):
    plans = {"dataset_name": DATASET, "plans_name": "P", "configurations": {}}
    for name in ("2d", "3d_fullres"):
        plans["configurations"][name] = {"data_identifier": f"P_{name}"}
    preprocessed = folders / "nnUNet_preprocessed" / DATASET
    (preprocessed / "P_2d").mkdir(parents=True)
    (preprocessed / "P.json").write_text(json.dumps(plans))
    options = argparse.Namespace(c=["2d", "3d_fullres"], tr=["nnUNetTrainer"], p="P", device="cuda")
    found = [" ".join(words) for words in crossval.preparation(options, DATASET, plans)]
    assert found == ["nnUNetv2_preprocess -d 7 -plans_name P -c 3d_fullres"]


@pytest.mark.parametrize(
    ("name", "epochs"),
    [("nnUNetTrainer", 1000), ("nnUNetTrainer_20epochs", 20), ("nnUNetTrainer_1epoch", 1), ("Mine", 0)],
)
def test_epochs_are_known_or_zero(name, epochs):
    assert crossval.epochs_of(name, None) == epochs
