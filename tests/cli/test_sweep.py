"""Wrong arguments of `nnunet_diffusion sweep` are named before a model is loaded."""

import pytest

from nnunet_diffusion.cli import sweep
from nnunet_diffusion.cli.main import main
from nnunet_diffusion.evaluation.sweep_results import NOISE, PRESEGMENTATION


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--steps", "1", "0"], "--steps is 0, but must be 1 or more"),
        (["--seeds", "0"], "--seeds is 0, but must be 1 or more"),
        (["--cases", "-1"], "--cases is -1, but must be 1 or more"),
        (["-o", __file__], "which is a file: give a folder for the output"),
    ],
)
def test_wrong_arguments_are_named(words, reason, capsys):
    assert main(["sweep", "-d", "4", *words]) == 2
    assert reason in capsys.readouterr().err


def test_unknown_samplers_are_refused(capsys):
    with pytest.raises(SystemExit):
        main(["sweep", "-d", "4", "--samplers", "euler"])
    assert "invalid choice: 'euler'" in capsys.readouterr().err


def test_starts_have_the_names_of_the_measurement():
    assert sweep.STARTS == (NOISE, PRESEGMENTATION)
