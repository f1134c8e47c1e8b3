"""Arguments of `nnunet_diffusion predict`: as nnU-Net's, and refused early where they are wrong."""

import json
import re
import subprocess
import sys

import pytest
import torch
from nnunetv2.inference import predict_from_raw_data

from nnunet_diffusion.cli import predict
from nnunet_diffusion.cli.errors import CommandError
from nnunet_diffusion.cli.main import build_parser, main
from nnunet_diffusion.inference import DiffusionPredictor
from nnunet_diffusion.model.settings import DiffusionSettings


@pytest.mark.parametrize(
    ("argument", "choices"), [("sampler", predict.SAMPLERS), ("fusion", predict.FUSIONS), ("draw", predict.DRAWS)]
)
def test_the_predictor_takes_the_commands_choices_and_no_other(argument, choices):
    def take(value):
        predictor = DiffusionPredictor(device=torch.device("cpu"), **{argument: value})
        DiffusionSettings(features_per_stage=(8, 8), **predictor.overrides)

    for choice in choices:
        take(choice)
    with pytest.raises(ValueError, match="nonsense") as refused:
        take("nonsense")
    assert all(choice in str(refused.value) for choice in choices)
    # the message lists no name beside those of the command
    listed = str(refused.value).replace("`", "").split("known: " if argument == "fusion" else "legal: ")[1]
    assert {name.strip(" .") for name in listed.split(",")} == set(choices)


def test_every_argument_of_nnunet_is_there():
    with open(predict_from_raw_data.__file__) as file:
        theirs = set(re.findall(r"parser\.add_argument\('(-[\w-]+)'", file.read()))
    ours = build_parser()._subparsers._group_actions[0].choices["predict"]._option_string_actions
    assert len(theirs) > 15
    assert theirs <= set(ours)


def made_model(folder, ending=".png"):
    """What tells a model folder without loading it: its description and a checkpoint's name."""
    (folder / "fold_0").mkdir(parents=True)
    (folder / "fold_0" / "checkpoint_final.pth").touch()
    (folder / "dataset.json").write_text(json.dumps({"file_ending": ending}))
    trainer, plans, configuration = (*folder.name.split("__"), "nnUNetPlans", "2d")[:3]
    sections = {configuration: {} if trainer == "nnUNetTrainer" else {"diffusion": {}}}
    (folder / "plans.json").write_text(json.dumps({"plans_name": plans, "configurations": sections}))
    return folder


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([], "give the model as -d ID"),
        (["-d", "4", "-c", "2d"], "nnUNet_results is not set"),
        (["-m", "model", "-i", "nowhere"], "-i is nowhere, which does not exist"),
        (["-m", "model", "--presegmentation", "nowhere"], "--presegmentation is nowhere"),
        (["-m", "model", "-num_parts", "2", "-part_id", "2"], "-part_id is 2"),
        (["-m", "model", "-step_size", "2"], "-step_size is 2.0"),
        (["-m", "model", "-npp", "-1"], "-npp is -1"),
        (["-m", "model", "--state_memory", "nan"], "--state_memory is nan"),
        (["-m", "model", "--state_memory", "-1"], "--state_memory is -1"),
        (["-m", "model", "-device", "mps"], "torch finds no Apple GPU"),
        (["-m", "model", "--threads", "0"], "--threads is 0, but must be 1 or more"),
        (["-m", "model", "-f", "five"], "-f has 'five'"),
        (["-m", "nowhere"], "no model folder of that name"),
        (["-m", "model", "-o", "."], "-o and -i are the same folder"),
        (["-m", "model", "-chk", "checkpoint_best.pth"], "no fold of model has checkpoint_best.pth"),
        (["-m", "model", "-o", __file__], "which is a file: give a folder"),
        (["-m", "model", "-i", __file__], "which is a file: give the folder that it is in"),
    ],
)
def test_wrong_arguments_are_named(words, reason, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("nnUNet_results", raising=False)
    monkeypatch.chdir(tmp_path)
    made_model(tmp_path / "model")
    (tmp_path / "a_0000.png").touch()
    given = ["predict", "-i", str(tmp_path), "-o", str(tmp_path / "out"), *words]
    assert main(given) == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.fixture
def results(tmp_path, monkeypatch):
    """nnU-Net's results with one nnU-Net and one diffusion model of a dataset."""
    folder = tmp_path / "results" / "Dataset007_Toy"
    made_model(folder / "nnUNetTrainer__nnUNetDiffusionPlans__2d")
    made_model(folder / "DiffusionTrainer_5epochs__nnUNetDiffusionPlans__2d")
    monkeypatch.setenv("nnUNet_results", str(tmp_path / "results"))
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "polyp_0000.png").touch()
    return folder


def loaded(monkeypatch):
    """Collect the models and folds that would be loaded."""
    found = []

    def load(options, model, folds):
        found.append((model.name, folds))
        raise CommandError("stop here")

    monkeypatch.setattr(predict, "_loaded_predictor", load)
    return found


def words(tmp_path, *more):
    return ["predict", "-i", str(tmp_path / "images"), "-o", str(tmp_path / "out"), *more]


def test_the_one_model_of_a_diffusion_trainer_is_found(results, tmp_path, monkeypatch):
    found = loaded(monkeypatch)
    for more in (
        ["-d", "7"],
        ["-d", "Dataset007_Toy", "-c", "2d"],
        ["-m", str(results / "DiffusionTrainer_5epochs__nnUNetDiffusionPlans__2d")],
    ):
        assert main(words(tmp_path, *more)) == 2
        assert found.pop() == ("DiffusionTrainer_5epochs__nnUNetDiffusionPlans__2d", ["0"])


def test_several_models_are_listed_as_one_types_them(results, tmp_path, monkeypatch, capsys):
    found = loaded(monkeypatch)
    made_model(results / "DiffusionTrainer__nnUNetDiffusionPlans__3d_fullres")
    assert main(words(tmp_path, "-d", "7")) == 2
    message = capsys.readouterr().err
    assert "2 trained models fit -d 7; type one of:" in message
    assert "  -d 7 -tr DiffusionTrainer -p nnUNetDiffusionPlans -c 3d_fullres" in message
    assert not found
    main(words(tmp_path, "-d", "7", "-c", "3d_fullres"))
    assert found == [("DiffusionTrainer__nnUNetDiffusionPlans__3d_fullres", ["0"])]
    assert main(words(tmp_path, "-d", "7", "-p", "other")) == 2
    assert "no trained model fits -d 7 -p other; there is:\n  -d 7 -tr Diff" in capsys.readouterr().err


def test_names_are_checked_before_the_model_is_loaded(results, tmp_path, monkeypatch, capsys):
    found = loaded(monkeypatch)
    images = tmp_path / "images"
    (images / "polyp_0000.png").rename(images / "polyp.png")
    assert main(words(tmp_path, "-d", "7")) == 2
    assert "you have polyp.png; nnU-Net wants polyp_0000.png" in capsys.readouterr().err
    assert not found
    (images / "good_0000.png").touch()
    main(words(tmp_path, "-d", "7"))
    assert "polyp.png is left out: nnU-Net wants polyp_0000.png" in capsys.readouterr().err
    assert len(found) == 1


def test_names_are_checked_before_torch_is_imported(results, tmp_path):
    (tmp_path / "images" / "polyp_0000.png").unlink()
    call = f"main({words(tmp_path, '-d', '7')}), 'torch' in sys.modules"
    code = f"import sys; from nnunet_diffusion.cli.main import main; print({call})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "False"], done.stderr
