"""Five folds submitted together, then everything nnU-Net offers on a cross-validation: choice, ensemble, postprocessing."""

import json
import os
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_diffusion.training.checkpoints import read_checkpoint

pytestmark = [pytest.mark.nnunet, pytest.mark.slow]
FIRST, OURS = "TinynnUNetTrainerNoMirroring", "TinyDiffusionTrainerNoMirroring"
FOLDS = (0, 1, 2, 3, 4)


def submit(place, results, fold, trainer, log):
    """Start nnUNetv2_train in the background, its output in a file."""
    words = [4, "2d", fold, "-tr", trainer, "-p", "Tiny", "-device", "cpu", "--npz"]
    with log.open("w") as output:
        return place.start("nnUNetv2_train", *words, stdout=output, nnUNet_results=str(results))


def wait_until(happened, log):
    end = time.monotonic() + 120
    while not happened():
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.1)


@pytest.fixture(scope="module")
def trained(hippocampus, tmp_path_factory, request):
    """nnU-Net's own job of fold 0, then the five folds of ours at once; returns the results folder and the logs."""
    results = tmp_path_factory.mktemp("folds")
    model = results / hippocampus.dataset / f"{FIRST}__Tiny__2d"
    jobs = [submit(hippocampus, results, 0, FIRST, results / "first.txt")]
    request.addfinalizer(lambda: [os.killpg(job.pid, signal.SIGKILL) for job in jobs if job.poll() is None])
    wait_until(lambda: list(model.glob("fold_0/training_log_*.txt")), results / "first.txt")
    # it would be over before ours looks
    jobs[0].send_signal(signal.SIGSTOP)
    jobs += [submit(hippocampus, results, 0, OURS, results / "0.txt")]
    wait_until(lambda: "nnU-Net is being trained by itself" in (results / "0.txt").read_text(), results / "0.txt")
    jobs[0].send_signal(signal.SIGCONT)
    jobs += [submit(hippocampus, results, fold, OURS, results / f"{fold}.txt") for fold in FOLDS[1:]]
    codes = [job.wait() for job in jobs]
    logs = [path.read_text() for path in (results / "first.txt", *(results / f"{fold}.txt" for fold in FOLDS))]
    assert codes == [0] * 6, "\n".join(log[-3000:] for log, code in zip(logs, codes, strict=True) if code)
    return hippocampus, results, logs[1:]


def test_each_network_is_trained_once_whoever_trains_it(trained):
    place, results, logs = trained
    assert "training it first" not in logs[0]
    for fold in FOLDS:
        assert fold == 0 or "training it first" in logs[fold]
        folders = [results / place.dataset / f"{name}__Tiny__2d" / f"fold_{fold}" for name in (FIRST, OURS)]
        for folder in folders:
            told = "".join(path.read_text() for path in folder.glob("training_log_*.txt"))
            assert len(re.findall(r"Epoch 0\b", told)) == len(re.findall(r"Epoch 1\b", told)) == 1, folder
            assert (folder / "validation" / "summary.json").is_file()
        first, ours = (read_checkpoint(folder / "checkpoint_final.pth")["network_weights"] for folder in folders)
        assert all((ours[f"presegmentor.{key}"] == value).all() for key, value in first.items())


def segmentations(folder):
    return {path.name: sitk.GetArrayFromImage(sitk.ReadImage(str(path))) for path in sorted(folder.glob("*.nii.gz"))}


def test_best_configuration_ensemble_and_postprocessing(trained, tmp_path):
    place, results, _ = trained
    variables = {"nnUNet_results": str(results)}
    words = ["Dataset004_Hippocampus", "-p", "Tiny", "-c", "2d", "-tr", FIRST, OURS, "-np", 1]
    output = place.run("nnUNetv2_find_best_configuration", *words, **variables).stdout
    information = json.loads((results / place.dataset / "inference_information.json").read_text())
    assert len(information["all_results"]) == 3
    assert any(name.startswith("ensemble___") for name in information["all_results"])
    assert all(np.isfinite(dice) for dice in information["all_results"].values())
    instructions = (results / place.dataset / "inference_instructions.txt").read_text()
    assert instructions.strip() in output
    # the ensemble's own commands, whichever model won here
    members = []
    for trainer in (FIRST, OURS):
        members.append(tmp_path / trainer)
        place.run(
            "nnUNetv2_predict", "-i", place.raw / "imagesTs", "-o", members[-1], "-d", 4, "-c", "2d", "-p", "Tiny",
            "-tr", trainer, "-f", *FOLDS, "-device", "cpu", "--save_probabilities", "-npp", 0, "-nps", 0, **variables,
        )  # fmt: skip
        found = {path.name: sitk.ReadImage(str(path)) for path in members[-1].glob("*.nii.gz")}
        place.assert_geometry_and_labels(found)
    place.run("nnUNetv2_ensemble", "-i", *members, "-o", tmp_path / "ensemble", "-np", 1, **variables)
    postprocessing = Path(information["best_model_or_ensemble"]["postprocessing_file"])
    place.run(
        "nnUNetv2_apply_postprocessing", "-i", tmp_path / "ensemble", "-o", tmp_path / "final", "-np", 1,
        "-pp_pkl_file", postprocessing, "-plans_json", postprocessing.with_name("plans.json"), **variables,
    )  # fmt: skip
    images = {path.name.replace("_0000", "") for path in (place.raw / "imagesTs").iterdir()}
    for folder in (*members, tmp_path / "ensemble", tmp_path / "final"):
        found = segmentations(folder)
        assert set(found) == images
        assert all(set(np.unique(labels)) <= {0, 1, 2} for labels in found.values())
    for name, found in segmentations(tmp_path / "ensemble").items():
        both = [np.load(folder / name.replace(".nii.gz", ".npz"))["probabilities"] for folder in members]
        assert np.array_equal(np.mean(both, 0).argmax(0), found)


