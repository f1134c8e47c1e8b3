"""Processes that die, networks that fail: one clear message, and no error taken for another."""

import os

import pytest
import torch
from torch import nn

from nnunet_diffusion.inference.cases import CaseFiles, run_cases
from nnunet_diffusion.inference.volume import Evaluations
from nnunet_diffusion.inference.volume_predictor import VolumePredictor
from nnunet_diffusion.segmenter import DiffusionSegmenter
from nnunet_diffusion.settings import DiffusionSettings


class Deadly:
    """Kills the process that receives it, as the system does when memory is short."""

    def __reduce__(self):
        return os._exit, (1,)


@pytest.mark.slow
def test_killed_worker_is_named_with_the_cure():
    with pytest.raises(RuntimeError, match=r"killed.*/dev/shm.*--continue_prediction and --sequential"):
        run_cases([CaseFiles("a", ["a"])], None, (Deadly(), None, {}), False, 1, 0, lambda *_: None)


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
    return predictor, lambda: predictor._presegment(torch.zeros(1, 4, 4), tiles, Evaluations())


def test_only_lack_of_memory_is_tried_again_on_the_cpu():
    predictor, presegment = predictor_with(RuntimeError("shapes do not fit"))
    with pytest.raises(RuntimeError, match="shapes do not fit"):
        presegment()
    assert predictor.network.presegmentor.calls == 1
    predictor, presegment = predictor_with(torch.cuda.OutOfMemoryError("CUDA out of memory"))
    with pytest.raises(torch.cuda.OutOfMemoryError):
        presegment()
    assert predictor.network.presegmentor.calls == 2
