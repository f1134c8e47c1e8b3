"""Memory of a volume's reverse processes: estimated before they begin, and limited to what is available."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from nnunet_diffusion.diffusion.solvers import SOLVERS

GIB = 2**30
FLOAT_BYTES = 4
# Volumes of K channels in memory at once, in addition to those of each sample: start, its probabilities, mean, scratch.
SHARED = 4
NETWORK_SHARE = 0.25  # share of a GPU's memory that is reserved for evaluating the networks
CONDITIONS_SHARE = 0.25  # share of what a volume's state leaves; the next case is prepared meanwhile
# Measured memory of nnU-Net's resampling of one channel: bytes per input voxel (padded and filtered in float64), bytes per
# output voxel, and the latter if the coarse axis is resampled separately (coordinates of every voxel).
BEFORE_BYTES, AFTER_BYTES, SEPARATE_AXIS_BYTES = 32, 16, 64
DOUBLE_BYTES = 8


@dataclass(frozen=True)
class MemoryPlan:
    """Where the state of a volume lives.

    Attributes:
        device: device of the state.
        at_once: number of samples whose states are in memory together; they share one condition flow.
        needed_bytes: upper bound on the memory of the volume's state.
        note: note for the user on changes made for lack of memory; empty if there are none.
    """

    device: torch.device
    at_once: int
    needed_bytes: int
    note: str = ""


def volumes_per_sample(sampler: str, steps: int, bernoulli: bool = False) -> int:
    """Return the number of volumes of K channels that one sample needs: state, estimate and temporaries of a sampler's step."""
    if steps == 1:
        return 2
    if bernoulli:
        return 9
    return 8 if sampler in SOLVERS else 6


def state_bytes(
    volume: Sequence[int], heads: int, samples: int, sampler: str, steps: int, bernoulli: bool = False
) -> int:
    """Return the memory of a volume's reverse processes in bytes, without image and networks.

    Args:
        volume: size in voxels, per axis.
        heads: K.
        samples: number of samples whose states are in memory together.
        sampler: name of the sampler.
        steps: number of steps of the reverse process.
        bernoulli: whether its process is HiDiff's, whose posterior takes more.
    """
    one = FLOAT_BYTES * math.prod(volume)
    # plus the summed weight of the tiles, and each sample's probabilities summed over the channels
    return one * (heads * (SHARED + samples * volumes_per_sample(sampler, steps, bernoulli)) + 1 + samples)


def reading_bytes(shape: Sequence[int]) -> int:
    """Return the main memory for reading an image (C, *image): the file's voxels, at most 8 bytes each, and a float32 copy."""
    return math.prod(shape) * (8 + FLOAT_BYTES)


def case_bytes(
    channels: int, heads: int, image: Sequence[int], grid: Sequence[int], resampled: bool, separate_axis: bool
) -> int:
    """Return the peak main memory of a case in bytes, from reading the image to writing the segmentation.

    It does not include the reverse processes, for which `plan_memory` plans.

    Args:
        channels: number of image channels.
        heads: K.
        image: size of the image in voxels, per axis.
        grid: size on the network's grid.
        resampled: whether nnU-Net resamples the image.
        separate_axis: whether it resamples one axis separately.
    """
    coarse, fine = math.prod(image), math.prod(grid)
    double, before = (DOUBLE_BYTES, BEFORE_BYTES) if resampled else (0, 0)
    after = SEPARATE_AXIS_BYTES if separate_axis else AFTER_BYTES if resampled else 0
    # the image as read, a copy, and a float64 copy; the nonzero mask; the result
    preparing = coarse * (channels * (2 * FLOAT_BYTES + double) + 2 + before) + fine * (channels * FLOAT_BYTES + after)
    # the image and its copy during the transfer to this process; start, sum and mean of the probabilities, and the logits
    predicting = fine * FLOAT_BYTES * (2 * channels + 4 * heads)
    # the logits and a float64 copy; logits resampled to the image, their probabilities and the argmax
    exporting = fine * heads * (FLOAT_BYTES + double) + coarse * (2 * heads * FLOAT_BYTES + DOUBLE_BYTES + after)
    return max(reading_bytes((channels, *image)), preparing, predicting, exporting)


