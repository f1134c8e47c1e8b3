"""Uncertainty of an ensemble: closed forms, slow implementations, and the files of a prediction."""

import itertools
import json
import math
from dataclasses import dataclass

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from torch import nn

from nnunet_diffusion.evaluation.metrics import dice
from nnunet_diffusion.inference import DiffusionPredictor
from nnunet_diffusion.inference.ensemble import Members
from nnunet_diffusion.inference.finished import why_not_kept
from nnunet_diffusion.inference.report import foreground_names, voxel_mm3
from nnunet_diffusion.inference.uncertainty import (
    MAPS,
    Uncertainty,
    default_sampling,
    interval,
    pairwise_dice,
    shared_voxels,
)
from nnunet_diffusion.model.segmenter import DiffusionSegmenter
from nnunet_diffusion.model.settings import DiffusionSettings

CPU = torch.device("cpu")


def ensemble(members, weights=None, regions=False):
    """Maps of members (M, K, voxels), as `Members` makes them."""
    made = Members(regions, keep_votes=False, keep_samples=False, uncertainty=Uncertainty(regions))
    members = torch.as_tensor(members, dtype=torch.float32)
    for number, member in enumerate(members):
        made.add(member, 1.0 if weights is None else weights[number], f"sample_{number}")
    return made.uncertainty.result(made.mean(), (slice(None),))


def assert_maps(found, **wanted):
    assert tuple(found.maps) == MAPS
    for name, value in wanted.items():
        torch.testing.assert_close(found.maps[name], torch.tensor(value), atol=1e-6, rtol=0, msg=name)


def test_certain_members_that_disagree_are_epistemic():
    found = ensemble([[[1, 1], [0, 0]], [[0, 1], [1, 0]]])
    half = math.log(2)
    assert_maps(
        found,
        entropy=[half, 0.0],
        aleatoric=[0.0, 0.0],
        epistemic=[half, 0.0],
        variance=[0.5, 0.0],
        agreement=[0.5, 1.0],
    )


def test_members_that_all_doubt_alike_are_aleatoric():
    found = ensemble([[[0.7, 0.5], [0.3, 0.5]]] * 3)
    doubt = [-0.7 * math.log(0.7) - 0.3 * math.log(0.3), math.log(2)]
    assert_maps(found, entropy=doubt, aleatoric=doubt, epistemic=[0.0, 0.0], variance=[0.0, 0.0], agreement=[1.0, 1.0])
    assert found.members == 3


def test_weights_count_and_a_member_without_weight_does_not():
    found = ensemble([[[1], [0]], [[0], [1]], [[0.5], [0.5]]], weights=[3.0, 1.0, 0.0])
    binary = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert_maps(
        found, entropy=[binary], aleatoric=[0.0], epistemic=[binary], variance=[2 * 0.75 * 0.25], agreement=[0.75]
    )
    assert found.members == 2


def test_each_region_is_a_bernoulli_variable():
    found = ensemble([[[1.0], [0.8], [0.0]], [[0.0], [0.8], [0.0]]], regions=True)
    doubt = -0.8 * math.log(0.8) - 0.2 * math.log(0.2)
    assert_maps(
        found,
        entropy=[math.log(2) + doubt],
        aleatoric=[doubt],
        epistemic=[math.log(2)],
        variance=[0.25],
        agreement=[(0.5 + 1 + 1) / 3],
    )


