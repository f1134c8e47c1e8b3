"""Wrong arguments of `nnunet_diffusion explain` are named before a model is loaded; classes are found by name or number."""

import json

import pytest

from nnunet_diffusion.cli import explain
from nnunet_diffusion.cli.errors import CommandError
from nnunet_diffusion.cli.explain import heads_of
from nnunet_diffusion.cli.main import main
from nnunet_diffusion.explain.explanation import TARGETS


@pytest.fixture
def model(tmp_path):
    """A model folder that is complete as far as its cases are looked for."""
    folder = tmp_path / "DiffusionTrainer__Plans__2d"
    (folder / "fold_0").mkdir(parents=True)
    (folder / "fold_0" / "checkpoint_final.pth").touch()
    (folder / "dataset.json").write_text(json.dumps({"file_ending": ".png"}))
    images = tmp_path / "images"
    images.mkdir()
    for name in ("a_0000.png", "b_0000.png"):
        (images / name).touch()
    return folder


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["-i", "nowhere"], "-i is nowhere, which does not exist"),
        (["-g", "nowhere"], "-g is nowhere, but there is no such folder"),
        (["-o", __file__], "which is a file: give a folder for the output"),
        (
            ["-o", f"{__file__}/pages"],
            f"-o is {__file__}/pages, but {__file__} is a file: give a folder for the output",
        ),
        (["--steps", "0"], "--steps is 0, but must be 1 or more"),
        (["--cases", "c"], "--cases has c, but "),
    ],
)
def test_wrong_arguments_are_named(words, reason, model, tmp_path, capsys):
    images = tmp_path / "images"
    given = ["explain", "-i", str(images), "-o", str(tmp_path / "out"), "-m", str(model), *words]
    assert main(given) == 2
    assert reason in capsys.readouterr().err


def test_one_image_file_is_one_case(model, tmp_path, capsys):
    (tmp_path / "images" / "scan.png").touch()
    words = ["explain", "-o", str(tmp_path / "out"), "-m", str(model), "-i"]
    assert main([*words, str(tmp_path / "images" / "scan.png")]) == 2
    assert "scan.png, which is not named as nnU-Net names images: CASE_0000.png" in capsys.readouterr().err
    options = explain_options([*words, str(tmp_path / "images" / "b_0000.png")])
    assert explain.find_cases(options, model)[0] == ["b"]


def explain_options(words):
    from nnunet_diffusion.cli.main import build_parser

    return build_parser().parse_args(words)


def test_classes_are_named_or_numbered():
    assert heads_of(["core", "edge"], [1, 3], None, 1) == {"core": 1, "edge": 2}
    assert heads_of(["core", "edge"], [1, 3], ["3"], 1) == {"edge": 2}
    assert heads_of(["whole", "core"], [(1, 2), 2], ["core"], 0) == {"core": 1}
    with pytest.raises(CommandError, match=r"--class has 2, but the model's classes are core \(1\), edge \(3\)"):
        heads_of(["core", "edge"], [1, 3], ["2"], 1)


def test_targets_have_the_names_of_the_explanation():
    assert explain.TARGETS == TARGETS
