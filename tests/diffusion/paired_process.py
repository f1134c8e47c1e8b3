"""A Gaussian process together with a prediction type, for tests that name networks by what they predict."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from nnunet_diffusion.diffusion.gaussian import GaussianProcess
from nnunet_diffusion.diffusion.predictions import Prediction, prediction_of
from nnunet_diffusion.diffusion.samplers import SAMPLERS
from nnunet_diffusion.diffusion.samplers import sample as sample_clean
from nnunet_diffusion.diffusion.schedules import noise_schedule

SCHEDULE = noise_schedule("linear", 1000)


@dataclass(frozen=True)
class Paired(GaussianProcess):
    prediction: Prediction

    def target(self, clean, noise, timestep):
        return self.prediction.target(clean, noise, timestep, self)

    def to_clean(self, prediction, noisy, timestep):
        return self.prediction.to_clean(prediction, noisy, timestep, self)

    def estimate(self, predict):
        """What a sampler sees of a network (noisy, timestep) -> prediction."""
        return lambda noisy, timestep: self.to_clean(predict(noisy, timestep), noisy, timestep)


def make_process(prediction_type="x0", schedule=SCHEDULE, *, clamp=False, activation=torch.sigmoid) -> Paired:
    return Paired(schedule, prediction_of(prediction_type, activation, clamp_epsilon=clamp))


def sample(name, predict, start, start_step, steps, process, **options):
    return sample_clean(name, process.estimate(predict), start, start_step, steps, process, **options)


def run(name, predict, start, grid, process, **options):
    """Run a sampler on a grid of its own."""
    return SAMPLERS[name](process.estimate(predict), start, grid, process, **options)
