"""Explanations of whole cases by small networks: masks, maps, rows, ablations and numbers."""

import dataclasses
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from nnunet_diffusion.explain import explanation
from nnunet_diffusion.explain.explanation import (
    CHANGED,
    FROM_NOISE,
    OTHER_IMAGE,
    NothingToExplain,
    Question,
    ablations,
    check_memory,
    explain,
    fitted,
    numbers,
    reverse,
    share_inside,
    shares_of,
)
from nnunet_diffusion.explain.units import NO_ATTENTION, NO_PRIOR, ablated
from nnunet_diffusion.inference import DiffusionPredictor
from nnunet_diffusion.inference.cases import PreparedCase
from nnunet_diffusion.model.segmenter import DiffusionSegmenter
from nnunet_diffusion.model.settings import DiffusionSettings
from nnunet_diffusion.networks.pgdiffseg import PGDiffSeg

CPU = torch.device("cpu")
LESION = Question(1, "lesion")


class Threshold(nn.Module):
    """Segments what is brighter than 0.5."""

    def forward(self, image):
        return torch.cat((torch.zeros_like(image), 20 * (image - 0.5)), 1)


def predictor_of(conv=nn.Conv2d, patch=(16, 16), steps=2, **changes):
    torch.manual_seed(1)
    settings = DiffusionSettings(
        features_per_stage=(8, 8, 16), start_step=300, steps=steps, samples=1, starts={"truth": 1.0},
        presegmentation_weight=0.0, **changes,
    )  # fmt: skip
    denoiser = PGDiffSeg(
        1, 2, 2, (8, 8, 16), (1, 2, 2), (3, 3, 3), conv, presence_classes=1, location_classes=1, sdb_depth=1,
        attention_tokens=64,
    )  # fmt: skip
    for part in denoiser.attention.values():
        nn.init.ones_(part.eta["denoising"])
    predictor = DiffusionPredictor(device=CPU, allow_tqdm=False, use_mirroring=False, threads=1)
    predictor.network = DiffusionSegmenter(Threshold(), denoiser, settings)
    predictor.configuration_manager = SimpleNamespace(patch_size=list(patch), batch_size=2)
    predictor.label_manager = SimpleNamespace(num_segmentation_heads=2)
    predictor.list_of_parameters, predictor.folds = [predictor.network.state_dict()], ["0"]
    predictor.allowed_mirroring_axes = None
    return predictor


def case_of(shape=(1, 1, 24, 20)):
    image = np.random.default_rng(0).random(shape).astype(np.float32) * 0.4
    image[..., 6:14, 5:12] = 0.9
    return PreparedCase(image, {}, None)


@pytest.mark.parametrize(
    ("conv", "patch", "shape"),
    [
        (nn.Conv2d, (16, 16), (1, 1, 24, 20)),
        (nn.Conv2d, (32, 32), (1, 3, 20, 20)),
        (nn.Conv3d, (8, 16, 16), (1, 9, 20, 18)),
    ],
)
def test_everything_is_on_the_grid_of_the_case(conv, patch, shape):
    question = Question(1, "lesion", voxel=(shape[1] - 1, 7, 11))
    run = reverse(predictor_of(conv, patch), case_of(shape))
    found = explain(run, question, ablations(run))
    volume = shape[1:]
    assert list(found.timesteps) == [299, 149]
    assert found.presegmentation.shape == found.result.shape == volume
    assert all(maps.shape == (2, *volume) and maps.max() <= 1 and maps.min() >= 0 for maps in found.heat.values())
    assert found.prior.location.shape == volume and 0 < found.prior.presence < 1
    assert found.prior.presence_heat.shape == volume and found.prior.presence_heat.max() <= 1
    assert set(found.rows) == {(flow, stage) for flow in ("condition flow", "denoising flow") for stage in (1, 2)}
    for row in found.rows.values():
        assert row.shape == volume and row.sum() == pytest.approx(1, abs=1e-4)
    assert set(found.ablations) == {OTHER_IMAGE, NO_PRIOR, NO_ATTENTION, FROM_NOISE}
    assert not np.array_equal(found.ablations[NO_ATTENTION], found.result)


def test_presegmentation_is_nnunets_and_maps_are_repeatable():
    case = case_of()
    first, second = (explain(reverse(predictor_of(), case), LESION) for _ in range(2))
    assert np.array_equal(first.presegmentation, case.data[0] > 0.5)
    assert all(np.array_equal(maps, second.heat[key]) for key, maps in first.heat.items())


def test_only_the_stages_that_are_asked_for():
    found = explain(reverse(predictor_of(), case_of()), Question(1, "lesion", voxel=(0, 7, 7), stages=(2,)))
    assert {stage for flow, stage, _ in found.heat if flow != "prior branch"} == {2}
    assert {stage for _, stage in found.rows} == {2} and ("prior branch", 1, False) in found.heat


def test_what_changed_is_explained_by_its_sign():
    case = case_of()
    found = explain(reverse(predictor_of(), case), Question(1, "lesion", CHANGED))
    assert not np.array_equal(found.result, found.presegmentation)
    other = explain(reverse(predictor_of(), case), LESION)
    assert any(not np.allclose(maps, other.heat[key], atol=0.05) for key, maps in found.heat.items())


