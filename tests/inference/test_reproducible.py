"""The same bits: whatever threads torch had before, whatever memory is free, and on demand by deterministic algorithms only."""

import multiprocessing
import os
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from nnunet_diffusion.inference import DiffusionPredictor
from nnunet_diffusion.inference.reproducible import threads_of
from nnunet_diffusion.model.segmenter import DiffusionSegmenter
from nnunet_diffusion.model.settings import DiffusionSettings

CPU = torch.device("cpu")
VOLUME = (1, 5, 21, 19)


class Condition:
    """The image itself."""

    def __init__(self, image):
        self.image = image

    def repeat_interleave(self, samples):
        return Condition(self.image.repeat_interleave(samples, 0))


class Denoiser(nn.Module):
    """Two convolutions of state and image; what is computed last depends on the size of the batch and on the threads."""

    state_channels = 2

    def __init__(self, record):
        super().__init__()
        self.record = record
        self.layers = nn.Sequential(
            nn.Conv3d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv3d(32, 2, 3, padding=1), nn.Tanh()
        )

    def encode(self, image, timestep, features=None):
        return Condition(image)

    def forward(self, noisy, timestep, condition):
        self.record()
        return self.layers(torch.cat((noisy, condition.image), 1))


@pytest.fixture
def predictor_of():
    """Builds predictors of one random network, which calls `record` whenever it is called."""

    def build(record=lambda: None, **arguments):
        torch.manual_seed(0)
        settings = DiffusionSettings(features_per_stage=(8,), start_step=300, steps=2, samples=4, starts={"truth": 1.0})
        predictor = DiffusionPredictor(device=CPU, allow_tqdm=False, use_mirroring=False, **arguments)
        predictor.network = DiffusionSegmenter(nn.Conv3d(1, 2, 3, padding=1), Denoiser(record), settings)
        predictor.configuration_manager = SimpleNamespace(patch_size=[5, 16, 16], batch_size=3)
        predictor.label_manager = SimpleNamespace(num_segmentation_heads=2)
        predictor.list_of_parameters, predictor.folds = [predictor.network.state_dict()], ["0"]
        predictor.allowed_mirroring_axes = None
        return predictor

    threads = torch.get_num_threads()
    yield build
    torch.set_num_threads(threads)


def test_threads_are_those_of_the_command_whatever_they_were_before(predictor_of):
    assert threads_of(CPU) == multiprocessing.cpu_count() and threads_of(torch.device("cuda")) == 1
    found, seen = [], set()
    for before in (1, 3):
        torch.set_num_threads(before)
        for wanted in (None, 2):
            seen.clear()
            predictor = predictor_of(lambda: seen.add(torch.get_num_threads()), threads=wanted)
            found.append(predictor.predict_volume(torch.ones(VOLUME)).logits)
            assert seen == {wanted or multiprocessing.cpu_count()}
            assert torch.get_num_threads() == before
    assert torch.equal(found[0], found[2]) and torch.equal(found[1], found[3])
    with pytest.raises(ValueError, match="threads is 0, but must be 1 or more"):
        predictor_of(threads=0)


def test_bits_do_not_depend_on_the_memory_that_is_free(predictor_of):
    data = torch.randn(VOLUME, generator=torch.Generator().manual_seed(1))
    whole = predictor_of().predict_volume(data)
    assert not whole.notes
    tight = predictor_of(state_memory_gb=390e3 / 2**30).predict_volume(data)
    assert len(tight.notes) == 1 and "for 4 samples: 3 at a time" in tight.notes[0]
    assert torch.equal(tight.logits, whole.logits)


def test_deterministic_algorithms_are_asked_for_and_only_meanwhile(predictor_of, monkeypatch):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    seen = []

    def record():
        seen.append((torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark))

    predictor_of(record).predict_volume(torch.ones(VOLUME))
    assert set(seen) == {(False, True)} and "CUBLAS_WORKSPACE_CONFIG" not in os.environ
    seen.clear()
    predictor_of(record, deterministic=True).predict_volume(torch.ones(VOLUME))
    assert set(seen) == {(True, False)} and os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.benchmark


def test_start_may_be_given_as_a_ratio_but_not_twice(predictor_of):
    predictor = predictor_of(start_snr=1.0)
    (changed, schedule) = (
        predictor._fitting_overrides(predictor.network.settings)[0],
        predictor.network.process.schedule,
    )
    assert schedule.snr[changed["start_step"] - 1].item() == pytest.approx(1.0, rel=0.02)
    assert changed["steps"] == 2 and changed["from_noise"] is False
    with pytest.raises(ValueError, match="start_step is 100 and start_snr 1.0, but both state T'"):
        predictor_of(start_step=100, start_snr=1.0)