@pytest.mark.parametrize("regions", [False, True])
def test_maps_are_what_the_definitions_give(regions):
    """In float64, with all members in memory."""
    generator = torch.Generator().manual_seed(0)
    random = torch.rand(6, 3, 50, generator=generator).double()
    members = (random.argsort(1).argsort(1) + 1 + 0.3 * random) / 5  # without near ties, which rounding decides
    members = members if regions else members / members.sum(1, keepdim=True)
    weights = torch.rand(6, generator=generator).double()
    found = ensemble(members, weights.tolist(), regions)
    share = (weights / weights.sum()).view(-1, 1, 1)
    mean = (share * members).sum(0)

    def entropy(p):
        terms = -p * p.log()
        return (terms - (1 - p) * (1 - p).log() if regions else terms).sum(-2)

    aleatoric = (share[..., 0] * entropy(members)).sum(0)
    variance = (share * (members - mean).square()).sum((0, 1))
    hard = (members > 0.5 if regions else nn.functional.one_hot(members.argmax(1), 3).movedim(-1, 1)).double()
    shares = (share * hard).sum(0)
    agreement = torch.maximum(shares, 1 - shares).mean(0) if regions else shares.amax(0)
    wanted = (entropy(mean), aleatoric, entropy(mean) - aleatoric, variance, agreement)
    for name, value in zip(MAPS, wanted, strict=True):
        torch.testing.assert_close(found.maps[name].double(), value, atol=2e-6, rtol=0, msg=name)


def test_memory_does_not_grow_but_by_label_maps():
    """Of each sample one byte a voxel is kept, and nothing of another member."""
    made = Members(False, keep_votes=False, keep_samples=False, uncertainty=Uncertainty(False))
    sizes = []
    for number in range(4):
        made.add(torch.rand(3, 10).softmax(0), 1.0, f"sample_{number}" if number else "")
        kept = made.uncertainty
        assert all(each.nbytes == 10 for each in kept.samples) and len(kept.samples) == number
        sizes.append(kept.entropies.nbytes + kept.squares.nbytes + kept.votes.nbytes)
    assert set(sizes) == {4 * 10 * (3 + 2)}


@pytest.mark.parametrize("regions", [False, True])
def test_pairwise_dice_is_that_of_all_pairs(regions, monkeypatch):
    monkeypatch.setattr("nnunet_diffusion.inference.uncertainty.VOXELS_AT_ONCE", 7)
    random = np.random.default_rng(0)
    samples = (random.random((4, 3, 5, 6)) < 0.3) if regions else random.integers(0, 2, (4, 5, 6))
    shared = shared_voxels([torch.from_numpy(each.astype(np.uint8)) for each in samples], 3, regions)
    for head in range(3):
        masks = samples[:, head] if regions else samples == head
        pairs = [dice(one, other) if (one | other).any() else 1.0 for one, other in itertools.combinations(masks, 2)]
        assert pairwise_dice(shared[head]) == pytest.approx(np.mean(pairs))
        assert shared[head].diagonal().tolist() == masks.reshape(4, -1).sum(1).tolist()


def test_one_sample_has_no_pair_and_empty_ones_agree():
    assert math.isnan(pairwise_dice([[3]]))
    assert pairwise_dice(np.zeros((3, 3))) == 1
    assert pairwise_dice([[4, 0], [0, 0]]) == 0


def test_interval_is_the_range_below_twenty_samples():
    values = np.arange(19.0)
    assert interval(values) == {"mean": 9.0, "low": 0.0, "high": 18.0, "interval": "range of 19 samples"}
    found = interval(np.arange(21.0))
    assert found == pytest.approx({"mean": 10.0, "low": 1.0, "high": 19.0, "interval": "90 %"})


# through the predictor


@dataclass(eq=False)
class Condition:
    """The image itself."""

    image: torch.Tensor

    def repeat_interleave(self, samples):
        return Condition(self.image.repeat_interleave(samples, 0))


class Denoiser(nn.Module):
    """Answers with the noisy state, pulled towards the image."""

    state_channels = 3

    def encode(self, image, timestep, features=None):
        return Condition(image)

    def forward(self, noisy, timestep, condition):
        return torch.tanh(noisy + condition.image)


SETTINGS = {"start_step": 600, "steps": 2, "presegmentation_weight": 0.0}


