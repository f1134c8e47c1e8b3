"""`nnunet_diffusion evaluate` on small folders of label maps, as a user would run it."""

import csv
import json
import re

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.evaluation.evaluate_predictions import compute_metrics
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO

from nnunet_diffusion.cli.main import main
from nnunet_diffusion.evaluation.uncertainty import band

LABELS = {"background": 0, "left": 1, "right": 2}
SHAPE = (8, 12, 10)
SPACING = (0.5, 1.0, 3.0)


def write(path, array, spacing=SPACING, origin=(1, 2, 3)):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array.astype(np.uint8))
    image.SetSpacing(spacing)
    image.SetOrigin(origin)
    sitk.WriteImage(image, str(path))


def blocks(shift=0):
    labels = np.zeros(SHAPE, int)
    labels[2:6, 2 + shift : 6 + shift, 2:5] = 1
    labels[2:6, 2:6, 6:9] = 2
    return labels


def probabilities_of(labels, certainty=0.9, heads=3):
    soft = np.full((heads, *labels.shape), (1 - certainty) / (heads - 1), np.float32)
    np.put_along_axis(soft, labels[None], certainty, 0)
    return soft


@pytest.fixture
def folders(tmp_path):
    """Three cases: a perfect one, one shifted by a voxel, one in which class 2 is missed."""
    missed = blocks()
    missed[missed == 2] = 0
    predictions = {"a": blocks(), "b": blocks(1), "c": missed}
    for name, labels in predictions.items():
        write(tmp_path / "truth" / f"{name}.nii.gz", blocks())
        write(tmp_path / "pred" / f"{name}.nii.gz", labels)
        np.savez_compressed(tmp_path / "pred" / f"{name}.npz", probabilities=probabilities_of(labels))
    (tmp_path / "pred" / "dataset.json").write_text(json.dumps({"labels": LABELS, "file_ending": ".nii.gz"}))
    return tmp_path


def evaluate(folders, *words, code=0, predictions=("pred",), truths=("truth",)):
    arguments = [word for name in predictions for word in ("-p", str(folders / name))]
    arguments += [word for name in truths for word in ("-g", str(folders / name))]
    assert main(["evaluate", *arguments, "-np", "0", *map(str, words)]) == code
    out = words[words.index("-o") + 1] if "-o" in words else folders / predictions[0] / "evaluation"
    return json.loads((out / "evaluation.json").read_text()) if code < 2 else None


def refused(folders, capsys, message, *words, **settings):
    evaluate(folders, *words, code=2, **settings)
    assert re.search(message, capsys.readouterr().err)


def test_numbers_by_hand(folders):
    found = evaluate(folders)["predictions"]["pred"]
    left, right = found["classes"]["left"], found["classes"]["right"]
    # of the shifted block three of four rows overlap
    assert left["dice"]["mean"] == pytest.approx((1 + 0.75 + 1) / 3)
    assert right["dice"]["mean"] == pytest.approx(2 / 3)
    assert (left["missed"], right["missed"], right["cases"]) == (0, 1, 3)
    # b has both classes, c one of two
    assert found["dice"]["mean"] == pytest.approx((1 + (0.75 + 1) / 2 + 1 / 2) / 3)
    # the miss is not in it; spacing along the shifted axis is 1 mm
    assert left["hd95_mm"] == pytest.approx(1 / 3)
    assert right["hd95_mm"] == 0


def test_dice_is_nnunets_own(folders):
    evaluate(folders)
    with (folders / "pred" / "evaluation" / "cases.csv").open() as file:
        rows = {(row["case"], row["class"]): row for row in csv.DictReader(file)}
    assert len(rows) == 6
    for case in "abc":
        paths = [str(folders / kind / f"{case}.nii.gz") for kind in ("truth", "pred")]
        expected = compute_metrics(*paths, SimpleITKIO(), [1, 2])["metrics"]
        for label, name in ((1, "left"), (2, "right")):
            row = rows[case, name]
            assert float(row["dice"]) == pytest.approx(expected[label]["Dice"])
            assert float(row["iou"]) == pytest.approx(expected[label]["IoU"])
            assert float(row["true_mm3"]) == pytest.approx(expected[label]["n_ref"] * 1.5)


