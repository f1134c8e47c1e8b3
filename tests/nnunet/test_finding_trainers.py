"""nnU-Net's own search finds our trainers, alone and beside another directory."""

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
TRAINERS, TINY_TRAINERS = TESTS.parent / "trainers", TESTS / "nnunet" / "tiny_trainers"

pytestmark = [pytest.mark.nnunet, pytest.mark.slow]
NAMES = (
    ["DiffusionTrainer"]
    + [f"DiffusionTrainer_{n}epochs" for n in (5, 10, 20, 50, 100, 250)]
    + ["DiffusionTrainer_1epoch", "DiffusionTrainerNoMirroring", "DiffusionTrainerUNet", "DiffusionTrainerUNet_1epoch"]
    + [f"DiffusionTrainerUNet_{n}epochs" for n in (5, 10, 20, 50, 100, 250)]
    + ["HiDiffTrainer", "HiDiffTrainer_1epoch"]
    + [f"HiDiffTrainer_{n}epochs" for n in (5, 10, 20, 50, 100, 250)]
)
SEARCH = """
import sys
from pathlib import Path
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name as find
for name in sys.argv[1:]:
    trainer = find(name)
    print("FOUND", name, trainer.__name__, trainer.epochs, trainer.presegmentor_trainer)
    find(trainer.presegmentor_trainer)
"""


def search(code, *directories, names=NAMES):
    return subprocess.run(
        [sys.executable, "-c", code, *names],
        env={**os.environ, "nnUNet_extTrainer": os.pathsep.join(map(str, directories))},
        capture_output=True,
        text=True,
        timeout=300,
    )


@pytest.mark.parametrize("directories", [[TRAINERS], [TINY_TRAINERS, TRAINERS]])
def test_every_trainer_and_its_presegmentor_is_found(directories):
    done = search(SEARCH, *directories)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("FOUND")]
    assert [line[1] for line in lines] == [line[2] for line in lines] == NAMES
    for _, name, _, epochs, presegmentor in lines:
        suffix = name.removeprefix("HiDiffTrainer").removeprefix("DiffusionTrainer").removeprefix("UNet")
        assert presegmentor == f"nnUNetTrainer{suffix}"
        length = "".join(filter(str.isdecimal, suffix))
        if "UNet" in name:
            assert int(epochs) == math.ceil(int(length or 1000) / 4), "a quarter of nnU-Net's"
        else:
            assert epochs == (length or "None")


def test_nnunet_with_averaged_weights_is_found_at_every_length():
    names = ["nnUNetTrainerEMA", "nnUNetTrainerEMA_1epoch"]
    names += [f"nnUNetTrainerEMA_{n}epochs" for n in (5, 10, 20, 50, 100, 250)]
    done = search(SEARCH.replace("trainer.presegmentor_trainer", "name"), TRAINERS, names=names)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines() if line.startswith("FOUND")]
    assert [line[1] for line in lines] == [line[2] for line in lines] == names
    for _, name, _, epochs, _ in lines:
        assert epochs == ("".join(filter(str.isdecimal, name)) or "None")


def test_the_quick_starts_own_trainer_is_found_with_its_presegmentor(tmp_path):
    page = (TESTS.parent / "documentation" / "quick_start.md").read_text(encoding="utf-8")
    (block,) = (
        each for each in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "DiffusionTrainerUpright" in each
    )
    (tmp_path / "nnUNetTrainerUpright.py").write_text(block, encoding="utf-8")
    done = search(SEARCH + "print(trainer.__mro__)", TRAINERS, tmp_path, names=["DiffusionTrainerUpright"])
    assert done.returncode == 0, done.stderr
    found, mro = (line for line in done.stdout.splitlines() if line.startswith(("FOUND", "(")))
    assert found == "FOUND DiffusionTrainerUpright DiffusionTrainerUpright None nnUNetTrainerUpright"
    assert mro.index(".Upright'") < mro.index(".DiffusionTrainer'") < mro.index(".nnUNetTrainer'")


def test_a_missing_package_is_said_in_one_line_with_the_cure():
    without = "import sys; sys.modules['nnunet_diffusion'] = None" + SEARCH
    done = search(without, TRAINERS)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    for part in ("nnunet_diffusion", "pip install", str(TRAINERS), "nnUNet_extTrainer"):
        assert part in last