def free_bytes(device: torch.device) -> float:
    """Return the memory that a volume's state may use on a device, in bytes; infinite if it is unknown."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return free - NETWORK_SHARE * total
    available = _bytes_in(Path("/proc/meminfo"), "MemAvailable") if device.type == "cpu" else None
    return math.inf if available is None else min(available, control_group_bytes())


def control_group_bytes(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float:
    """Return the memory left by the limits of control groups (v2 or v1), in bytes; infinite without a limit.

    Containers and cluster jobs set such limits. The inactive file cache counts as free, since the kernel releases it on demand.
    """
    if not own.is_file():
        return math.inf
    lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    found = [math.inf]
    for controllers, group in ((parts[1], parts[2]) for parts in lines if len(parts) == 3):
        if controllers == "":
            folder, names = root, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            folder, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        inner = folder / group.lstrip("/")
        for place in (inner, *inner.parents):  # up to the root, which is the process's own group in a container
            found.append(_left_in_group(place, *names))
            if place == folder:
                break
    return min(found)


def _left_in_group(folder: Path, limit: str, usage: str, cache: str) -> float:
    try:
        most, used = (folder / limit).read_text().strip(), int((folder / usage).read_text())
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # the root group has no limit, and some kernels hide the files
        return math.inf
    return math.inf if most == "max" else max(0, int(most) - used + int(statistics.get(cache, 0)))


def peak_bytes(device: torch.device) -> int | None:
    """Return peak GPU memory since the last reset, or on a CPU peak memory of the process; None if unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # getrusage would include the peak of the parent process
    return _bytes_in(Path("/proc/self/status"), "VmHWM")


def used_bytes() -> int:
    """Return the main memory of this process in bytes; 0 if it is unknown."""
    return _bytes_in(Path("/proc/self/status"), "VmRSS") or 0


def _bytes_in(path: Path, key: str) -> int | None:
    """Return the bytes in a line `key: number kB` of a file in /proc; None if the file or line does not exist."""
    if not path.is_file():
        return None
    found = [line.split()[1] for line in path.read_text().splitlines() if line.startswith(f"{key}:")]
    return 1024 * int(found[0]) if found else None


def plan_memory(
    volume: Sequence[int],
    heads: int,
    samples: int,
    sampler: str,
    steps: int,
    device: torch.device,
    limit_bytes: float | None = None,
    together: int = 1,
    free: Callable[[torch.device], float] = free_bytes,
    bernoulli: bool = False,
) -> MemoryPlan:
    """Choose the device of the state and the number of samples at once.

    The state is on the GPU if all samples fit there, else on the CPU. If they do not fit there either, they run in smaller
    groups, each with its own evaluation of the condition flow. The size of a group is a multiple of `together`, so that
    results are bit-identical for any grouping. It is smaller only if the states of one call do not fit.

    Args:
        volume: size in voxels, per axis.
        heads: K.
        samples: number of reverse processes.
        sampler: name of the sampler.
        steps: number of steps of each reverse process.
        device: device of the networks.
        limit_bytes: limit of the device's memory; None for the free memory.
        together: number of samples in one call of the denoiser.
        free: device -> free bytes.
        bernoulli: whether the process is HiDiff's.

    Raises:
        MemoryError: not even one sample fits. The message gives the needed and the available memory.
    """

    def needed(count: int) -> int:
        return state_bytes(volume, heads, count, sampler, steps, bernoulli)

    available = free(device) if limit_bytes is None else limit_bytes
    if needed(samples) <= available:
        return MemoryPlan(device, samples, needed(samples))
    cpu, notes = torch.device("cpu"), []
    if device.type != "cpu":
        which = "free" if limit_bytes is None else "allowed"
        notes.append(
            f"{needed(samples) / GIB:.2f} GiB do not fit on {device} ({available / GIB:.2f} {which}): state on the CPU"
        )
        available = free(cpu)
    word = "are free" if limit_bytes is None or device.type != "cpu" else "are allowed (--state_memory)"
    fitting = [count for count in range(samples, 0, -1) if needed(count) <= available]
    if not fitting:
        raise MemoryError(
            f"One reverse process of {' x '.join(map(str, volume))} voxels and {heads} channels needs "
            f"{readable_size(needed(1))}, {readable_size(available)} {word}: take a machine with more memory, --steps 1, or a "
            "configuration with a coarser spacing (3d_lowres)."
        )
    at_once = next((count for count in fitting if count == samples or count % together == 0), fitting[0])
    if at_once < samples:
        notes.append(f"{readable_size(needed(samples))} for {samples} samples: {at_once} at a time")
    return MemoryPlan(cpu, at_once, needed(at_once), "; ".join(notes))


def condition_bytes(
    device: torch.device,
    plan: MemoryPlan,
    limit_bytes: float | None = None,
    free: Callable[[torch.device], float] = free_bytes,
) -> float:
    """Return the memory in which conditions of tiles may be kept: a quarter of what the state leaves; 0 if that is unknown.

    Args:
        device: device of the networks.
        plan: for the volume's state.
        limit_bytes: limit of the device's memory; None for the free memory.
        free: device -> free bytes.
    """
    available = min(free(device), math.inf if limit_bytes is None else limit_bytes)
    left = available - plan.needed_bytes * (plan.device == device)
    return max(0.0, CONDITIONS_SHARE * left) if math.isfinite(left) else 0.0


def readable_size(number: float) -> str:
    """Return a number of bytes in GiB or MiB."""
    return f"{number / GIB:.2f} GiB" if number >= GIB / 10 else f"{number / 2**20:.2f} MiB"