@pytest.fixture
def predictor_of(managers_of):
    """Builds predictors of a network without training; `plans` are settings of its plans."""

    def build(plans=None, reader="SimpleITKIO", **arguments):
        torch.manual_seed(0)
        settings = DiffusionSettings(features_per_stage=(8,), starts={"truth": 1.0}, **(plans or SETTINGS))
        network = DiffusionSegmenter(nn.Conv3d(1, 3, 1), Denoiser(), settings)
        plans_manager, configuration, description = managers_of(reader=reader)
        configuration.configuration["patch_size"] = [8, 8, 8]
        predictor = DiffusionPredictor(device=CPU, allow_tqdm=False, use_mirroring=False, threads=1, **arguments)
        predictor.manual_initialization(network, plans_manager, configuration, None, description, "Trainer", None)
        return predictor

    return build


@pytest.fixture
def images(tmp_path):
    """A folder with one image of 1 mm voxels, whose borders are empty: 6 x 10 x 9 of them are not."""
    voxels = np.zeros((8, 14, 13), np.float32)
    voxels[1:7, 2:12, 3:12] = np.random.default_rng(0).normal(0, 1, (6, 10, 9)) + 0.1
    image = sitk.GetImageFromArray(voxels)
    image.SetSpacing((1.0, 1.0, 1.0))
    image.SetOrigin((5.0, 6.0, 7.0))
    image.SetDirection((-1.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0, 0.0, -1.0))
    (tmp_path / "images").mkdir()
    sitk.WriteImage(image, str(tmp_path / "images" / "a_0000.nii.gz"))
    return tmp_path / "images"


def read(path):
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def test_files_agree_with_the_samples_and_the_probabilities(predictor_of, images, tmp_path):
    out = tmp_path / "out"
    predictor = predictor_of(samples=4, uncertainty=True, keep_samples=True)
    predictor.predict_from_files_sequential(str(images), str(out), save_probabilities=True)
    assert {path.name for path in (out / "uncertainty").iterdir()} == {"a.json", *[f"a_{name}.nii.gz" for name in MAPS]}
    maps = {name: read(out / "uncertainty" / f"a_{name}.nii.gz") for name in MAPS}
    image, written = (
        sitk.ReadImage(str(out / "a.nii.gz")),
        sitk.ReadImage(str(out / "uncertainty" / "a_entropy.nii.gz")),
    )
    for key in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
        assert getattr(written, key)() == getattr(image, key)()

    mean = np.load(out / "a.npz")["probabilities"].astype(float)
    inside = read(images / "a_0000.nii.gz") != 0
    entropy = -(mean * np.log(mean.clip(1e-12))).sum(0)
    np.testing.assert_allclose(maps["entropy"][inside], entropy[inside], atol=5e-3)
    assert maps["epistemic"][inside].max() > 0.1 and maps["variance"].min() >= 0
    np.testing.assert_allclose(maps["aleatoric"] + maps["epistemic"], maps["entropy"], atol=1e-5)
    samples = np.stack([read(path) for path in sorted((out / "samples").glob("*/a.nii.gz"))])
    shares = np.stack([(samples == label).mean(0) for label in range(3)])
    np.testing.assert_allclose(maps["agreement"], shares.max(0))
    assert (maps["agreement"][~inside] == 1).all() and not maps["entropy"][~inside].any()

    numbers = json.loads((out / "uncertainty" / "a.json").read_text())
    assert (numbers["samples"], numbers["members"]) == (4, 4)
    assert numbers["settings"]["start_step"] == [600, 1000] and numbers["settings"]["seed"] == 1234
    assert set(numbers["scores"]) == set(numbers["volume_mm3"]) == {"class 1", "class 2"}
    for label in (1, 2):
        found = numbers["volume_mm3"][f"class {label}"]
        volumes = (samples == label).sum((1, 2, 3))
        assert found["interval"] == "range of 4 samples"
        assert [found[key] for key in ("mean", "low", "high")] == [volumes.mean(), volumes.min(), volumes.max()]
        pairs = [dice(one == label, other == label) for one, other in itertools.combinations(samples, 2)]
        assert numbers["scores"][f"class {label}"] == pytest.approx(np.mean(pairs))
    assert numbers["score"] == pytest.approx(np.mean(list(numbers["scores"].values())))


