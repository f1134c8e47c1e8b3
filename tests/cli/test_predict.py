"""Arguments of `nnunet_diffusion predict`: as nnU-Net's, and refused early where they are wrong."""

import re
import subprocess
import sys

import pytest
from nnunetv2.inference import predict_from_raw_data

from nnunet_diffusion.cli import predict
from nnunet_diffusion.cli.main import build_parser, main
from nnunet_diffusion.diffusion.samplers import SAMPLERS
from nnunet_diffusion.inference.fusion import FUSIONS


def test_choices_are_those_of_the_code():
    assert set(predict.SAMPLERS) == set(SAMPLERS)
    assert predict.FUSIONS == FUSIONS


def test_every_argument_of_nnunet_is_there():
    with open(predict_from_raw_data.__file__) as file:
        theirs = set(re.findall(r"parser\.add_argument\('(-[\w-]+)'", file.read()))
    ours = build_parser()._subparsers._group_actions[0].choices["predict"]._option_string_actions
    assert len(theirs) > 15
    assert theirs <= set(ours)


@pytest.fixture
def model(tmp_path):
    """A model folder with what is read before the model is loaded."""
    folder = tmp_path / "model"
    (folder / "fold_0").mkdir(parents=True)
    (folder / "fold_0" / "checkpoint_final.pth").touch()
    (folder / "dataset.json").write_text('{"file_ending": ".png"}')
    return folder


@pytest.fixture
def images(tmp_path):
    """A folder with one image."""
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a_0000.png").touch()
    return folder


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([], "give the model as -d ID"),
        (["-d", "4"], "nnUNet_results is not set"),
        (["-m", "nowhere"], "no model folder of that name"),
        (["-m", "MODEL", "-i", "nowhere"], "-i is nowhere, which does not exist"),
        (["-m", "MODEL", "-i", "MODEL/dataset.json"], "which is a file: give the folder"),
        (["-m", "MODEL", "-o", "MODEL/dataset.json"], "which is a file: give a folder"),
        (["-m", "MODEL", "-o", "IMAGES"], "-o and -i are the same folder"),
        (["-m", "MODEL", "--presegmentation", "nowhere"], "--presegmentation is nowhere"),
        (["-m", "MODEL", "-num_parts", "2", "-part_id", "2"], "-part_id is 2"),
        (["-m", "MODEL", "-step_size", "2"], "-step_size is 2.0"),
        (["-m", "MODEL", "-npp", "-1"], "-npp is -1"),
        (["-m", "MODEL", "--state_memory", "nan"], "--state_memory is nan"),
        (["-m", "MODEL", "--state_memory", "-1"], "--state_memory is -1"),
        (["-m", "MODEL", "-device", "mps"], "torch finds none"),
        (["-m", "MODEL", "-f", "five"], "-f has 'five'"),
        (["-m", "MODEL", "-chk", "checkpoint_best.pth"], "has checkpoint_best.pth"),
        (["-m", "MODEL", "-device", "cpu"], "plans.json is missing"),
    ],
)
def test_wrong_arguments_are_named(words, reason, model, images, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("nnUNet_results", raising=False)
    words = [word.replace("MODEL", str(model)).replace("IMAGES", str(images)) for word in words]
    given = ["predict", "-i", str(images), "-o", str(tmp_path / "out"), *words]
    assert main(given) == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_names_of_images_are_checked_before_torch_is_imported(model, images):
    (images / "a_0000.png").rename(images / "polyp.png")
    words = ["predict", "-i", str(images), "-o", str(images / "out"), "-m", str(model)]
    code = f"import sys; from nnunet_diffusion.cli.main import main; print(main({words}), 'torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "False"]
    assert "you have polyp.png; nnU-Net wants polyp_0000.png" in done.stderr
