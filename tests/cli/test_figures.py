"""`nnunet_diffusion figures` on small folders of label maps, as a user would run it."""

import csv
import json
import re
import shutil

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from matplotlib.image import imread

from nnunet_diffusion.cli.main import main
from nnunet_diffusion.explain.figures import ERROR_COLOURS

MISSED, TOO_MUCH = ERROR_COLOURS["missed (A−B)"], ERROR_COLOURS["over-segmented (B−A)"]
SPACING = (1.0, 1.0, 3.0)


def write(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array.astype(np.uint8))
    if array.ndim == 3:
        image.SetSpacing(SPACING)
    sitk.WriteImage(image, str(path))


def block(shift=0, volume=False):
    labels = np.zeros((5, 20, 30) if volume else (20, 30), int)
    where = (slice(1, 4),) if volume else ()
    labels[(*where, slice(5, 15), slice(5 + shift, 15 + shift))] = 1
    return labels


# case -> shift of the first and of the last model; Dice is 1 - shift / 10
SHIFTS = {"gain": (5, 1), "loss": (0, 4), "middle": (3, 2), "more": (2, 0), "nothing": (None, None)}
EXPECTED = {"gain": (0.5, 0.9), "loss": (1.0, 0.6), "middle": (0.7, 0.8), "more": (0.8, 1.0), "nothing": (1.0, 1.0)}


def fill(folder, ending, volume=False):
    """Write images, truths and two folders of predictions; case `nothing` has no foreground."""
    for case, shifts in SHIFTS.items():
        truth = block(volume=volume)
        maps = [0 * truth if shift is None else block(shift, volume) for shift in shifts]
        for name, labels in zip(("truth", "first", "last"), (truth * (shifts[0] is not None), *maps), strict=True):
            write(folder / name / f"{case}{ending}", labels)
        write(folder / "images" / f"{case}_0000{ending}", truth * 100 + np.arange(30))
    description = {"labels": {"background": 0, "lesion": 1}, "file_ending": ending, "channel_names": {"0": "US"}}
    (folder / "dataset.json").write_text(json.dumps(description))
    return folder


def words(folder, *more, predictions=("first", "last")):
    given = [
        "figures",
        "-i",
        str(folder / "images"),
        "-g",
        str(folder / "truth"),
        "-o",
        str(folder / "out"),
        "-np",
        "0",
    ]
    return [*given, *(word for name in predictions for word in ("-p", str(folder / name))), *map(str, more)]


def table(folder, name="figures.csv"):
    with (folder / "out" / name).open() as file:
        return {line["case"]: line for line in csv.DictReader(file)}


@pytest.fixture
def pictures(tmp_path):
    return fill(tmp_path, ".png")


def test_pictures_of_two_models(pictures, capsys):
    assert main(words(pictures, "--names", "nnU-Net", "ours", "--width_mm", 88)) == 0
    rows = table(pictures)
    for case, dice in EXPECTED.items():
        assert (float(rows[case]["nnU-Net"]), float(rows[case]["ours"])) == pytest.approx(dice)
        assert float(rows[case]["last - first"]) == pytest.approx(dice[1] - dice[0])
    assert {case: row["shown"] for case, row in rows.items() if row["shown"]} == {
        "gain": "largest gain, gain",
        "loss": "largest loss, loss",
        "more": "median change, more",  # of +0.4, +0.2, +0.1 and -0.4; nothing is to be seen in the fifth
    }
    assert "largest gain, gain: Dice 0.500, 0.900" in capsys.readouterr().out
    picture = np.round(imread(pictures / "out" / "comparison.png")[..., :3] * 255).astype(int)
    assert picture.shape[1] == round(88 / 25.4 * 300)
    assert {MISSED, TOO_MUCH} <= set(map(tuple, picture.reshape(-1, 3)))
    assert (pictures / "out" / "comparison.pdf").read_bytes().startswith(b"%PDF")
    assert not list((pictures / "out").glob("process*"))


def test_named_cases_need_no_prediction_of_others(pictures):
    (pictures / "last" / "gain.png").unlink()
    assert main(words(pictures, "--cases", "more", "loss", "--ending", "png")) == 0
    assert {case: row["shown"] for case, row in table(pictures, "named_cases.csv").items()} == {
        "more": "more",
        "loss": "loss",
    }
    assert not (pictures / "out" / "comparison.pdf").exists()
    assert main(words(pictures, "--chill", "--ending", "png")) == 0
    assert table(pictures)["more"]["shown"] == "largest gain, more" and "gain" not in table(pictures)


def test_one_model_shows_its_best_worst_and_median_case(pictures):
    assert main(words(pictures, "--ending", "png", predictions=("first",))) == 0
    shown = {case: row["shown"].split(",")[0] for case, row in table(pictures).items()}
    assert shown == {"loss": "best Dice", "more": "median Dice", "gain": "worst Dice", "middle": "", "nothing": ""}


