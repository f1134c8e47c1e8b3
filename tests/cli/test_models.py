"""The one trained model that fits what was given, or all that fit and what to type."""

import argparse
import json

import pytest

from nnunet_diffusion.cli.errors import CommandError
from nnunet_diffusion.cli.models import finished_folds, model_folder

OURS, STOCK, CHECKPOINT = "DiffusionTrainer__nnUNetPlans__2d", "nnUNetTrainer__nnUNetPlans__2d", "checkpoint_final.pth"


@pytest.fixture
def results(tmp_path):
    folder = tmp_path / "Dataset004_Hippocampus"

    def add(name, folds=("0",), section=None, checkpoint=CHECKPOINT):
        configuration = name.split("__")[-1]
        section = {"presegmentor_trainer": "Pretrainer"} if section is None else section
        for fold in folds:
            (folder / name / f"fold_{fold}").mkdir(parents=True)
            (folder / name / f"fold_{fold}" / checkpoint).touch()
        plans = {"configurations": {configuration: {"diffusion": section} if section else {}}}
        (folder / name / "plans.json").write_text(json.dumps(plans))
        return folder / name

    return add


def found(results_folder, **given):
    options = argparse.Namespace(**{**dict.fromkeys(("m", "d", "tr", "p", "c")), "chk": CHECKPOINT, **given})
    return model_folder(options, {"nnUNet_results": str(results_folder)}).name


def test_the_dataset_alone_means_its_only_model_of_a_diffusion_trainer(results, tmp_path):
    results(OURS)
    results(STOCK)  # trained on plans of our planner
    results("Pretrainer__nnUNetPlans__2d")
    results("Other__nnUNetPlans__2d", section=False)
    results("DiffusionTrainer__nnUNetPlans__3d_fullres", checkpoint="checkpoint_latest.pth")
    for name in ("4", "Dataset004_Hippocampus"):
        assert found(tmp_path, d=name) == OURS
    assert found(tmp_path, d="4", tr="nnUNetTrainer") == STOCK  # refused when it is loaded, with the reason
    chosen = found(tmp_path, d="4", c="3d_fullres", chk="checkpoint_latest.pth")
    assert chosen == "DiffusionTrainer__nnUNetPlans__3d_fullres"


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({}, "give the model as -d ID"),
        ({"d": "5"}, "has no models of that dataset"),
        ({"d": "4"}, "has no model of a diffusion trainer .*train one: nnunet_diffusion train 4"),
        ({"m": "nowhere"}, "-m is nowhere, but there is no model folder of that name"),
    ],
)
def test_without_a_model_it_says_what_is_missing(results, tmp_path, given, reason):
    results(STOCK)
    with pytest.raises(CommandError, match=reason):
        found(tmp_path, **given)


def test_folds_are_those_that_are_finished(results):
    model = results(OURS, ("2", "0", "all"))
    (model / "fold_1").mkdir()
    assert finished_folds(model, CHECKPOINT) == ["0", "2"]
    assert finished_folds(results("Only__all__2d", ("all",)), CHECKPOINT) == ["all"]
    with pytest.raises(
        CommandError, match="no fold of .* has checkpoint_best.pth, but there is checkpoint_final.pth: choose"
    ):
        finished_folds(model, "checkpoint_best.pth")
