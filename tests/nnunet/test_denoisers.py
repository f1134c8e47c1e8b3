"""The denoisers that stand on nnU-Net, trained, resumed and used by the commands that users type."""

import json

import pytest
import SimpleITK as sitk
import torch

from nnunet_diffusion.training.checkpoints import read_checkpoint

pytestmark = [pytest.mark.nnunet, pytest.mark.slow]
KINDS = {
    # the trainer decides, on plans for the other denoiser
    "nnunet": ("TinyDiffusionTrainerUNet", {"network": {"denoiser": "pgdiffseg"}, "process": {"schedule": "cosine"}}),
    "hidiff": ("TinyHiDiffTrainer", {"network": {"denoiser": "pgdiffseg"}, "process": {"schedule": "cosine"}}),
    "features": ("TinyDiffusionTrainer", {"network": {"condition": "presegmentor"}, "process": {"signal_scale": 0.1}}),
}


@pytest.fixture(scope="module", params=KINDS)
def trained(request, hippocampus, tmp_path_factory):
    kind = request.param
    trainer, section = KINDS[kind]
    hippocampus.write_plans(f"Tiny_{kind}", "2d", patch=[40, 40], **section)
    results = tmp_path_factory.mktemp(kind)
    words = [4, "2d", 0, "-tr", trainer, "-p", f"Tiny_{kind}", "-device", "cpu"]
    done = hippocampus.run("nnUNetv2_train", *words, nnUNet_results=str(results))
    return hippocampus, results, kind, words, done.stdout


def test_training_validation_and_both_predictions(trained, tmp_path):
    place, results, kind, words, printed = trained
    fold = results / place.dataset / f"{KINDS[kind][0]}__Tiny_{kind}__2d" / "fold_0"
    settings = json.loads((fold.parent / "plans.json").read_text())["configurations"]["2d"]["diffusion"]
    for other in ("nnunet", "hidiff"):
        assert (f"is for the denoiser 'pgdiffseg', but this trainer's is '{other}'" in printed) == (kind == other)
    if kind == "nnunet":
        assert settings["network"]["denoiser"] == "nnunet"
        assert settings["process"]["schedule"] == "linear"
        weights = read_checkpoint(fold / "checkpoint_final.pth")["network_weights"]
        first = "network.encoder.stages.0.0.convs.0.conv.weight"
        ours, theirs = weights[f"denoiser.{first}"], weights[first.replace("network", "presegmentor")]
        assert ours.shape[1] == theirs.shape[1] + 3
        # four steps from nnU-Net's own weights, and from 0 for the state's
        assert 0 < (ours[:, :1] - theirs).abs().max() < 0.01
        assert 0 < ours[:, 1:].abs().max() < 0.01
    if kind == "hidiff":
        assert settings["network"]["denoiser"] == "hidiff" and settings["process"]["timesteps"] == 10
        # both networks have learned: the segmentor's weights are near nnU-Net's, not the same
        nnunet = read_checkpoint(
            results / place.dataset / "TinynnUNetTrainer__Tiny_hidiff__2d" / "fold_0" / "checkpoint_final.pth"
        )["network_weights"]
        ours = read_checkpoint(fold / "checkpoint_final.pth")["network_weights"]
        moved = [(ours[f"presegmentor.{key}"] - value).abs().max() for key, value in nnunet.items() if value.ndim > 1]
        assert all(0 <= each < 0.02 for each in moved) and sum(each > 0 for each in moved) >= len(moved) - 1
    comparison = json.loads((fold / "validation" / "comparison.json").read_text())
    assert comparison["sentence"] in printed
    words = ["-i", place.raw / "imagesTs", "-d", 4, *words[1:2], "-f", 0, *words[3:]]
    words.insert(words.index("2d"), "-c")
    for command, output in (("nnUNetv2_predict", "stock"), ("nnunet_diffusion", "ours")):
        start = ["predict"] if command == "nnunet_diffusion" else []
        place.run(command, *start, *words, "-o", tmp_path / output, "-npp", 1, "-nps", 1, nnUNet_results=str(results))
        place.assert_geometry_and_labels(
            {path.name: sitk.ReadImage(str(path)) for path in (tmp_path / output).glob("*.nii.gz")}
        )