def test_predicting_again_without_uncertainty_leaves_none(predictor_of, images, tmp_path):
    out = tmp_path / "out"
    settings = {"samples": 2, "start_step": 600}
    predictor_of(uncertainty=True, **settings).predict_from_files_sequential(str(images), str(out))
    plain = predictor_of(**settings)
    with pytest.raises(ValueError, match="was predicted with uncertainty True, which is False now"):
        plain.predict_from_files_sequential(str(images), str(out), overwrite=False)
    kept = (out / "a.nii.gz").read_bytes()
    plain.predict_from_files_sequential(str(images), str(out))
    assert not (out / "uncertainty").exists()
    assert (out / "a.nii.gz").read_bytes() == kept  # the maps change nothing


def test_reports_of_earlier_versions_had_no_uncertainty(tmp_path):
    (tmp_path / "reports").mkdir()
    (tmp_path / "reports" / "a.json").write_text("{}")
    assert why_not_kept(str(tmp_path / "a"), ".png", {"uncertainty": False}) == ""
    assert "uncertainty False, which is True now" in why_not_kept(str(tmp_path / "a"), ".png", {"uncertainty": True})


def test_several_samples_are_drawn_unless_the_user_wants_one(predictor_of, capsys):
    plans = {**SETTINGS, "start_step": 100}
    found = predictor_of(plans, uncertainty=True)
    assert (found.network.settings.samples, found.start_steps) == (6, (100, 300, 600))
    assert "several samples: 6 are drawn, from T' 100, 300, 600 in turn" in capsys.readouterr().out
    found = predictor_of(plans, uncertainty=True, samples=2)
    assert (found.network.settings.samples, found.start_steps) == (2, (100, 300))
    assert predictor_of(uncertainty=True, start_step=200).start_steps == ()
    assert "several samples: 5 are drawn." in capsys.readouterr().out
    assert predictor_of({**SETTINGS, "samples": 3}, uncertainty=True).network.settings.samples == 3
    assert "drawn" not in capsys.readouterr().out
    with pytest.raises(ValueError, match="--uncertainty compares samples: give --samples 2 or more"):
        predictor_of(uncertainty=True, samples=1)
    with pytest.raises(ValueError, match="presegmentation_weight is 1, so none counts"):
        predictor_of(uncertainty=True, presegmentation_weight=1.0)


def test_unknown_reader_is_refused_before_anything_is_written(predictor_of, images, tmp_path, monkeypatch):
    monkeypatch.setattr("nnunet_diffusion.inference.maps.WRITERS", {})
    with pytest.raises(NotImplementedError, match="SimpleITKIO"):
        predictor_of(uncertainty=True).predict_from_files_sequential(str(images), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("weight", "members"), [(0.0, 4), (0.5, 5)])
def test_nnunet_is_a_member_but_no_sample_and_padding_does_not_count(predictor_of, weight, members):
    predictor = predictor_of(samples=4, uncertainty=True, keep_samples=True, presegmentation_weight=weight)
    predicted = predictor.predict_volume(torch.randn(1, 5, 9, 6))
    found = predicted.uncertainty
    assert found.members == members
    assert all(values.shape == (5, 9, 6) for values in found.maps.values())
    assert found.shared.shape == (3, 4, 4)
    counted = [[int((logits.argmax(0) == head).sum()) for logits in predicted.samples.values()] for head in range(3)]
    assert [shared.diagonal().tolist() for shared in found.shared] == counted


def test_volume_of_a_voxel_on_the_networks_grid():
    properties = {"spacing": (3.0, 0.5, 2.0), "shape_after_cropping_and_before_resampling": (4, 10, 20)}
    assert voxel_mm3(properties, (8, 5, 20)) == 3.0
    assert voxel_mm3(properties, (4, 10, 40)) == 1.5


