"""From images to a report, as the page on uncertainty says: calibrate, predict, evaluate, on the tiny trained model."""

import json
import shutil

import numpy as np
import pytest

from nnunet_diffusion.cli.main import main
from nnunet_diffusion.inference.uncertainty import MAPS
from nnunet_diffusion.model.settings import DiffusionSettings

pytestmark = [pytest.mark.nnunet, pytest.mark.slow]
MODEL = "TinyDiffusionTrainer__Tiny__2d"


@pytest.fixture
def model(place, tmp_path):
    """A copy of the model, because calibration writes its plans."""
    return shutil.copytree(place.results / MODEL, tmp_path / MODEL)


def predict(place, model, out, *arguments, code=0):
    words = [
        "-i",
        place.raw / "imagesTs",
        "-o",
        out,
        "-m",
        model,
        "-f",
        "0",
        "-device",
        "cpu",
        "--sequential",
        *arguments,
    ]
    assert main(["predict", *map(str, words)]) == code
    return sorted(path.name.removesuffix(".nii.gz") for path in out.glob("*.nii.gz"))


def probabilities(out, case):
    return np.load(out / f"{case}.npz")["probabilities"].astype(np.float64)


def test_calibrated_probabilities_are_the_others_at_the_temperature(place, model, tmp_path, capsys):
    predict(place, model, tmp_path / "refused", "--calibrated", code=2)
    assert "run nnunet_diffusion calibrate first" in capsys.readouterr().err
    before = DiffusionSettings.from_plans(json.loads((model / "plans.json").read_text())["configurations"]["2d"])
    assert main(["calibrate", "-m", str(model), "-f", "0", "-device", "cpu", "--cases", "2"]) == 0
    plans = json.loads((model / "plans.json").read_text())
    inference = plans["configurations"]["2d"]["diffusion"]["inference"]
    # nothing else changes: uncertainty samples in another way than plain prediction
    for key in ("samples", "start_step", "steps", "draw"):
        assert inference[key] == getattr(before, key)
    temperature = inference["temperature"]
    printed = capsys.readouterr().out
    assert f"{temperature:.3f}" in printed
    assert "Intervals of the volumes need 9 cases" in printed and inference["volume_half_widths"] == []
    classes = [name for name in json.loads((model / "dataset.json").read_text())["labels"] if name != "background"]
    inference["volume_half_widths"] = [100.0] * len(classes)  # as fitted to cases that no level holds
    (model / "plans.json").write_text(json.dumps(plans))
    for name, words in (("before", ["--uncertainty"]), ("after", ["--uncertainty", "--calibrated"])):
        cases = predict(place, model, tmp_path / name, "--save_probabilities", *words)
    assert "was calibrated with" not in capsys.readouterr().out
    for case in cases:
        before, after = probabilities(tmp_path / "before", case), probabilities(tmp_path / "after", case)
        wanted = np.maximum(before, 1e-6) ** (1 / temperature)
        # both are stored in half precision, and resampled as logits
        assert np.abs(wanted / wanted.sum(0) - after).max() < 0.01
        assert json.loads((tmp_path / "after" / "reports" / f"{case}.json").read_text())["temperature"] == temperature
        volumes = [
            json.loads((tmp_path / name / "uncertainty" / f"{case}.json").read_text())["volume_mm3"]
            for name in ("before", "after")
        ]
        for name in classes:
            assert volumes[0][name]["interval"] == "range of 6 samples"
            assert volumes[1][name]["interval"] == "90 %, fitted to validation cases"
            assert volumes[1][name]["low"] == 0 <= volumes[0][name]["high"] < volumes[1][name]["high"]
    predict(place, model, tmp_path / "others", "--uncertainty", "--calibrated", "--samples", 3)
    assert "but now has samples 3 instead of 6" in capsys.readouterr().out
    inference["volume_half_widths"] = [1.0] * (len(classes) + 1)
    (model / "plans.json").write_text(json.dumps(plans))
    predict(place, model, tmp_path / "refused", "--calibrated", code=2)
    assert "run nnunet_diffusion calibrate again" in capsys.readouterr().err


def test_figures_and_report_of_several_samples(place, model, tmp_path):
    out = tmp_path / "out"
    settings = ("--samples", 3, "--start_step", 100, 300, 600, "--steps", 2, "--draw", "level")
    cases = predict(place, model, out, "--figures", "--save_probabilities", *settings)
    files = {path.name for path in (out / "uncertainty").iterdir()}
    assert files == {"contact_sheet.png"} | {
        f"{case}{end}" for case in cases for end in (".json", ".png", *(f"_{name}.nii.gz" for name in MAPS))
    }
    numbers = json.loads((out / "uncertainty" / f"{cases[0]}.json").read_text())
    assert (numbers["samples"], numbers["settings"]["start_step"]) == (3, [100, 300, 600])
    # without labels of the test images, those of the prediction itself
    truth = tmp_path / "truth"
    truth.mkdir()
    for case in cases:
        shutil.copy(out / f"{case}.nii.gz", truth)
    assert (
        main(["evaluate", "-p", str(out), "-g", str(truth), "-np", "0", "--images", str(place.raw / "imagesTs")]) == 0
    )
    found = json.loads((out / "evaluation" / "evaluation.json").read_text())["predictions"]["out"]
    assert set(found["errors"]) == {*MAPS, "entropy of the probabilities"}
    assert set(found["failure_detection"]) == {"confidence", "pairwise Dice"}
    assert set(found["volumes"]) == set(found["classes"])
    assert found["dice"]["mean"] in (None, 1)
    # two predictions against two raters, who are the first two samples
    predict(place, model, tmp_path / "plain")
    samples = sorted((out / "samples").iterdir())[:2]
    words = ["-p", out, "-p", tmp_path / "plain", "-g", samples[0], "-g", samples[1], "-o", tmp_path / "both", "-np", 0]
    assert main(["evaluate", *map(str, words), "-djfile", str(out / "dataset.json")]) == 0
    both = json.loads((tmp_path / "both" / "evaluation.json").read_text())
    assert both["comparison"]["dice"]["cases"] == len(cases)
    for name in found["classes"]:
        raters = both["predictions"]["out"]["raters"][name]
        assert raters["hungarian_iou"]["mean"] > both["predictions"]["plain"]["raters"][name]["hungarian_iou"]["mean"]


def test_a_vote_needs_three_segmentations(place, model, tmp_path, capsys):
    predict(place, model, tmp_path / "refused", "--fusion", "dice", code=2)
    assert "--fusion dice needs 3 segmentations" in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()
    # two samples and nnU-Net
    assert predict(place, model, tmp_path / "voted", "--fusion", "dice", "--samples", 2)


def test_draws_change_the_samples(place, model, tmp_path):
    one, other = (
        predict(place, model, tmp_path / kind, "--save_probabilities", "--start_step", 600, "--steps", 3, "--draw", kind,
                "--presegmentation_weight", 0)
        for kind in ("no", "voxels")
    )  # fmt: skip
    assert one == other
    assert any(
        np.abs(probabilities(tmp_path / "no", case) - probabilities(tmp_path / "voxels", case)).max() > 1e-3
        for case in one
    )