def test_nothing_of_a_class_is_said(monkeypatch):
    monkeypatch.setattr(explanation.Reverse, "mask", lambda run, found, head: torch.zeros_like(found[head]).bool())
    with pytest.raises(NothingToExplain, match="the result has no voxel of lesion: explain another --class"):
        explain(reverse(predictor_of(), case_of()), LESION)
    with pytest.raises(
        NothingToExplain, match="the same voxels of lesion as nnU-Net's segmentation: explain --target class"
    ):
        explain(reverse(predictor_of(), case_of()), Question(1, "lesion", CHANGED))


def test_a_volume_larger_than_memory_is_refused_before_the_work(monkeypatch):
    monkeypatch.setattr(explanation, "free_bytes", lambda device: 1000.0)
    with pytest.raises(MemoryError, match="the maps of 15 units at 2 steps need .* are free: give fewer --steps"):
        check_memory(predictor_of(), case_of())
    with pytest.raises(MemoryError, match="the maps of 8 units at 2 steps"):
        check_memory(predictor_of(), case_of(), stages=(2,))


def test_map_of_the_presence_head_is_grad_cam_of_its_logit():
    """Captum's, of the last features: the weights of a linear head on pooled features need no gradient."""
    attr = pytest.importorskip("captum.attr")
    predictor, case = predictor_of(patch=(16, 16)), case_of((1, 1, 16, 16))
    run = reverse(predictor, case)
    found = explain(run, LESION).prior.presence_heat
    branch = predictor.network.denoiser.prior

    class Presence(nn.Module):
        def __init__(self):
            super().__init__()
            self.branch = branch

        def forward(self, image):
            return self.branch(image).presence_logits

    expected = attr.LayerGradCam(Presence(), branch.units[-1]).attribute(
        torch.from_numpy(case.data)[:, 0:1, :][0][None], target=0, relu_attributions=True
    )
    expected = torch.nn.functional.interpolate(expected, (16, 16), mode="bilinear")[0, 0].detach().numpy()
    assert expected.max() > 0
    assert np.allclose(found[0], expected / expected.max(), atol=1e-4)


def test_each_ablation_is_by_itself():
    """With one step and one tile a process would use the conditions of the last run again."""
    run = reverse(predictor_of(steps=1), case_of((1, 1, 16, 16)))
    found = ablations(run)
    for name in (NO_PRIOR, NO_ATTENTION):
        with ablated(run.process.segmenter.denoiser, name):
            assert torch.equal(found[name], dataclasses.replace(run.process).run([0])[0])
    assert not torch.equal(found[NO_PRIOR], found[NO_ATTENTION])


def test_numbers_refer_to_the_truth_if_there_is_one():
    run = reverse(predictor_of(), case_of())
    found = explain(run, LESION, ablations(run))
    truth = np.zeros((1, 24, 20), bool)
    truth[0, :12] = True
    of_truth = numbers(found, LESION, shares_of(found, LESION, truth), truth)
    of_result = numbers(found, LESION, shares_of(found, LESION))
    assert (of_truth["reference"], of_truth["share_of_reference"]) == ("truth", 0.5)
    assert of_result["reference"] == "result" and of_result["result"]["dice_with_result"] == 1
    assert "dice_with_truth" not in of_result["nnunet"] and "dice_with_truth" in of_truth["nnunet"]
    shares = of_truth["share_of_heat_in_reference"]["denoising flow"]
    assert set(shares) == {f"stage {stage}{after}" for stage in (1, 2) for after in ("", " after attention")}
    heat = found.heat["denoising flow", 1, False]
    assert shares["stage 1"][1] == pytest.approx(heat[1][truth].sum() / heat[1].sum(), rel=1e-4)
    assert set(of_truth["ablations"]) == {OTHER_IMAGE, NO_PRIOR, NO_ATTENTION, FROM_NOISE}
    looked = of_truth["prior_branch"]["share_of_presence_heat_in_reference"]
    assert looked == pytest.approx(share_inside(found.prior.presence_heat, truth))


def test_what_changed_is_its_own_reference():
    """The share of the heat inside a lesion would say nothing of the voxels in which it was changed."""
    question = Question(1, "lesion", CHANGED)
    found = explain(reverse(predictor_of(), case_of()), question)
    changed = found.result != found.presegmentation
    shares = shares_of(found, question, np.ones_like(changed))
    assert (shares.reference, shares.expected) == ("changed voxels", changed.mean())
    key = ("decoder", 2, False)
    assert shares.heat[key][0] == share_inside(found.heat[key][0], changed)


def test_shares_of_known_maps():
    mask = np.array([[True, False], [False, False]])
    assert share_inside(np.array([[1.0, 1.0], [1.0, 1.0]]), mask) == 0.25
    assert share_inside(np.array([[3.0, 0.0], [0.0, 1.0]]), mask) == 0.75
    assert np.isnan(share_inside(np.zeros((2, 2)), mask))


def test_another_image_is_brought_to_the_size_about_its_centre():
    image = torch.arange(1.0, 10.0).reshape(1, 1, 9)
    assert fitted(image, (1, 1, 5)).tolist() == [[[3, 4, 5, 6, 7]]]
    assert fitted(image[..., :3], (1, 1, 5)).tolist() == [[[0, 1, 2, 3, 0]]]
