"""Memory of a volume's reverse processes: known before they begin, and kept within what there is."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from nnunet_diffusion.diffusion.solvers import SOLVERS

GIB = 2**30
FLOAT_BYTES = 4
# Volumes of K channels that live at once, beside what each sample needs: start, its probabilities, their mean, scratch.
SHARED = 4
NETWORK_SHARE = 0.25  # of a GPU's memory stays free for the networks' own evaluations


@dataclass(frozen=True)
class MemoryPlan:
    """Where the state of a volume lives.

    Attributes:
        device: of the state.
        at_once: samples whose states live together; those share one condition flow.
        needed_bytes: at most, for the volume's state.
        note: what to tell the user, empty where nothing had to give way.
    """

    device: torch.device
    at_once: int
    needed_bytes: int
    note: str = ""


def volumes_per_sample(sampler: str, steps: int) -> int:
    """Volumes of K channels that one sample needs: state and estimate, and what a sampler's step adds to them."""
    if steps == 1:
        return 2
    return 8 if sampler in SOLVERS else 6


def state_bytes(volume: Sequence[int], heads: int, samples: int, sampler: str, steps: int) -> int:
    """Memory of the reverse processes of a volume, in bytes, without the image and the networks.

    Args:
        volume: its size in voxels, per axis.
        heads: K.
        samples: whose states live together.
        sampler: its name.
        steps: of the reverse process.
    """
    one = FLOAT_BYTES * math.prod(volume)
    # the tiles' summed weight, and each sample's probabilities summed over the channels
    return one * (heads * (SHARED + samples * volumes_per_sample(sampler, steps)) + 1 + samples)


def free_bytes(device: torch.device) -> float:
    """Memory that a volume's state may take on a device, in bytes; infinite where it cannot be known."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return free - NETWORK_SHARE * total
    available = _bytes_in(Path("/proc/meminfo"), "MemAvailable") if device.type == "cpu" else None
    return math.inf if available is None else min(available, control_group_bytes())


def control_group_bytes(root: Path = Path("/sys/fs/cgroup"), own: Path = Path("/proc/self/cgroup")) -> float:
    """Memory that containers and cluster jobs may still take by their control groups (v2 or v1), in bytes; or infinite.

    The files' cache counts as free: it is given back on demand.
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
        for place in (inner, *inner.parents):  # up to the root, which is the own group in a container
            found.append(_left_in_group(place, *names))
            if place == folder:
                break
    return min(found)


def _left_in_group(folder: Path, limit: str, usage: str, cache: str) -> float:
    try:
        most, used = (folder / limit).read_text().strip(), int((folder / usage).read_text())
        statistics = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # the root of all groups has no limit, and some kernels hide them
        return math.inf
    return math.inf if most == "max" else max(0, int(most) - used + int(statistics.get(cache, 0)))


def peak_bytes(device: torch.device) -> int | None:
    """Peak of a GPU's memory since it was last reset, on a CPU of the process since its start; None where unknown."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    # getrusage would count what the process that started this one had
    return _bytes_in(Path("/proc/self/status"), "VmHWM")


def _bytes_in(path: Path, key: str) -> int | None:
    """Value of a line `key: number kB` of Linux's process information; None where there is none."""
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
    free: Callable[[torch.device], float] = free_bytes,
) -> MemoryPlan:
    """Choose the device of the state and the number of samples at once.

    The GPU is taken if all samples fit there, else the CPU; where memory is short there too, fewer samples at once, each
    group with a condition flow of its own.

    Args:
        volume: its size in voxels, per axis.
        heads: K.
        samples: number of reverse processes.
        sampler: its name.
        steps: of each reverse process.
        device: of the networks.
        limit_bytes: of the device's memory, instead of what is free.
        free: device -> bytes.

    Raises:
        MemoryError: not even one sample fits; names what is needed and what there is.
    """

    def needed(count: int) -> int:
        return state_bytes(volume, heads, count, sampler, steps)

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
    if fitting[0] < samples:
        notes.append(f"{readable_size(needed(samples))} for {samples} samples: {fitting[0]} at a time")
    return MemoryPlan(cpu, fitting[0], needed(fitting[0]), "; ".join(notes))


def readable_size(number: float) -> str:
    """Return a number of bytes in GiB or MiB."""
    return f"{number / GIB:.2f} GiB" if number >= GIB / 10 else f"{number / 2**20:.2f} MiB"
