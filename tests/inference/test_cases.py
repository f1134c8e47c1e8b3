"""Processes that die, networks that fail: one clear message, and no error taken for another."""

import os
from concurrent.futures import Executor, Future

import nibabel
import numpy as np
import pytest
import torch
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from torch import nn

from nnunet_diffusion.inference.cases import CaseFiles, FailedCases, _prepared_ahead, run_cases
from nnunet_diffusion.inference.output import PredictedCase
from nnunet_diffusion.inference.reading import expected_bytes
from nnunet_diffusion.inference.volume import Evaluations
from nnunet_diffusion.inference.volume_predictor import VolumePredictor
from nnunet_diffusion.segmenter import DiffusionSegmenter
from nnunet_diffusion.settings import DiffusionSettings


class Deadly(list):
    """Files that kill the process that receives them, as the system does when memory is short."""

    def __reduce__(self):
        return os._exit, (1,)


def image(folder, name, shape=(6, 7, 8), spacing=(1, 1, 1)):
    path = folder / f"{name}_0000.nii.gz"
    voxels = np.random.default_rng(0).random(shape).astype(np.float32)
    nibabel.save(nibabel.Nifti1Image(voxels, np.diag([*spacing, 1])), path)
    return [str(path)]


def first_class(case, prepared):
    """A network that finds the first class everywhere."""
    logits = np.zeros((3, *prepared.data.shape[1:]), np.float32)
    logits[1] = 1
    return PredictedCase(case.name, case.target, logits, None, prepared.properties)


@pytest.mark.slow
@pytest.mark.nnunet
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_worker_costs_its_case_only(tmp_path, managers_of, processes):
    """Beside a case whose spacing, 1000 mm, asks for more memory than any machine has."""
    images = {name: image(tmp_path, name) for name in "abd"} | {"c": image(tmp_path, "c", spacing=(1000,) * 3)}
    images["b"] = Deadly(images["b"])
    cases = [CaseFiles(name, images[name], str(tmp_path / "out" / name)) for name in "abcd"]
    ended = []
    with pytest.raises(FailedCases, match="2 of 4 cases failed") as failed:
        run_cases(cases, first_class, managers_of(), False, processes, 0, lambda name, _: ended.append(name))
    assert sorted(ended) == list("abcd")
    assert set(failed.value.failures) == {"b", "c"}
    assert "was killed, mostly for lack of memory" in failed.value.failures["b"]
    assert "8000 x 7000 x 6000 voxels" in failed.value.failures["c"]
    for name in "ad":
        assert (SimpleITKIO().read_seg(str(tmp_path / "out" / f"{name}.nii.gz"))[0] == 1).all()


class Recorder(Executor):
    """Takes work and never does it."""

    def __init__(self):
        self.begun = []

    def submit(self, fn, case, *arguments):
        self.begun.append(case.name)
        return Future()


@pytest.mark.nnunet
@pytest.mark.parametrize(
    ("room", "begun"),
    [
        (100, [4, 5, 6, 6, 6, 6]),
        (3.5, [3, 3, 4, 5, 6, 6]),  # one of the three is the one that the network has
        (2.5, [2, 2, 3, 4, 5, 6]),
        (0.5, [1, 2, 3, 4, 5, 6]),
    ],
)
def test_only_as_many_cases_are_prepared_ahead_as_fit_into_memory_together(tmp_path, managers_of, room, begun):
    managers, readers = managers_of(), Recorder()
    cases = [CaseFiles(name, image(tmp_path, name)) for name in "abcdef"]
    one = expected_bytes(cases[0].images, managers)
    assert one > 6 * 7 * 8 * 4
    assert [len(readers.begun) for _ in _prepared_ahead(readers, 3, cases, managers, room * one)] == begun
    assert readers.begun == list("abcdef")


class Failing(nn.Module):
    """A presegmentor that fails as a wrong shape would."""

    def __init__(self, error):
        super().__init__()
        self.error, self.calls = error, 0

    def forward(self, image):
        self.calls += 1
        raise self.error


def predictor_with(error):
    network = DiffusionSegmenter(Failing(error), nn.Identity(), DiffusionSettings(features_per_stage=(8, 8)))
    predictor = VolumePredictor(device=torch.device("cpu"), use_mirroring=False, use_gaussian=False, allow_tqdm=False)
    predictor.network, predictor.perform_everything_on_device = network, True
    predictor.label_manager = type("Labels", (), {"num_segmentation_heads": 2})
    tiles = type("Tiles", (), {"tiles": [(slice(None), slice(0, 4), slice(0, 4))]})
    return predictor, lambda: predictor._presegment(torch.zeros(1, 4, 4), tiles, Evaluations(), [])


def test_only_lack_of_memory_is_tried_again_on_the_cpu():
    predictor, presegment = predictor_with(RuntimeError("shapes do not fit"))
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        presegment()
    assert predictor.network.presegmentor.calls == 1
    predictor, presegment = predictor_with(torch.cuda.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(torch.cuda.OutOfMemoryError):
        presegment()
    assert predictor.network.presegmentor.calls == 2
