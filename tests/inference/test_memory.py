"""Memory of a volume's state: what is planned, and that it holds."""

import subprocess
import sys

import pytest
import torch

from nnunet_diffusion.inference.memory import GIB, plan_memory, state_bytes

CUDA, CPU = torch.device("cuda"), torch.device("cpu")
LARGE = (600, 512, 512)


def test_large_volume_with_five_classes_is_planned_for():
    needed = state_bytes(LARGE, 5, 1, "ddim", 1)
    assert 17 < needed / GIB < 19
    plan = plan_memory(LARGE, 5, 1, "ddim", 1, CUDA, free=lambda device: {"cuda": 60 * GIB}[device.type])
    assert (plan.device, plan.at_once, plan.note) == (CUDA, 1, "")


def test_state_goes_to_the_cpu_when_it_does_not_fit_and_says_so():
    plan = plan_memory(
        LARGE, 5, 1, "ddim", 1, CUDA, free=lambda device: {"cuda": 8 * GIB, "cpu": 64 * GIB}[device.type]
    )
    assert plan.device == CPU
    assert "do not fit on cuda" in plan.note
    assert "\n" not in plan.note


def test_fewer_samples_at_once_where_memory_is_short():
    plan = plan_memory(LARGE, 5, 5, "ddim", 1, CPU, free=lambda _: 32 * GIB)
    assert plan.at_once == 3
    assert plan.needed_bytes <= 32 * GIB
    assert "3 at a time" in plan.note


def test_too_little_memory_for_one_sample_is_refused_with_numbers():
    with pytest.raises(MemoryError, match=r"600 x 512 x 512 voxels and 5 channels needs .* GiB, 4.00 GiB are free"):
        plan_memory(LARGE, 5, 1, "ddim", 1, CPU, free=lambda _: 4 * GIB)


MEASURED = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from test_volume import Denoiser, process, tiling, SETTINGS
import dataclasses
from nnunet_diffusion.inference.memory import peak_bytes
volume = (64, 192, 192)
settings = dataclasses.replace(SETTINGS, steps=int(sys.argv[2]), samples=2, sampler=sys.argv[3])
tiles = tiling(volume, (64, 192, 192), 1.0, batch=1)
image = torch.zeros(1, *volume)
small = process(Denoiser(4, lambda noisy, image: noisy), image[:, :, :8, :8].contiguous(), tiling((64, 8, 8), (64, 8, 8), 1.0))
small.run([0])
before = peak_bytes(torch.device('cpu'))
members = process(Denoiser(4, lambda noisy, image: noisy), image, tiles, settings).run([0, 1])
mean = members.mean(0)
print(peak_bytes(torch.device('cpu')) - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("steps", "sampler"), [(1, "ddim"), (3, "ddim"), (3, "ddpm"), (3, "unipc")])
def test_measured_memory_stays_within_the_plan(steps, sampler, request):
    words = [sys.executable, "-c", MEASURED, str(request.path.parent), str(steps), sampler]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    planned = state_bytes((64, 192, 192), 4, 2, sampler, steps)
    # the tile's own copies are the network's: this denoiser sees the whole volume at once, two samples of it
    tile_copies = 4 * 4 * 64 * 192 * 192 * 2 * 4
    assert 0.25 * planned < int(done.stdout) < planned + tile_copies
