"""Memory of a volume's state: what is planned, and that it holds."""

import math
import os
import subprocess
import sys
import tracemalloc

import numpy as np
import pytest
import torch
from nnunetv2.inference.export_prediction import convert_predicted_logits_to_segmentation_with_correct_shape

from nnunet_diffusion.inference.memory import (
    GIB,
    MemoryPlan,
    case_bytes,
    condition_bytes,
    control_group_bytes,
    plan_memory,
    state_bytes,
)

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


def test_samples_of_one_call_of_the_denoiser_stay_together_where_they_fit():
    """Else a sample's last bits would depend on the memory that is free."""
    for together, at_once in ((2, 2), (3, 3), (4, 3)):
        plan = plan_memory(LARGE, 5, 5, "ddim", 1, CPU, free=lambda _: 32 * GIB, together=together)
        assert plan.at_once == at_once
    assert plan_memory(LARGE, 5, 5, "ddim", 1, CPU, free=lambda _: 99 * GIB, together=4).at_once == 5


def test_conditions_get_a_quarter_of_what_the_state_leaves():
    def found(state, limit=None, free=10 * GIB):
        return condition_bytes(CUDA, MemoryPlan(state, 1, 4 * GIB), limit, lambda _: free)

    assert found(CUDA) == 1.5 * GIB and found(CPU) == 2.5 * GIB
    assert found(CUDA, limit=6 * GIB) == 0.5 * GIB and found(CUDA, limit=2 * GIB) == 0
    assert found(CUDA, free=math.inf) == 0  # not known


def test_too_little_memory_for_one_sample_is_refused_with_numbers():
    with pytest.raises(MemoryError, match=r"600 x 512 x 512 voxels and 5 channels needs .* GiB, 4.00 GiB are free"):
        plan_memory(LARGE, 5, 1, "ddim", 1, CPU, free=lambda _: 4 * GIB)


def peak_of(function):
    """What `function` returns, and the most memory that numpy's arrays took meanwhile."""
    function()  # what it imports is not to be counted
    tracemalloc.start()
    try:
        return function(), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.nnunet
@pytest.mark.parametrize(
    ("channels", "classes", "shape", "spacing", "separate"),
    [
        (1, 3, (24, 24, 24), (2.0, 2.0, 2.0), False),
        (3, 8, (24, 24, 24), (2.0, 2.0, 2.0), False),
        (1, 3, (96, 96, 96), (0.5, 0.5, 0.5), False),
        (1, 3, (16, 64, 64), (5.0, 1.0, 1.0), True),
        (2, 3, (40, 60, 60), (1.0, 1.0, 1.0), False),
    ],
)
def test_memory_of_a_case_holds_and_is_not_far_off(managers_of, channels, classes, shape, spacing, separate):
    """nnU-Net's own preprocessing and export, measured."""
    plans, configuration, description = managers_of(channels=channels, classes=classes)
    image = np.random.default_rng(0).normal(100, 10, (channels, *shape)).astype(np.float32)
    (data, _, properties), preparing = peak_of(
        lambda: configuration.preprocessor_class(verbose=False).run_case_npy(
            image, None, {"spacing": spacing}, plans, configuration, description
        )
    )
    logits = np.random.default_rng(0).normal(size=(classes, *data.shape[1:])).astype(np.float32)
    labels = plans.get_label_manager(description)
    _, exporting = peak_of(
        lambda: convert_predicted_logits_to_segmentation_with_correct_shape(
            logits, plans, configuration, labels, properties
        )
    )
    measured = max(preparing + image.nbytes, exporting + logits.nbytes)
    planned = case_bytes(channels, classes, shape, data.shape[1:], data.shape[1:] != shape, separate)
    assert 0.9 * measured < planned < 2.1 * measured


@pytest.fixture
def groups(tmp_path):
    """Writes a tree of control groups and the process's own entry in it; returns what `control_group_bytes` finds."""

    def write(entry, files):
        for name, content in files.items():
            (tmp_path / "groups" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "groups" / name).write_text(content)
        (tmp_path / "own").write_text(entry)
        return control_group_bytes(tmp_path / "groups", tmp_path / "own")

    return write


def test_limits_of_containers_and_cluster_jobs_count(groups):
    job = {"memory.max": "1000\n", "memory.current": "700\n", "memory.stat": "anon 600\ninactive_file 100\n"}
    step = {"memory.max": "max\n", "memory.current": "650\n", "memory.stat": "inactive_file 0\n"}
    files = {f"slurm/job/{name}": text for name, text in job.items()}
    files |= {f"slurm/job/step/{name}": text for name, text in step.items()}
    assert groups("0::/slurm/job/step\n", files) == 400


def test_limit_of_a_container_that_sees_itself_as_the_root(groups):
    files = {"memory.max": "1000\n", "memory.current": "1200\n", "memory.stat": "inactive_file 0\n"}
    assert groups("0::/\n", files) == 0


def test_limit_of_version_1(groups):
    files = {"memory.limit_in_bytes": "500", "memory.usage_in_bytes": "200", "memory.stat": "total_inactive_file 50"}
    files = {f"memory/docker/abc/{name}": text for name, text in files.items()}
    assert groups("5:cpu,cpuacct:/\n4:memory:/docker/abc\n", files) == 350


def test_no_limit_where_there_is_none(groups, tmp_path):
    assert groups("0::/\n", {"cgroup.procs": ""}) == math.inf
    assert control_group_bytes(tmp_path, tmp_path / "missing") == math.inf


ENSEMBLE = """
import sys, torch
sys.path.insert(0, sys.argv[1])
from test_volume import Denoiser, process, tiling, SETTINGS
import dataclasses
from nnunet_diffusion.inference.memory import peak_bytes
volume, patch = (64, 128, 128), (16, 32, 32)
samples = int(sys.argv[2])
settings = dataclasses.replace(SETTINGS, steps=1, samples=samples)
image, tiles = torch.zeros(1, *volume), tiling(volume, patch, 1.0, batch=1)
process(Denoiser(4, lambda noisy, image: noisy), image[:, :16, :32, :32].contiguous(), tiling(patch, patch, 1.0)).run([0])
before = peak_bytes(torch.device('cpu'))
process(Denoiser(4, lambda noisy, image: noisy), image, tiles, settings).run(range(samples))
print(peak_bytes(torch.device('cpu')) - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("samples", [1, 8])
def test_samples_of_an_ensemble_that_take_one_step_stay_within_the_plan(request, samples):
    """The default: the states themselves are most of it, not the tiles."""
    words = [sys.executable, "-c", ENSEMBLE, str(request.path.parent), str(samples)]
    # else the allocator keeps some of what was freed
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(words, capture_output=True, text=True, check=True, env=environment)
    # the members' mean lies beside the process
    planned = state_bytes((64, 128, 128), 4, samples, "ddim", 1) - 4 * 4 * 64 * 128 * 128
    assert 0.6 * planned < int(done.stdout) < 1.05 * planned


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
