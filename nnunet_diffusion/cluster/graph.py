"""The tasks of a cross-validation: commands that a user could type, and which of them need which others."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

FIVE = (0, 1, 2, 3, 4)  # folds of nnU-Net's own split
CASCADE, LOW = "3d_cascade_fullres", "3d_lowres"
FINAL, SUMMARY = "checkpoint_final.pth", "validation/summary.json"


@dataclass(frozen=True)
class Task:
    """One command of a cross-validation.

    Attributes:
        name: of the task, its log and its Slurm job.
        words: the command.
        needs: names of the tasks that must have ended well before.
        proof: files that exist once the task is done; without any, its marker tells (`state.State.is_done`).
        epochs: number of epochs of a training; 0 if it is not known.
    """

    name: str
    words: tuple[str, ...]
    needs: tuple[str, ...] = ()
    proof: tuple[str, ...] = ()
    epochs: int = 0

    @property
    def is_training(self) -> bool:
        """Whether the task trains a network, so that it needs GPUs."""
        return bool(self.proof)

    @property
    def command(self) -> str:
        """The command as a user types it."""
        return shlex.join(self.words)

    def to_json(self) -> dict[str, Any]:
        """Return the task as a JSON-serialisable dictionary."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Task:
        """Return the task of a dictionary from `to_json`."""
        values: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in content.items()
        }
        return cls(**values)


@dataclass(frozen=True)
class Request:
    """What is to be cross-validated.

    Attributes:
        dataset: full name, DatasetXXX_NAME.
        configurations: names of the configurations.
        trainers: names of the trainers; the others are compared with the first.
        plans: name of the plans.
        folds: numbers of the folds.
        device: "cuda", "cpu" or "mps".
        gpus: GPUs of each training; more than one: distributed training.
        npz: whether probabilities are kept, which nnU-Net's ensembles need.
        results: folder of the dataset's trained models.
        truth: folder of the training cases' ground truth.
        output: folder for the evaluation.
        preparation: commands that plan and preprocess, in their order; none if the data are there.
        first_network: (trainer, configuration) -> trainer of the network that it starts from; None for nnU-Net itself.
        epochs: trainer -> number of epochs; 0 if it is not known.
    """

    dataset: str
    configurations: Sequence[str]
    trainers: Sequence[str]
    plans: str
    folds: Sequence[int]
    device: str
    gpus: int
    npz: bool
    results: Path
    truth: Path
    output: Path
    preparation: Sequence[Sequence[str]]
    first_network: Callable[[str, str], str | None]
    epochs: Callable[[str], int] = field(default=lambda trainer: 0)

    @property
    def number(self) -> str:
        """The dataset's number."""
        return str(int(self.dataset[7:10]))

    def model(self, trainer: str, configuration: str) -> Path:
        """Return the folder of a trained model, as nnU-Net names it."""
        return self.results / f"{trainer}__{self.plans}__{configuration}"

    def segmentations(self, trainer: str, configuration: str) -> Path:
        """Return the folder in which nnUNetv2_find_best_configuration collects the segmentations of all folds."""
        return self.model(trainer, configuration) / f"crossval_results_folds_{'_'.join(map(str, self.folds))}"


def tasks_of(request: Request) -> list[Task]:
    """Return the tasks of a request; each stands behind all that it needs."""
    tasks: dict[str, Task] = {}
    ready: tuple[str, ...] = ()
    for number, words in enumerate(request.preparation, 1):
        name = f"prepare_{number}"
        tasks[name], ready = Task(name, tuple(words), ready), (name,)
    folds = tuple(
        _add_training(tasks, request, trainer, configuration, fold, ready)
        for trainer in request.trainers
        for configuration in request.configurations
        for fold in request.folds
    )
    best = _find_best(request, folds)
    for task in (best, *_evaluations(request, best.name)):
        tasks[task.name] = task
    return list(tasks.values())


def _add_training(
    tasks: dict[str, Task], request: Request, trainer: str, configuration: str, fold: int, ready: tuple[str, ...]
) -> str:
    """Add the training of a fold, behind those whose networks or segmentations it starts from; return its name."""
    name = f"{trainer}__{configuration}__fold_{fold}"
    if name in tasks:
        return name
    first, needs = request.first_network(trainer, configuration), list(ready)
    if first is not None:
        needs.append(_add_training(tasks, request, first, configuration, fold, ready))
    if configuration == CASCADE:  # its input is what the validation of all five folds of the first stage writes
        needs += [_add_training(tasks, request, first or trainer, LOW, each, ready) for each in FIVE]
    # --c starts a training that has no checkpoint yet, and continues one that has
    words = ["nnunet_diffusion", "train", request.number, configuration, str(fold), "-tr", trainer]
    words += ["-p", request.plans, "-device", request.device, "--c"]
    words += ["-num_gpus", str(request.gpus)] if request.gpus > 1 else []
    words += ["--npz"] if request.npz else []
    folder = request.model(trainer, configuration) / f"fold_{fold}"
    proof = (str(folder / FINAL), str(folder / SUMMARY))
    tasks[name] = Task(name, tuple(words), tuple(dict.fromkeys(needs)), proof, request.epochs(trainer))
    return name


def _find_best(request: Request, needs: tuple[str, ...]) -> Task:
    words = ["nnUNetv2_find_best_configuration", request.dataset, "-p", request.plans, "-c", *request.configurations]
    words += ["-tr", *request.trainers, "-f", *map(str, request.folds)]
    return Task("find_best", (*words, *([] if request.npz else ["--disable_ensembling"])), needs)


def _evaluations(request: Request, best: str) -> list[Task]:
    """Compare each model with that of the first trainer, which evaluates both; without another, evaluate that alone."""
    first, *others = request.trainers
    found: list[Task] = []
    compared: list[str | None] = [*others] or [None]
    for configuration in request.configurations:
        for other in compared:
            name = f"evaluate__{first}__{configuration}" if other is None else f"compare__{other}__{configuration}"
            words = ["nnunet_diffusion", "evaluate"]
            for trainer in filter(None, (first, other)):
                words += ["-p", str(request.segmentations(trainer, configuration))]
            words += ["-g", str(request.truth), "-o", str(request.output / name)]
            # the cases of the other folds have no segmentation
            words += [] if tuple(sorted(request.folds)) == FIVE else ["--chill"]
            found.append(Task(name, tuple(words), (best,)))
    return found