def test_calibration_errors_and_failures_are_found(folders):
    found = evaluate(folders)["predictions"]["pred"]
    band = found["calibration"]["band"]
    # the perfect case is right everywhere and says 0.9
    assert band["ece"]["cases"] == 3
    voxels = wrong = 0
    for name in "abc":
        numbers = json.loads((folders / "pred" / "evaluation" / "cases" / f"{name}.json").read_text())
        voxels += numbers["calibration"]["band"]["voxels"]
    # b has two rows of 12 voxels wrong, c misses a block of 48; all say 0.9
    wrong = 2 * 12 + 48
    assert found["calibration"]["pooled_ece"] == pytest.approx(abs(0.9 - (voxels - wrong) / voxels), rel=1e-5)
    # one confidence everywhere finds nothing
    assert found["errors"]["entropy of the probabilities"]["mean"] == pytest.approx(0.5)
    assert found["failure_detection"]["confidence"]["cases"] == 3
    assert numbers["scores"]["confidence"] == pytest.approx(0.9)


def test_uncertain_voxels_where_the_prediction_is_wrong_are_found(folders):
    path = folders / "pred" / "b.npz"
    soft = probabilities_of(blocks(1))
    wrong = blocks() != blocks(1)
    soft[:, wrong] = 1 / 3
    np.savez_compressed(path, probabilities=soft)
    numbers = folders / "pred" / "evaluation" / "cases" / "b.json"
    evaluate(folders)
    assert json.loads(numbers.read_text())["errors"]["entropy of the probabilities"] == 1


def test_finished_cases_are_kept_until_a_file_changes(folders, monkeypatch):
    from nnunet_diffusion.evaluation import evaluate as module

    measured = []
    original = module.measure_case
    monkeypatch.setattr(module, "measure_case", lambda *words: measured.append(1) or original(*words))
    first = evaluate(folders)
    assert len(measured) == 3
    assert evaluate(folders) == first
    assert len(measured) == 3
    write(folders / "pred" / "b.nii.gz", blocks())
    assert evaluate(folders)["predictions"]["pred"]["dice"]["mean"] > first["predictions"]["pred"]["dice"]["mean"]
    assert len(measured) == 4
    evaluate(folders, "--tolerance", 5)
    assert len(measured) == 7


def test_a_broken_case_is_named_at_the_end_and_the_others_are_measured(folders, capsys):
    (folders / "pred" / "b.nii.gz").write_bytes(b"nothing")
    found = evaluate(folders, code=1)
    assert found["predictions"]["pred"]["cases"] == 2
    error = capsys.readouterr().err
    assert "pred: b failed: The prediction" in error
    assert "cannot be read" in error
    assert "b.nii.gz" in (folders / "pred" / "evaluation" / "report.html").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"spacing": (0.5, 1.0, 3.1)}, "has spacing"),
        ({"origin": (1, 2, 9)}, "has origin"),
        ({"array": np.zeros((8, 12, 11))}, r"has shape \(8, 12, 11\), the ground truth"),
        ({"array": blocks() * 3}, "has label 3, which is not in dataset.json"),
    ],
)
def test_files_that_do_not_fit_are_named(folders, capsys, change, message):
    write(folders / "pred" / "a.nii.gz", **{"array": blocks(), **change})
    evaluate(folders, code=1)
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("soft", "message"),
    [
        (probabilities_of(blocks()) * 0.5, "sum over the classes"),
        (probabilities_of(blocks())[:2], "has 2 channels, but must have 3"),
        (probabilities_of(blocks())[..., 1:], "has shape"),
        (probabilities_of(blocks()) * np.nan, "not probabilities"),
    ],
)
def test_wrong_probabilities_are_named(folders, capsys, soft, message):
    np.savez_compressed(folders / "pred" / "a.npz", probabilities=soft)
    evaluate(folders, code=1)
    assert re.search(f"a.npz.*{message}", capsys.readouterr().err)


def test_cases_without_a_partner(folders, capsys):
    write(folders / "pred" / "d.nii.gz", blocks())
    evaluate(folders)
    assert "1 cases have no ground truth and are left out: d" in capsys.readouterr().err
    (folders / "pred" / "c.nii.gz").unlink()
    refused(folders, capsys, "pred lacks c.nii.gz.*--chill")
    assert evaluate(folders, "--chill")["predictions"]["pred"]["cases"] == 2


def test_normal_cases_are_counted_apart(folders):
    write(folders / "truth" / "c.nii.gz", np.where(blocks() == 2, 0, blocks()))
    write(folders / "truth" / "b.nii.gz", np.where(blocks() == 2, 0, blocks()))
    right = evaluate(folders)["predictions"]["pred"]["classes"]["right"]
    assert (right["cases"], right["normal_cases"], right["false_alarms"], right["missed"]) == (1, 2, 1, 0)
    assert right["dice"]["mean"] == 1


