"""Training runs of the comparison, each a resumable subprocess with nnU-Net's own training command inside."""

from __future__ import annotations

import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from comparison_plans import Folders

WORKER = Path(__file__).with_name("train_worker.py")
GRACE_SECONDS = 30
"""After the time limit, for a worker that is in the middle of an epoch or a validation."""

LENGTH = re.compile(r"(?P<base>\w+)_(?P<epochs>\d+)epochs?")
TRAINER_TEMPLATE = '''"""Written by tests/benchmarks/compare.py: {base} for {epochs} epochs."""

import torch
from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

{base} = recursive_find_trainer_class_by_name("{base}")


class {name}({base}):
    """{base}, {epochs} epochs."""

    def __init__(self, plans, configuration, fold, dataset_json, device=torch.device("cuda")):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = {epochs}
'''


class TimeIsUp(Exception):
    """The time limit is reached; what is finished is kept and the same command goes on from there."""


@dataclass(frozen=True)
class Deadline:
    """Moment at which the whole run has to stop (seconds since the epoch), or infinity."""

    moment: float = math.inf

    def check(self) -> None:
        """Raise TimeIsUp once the moment has come."""
        if time.time() >= self.moment:
            raise TimeIsUp


@dataclass(frozen=True)
class Training:
    """One nnUNetv2_train run."""

    trainer: str
    plans_name: str
    configuration: str
    fold: int
    device: str

    def folder(self, folders: Folders) -> Path:
        """Folder of the fold."""
        return folders.model(self.trainer, self.plans_name, self.configuration) / f"fold_{self.fold}"


def train(folders: Folders, training: Training, deadline: Deadline, *, validate: bool = False) -> None:
    """Train, or go on training, until the final checkpoint (and, on demand, nnU-Net's own validation) is there.

    Raises:
        TimeIsUp: the time limit came first; run again to go on.
        subprocess.CalledProcessError: the training failed.
    """
    folder = training.folder(folders)
    final = (folder / "checkpoint_final.pth").is_file()
    if final and (not validate or (folder / "validation" / "summary.json").is_file()):
        return
    deadline.check()
    resumable = final or any((folder / f"checkpoint_{kind}.pth").is_file() for kind in ("latest", "best"))
    words = [folders.dataset, training.configuration, str(training.fold), "-tr", training.trainer]
    words += ["-p", training.plans_name, "-device", training.device]
    words += ["--npz"] if validate else []
    words += ["--c"] if resumable else []
    options = [f"--deadline={deadline.moment}", *([] if validate else ["--no-validation"])]
    command = [sys.executable, str(WORKER), *options, "--", *words]
    print(f"[{time.strftime('%H:%M:%S')}] {' '.join(words)}", flush=True)
    code = _run(command, deadline)
    if not (folder / "checkpoint_final.pth").is_file() or (validate and code != 0):
        if time.time() + GRACE_SECONDS >= deadline.moment or code == os.EX_TEMPFAIL:
            raise TimeIsUp
        raise subprocess.CalledProcessError(code, command)


def _run(command: list[str], deadline: Deadline) -> int:
    """Run in a process group of its own, which is ended (data loaders included) when the grace period is over."""
    process = subprocess.Popen(command, start_new_session=True)
    limit = None if math.isinf(deadline.moment) else max(0.0, deadline.moment - time.time()) + GRACE_SECONDS
    try:
        return process.wait(timeout=limit)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if isinstance(error, subprocess.TimeoutExpired):
            return os.EX_TEMPFAIL
        raise


def share_presegmentor(folders: Folders, presegmentor: Training, plans_name: str) -> None:
    """Let plans that differ in diffusion settings alone find the nnU-Net trained on their base plans (by a link)."""
    source = folders.model(presegmentor.trainer, presegmentor.plans_name, presegmentor.configuration)
    link = folders.model(presegmentor.trainer, plans_name, presegmentor.configuration)
    if not link.exists():
        link.symlink_to(source.name)
    elif link.resolve() != source.resolve():
        raise ValueError(
            f"{link} is a training of its own, so a denoiser beside it would not start from {source.name}: name the two with "
            "--trainers, or move that folder away"
        )


def epoch_seconds(folders: Folders, training: Training) -> list[float]:
    """Return the seconds of each epoch of a finished training."""
    from nnunet_diffusion.training.checkpoints import read_checkpoint

    log = read_checkpoint(training.folder(folders) / "checkpoint_final.pth")["logging"]
    return [
        float(end - start)
        for start, end in zip(log["epoch_start_timestamps"], log["epoch_end_timestamps"], strict=True)
    ]


def control_epochs(nnunet: list[float], denoiser: list[float]) -> int:
    """Return how many epochs nnU-Net trains for its own and the denoiser's time together (medians, rounded up)."""
    return len(nnunet) + math.ceil(len(denoiser) * statistics.median(denoiser) / statistics.median(nnunet))


def without_averaging(folders: Folders, averaged: Training, plain: Training) -> None:
    """Write the model that a training of `nnUNetTrainerEMA` would have given without the average, if it is not there."""
    import torch

    from nnunet_diffusion.training.averaged_nnunet import RAW_KEY
    from nnunet_diffusion.training.checkpoints import read_checkpoint, write_aside

    target, source = (training.folder(folders) for training in (plain, averaged))
    final = target / "checkpoint_final.pth"
    if final.is_file():
        return
    target.mkdir(parents=True, exist_ok=True)
    for name in ("plans.json", "dataset.json"):
        shutil.copy(source.parent / name, target.parent / name)
    checkpoint = read_checkpoint(source / "checkpoint_final.pth")
    checkpoint |= {"network_weights": checkpoint.pop(RAW_KEY), "trainer_name": plain.trainer}
    write_aside(lambda aside: torch.save(checkpoint, aside), final)


def write_missing_trainer(folders: Folders, name: str) -> str:
    """Write the trainer BASE_Nepochs, which trains as BASE does, where nnU-Net looks for it if nobody has it; return `name`.

    Raises:
        ValueError: nnU-Net finds neither this trainer nor BASE.
    """
    match = LENGTH.fullmatch(name)
    if _find_trainer(name) is None:
        if match is None or _find_trainer(match["base"]) is None:
            raise ValueError(f"nnU-Net finds no trainer {name}, nor one that it would be a length of")
        text = TRAINER_TEMPLATE.format(name=name, **match.groupdict())
        (folders.control_trainers / f"{name}.py").write_text(text)
    return name


def _find_trainer(name: str) -> type | None:
    from nnunetv2.utilities.find_objects import recursive_find_trainer_class_by_name

    try:
        return recursive_find_trainer_class_by_name(name)
    except RuntimeError:
        return None
