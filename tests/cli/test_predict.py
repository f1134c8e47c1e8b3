"""Arguments of `nnunet_diffusion predict`: as nnU-Net's, and refused early where they are wrong."""

import re

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


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["-d", "4"], "-d ID -c CONFIG"),
        (["-d", "4", "-c", "2d"], "nnUNet_results is not set"),
        (["-m", "model", "-i", "nowhere"], "-i is nowhere, which is no folder"),
        (["-m", "model", "--presegmentation", "nowhere"], "--presegmentation is nowhere"),
        (["-m", "model", "-num_parts", "2", "-part_id", "2"], "-part_id is 2"),
        (["-m", "model", "-step_size", "2"], "-step_size is 2.0"),
        (["-m", "model", "-npp", "-1"], "-npp is -1"),
        (["-m", "model", "--state_memory", "nan"], "--state_memory is nan"),
        (["-m", "model", "--state_memory", "-1"], "--state_memory is -1"),
        (["-m", "model", "--threads", "0"], "--threads is 0, but must be 1 or more"),
        (["-m", "model", "-device", "mps"], "torch finds none"),
        (["-m", "model", "-f", "five"], "-f has 'five'"),
        (["-m", "model", "-device", "cpu"], "no model folder model"),
    ],
)
def test_wrong_arguments_are_named(words, reason, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("nnUNet_results", raising=False)
    given = ["predict", "-i", str(tmp_path), "-o", str(tmp_path / "out"), *words]
    assert main(given) == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