def test_one_empty_case_alone(folders):
    for name in "bc":
        (folders / "truth" / f"{name}.nii.gz").unlink()
    for kind in ("truth", "pred"):
        write(folders / kind / "a.nii.gz", np.zeros(SHAPE))
    found = evaluate(folders)["predictions"]["pred"]
    assert found["dice"]["mean"] == 1
    assert found["classes"]["left"]["normal_cases"] == 1


def test_two_predictions_are_compared(folders):
    for name in "abc":
        write(folders / "better" / f"{name}.nii.gz", blocks())
    found = evaluate(folders, "-o", folders / "out", predictions=("better", "pred"))
    assert list(found["predictions"]) == ["better", "pred"]
    dice = found["comparison"]["dice"]
    assert dice["mean_difference"] == pytest.approx((0 + 0.125 + 0.5) / 3)
    assert (dice["better"], dice["worse"]) == (2, 0)
    # the miss counts as the largest difference, but not in the mean
    assert found["comparison"]["hd95_mm of right"]["baseline_infinite"] == 1
    assert "better against pred" in (folders / "out" / "report.html").read_text()


def test_several_raters(folders):
    for name in "abc":
        write(folders / "second" / f"{name}.nii.gz", blocks(2))
    found = evaluate(folders, truths=("truth", "second"))["predictions"]["pred"]["raters"]
    left = found["left"]
    assert [each["mean"] for each in left["dice"]] == pytest.approx([(1 + 0.75 + 1) / 3, (0.5 + 0.75 + 0.5) / 3])
    assert left["interrater_dice"]["mean"] == pytest.approx(0.5)
    assert found["right"]["interrater_dice"]["mean"] == 1
    # where the raters agree, the perfect and the shifted block are right
    assert left["consensus_dice"]["mean"] == 1


def test_a_rater_who_lacks_a_case_is_named(folders, capsys):
    write(folders / "second" / "a.nii.gz", blocks())
    refused(folders, capsys, "second lacks b.nii.gz", truths=("truth", "second"))


def test_labels_instead_of_a_dataset_json(folders, capsys):
    (folders / "pred" / "dataset.json").unlink()
    refused(folders, capsys, "no dataset.json.*-l 1 2 3")
    found = evaluate(folders, "-l", 1)["predictions"]["pred"]
    assert list(found["classes"]) == ["1"]
    assert found["dice"]["mean"] == pytest.approx((1 + 0.75 + 1) / 3)


def test_regions_and_an_ignore_label(folders):
    labels = {"background": 0, "whole": [1, 2], "right": [2], "ignore": 3}
    (folders / "pred" / "dataset.json").write_text(
        json.dumps({"labels": labels, "regions_class_order": [1, 2], "file_ending": ".nii.gz"})
    )
    for name in "abc":
        truth = blocks()
        truth[:, :, 6:] = 3
        write(folders / "truth" / f"{name}.nii.gz", truth)
        (folders / "pred" / f"{name}.npz").unlink()
    masks = [np.isin(blocks(1), (1, 2)), blocks(1) == 2]
    soft = np.where(masks, 0.8, 0.1)
    np.savez_compressed(folders / "pred" / "b.npz", probabilities=soft)
    found = evaluate(folders)["predictions"]["pred"]
    assert found["classes"]["whole"]["dice"]["mean"] == pytest.approx((1 + 0.75 + 1) / 3)
    # it is where the truth is unknown
    assert found["classes"]["right"]["cases"] == 0
    assert found["calibration"]["band"]["ece"]["cases"] == 1


def test_natural_images(tmp_path):
    for name in "ab":
        flat = blocks()[3]
        for kind in ("truth", "pred"):
            (tmp_path / kind).mkdir(exist_ok=True)
            sitk.WriteImage(sitk.GetImageFromArray(flat.astype(np.uint8)), str(tmp_path / kind / f"{name}.png"))
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": LABELS, "file_ending": ".png"}))
    assert evaluate(tmp_path)["predictions"]["pred"]["dice"]["mean"] == 1


