"""The main job as a user types it: nnUNetv2_train -tr DiffusionTrainer..., then stock nnUNetv2_predict, on real cases."""

import json

import numpy as np
import pytest
import SimpleITK as sitk
import torch

pytestmark = [pytest.mark.nnunet, pytest.mark.slow]


def predict(place, out, *arguments, configuration="2d", plans="Tiny", trainer="TinyDiffusionTrainer"):
    place.run(
        "nnUNetv2_predict", "-i", place.raw / "imagesTs", "-o", out, "-d", 4, "-c", configuration, "-p", plans,
        "-tr", trainer, "-f", 0, "-device", "cpu", "-npp", 1, "-nps", 1, *arguments,
    )  # fmt: skip
    return {path.name: sitk.ReadImage(str(path)) for path in sorted(out.glob("*.nii.gz"))}


def test_one_command_trains_both_networks_completely(trained_2d):
    place, log = trained_2d
    assert "not trained yet, training it first" in log
    first = place.results / "TinynnUNetTrainer__Tiny__2d" / "fold_0"
    ours = place.results / "TinyDiffusionTrainer__Tiny__2d"
    validation = json.loads((place.preprocessed / "splits_final.json").read_text())[0]["val"]
    for folder in (first, ours / "fold_0"):
        assert (folder / "checkpoint_final.pth").is_file()
        assert (folder / "checkpoint_best.pth").is_file()
        assert (folder / "progress.png").is_file()
        assert json.loads((folder / "validation" / "summary.json").read_text())["foreground_mean"]["Dice"] >= 0
        assert not (folder / "checkpoint_latest.pth").exists()
    assert sorted(path.stem for path in (first / "validation").glob("*.npz")) == sorted(validation)
    assert (ours / "fold_0" / "progress_diffusion.png").is_file()
    section = json.loads((ours / "plans.json").read_text())["configurations"]["2d"]["diffusion"]
    assert section["presegmentor"]["trainer"] == "TinynnUNetTrainer"


def dice_of_class(segmentation, truth, label):
    ours, theirs = segmentation == label, truth == label
    return 2 * (ours & theirs).sum() / (ours.sum() + theirs.sum())


def test_log_says_what_happens_and_which_network_is_better(trained_2d):
    place, log = trained_2d
    said = [
        "1. pre-segmentor, an ordinary nnU-Net (TinynnUNetTrainer): to be trained and validated first",
        "2. denoiser, which corrects what the first one segments (TinyDiffusionTrainer): 2 epochs",
        "Now training the pre-segmentor: 2 epochs.",
        "An epoch of the pre-segmentor took",
        "Now training the denoiser: 2 epochs.",
        "An epoch of the denoiser took",
        "Verdict: neither PD-DDPM nor nnU-Net is shown to be better. On 2 validation cases",
        "Mean Dice by presegmentation_weight",
    ]
    assert sorted(said, key=log.index) == said
    assert "WARNING: The comparison" not in log

    validation = place.results / "TinyDiffusionTrainer__Tiny__2d" / "fold_0" / "validation"
    content = json.loads((validation / "comparison.json").read_text())
    assert content["sentence"] in log
    assert content["presegmentation_weights"]["sentence"] in log
    folders = {"nnunet": place.results / "TinynnUNetTrainer__Tiny__2d" / "fold_0" / "validation", "pddpm": validation}
    cases = json.loads((place.preprocessed / "splits_final.json").read_text())[0]["val"]
    assert sorted(content["cases"]) == sorted(cases)
    for name, folder in folders.items():
        expected = []
        for case in cases:
            found, truth = (
                sitk.GetArrayFromImage(sitk.ReadImage(str(place_of / f"{case}.nii.gz")))
                for place_of in (folder, place.raw / "labelsTr")
            )
            expected.append(np.mean([dice_of_class(found, truth, label) for label in (1, 2)]))
            assert content["cases"][case][name] == pytest.approx(expected[-1], abs=1e-6)
        assert content[f"{name}_mean"] == pytest.approx(np.mean(expected), abs=1e-6)
    assert content["mean_difference"] == pytest.approx(content["pddpm_mean"] - content["nnunet_mean"])
    assert [row["weight"] for row in content["presegmentation_weights"]["table"]] == [0, 0.25, 0.5, 0.75, 1]


def test_checkpoint_holds_the_presegmentor_unchanged_and_every_loss_term_as_a_curve(trained_2d):
    place, _ = trained_2d
    first, ours = (
        torch.load(place.results / f"{name}__Tiny__2d" / "fold_0" / "checkpoint_final.pth", weights_only=False)
        for name in ("TinynnUNetTrainer", "TinyDiffusionTrainer")
    )
    for key, value in first["network_weights"].items():
        assert torch.equal(ours["network_weights"][f"presegmentor.{key}"], value)
    for term in ("denoising_loss", "presence_loss", "location_loss"):
        assert len(ours["logging"][term]) == 2
        assert np.isfinite(ours["logging"][term]).all()
    raw, averaged = ours["diffusion"]["denoiser_weights"], ours["network_weights"]
    assert any(not torch.equal(averaged[f"denoiser.{key}"], value) for key, value in raw.items())
    assert int(ours["diffusion"]["averaged_steps"]) == 4


def test_stock_predict_gives_the_images_geometry_and_the_same_twice(trained_2d, tmp_path):
    place, _ = trained_2d
    found = predict(place, tmp_path / "one", "--save_probabilities")
    place.assert_geometry_and_labels(found)
    again = predict(place, tmp_path / "two", "-npp", 0, "-nps", 0)
    for name, segmentation in found.items():
        assert np.array_equal(*map(sitk.GetArrayFromImage, (segmentation, again[name])))
        probabilities = np.load(tmp_path / "one" / name.replace(".nii.gz", ".npz"))["probabilities"]
        assert np.allclose(probabilities.sum(0), 1, atol=1e-3)
        assert np.array_equal(probabilities.argmax(0), sitk.GetArrayFromImage(segmentation))


def test_validation_equals_stock_predict_so_both_use_the_averaged_weights(trained_2d, tmp_path):
    place, _ = trained_2d
    validation = place.results / "TinyDiffusionTrainer__Tiny__2d" / "fold_0" / "validation"
    case = sorted(validation.glob("*.nii.gz"))[0]
    (tmp_path / "in").mkdir()
    image = case.name.replace(".nii.gz", "_0000.nii.gz")
    (tmp_path / "in" / image).symlink_to(place.raw / "imagesTr" / image)
    place.run(
        "nnUNetv2_predict", "-i", tmp_path / "in", "-o", tmp_path / "out", "-d", 4, "-c", "2d", "-p", "Tiny",
        "-tr", "TinyDiffusionTrainer", "-f", 0, "-device", "cpu",
    )  # fmt: skip
    ours, theirs = (sitk.GetArrayFromImage(sitk.ReadImage(str(path))) for path in (tmp_path / "out" / case.name, case))
    assert np.array_equal(ours, theirs)


def test_another_fold_with_other_settings_is_refused_by_key_and_value(trained_2d):
    place, _ = trained_2d
    before = (place.preprocessed / "Tiny.json").read_text()
    try:
        place.write_plans("Tiny", "2d", patch=[32, 32], max_train_step=877)
        done = place.run(
            "nnUNetv2_train", 4, "2d", 2, "-tr", "TinyDiffusionTrainer", "-p", "Tiny", "-device", "cpu", check=False
        )
    finally:
        (place.preprocessed / "Tiny.json").write_text(before)
    assert done.returncode != 0
    assert "max_train_step" in done.stderr
    assert "877" in done.stderr
    assert "plans_name" in done.stderr
