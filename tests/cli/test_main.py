"""The command as the user calls it: exit codes and one clear line on wrong input."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nnunet_diffusion import __version__
from nnunet_diffusion.cli.main import main
from nnunet_diffusion.cli.trainers_directory import VARIABLE, trainers_directory, with_trainers

ROOT = Path(__file__).parents[2]


def call(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-m", "nnunet_diffusion.cli.main", *words], capture_output=True, text=True)


def test_trainers_directory_prints_one_folder_and_nothing_else():
    done = call("trainers_directory")
    assert done.returncode == 0 and not done.stderr
    folder = Path(done.stdout.removesuffix("\n"))
    assert folder.is_absolute() and (folder / "DiffusionTrainer.py").is_file()


def test_console_command_is_installed():
    done = subprocess.run(
        [Path(sys.executable).parent / "nnunet_diffusion", "--version"], capture_output=True, text=True
    )
    assert done.stdout.split() == ["nnunet_diffusion", __version__]


@pytest.mark.parametrize("words", [[], ["nonsense"], ["doctor", "--nonsense"]])
def test_wrong_words_exit_with_2(words, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    assert "usage: nnunet_diffusion" in capsys.readouterr().err


def test_help_of_the_command_needs_no_heavy_import():
    code = (
        "import sys; from nnunet_diffusion.cli.main import build_parser; build_parser(); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr


def test_our_trainers_come_first_and_the_users_folders_stay():
    ours = str(trainers_directory())
    assert with_trainers({})[VARIABLE] == ours
    mixed = os.pathsep.join(["/somewhere", ours, "/else"])
    assert with_trainers({VARIABLE: mixed, "other": "kept"}) == {
        VARIABLE: os.pathsep.join([ours, "/somewhere", "/else"]),
        "other": "kept",
    }
