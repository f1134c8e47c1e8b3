"""`nnunet_diffusion crossval`: a whole cross-validation, from preprocessing to the comparison, here or by Slurm."""

from __future__ import annotations

import argparse
import importlib.util
import os
import re
import shlex
import shutil
from pathlib import Path
from typing import Any

from nnunet_diffusion.cli.devices import DEVICES, check_device
from nnunet_diffusion.cli.errors import CommandError, named_for_the_user
from nnunet_diffusion.cli.folders import (
    PREPROCESSED,
    RAW,
    RESULTS,
    dataset_prefix,
    datasets_in,
    folder_in,
    refuse_file_as_output,
)
from nnunet_diffusion.cli.stopping import until_stopped
from nnunet_diffusion.cli.train import DEFAULT_PLANS, check_trainer, data_identifier, planning_commands
from nnunet_diffusion.cli.trainers_directory import with_trainers
from nnunet_diffusion.cluster.graph import CASCADE, FIVE, LOW, Request, tasks_of
from nnunet_diffusion.cluster.running import jobs_in_slurm, live_jobs, run_here, submit
from nnunet_diffusion.cluster.state import State, estimate
from nnunet_diffusion.files import HIDIFF_TRAINER, PRESEGMENTOR_FOLDER, preprocess_command, read_plans

FOLDER = "crossval"
SHORTEST = 10  # minutes; submitit takes every preemption of a job with such a limit for a timeout
OF_SLURM = ("partition", "time", "mem", "cpus", "slurm")
OURS = {
    "array",
    "dependency",
    "error",
    "job-name",
    "mem",
    "open-mode",
    "output",
    "partition",
    "requeue",
    "signal",
    "time",
}
THOUSAND_EPOCHS = ("nnUNetTrainer", "nnUNetTrainerNoMirroring", "nnUNetTrainerEMA", "DiffusionTrainer", HIDIFF_TRAINER)


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `crossval` to the command line."""
    parser = subparsers.add_parser(
        "crossval",
        help="cross-validate trainers: preprocessing, all folds, choice of the best, evaluation; here or by Slurm",
        description="Plans a cross-validation as tasks, runs them here or submits them to Slurm, and takes up what is "
        "unfinished when it is called again: networks that others start from first, then their folds, "
        "nnUNetv2_find_best_configuration, and the comparison of each trainer with the first.",
    )
    add = parser.add_argument
    add("-d", required=True, metavar="ID", help="dataset, number or name")
    add("-c", nargs="+", metavar="CONFIG", help="configurations, for example 2d 3d_fullres")
    add("-tr", nargs="+", metavar="TRAINER", help="trainers; the others are compared with the first")
    add("-p", default=DEFAULT_PLANS, metavar="PLANS", help=f"plans; made if they are missing ({DEFAULT_PLANS})")
    add("--folds", nargs="+", type=int, default=list(FIVE), metavar="FOLD", help="folds (0 1 2 3 4)")
    add("-device", default="cuda", choices=DEVICES)
    add("--npz", action="store_true", help="keep probabilities, and try nnU-Net's ensembles of two models")
    add("-o", metavar="FOLDER", help=f"logs, state and evaluation ({FOLDER} in the dataset's folder of nnUNet_results)")
    add("--dry-run", action="store_true", help="show the tasks and an estimate of the hours; run nothing")
    add("--status", action="store_true", help="show how far the tasks are, and the end of the log of those that failed")
    add("--gpus", type=int, default=1, metavar="N", help="GPUs of each training (1); more: distributed training")
    add("--executor", choices=("local", "slurm"), default="local", help="run the tasks here, or submit them (local)")
    add(
        "--at_once",
        type=int,
        metavar="N",
        help="local: number of tasks at a time (as many as the GPUs suffice for, or 1)",
    )
    add("--partition", help="Slurm: partition of the jobs")
    add("--time", type=int, metavar="MINUTES", help=f"Slurm: time limit of each job, more than {SHORTEST}")
    add("--mem", help="Slurm: memory of each job, for example 32G")
    add("--cpus", type=int, metavar="N", help="Slurm: CPU cores of each job")
    add(
        "--slurm",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="Slurm: further options of sbatch, such as account=me",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Show, run or submit a cross-validation. Return 0; 1 if a task failed; 130 if interrupted; 143 if terminated.

    Raises:
        CommandError: wrong arguments, or folders that are not ready.
    """
    dataset, results = find_dataset(options.d), Path(folder_in(os.environ, RESULTS))
    refuse_file_as_output(options.o)
    folder = Path(options.o).resolve() if options.o else results / dataset / FOLDER
    state = State(folder)
    with named_for_the_user(ValueError, RuntimeError, OSError):
        if options.status:
            return show(state.read())
        check_options(options)
        os.environ.update(with_trainers(os.environ))
        tasks = tasks_of(request_of(options, dataset, results / dataset, folder))
        if options.dry_run:
            return show(with_tasks(state.read(), tasks))
        folder.mkdir(parents=True, exist_ok=True)
        if not state.lock.acquire():
            raise CommandError(
                f"another call works on the cross-validation in {folder} now: wait for it, or choose another folder with -o"
            )
        with state.lock:
            return start(options, with_tasks(state.read(), tasks))


