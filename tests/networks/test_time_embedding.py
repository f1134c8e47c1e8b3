"""Time embedding: closed form of the sinusoids, distinct timesteps, broadcasting."""

from __future__ import annotations

import math

import torch

from nnunet_diffusion.networks.time_embedding import TimeEmbedding, TimeShift, sinusoids


def test_sinusoids_in_closed_form():
    waves = sinusoids(torch.tensor([0, 3], dtype=torch.float64), 8)
    frequencies = [10_000 ** (-i / 3) for i in range(4)]
    for row, timestep in zip(waves, (0, 3), strict=True):
        expected = [math.sin(timestep * f) for f in frequencies] + [math.cos(timestep * f) for f in frequencies]
        torch.testing.assert_close(row, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


def test_sinusoids_are_float32_for_integers_and_half_precision():
    assert sinusoids(torch.arange(3), 4).dtype == torch.float32
    assert sinusoids(torch.arange(3, dtype=torch.float16), 4).dtype == torch.float32


def test_all_timesteps_differ():
    waves = sinusoids(torch.arange(1000), 64)
    distance = torch.cdist(waves, waves) + 10 * torch.eye(1000)
    assert distance.min() > 0.1


def test_embedding_has_the_dtype_of_its_parameters():
    timestep = torch.tensor([0, 999])
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        embedded = TimeEmbedding(8, 16).to(dtype)(timestep)
        assert embedded.dtype == dtype
        assert embedded.shape == (2, 16)


def test_shift_is_the_same_at_every_voxel_and_differs_between_samples():
    shift = TimeShift(16, 5)
    time = torch.randn(2, 16)
    for size in ((3,), (3, 4), (2, 3, 4)):
        shifted = shift(torch.zeros(2, 5, *size), time).flatten(2)
        torch.testing.assert_close(shifted, shifted[:, :, :1].expand_as(shifted), rtol=0, atol=0)
        assert (shifted[0] - shifted[1]).abs().min() > 0