def test_wrong_arguments_are_named(folders, capsys):
    refused(folders, capsys, "which does not exist", predictions=("nowhere",))
    refused(folders, capsys, "is given twice", truths=("truth", "truth"))
    refused(folders, capsys, "-np is -1", "-np", -1)
    refused(folders, capsys, "--tolerance is -1", "--tolerance", -1)
    refused(folders, capsys, "-djfile is nothing.json", "-djfile", "nothing.json")
    refused(folders, capsys, "two predictions are compared at most", predictions=("pred", "truth", "pred"))
    (folders / "other").mkdir()
    words = ("-djfile", folders / "pred" / "dataset.json")
    refused(folders, capsys, "no file of the same name", *words, predictions=("other",))


def test_several_processes_give_the_same(folders):
    assert main(["evaluate", "-p", str(folders / "pred"), "-g", str(folders / "truth"), "-np", "2"]) == 0
    found = json.loads((folders / "pred" / "evaluation" / "evaluation.json").read_text())
    for path in (folders / "pred" / "evaluation" / "cases").iterdir():
        path.unlink()
    assert evaluate(folders) == found


def test_a_false_alarm_of_one_prediction_is_a_difference(folders):
    empty = np.zeros(SHAPE)
    for name in "abc":
        write(folders / "truth" / f"{name}.nii.gz", empty)
        write(folders / "silent" / f"{name}.nii.gz", empty)
    found = evaluate(folders, "-o", folders / "out", predictions=("silent", "pred"))
    assert found["predictions"]["silent"]["dice"]["mean"] == 1
    assert found["comparison"]["dice"]["mean_difference"] == 1
    assert found["comparison"]["dice of left"]["better"] == 3
    # of c only the class that it has
    assert found["comparison"]["dice of right"]["better"] == 2


def test_signs_of_better_and_worse(folders):
    for name in "abc":
        write(folders / "better" / f"{name}.nii.gz", blocks())
        np.savez_compressed(folders / "better" / f"{name}.npz", probabilities=probabilities_of(blocks(), 0.99))
    found = evaluate(folders, "-o", folders / "out", predictions=("better", "pred"))["comparison"]
    for metric in ("hd95_mm of left", "nll in the band", "nsd"):
        assert found[metric]["better"] > 0, metric
        assert found[metric]["worse"] == 0, metric


def test_intervals_of_volumes_are_compared_with_the_truth(folders):
    # 48 voxels of 1.5 mm^3
    true = 4 * 4 * 3 * 1.5
    for name, low, high in (("a", true - 1, true), ("b", true + 1, true + 9), ("c", 0, 99)):
        numbers = {
            "score": 0.5,
            "volume_mm3": {"left": {"mean": true, "low": low, "high": high, "interval": "90 %"}},
        }
        (folders / "pred" / "uncertainty").mkdir(exist_ok=True)
        (folders / "pred" / "uncertainty" / f"{name}.json").write_text(json.dumps(numbers))
    found = evaluate(folders)["predictions"]["pred"]
    assert found["volumes"]["left"]["coverage"] == pytest.approx(2 / 3)
    assert found["volumes"]["left"]["mean_width_mm3"] == pytest.approx((1 + 8 + 99) / 3)
    assert found["volumes"]["left"]["interval"] == "90 %"
    assert found["failure_detection"]["pairwise Dice"]["normalised"] == pytest.approx(0)


def test_samples_against_raters(folders):
    """Two samples that are the two raters: their distributions are equal."""
    for name in "abc":
        write(folders / "second" / f"{name}.nii.gz", blocks(2))
        for number, labels in enumerate((blocks(), blocks(2))):
            write(folders / "pred" / "samples" / f"fold_0_sample_{number}" / f"{name}.nii.gz", labels)
    found = evaluate(folders, truths=("truth", "second"))["predictions"]["pred"]["raters"]["left"]
    assert found["ged"]["mean"] == pytest.approx(0)
    assert found["hungarian_iou"]["mean"] == pytest.approx(1)
    # the sum of probabilities of the class: 0.9 inside, 0.05 elsewhere
    volume = (48 * 0.9 + (8 * 12 * 10 - 48) * 0.05) * 1.5
    assert found["crps_mm3"]["mean"] == pytest.approx(abs(volume - 72), rel=1e-3)