def test_accumulated_results_have_every_case_once(trained):
    place, results, _ = trained
    words = ["Dataset004_Hippocampus", "-tr", OURS, "-p", "Tiny", "-c", "2d"]
    place.run("nnUNetv2_accumulate_crossval_results", *words, nnUNet_results=str(results))
    folder = results / place.dataset / f"{OURS}__Tiny__2d" / "crossval_results_folds_0_1_2_3_4"
    summary = json.loads((folder / "summary.json").read_text())
    cases = sorted(Path(case["prediction_file"]).name for case in summary["metric_per_case"])
    assert cases == sorted(path.name for path in (place.raw / "labelsTr").iterdir())


def test_tuning_on_all_folds_reaches_prediction_and_later_trainings(trained, tmp_path):
    place, results, _ = trained
    model = results / place.dataset / f"{OURS}__Tiny__2d"
    before = (model / "plans.json").read_text()
    words = ["-d", 4, "-c", "2d", "-p", "Tiny", "-tr", OURS, "-device", "cpu"]
    few = ["--start_steps", 50, "--steps", 1, "--cases", 1]
    tune = lambda *more: place.run("nnunet_diffusion", "tune", *words, *few, *more, nnUNet_results=str(results))  # noqa: E731
    done = tune("--dry_run")
    assert (model / "plans.json").read_text() == before
    tuned = json.loads((model / "tuning.json").read_text())
    assert tuned["folds"] == [str(fold) for fold in FOLDS] and len(tuned["cases"]) == len(set(tuned["cases"])) == 5
    assert {(row["steps"], row["start_step"]) for row in tuned["found"]} == {(0, 0), (1, 50), (1, 100)}
    assert "(chosen)" in done.stdout and "(--dry_run)" in done.stdout
    calibrated = json.loads(before)
    calibrated["configurations"]["2d"]["diffusion"]["inference"]["temperature"] = 1.5
    (model / "plans.json").write_text(json.dumps(calibrated))
    tune()
    inference = json.loads((model / "plans.json").read_text())["configurations"]["2d"]["diffusion"]["inference"]
    for key in ("presegmentation_weight", "presence_threshold"):
        assert inference[key] == tuned["chosen"][key]
    assert inference["temperature"] == 0  # it was that of other settings
    # an untuned value beside it, which prediction and a training of another fold must both read
    plans = json.loads((model / "plans.json").read_text())
    plans["configurations"]["2d"]["diffusion"]["inference"] |= {"start_step": 70, "presegmentation_weight": 0.25}
    (model / "plans.json").write_text(json.dumps(plans))
    place.run("nnunet_diffusion", "predict", "-i", place.raw / "imagesTs", "-o", tmp_path, *words, "-f", 0, "--sequential",
              nnUNet_results=str(results))  # fmt: skip
    report = json.loads(next((tmp_path / "reports").glob("*.json")).read_text())
    assert (report["start_step"], report["presegmentation_weight"]) == (70, 0.25)
    again = place.run(
        "nnUNetv2_train", 4, "2d", 0, "-tr", OURS, "-p", "Tiny", "-device", "cpu", nnUNet_results=str(results)
    )
    assert "share their inference settings" in again.stdout and "start_step 70 (not 100)" in again.stdout
    kept = json.loads((model / "plans.json").read_text())["configurations"]["2d"]["diffusion"]["inference"]
    assert (kept["start_step"], kept["presegmentation_weight"]) == (70, 0.25)