@pytest.mark.parametrize(
    ("labels", "order", "names"),
    [
        ({"background": 0, "b": 2, "a": 1, "ignore": 3}, None, ["a", "b"]),
        ({"background": 0, "whole": [1, 2], "core": 2, "ignore": 3}, [1, 2], ["whole", "core"]),
    ],
)
def test_names_are_in_the_order_of_the_heads(labels, order, names):
    assert foreground_names(LabelManager(labels, order)) == names


# several start steps


def samples_of(predictor):
    data = torch.randn(1, 8, 9, 10, generator=torch.Generator().manual_seed(0))
    return predictor.predict_volume(data).samples


@pytest.mark.parametrize("limit", [None, 100e3 / 2**30])
def test_samples_take_the_start_steps_in_turn(predictor_of, limit):
    mixed = samples_of(predictor_of(start_step=[600, 1], samples=4, keep_samples=True, state_memory_gb=limit))
    assert len(mixed) == 4
    for place, start_step in enumerate((600, 1)):
        alone = samples_of(predictor_of(start_step=start_step, samples=4, keep_samples=True))
        for number in range(4):
            name = f"fold_0_sample_{number}"
            assert torch.equal(mixed[name], alone[name]) == (number % 2 == place)


def test_start_steps_are_checked_and_reported(predictor_of, images, tmp_path):
    with pytest.raises(ValueError, match="start_step has 3 values, .*samples is 2: give --samples 3 or more"):
        predictor_of(start_step=[100, 300, 600], samples=2)
    with pytest.raises(ValueError, match="start_step is 0"):
        predictor_of(start_step=[100, 0], samples=2)
    with pytest.raises(ValueError, match="start_step has no value"):
        predictor_of(start_step=[])
    assert predictor_of(start_step=[300]).network.settings.start_step == 300
    predictor_of(start_step=[100, 300], samples=2).predict_from_files_sequential(str(images), str(tmp_path / "out"))
    report = json.loads((tmp_path / "out" / "reports" / "a.json").read_text())
    assert report["start_step"] == [100, 300] and len(report["start_snr"]) == 2
    with pytest.raises(ValueError, match=r"with start_step \[100, 300\], which is 100 now"):
        predictor_of(start_step=100, samples=2).predict_from_files_sequential(
            str(images), str(tmp_path / "out"), overwrite=False
        )


@pytest.mark.parametrize("start_steps", [600, [600, 1], [600, 300, 1]])
@pytest.mark.parametrize("samples", [3, 8])
def test_mirrored_samples_take_start_steps_too_and_the_bar_is_filled(predictor_of, monkeypatch, start_steps, samples):
    bars = []

    class Bar:
        def __init__(self, total, **_):
            self.total, self.done = total, 0
            bars.append(self)

        def update(self, number):
            self.done += number

        def close(self):
            pass

    monkeypatch.setattr("nnunet_diffusion.inference.volume_run.tqdm", Bar)
    predictor = predictor_of(start_step=start_steps, samples=samples, mirror_samples=True, keep_samples=True)
    predictor.use_mirroring, predictor.allowed_mirroring_axes = True, (1, 2)
    assert set(samples_of(predictor)) == {f"fold_0_sample_{number}" for number in range(samples)}
    assert bars[0].done == bars[0].total


def test_default_samples_differ_as_far_as_the_model_was_trained():
    network = {"features_per_stage": (8, 16)}
    assert default_sampling(DiffusionSettings(**network)) == ({"samples": 6, "start_step": 600}, (100, 300, 600))
    near = DiffusionSettings(max_train_step=250, **network)
    assert default_sampling(near) == ({"samples": 4, "start_step": 250}, (100, 250))
    assert default_sampling(DiffusionSettings(samples=4, **network)) == ({}, ())
    noise = DiffusionSettings(from_noise=True, start_step=1000, **network)
    assert default_sampling(noise) == ({"samples": 5}, ())
    hidiff = DiffusionSettings(denoiser="hidiff", prediction_type="flip", timesteps=10, max_train_step=10, start_step=10,
                               starts={"truth": 1.0}, **network)  # fmt: skip
    assert default_sampling(hidiff) == ({"samples": 5, "draw": "level", "steps": 2}, ())