def test_the_ignored_region_has_no_border(folders):
    labels = {"background": 0, "left": 1, "right": 2, "ignore": 3}
    (folders / "pred" / "dataset.json").write_text(json.dumps({"labels": labels, "file_ending": ".nii.gz"}))
    truth = blocks()
    truth[:, 10:] = 3
    write(folders / "truth" / "a.nii.gz", truth)
    evaluate(folders)
    numbers = json.loads((folders / "pred" / "evaluation" / "cases" / "a.json").read_text())
    assert numbers["calibration"]["band"]["voxels"] == np.count_nonzero(band(blocks(), blocks())[:, :10])


def test_a_hidden_file_a_broken_truth_and_a_broken_image_stop_nothing(folders, capsys):
    for folder in ("truth", "pred"):
        (folders / folder / "._a.nii.gz").write_bytes(b"macOS")
    (folders / "truth" / "a.nii.gz").write_bytes(b"nothing")
    (folders / "images").mkdir()
    (folders / "images" / "b_0000.nii.gz").write_bytes(b"nothing")
    found = evaluate(folders, "--images", folders / "images", code=1)
    assert found["predictions"]["pred"]["cases"] == 2
    assert "the picture of b has no image" in capsys.readouterr().out


def test_two_predictions_need_a_folder_for_the_result(folders, capsys):
    (folders / "other").mkdir()
    refused(folders, capsys, "name its folder with -o", predictions=("pred", "other"))


def test_intervals_of_level_sets_are_fitted_to_the_other_half(tmp_path):
    """Probabilities that fall by one in log-odds with each ring around a square; truths that are 0 to 2 rings larger."""
    axis = np.abs(np.arange(16) - 7.5)
    log_odds = 4.2 - np.maximum(axis[:, None], axis)[None]
    soft = (1 / (1 + np.exp(-log_odds)))[None]
    rings = [0, 1] * 9
    rings[4] = 2  # one of the first half needs more than nine of ten others
    for number, ring in enumerate(rings):
        name = f"case_{number:02}"
        write(tmp_path / "pred" / f"{name}.nii.gz", log_odds > 0)
        write(tmp_path / "truth" / f"{name}.nii.gz", log_odds > -ring)
        np.savez_compressed(tmp_path / "pred" / f"{name}.npz", probabilities=np.concatenate((1 - soft, soft)))
    description = {"labels": {"background": 0, "lesion": 1}, "file_ending": ".nii.gz"}
    (tmp_path / "pred" / "dataset.json").write_text(json.dumps(description))
    found = evaluate(tmp_path)["predictions"]["pred"]["volumes_of_level_sets"]["lesion"]

    def volume(above):
        return 1.5 * np.count_nonzero(log_odds > above)

    # the first half, every second case, has the interval that the second half needs, one ring at log-odds -0.3
    narrow, wide = volume(-0.375) - volume(0.375), volume(-1.375) - volume(1.375)
    assert found["coverage"] == pytest.approx(17 / 18)
    assert found["mean_width_mm3"] == pytest.approx((9 * narrow + 9 * wide) / 18)
    assert "fitted to the other half" in (tmp_path / "pred" / "evaluation" / "report.html").read_text()
    # with fewer cases there is none
    for path in sorted((tmp_path / "truth").iterdir())[:1]:
        path.unlink()
    assert "volumes_of_level_sets" not in evaluate(tmp_path)["predictions"]["pred"]


def test_a_truncated_npz_is_named_and_the_other_cases_are_measured(folders, capsys):
    (folders / "pred" / "b.npz").write_bytes(b"PK")
    assert main(["evaluate", "-p", str(folders / "pred"), "-g", str(folders / "truth")]) == 1
    assert re.search(r"b failed: .*b\.npz is not an \.npz", capsys.readouterr().err)
    found = json.loads((folders / "pred" / "evaluation" / "evaluation.json").read_text())
    assert found["predictions"]["pred"]["cases"] == 2


def test_the_summary_says_what_a_reader_must_know(folders, capsys):
    (folders / "pred" / "b.npz").unlink()
    for name in "abc":
        write(folders / "other" / f"{name}.nii.gz", blocks())
    notes = " ".join(evaluate(folders, truths=("truth", "other"))["notes"])
    assert f"{folders / 'truth'}, {folders / 'other'}" in notes
    assert "tolerance of 1 mm" in notes
    assert "pred: 1 of 3 cases have no .npz" in notes
    assert "3 cases are too few" in notes
    printed = capsys.readouterr().out
    assert "| ECE | AUROC of the entropy | normalised AURC |" in printed
    for name in "ac":
        (folders / "pred" / f"{name}.npz").unlink()
    evaluate(folders)
    assert "ECE" not in capsys.readouterr().out
