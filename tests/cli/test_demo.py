"""`nnunet_diffusion demo`: all of it with a tiny recipe, and its parts by themselves."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from nnunet_diffusion.trainers import DiffusionTrainerUNet_Xepochs

from nnunet_diffusion.cli import demo
from nnunet_diffusion.cli.errors import CommandError
from nnunet_diffusion.cli.trainers_directory import VARIABLE, trainers_directory

TINY_TRAINERS = Path(__file__).parents[1] / "nnunet" / "tiny_trainers"
TINY = demo.Recipe(
    training_images=10,
    test_images=4,
    trainer="TinyDiffusionTrainerUNet",
    presegmentor="TinynnUNetTrainer",
    step_seconds=0.05,
    ddpm_steps=2,
)


@pytest.mark.slow
@pytest.mark.nnunet
def test_demo_runs_end_to_end_and_a_second_run_reuses_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv(VARIABLE, str(TINY_TRAINERS))
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(tmp_path / "the_users_own"))
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")
    before = dict(os.environ)
    folder = tmp_path / "demo"
    report = demo.run_recipe(folder, "cpu", TINY)
    assert dict(os.environ) == before, "the user's environment stays as it was"
    assert not (tmp_path / "the_users_own").exists()

    text = report.read_text()
    for method in ("| nnU-Net |", "| DDPM from noise, 2 steps |", "| PD-DDPM, T' = "):
        assert method in text
    assert text.count("4 of 4 segmentations equal those of `nnUNetv2_predict`") == 2
    assert (folder / "report.png").stat().st_size > 10_000
    model = folder / "results" / demo.DATASET_NAME / f"TinyDiffusionTrainerUNet__{demo.PLANS_NAME}__2d"
    assert (model / "fold_0" / "checkpoint_final.pth").is_file()
    assert "Pseudo dice" in (folder / "logs" / "nnUNetv2_train.log").read_text()

    capsys.readouterr()
    monkeypatch.setattr(demo, "stream", lambda *_: pytest.fail("a second run starts no command"))
    assert demo.run_recipe(folder, "cpu", TINY) == report
    assert capsys.readouterr().out.count("already done") == 6


def test_default_recipe_names_the_presegmentor_that_its_trainer_trains():
    recipe = demo.Recipe()
    assert getattr(DiffusionTrainerUNet_Xepochs, recipe.trainer).presegmentor_trainer == recipe.presegmentor


@pytest.mark.parametrize(
    ("device", "target"), [("cpu", ["-device", "cpu", "-step_seconds", "0.05"]), ("cuda", ["-gpu_memory_target", "4"])]
)
def test_plans_are_made_for_the_device(tmp_path, monkeypatch, device, target):
    commands = []
    monkeypatch.setattr(demo, "run_command", lambda words, place: commands.append(words))
    demo.plan_and_preprocess(demo.Workplace(tmp_path, device, TINY))
    assert [words[0] for words in commands] == ["nnUNetv2_extract_fingerprint", "nnunet_diffusion"]
    assert commands[1][1:6] == ["plan", "-d", "901", *target[:2]] and set(target) <= set(commands[1])
    place = commands[1].index("-overwrite_target_spacing")
    assert commands[1][place + 1 : place + 4] == ["999", "2", "2"]


def test_environment_keeps_to_the_demos_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("nnUNet_raw", "/the/users/own")
    monkeypatch.setenv(VARIABLE, "/the/users/trainers")
    environment = demo.Workplace(tmp_path, "cpu", TINY).environment()
    for name in ("raw", "preprocessed", "results"):
        assert environment[f"nnUNet_{name}"] == str(tmp_path / name)
    assert environment[VARIABLE] == os.pathsep.join([str(trainers_directory()), "/the/users/trainers"])


def test_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(CommandError, match="holds other files"):
        demo.claim(tmp_path, TINY)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_folder_of_another_recipe_is_refused(tmp_path):
    demo.claim(tmp_path / "demo", TINY)
    assert demo.claim(tmp_path / "demo", TINY) == tmp_path / "demo"
    with pytest.raises(CommandError, match="of another version; remove it"):
        demo.claim(tmp_path / "demo", replace(TINY, ddpm_steps=3))


def test_failed_command_names_its_log_and_is_not_marked_as_finished(tmp_path, monkeypatch, capsys):
    place = demo.Workplace(tmp_path, "cpu", TINY)
    monkeypatch.setattr(demo, "find_command", lambda name: sys.executable)
    with pytest.raises(CommandError, match=r"failed with exit code 3; see its output in .*x\.log"):
        demo.run_command(["x", "-c", "print('so far'); raise SystemExit(3)"], place)
    assert (tmp_path / "logs" / "x.log").read_text() == "so far\n"
    assert "so far" in capsys.readouterr().out


def test_silence_shows_a_sign_of_life(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "SILENCE_SECONDS", 0.5)
    words = [sys.executable, "-c", "import time; time.sleep(2.5)"]
    assert demo.stream(words, os.environ, tmp_path / "log") == 0
    assert "... running for 0:0" in capsys.readouterr().out


def test_missing_command_names_the_package():
    with pytest.raises(CommandError, match="pip install nnunetv2"):
        demo.find_command("nnUNetv2_nonsense")
