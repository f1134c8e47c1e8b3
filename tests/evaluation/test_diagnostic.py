"""The diagnostic tells a denoiser that copies its state from one that ignores it, and sees which parts matter."""

import json
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from nnunet_diffusion.evaluation.diagnostic import ablations, diagnose, fitted
from nnunet_diffusion.evaluation.preprocessed import mean_dice
from nnunet_diffusion.networks.hidiff import HiDiffRefiner

pytestmark = pytest.mark.nnunet
STEPS = (50, 700)


@dataclass(frozen=True)
class Image:
    image: Tensor

    def repeat_interleave(self, samples):
        return Image(self.image.repeat_interleave(samples, 0))


class Copying(nn.Module):
    """Returns the clean state that its noisy one comes closest to."""

    state_channels = 3

    def __init__(self, process):
        super().__init__()
        self.process = process

    def encode(self, image, timestep, features=None):
        return Image(image)

    def forward(self, noisy, timestep, condition):
        signal, _ = self.process.signal_and_spread(timestep, noisy)
        # a mean over a few voxels removes most of the noise
        return nn.functional.avg_pool2d(noisy / signal, 3, 1, 1, count_include_pad=False).clamp(-1, 1)


class Reading(Copying):
    """Reads the image and ignores the state: class 1 where it is bright."""

    def forward(self, noisy, timestep, condition):
        bright = (condition.image > 0).float()
        return torch.cat((1 - bright, bright, torch.zeros_like(bright)), 1) * 2 - 1


def test_a_denoiser_that_copies_its_state_keeps_every_start(loaded):
    found = diagnose(*loaded(Copying), STEPS)
    assert found.dice["truth"][50] > 0.9 and found.dice["empty"][50] == 0
    assert found.dice["mask of another image"][50] < 0.9
    assert found.dice["nnU-Net"][50] == pytest.approx(found.nnunet, abs=0.1)
    assert found.dice["truth"][50] > found.dice["truth"][700], "more noise hides more"
    assert found.ablations["image of another case"].change == pytest.approx(0, abs=1e-6)


def test_a_denoiser_that_ignores_its_state_returns_the_same_from_every_start(loaded):
    found = diagnose(*loaded(Reading), STEPS)
    assert len({dice for steps in found.dice.values() for dice in steps.values()}) == 1
    assert found.ablations["image of another case"].change > 0.1


def test_parts_of_pgdiffseg_are_switched_off_one_by_one_and_on_again(loaded):
    predictor, cases, load = loaded(None)
    for parameter in predictor.network.denoiser.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    predictor.list_of_parameters = [predictor.network.state_dict()]
    found = diagnose(predictor, cases, load, STEPS)
    for part in ("prior branch", "parameter-shared attention", "bottleneck", "image of another case"):
        assert found.ablations[part].largest > 1e-4, part
    again = diagnose(predictor, cases, load, STEPS)
    assert again == found
    tables = found.tables()
    assert "T' = 50 (SNR " in tables and "| bottleneck |" in tables


def test_parts_of_hidiffs_refiner_are_switched_off_one_by_one_and_on_again():
    torch.manual_seed(0)
    refiner = HiDiffRefiner(1, 2, [8, 8, 16], [1, 2, 2], [3, 3, 3], "torch.nn.Conv2d", guide_channels=[4, 6, 8])
    for parameter in refiner.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    guide = tuple(torch.randn(1, width, size, size) for width, size in ((4, 16), (6, 8), (8, 4)))
    condition = refiner.encode(torch.randn(1, 3, 16, 16), features=guide)

    def found():
        return refiner(torch.ones(1, 2, 16, 16), torch.tensor([9]), condition)

    intact, parts = found(), ablations(refiner)
    assert set(parts) == {"attention to the segmentor", "bottleneck"}
    for off in parts.values():
        with off():
            assert (found() - intact).abs().max() > 1e-3
        assert torch.equal(found(), intact)


def test_too_few_cases_and_steps_beyond_the_training_are_refused(loaded):
    predictor, cases, load = loaded(None)
    with pytest.raises(ValueError, match="got 1 cases"):
        diagnose(predictor, cases[:1], load)
    with pytest.raises(ValueError, match="max_train_step, 1000"):
        diagnose(predictor, cases, load, [2000])


def test_arrays_are_cropped_and_padded_around_their_centre():
    array = np.arange(1, 7).reshape(1, 1, 6)
    assert np.array_equal(fitted(array, (3, 4)), [[[0] * 4, [2, 3, 4, 5], [0] * 4]])
    assert np.array_equal(fitted(array, (1, 8)), [[[0, 1, 2, 3, 4, 5, 6, 0]]])


@pytest.mark.slow
def test_the_command_writes_its_tables_beside_the_model(trained_2d):
    place, _ = trained_2d
    words = ["diagnose", "-d", 4, "-tr", "TinyDiffusionTrainer", "-p", "Tiny", "-device", "cpu", "--start_steps", 100]
    printed = place.run("nnunet_diffusion", *words).stdout
    path = place.results / "TinyDiffusionTrainer__Tiny__2d" / "fold_0" / "diagnostic.json"
    content = json.loads(path.read_text())
    split = json.loads((place.preprocessed / "splits_final.json").read_text())[0]["val"]
    assert content["cases"] == sorted(split)
    assert content["model"]["trainer"] == "TinyDiffusionTrainer" and content["model"]["folds"] == ["0"]
    assert f"| truth | {content['dice']['truth']['100']:.4f} |" in printed and str(path) in printed
    refused = place.run("nnunet_diffusion", *words, "-f", 7, check=False)
    assert refused.returncode == 2 and "Folds that have one: 0" in refused.stderr
    refused = place.run("nnunet_diffusion", *words, "--cases", 1, check=False)
    assert refused.returncode == 2 and "--cases is 1" in refused.stderr


def test_neither_network_is_mirrored(loaded):
    predictor, cases, load = loaded(Reading)
    found = diagnose(predictor, cases, load, [50])
    assert predictor.use_mirroring, "the predictor is left as it was"
    dice = {}
    for mirrored in (False, True):
        predictor.use_mirroring = mirrored
        with predictor.network.overridden(presegmentation_weight=1.0):
            runs = [predictor.predict_volume(torch.from_numpy(load(name).image)) for name in cases]
        segmentations = [np.asarray(predictor.label_manager.convert_logits_to_segmentation(run.logits)) for run in runs]
        dice[mirrored] = np.mean(
            [
                mean_dice(segmentation, load(name).truth, predictor.label_manager)
                for segmentation, name in zip(segmentations, cases, strict=True)
            ]
        )
    assert found.nnunet == pytest.approx(dice[False])
    assert dice[False] != pytest.approx(dice[True], abs=1e-6), "or this could not fail"