def test_a_resumed_training_goes_on_from_its_own_weights(trained, tmp_path):
    """And not from nnU-Net's again: marked weights of an unfinished training are still marked after its last epoch."""
    place, results, kind, words, _ = trained
    fold = results / place.dataset / f"{KINDS[kind][0]}__Tiny_{kind}__2d" / "fold_0"
    checkpoint = read_checkpoint(fold / "checkpoint_final.pth")
    raw = checkpoint["diffusion"]["denoiser_weights"]
    marked = next(key for key in raw if key.endswith("conv.weight") or key.endswith("0.weight"))
    raw[marked] += 0.5
    checkpoint["current_epoch"] = 1
    torch.save(checkpoint, fold / "checkpoint_latest.pth")
    (fold / "checkpoint_final.pth").unlink()
    done = place.run("nnUNetv2_train", *words, "--c", nnUNet_results=str(results))
    assert "Epoch 1" in done.stdout and "Epoch 0" not in done.stdout
    after = read_checkpoint(fold / "checkpoint_final.pth")["diffusion"]["denoiser_weights"]
    assert (after[marked] - raw[marked]).abs().max() < 0.1


def test_starts_out_of_fold_train_two_nnunets_on_halves_of_the_cases(hippocampus, tmp_path):
    starts = {"truth": 0.2, "corrupted": 0.2, "out_of_fold": 0.3, "recycled": 0.3}
    hippocampus.write_plans("Tiny_starts", "2d", patch=[40, 40], training={"starts": starts})
    words = [4, "2d", 0, "-tr", "TinyDiffusionTrainerUNet", "-p", "Tiny_starts", "-device", "cpu"]
    printed = hippocampus.run("nnUNetv2_train", *words, nnUNet_results=str(tmp_path)).stdout
    results = tmp_path / hippocampus.dataset
    split = json.loads((hippocampus.preprocessed / "splits_final.json").read_text())[0]
    seen = []
    for half in (0, 1):
        fold = results / f"TinynnUNetTrainer_half{half}__Tiny_starts__2d" / "fold_0"
        assert (fold / "checkpoint_final.pth").is_file() and not (fold / "validation").exists()
        seen.append(json.loads((fold / "cases.json").read_text())["training"])
    assert sorted(seen[0] + seen[1]) == sorted(split["train"]) and not set(seen[0]) & set(seen[1])
    assert "Corrupted truths imitate the pre-segmentor's mistakes, measured on validation patches: Dice" in printed
    assert "Before the denoiser two further nnU-Nets are trained if they are missing" in printed
    model = results / "TinyDiffusionTrainerUNet__Tiny_starts__2d"
    saved = read_checkpoint(model / "fold_0" / "checkpoint_final.pth")["diffusion"]["mistakes"]
    assert len(saved["dice"]) == len(saved["softness"]) > 0
    # a second training finds both, and refuses them where the split has changed
    again = hippocampus.run("nnUNetv2_train", *words, nnUNet_results=str(tmp_path)).stdout
    assert again.count("is trained already") == 3
    record = results / "TinynnUNetTrainer_half1__Tiny_starts__2d" / "fold_0" / "cases.json"
    record.write_text(json.dumps({"training": seen[0]}))
    refused = hippocampus.run("nnUNetv2_train", *words, nnUNet_results=str(tmp_path), check=False)
    assert refused.returncode != 0
    assert (
        "is an nnU-Net trained on other cases than this fold's (cases.json there): the split has changed since"
        in refused.stderr + refused.stdout
    )