def test_volumes_say_the_slice(tmp_path):
    folder = fill(tmp_path, ".nii.gz", volume=True)
    labels = block(1, volume=True)
    labels[3] = 0  # the most different slice
    write(folder / "last" / "gain.nii.gz", labels)
    assert main(words(folder, "--cases", "gain", "loss", "--ending", "png")) == 0
    assert table(folder, "named_cases.csv")["gain"]["shown"] == "gain, z = 3"
    assert main(words(folder, "--cases", "gain", "--ending", "png", "--axis", 1)) == 0
    assert re.fullmatch(r"gain, y = \d+", table(folder, "named_cases.csv")["gain"]["shown"])


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (
            ["--cases", "gain", "polyp"],
            r"--cases has polyp, but the cases in .* are: gain, loss, middle, more, nothing",
        ),
        (["--names", "ours"], r"--names has 1 names \(ours\), but -p is given 2 times: give one name for each"),
        (["--width_mm", "0"], "--width_mm is 0, but must be a number of mm above 0"),
        (["--width_mm", "nan"], "--width_mm is nan, but must"),
        (["--steps", "0"], "--steps is 0, but must be 1 or more"),
        (["-np", "-1"], "-np is -1, but must be 0"),
        (["-p", "nowhere"], "-p is nowhere, which does not exist"),
        (["-g", "nowhere"], "-g is nowhere, which does not exist"),
        (["-i", __file__], "-i is .*, which is a file: give the folder"),
        (["-o", __file__], "-o is .*, which is a file"),
        (["-m", "nowhere"], "-m is nowhere, but there is no model folder of that name"),
        (["--start_step", "300"], r"give the model as -d ID \(with -c, --plans and -tr"),
        (["-device", "cpu", "-m", "."], r"no fold of \. has checkpoint_final.pth"),
    ],
)
def test_wrong_arguments_are_named(pictures, capsys, more, reason):
    assert main(words(pictures, *more)) == 2
    assert re.search(reason, capsys.readouterr().err)


def remove(name):
    return lambda folder: (folder / name).unlink()


@pytest.mark.parametrize(
    ("change", "more", "reason"),
    [
        (remove("last/loss.png"), [], r"last lacks loss\.png, .* predict it, or leave .* out with --chill"),
        (
            remove("last/loss.png"),
            ["--cases", "loss"],
            "last lacks loss, which --cases names: predict it, or leave it out",
        ),
        (remove("images/gain_0000.png"), [], r"images, which has no image of gain: add gain_0000\.png"),
        (remove("dataset.json"), [], r"there is no dataset\.json .* give it \(-djfile\)"),
        (lambda folder: shutil.rmtree(folder / "images"), [], "images, which does not exist"),
        (
            lambda folder: write(folder / "images" / "gain_0000.png", np.ones((20, 31))),
            [],
            r"image .*gain_0000\.png has shape \(1, 20, 31\), the ground truth .*gain\.png \(1, 20, 30\)",
        ),
        (
            lambda folder: write(folder / "last" / "loss.png", np.ones((19, 30))),
            [],
            r"loss of last: The prediction .*loss\.png has shape \(1, 19, 30\), the ground truth",
        ),
    ],
)
def test_folders_that_do_not_go_together_are_named(pictures, capsys, change, more, reason):
    change(pictures)
    assert main(words(pictures, *more)) == 2
    assert re.search(reason, capsys.readouterr().err)


def test_an_input_folder_is_not_written_to(pictures, capsys):
    assert main([*words(pictures), "-o", str(pictures / "last")]) == 2
    assert "-o and -p are the same folder" in capsys.readouterr().err


@pytest.mark.nnunet
@pytest.mark.parametrize(("plans", "configuration"), [("Tiny", "2d"), ("Tiny3d", "3d_fullres")])
def test_a_named_model_shows_its_reverse_process(workplace, tmp_path, capsys, plans, configuration):
    from nnunet_diffusion.training import DiffusionTrainer

    torch.manual_seed(0)
    trainer = workplace.trainer(DiffusionTrainer, plans, configuration)
    trainer.initialize()
    model = tmp_path / f"DiffusionTrainer__{plans}__{configuration}"
    (model / "fold_0").mkdir(parents=True)
    (model / "plans.json").write_text(json.dumps(trainer.plans_manager.plans))
    shutil.copy(workplace.preprocessed / "dataset.json", model)
    trainer.save_checkpoint(str(model / "fold_0" / "checkpoint_final.pth"))
    case = sorted(path.name.removesuffix(".nii.gz") for path in (workplace.raw / "labelsTr").iterdir())[0]
    given = ["-i", workplace.raw / "imagesTr", "-g", workplace.raw / "labelsTr", "-p", workplace.raw / "labelsTr"]
    given += ["-o", tmp_path / "out", "-np", 0, "--cases", case, "--ending", "png", "-device", "cpu"]
    given = ["figures", *map(str, given), "-m", str(model)]
    assert main([*given, "--start_step", "300", "--steps", "3"]) == 0
    assert "comparison, process, named_cases.csv" in capsys.readouterr().out
    picture = np.round(imread(tmp_path / "out" / "process.png")[..., :3] * 255).astype(int)
    assert (68, 1, 84) in set(map(tuple, picture.reshape(-1, 3))), "the lowest colour of viridis"
    assert main([*given, "--steps", "200"]) == 2
    assert re.search(r"steps.* 200", capsys.readouterr().err)