def with_tasks(state: State, tasks: list[Any]) -> State:
    """Give a state the tasks of this call, whose jobs may be those of an earlier one."""
    state.tasks = tasks
    return state


def show(state: State) -> int:
    """Print the table, the estimate and the failed tasks. Return 0; 1 if a task failed."""
    if not state.tasks:
        raise CommandError(
            f"{state.folder} holds no cross-validation: start one with -c and -tr, or name its folder (-o)"
        )
    states = state.states(*live_jobs(state))
    print(state.table(states))
    print(estimate(state.unfinished()))
    failures = state.failures(states)
    if failures:
        print(f"\n{failures}\n\nThe same command without --status or --dry-run takes up what is unfinished.")
    return 1 if failures else 0


def start(options: argparse.Namespace, state: State) -> int:
    """Run the unfinished tasks here, or submit those without a live job. The caller holds the lock."""
    slurm = jobs_in_slurm(state)
    live = {name for name, job in state.jobs.items() if job in slurm}
    state.jobs = {name: job for name, job in state.jobs.items() if name in live}
    tasks = [task for task in state.unfinished() if task.name not in live]
    for task in tasks:
        state.marker(task.name).unlink(missing_ok=True)
    state.write()
    if not state.unfinished():
        print(f"All {len(state.tasks)} tasks are done; the evaluation is in {state.folder}.")
        return 0
    if options.executor == "slurm":
        submit(state, tasks, live, slurm_options(options), 0 if options.device != "cuda" else options.gpus)
        print(
            f"{len(tasks)} tasks submitted, {len(live)} already there. See: nnunet_diffusion crossval -d {options.d} --status"
        )
        return 0
    if live:
        raise CommandError(
            f"Slurm still has {len(live)} jobs of this cross-validation: cancel them (scancel {' '.join(state.jobs.values())}) "
            "or give --executor slurm"
        )
    devices = gpus_here() if options.device == "cuda" else []
    at_once = options.at_once or max(1, len(devices) // options.gpus)

    def work() -> int:
        failed = run_here(state, tasks, at_once, options.gpus, devices)
        if failed:
            print(f"\n{state.failures(state.states((), ()))}\n\nThe same command takes up what is unfinished.")
        else:
            print(f"All tasks are done; the evaluation is in {state.folder}.")
        return 1 if failed else 0

    return until_stopped("crossval", work, lambda: "; trainings keep their last epoch, and the same command continues")


def gpus_here() -> list[str]:
    """Return the GPUs of this machine as CUDA_VISIBLE_DEVICES names them."""
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    return named.split(",") if named else [str(number) for number in range(torch.cuda.device_count())]


def check_options(options: argparse.Namespace) -> None:
    """Raise CommandError if arguments are missing, out of range or contradict each other."""
    for name in ("c", "tr"):
        if not getattr(options, name):
            raise CommandError(f"-{name} is missing: give it, or --status")
    for name, values in (("-c", options.c), ("-tr", options.tr), ("--folds", options.folds)):
        if twice := [value for place, value in enumerate(values) if value in values[:place]]:
            raise CommandError(f"{name} has {twice[0]} twice: leave one out")
    if min(options.folds) < 0:
        raise CommandError(f"--folds has {min(options.folds)}, but folds begin with 0")
    for name in ("gpus", "at_once", "cpus"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise CommandError(f"--{name} is {getattr(options, name)}, but must be 1 or more")
    if options.gpus > 1 and options.device != "cuda":
        raise CommandError(f"--gpus is {options.gpus}, but -device is {options.device}: leave --gpus out")
    if options.executor == "local":
        if named := [name for name in OF_SLURM if getattr(options, name)]:
            raise CommandError(f"--{named[0]} is for Slurm: add --executor slurm, or leave it out")
        if not options.dry_run:
            check_device(options.device)
        return
    if options.at_once is not None:
        raise CommandError(f"--at_once is {options.at_once}, but Slurm decides how many jobs run: leave it out")
    if options.time is None or options.time <= SHORTEST:
        wrong = "is missing" if options.time is None else f"is {options.time}"
        raise CommandError(
            f"--time {wrong}, but must be more than {SHORTEST} minutes, because submitit takes every preemption of a shorter "
            "job for a timeout; a training that reaches the limit continues in the next job"
        )
    slurm_options(options)
    if not options.dry_run and importlib.util.find_spec("submitit") is None:
        raise CommandError("--executor is slurm, which needs submitit: pip install 'nnunet-diffusion[cluster]'")
    if not options.dry_run and shutil.which("sbatch") is None:
        raise CommandError(
            "--executor is slurm, but there is no sbatch on PATH: call it where Slurm's jobs are submitted"
        )


def slurm_options(options: argparse.Namespace) -> dict[str, Any]:
    """Return submitit's parameters of all jobs.

    Raises:
        CommandError: an entry of --slurm is not KEY=VALUE, or has an argument of its own.
    """
    more: dict[str, Any] = {}
    for given in options.slurm:
        key, equals, value = given.partition("=")
        key = key.lstrip("-").replace("_", "-")
        if not equals or not key:
            raise CommandError(f"--slurm has {given}, but must be KEY=VALUE, as account=me for sbatch --account=me")
        if key in OURS:
            raise CommandError(f"--slurm has {given}, but this command sets {key}: leave it out")
        more[key] = value
    named = {"partition": options.partition, "time": options.time, "mem": options.mem, "cpus_per_task": options.cpus}
    given_ones = {name: argument for name, argument in named.items() if argument is not None}
    return {**given_ones, "additional_parameters": more}


def find_dataset(name_or_id: str) -> str:
    """Return the full name of a dataset in nnUNet_raw or nnUNet_preprocessed.

    Raises:
        CommandError: there is none of that number, or more than one.
    """
    folders = [Path(folder_in(os.environ, name)) for name in (RAW, PREPROCESSED)]
    found = sorted({name for folder in folders for name in datasets_in(folder, dataset_prefix(name_or_id))})
    if len(found) != 1:
        what = f"is ambiguous ({', '.join(found)})" if found else f"is neither in {folders[0]} nor in {folders[1]}"
        raise CommandError(f"-d is {name_or_id}, which {what}: put one dataset of that number into nnUNet_raw")
    return found[0]


def request_of(options: argparse.Namespace, dataset: str, results: Path, folder: Path) -> Request:
    """Return the request of the command line; nnU-Net is imported here, with its variables set.

    Raises:
        CommandError: a trainer or a configuration is unknown.
    """
    preprocessed = Path(os.environ[PREPROCESSED]) / dataset
    path = preprocessed / f"{options.p}.json"
    plans = read_plans(path, "remove it, and this command makes it again") if path.is_file() else None
    configurations = plans["configurations"] if plans else {}
    for name in options.c:
        if plans and name not in configurations:
            raise CommandError(
                f"-c has {name}, which plans {options.p} do not have; they have: {', '.join(configurations)}"
            )
    classes = {name: check_trainer(name) for name in options.tr}

    def first_network(trainer: str, configuration: str) -> str | None:
        default = getattr(classes.get(trainer), "presegmentor_trainer", None)
        if default is None or os.environ.get(PRESEGMENTOR_FOLDER):
            return None
        section = configurations.get(configuration, {}).get("diffusion", {})
        return section.get("presegmentor", {}).get("trainer") or default

    raw_truth = Path(os.environ[RAW]) / dataset / "labelsTr"
    return Request(
        dataset=dataset,
        configurations=options.c,
        trainers=options.tr,
        plans=options.p,
        folds=options.folds,
        device=options.device,
        gpus=options.gpus,
        npz=options.npz,
        results=results,
        truth=raw_truth if raw_truth.is_dir() else preprocessed / "gt_segmentations",
        output=folder,
        preparation=preparation(options, dataset, plans),
        first_network=first_network,
        epochs=lambda trainer: epochs_of(trainer, classes.get(trainer)),
    )


def epochs_of(name: str, trainer: Any) -> int:
    """Return the epochs of a trainer: its own attribute, those in its name, or nnU-Net's 1000; 0 if none tells."""
    if getattr(trainer, "epochs", None):
        return trainer.epochs
    if named := re.search(r"_(\d+)epochs?(_NoMirroring)?$", name):
        return int(named[1])
    return 1000 if name in THOUSAND_EPOCHS else 0


def preparation(options: argparse.Namespace, dataset: str, plans: dict[str, Any] | None) -> list[list[str]]:
    """Return the commands that plan and preprocess what is missing."""
    from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

    from nnunet_diffusion.planning.data_reuse import is_complete

    names = list(
        dict.fromkeys(each for name in options.c for each in ([LOW, "3d_fullres"] if name == CASCADE else [name]))
    )
    preprocessed, raw = Path(os.environ[PREPROCESSED]) / dataset, Path(os.environ[RAW]) / dataset
    if plans is None:
        hidiff = next((name for name in options.tr if name.startswith(HIDIFF_TRAINER)), options.tr[0])
        chosen = argparse.Namespace(
            dataset_name_or_id=dataset, tr=hidiff, p=options.p, configuration=" ".join(names), device=options.device
        )
        commands = planning_commands(chosen, from_raw=not (preprocessed / "dataset_fingerprint.json").is_file())
        return [shlex.split(command) for command in commands.split(" && ")]
    folders = {name: preprocessed / data_identifier(plans, name, options.p) for name in names}
    if (raw / "dataset.json").is_file():
        cases = list(get_filenames_of_train_images_and_targets(str(raw)))
        missing = [name for name, folder in folders.items() if not is_complete(folder, cases)]
    else:
        missing = [name for name, folder in folders.items() if not folder.is_dir()]
    return [shlex.split(preprocess_command(dataset, options.p, " ".join(missing)))] if missing else []
