"""`nnunet_diffusion plan`: plan nnU-Net and the denoiser for a GPU's memory or a CPU's time."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import os
import pkgutil
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from nnunet_diffusion.cli.errors import CommandError, named_for_the_user
from nnunet_diffusion.cli.folders import PREPROCESSED, RAW, dataset_prefix, datasets_in, folder_in
from nnunet_diffusion.files import hidiff_plans, preprocess_command, read_dictionary, read_plans, require

CONFIGURATIONS = ("2d", "3d_fullres", "3d_lowres")
DEFAULT_PROCESSES = {"2d": 8, "3d_fullres": 4, "3d_lowres": 8}
DEFAULT_STEP_SECONDS = 1.0
PLANS_NAME = re.compile(r"[\w.-]+")
# keys that nnU-Net's planner reads
RAW_KEYS = {"labels": dict, "numTraining": int, "file_ending": str}
RAW_CURE = "correct it as nnU-Net's dataset_format.md describes it"
FINGERPRINT_KEYS = {
    "spacings": list,
    "shapes_after_crop": list,
    "foreground_intensity_properties_per_channel": dict,
}


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `plan` to the command line."""
    parser = subparsers.add_parser(
        "plan", help="plan nnU-Net and the denoiser for a GPU's memory, or for a time per training step on this CPU"
    )
    add = parser.add_argument
    add("-d", nargs="+", required=True, metavar="ID", help="datasets, each by number or full name")
    add("-pl", default="DiffusionPlanner", metavar="PLANNER", help=f"one of {', '.join(planner_names())}")
    add(
        "-denoiser",
        choices=("pgdiffseg", "hidiff"),
        default="pgdiffseg",
        help="network to size beside nnU-Net: pgdiffseg for DiffusionTrainer, hidiff for HiDiffTrainer; DiffusionTrainerUNet "
        "needs no plans of its own",
    )
    add("-gpu_memory_target", type=float, metavar="GB", help="GPU memory to plan for (default: 8, for ResEncL 24)")
    add("-preprocessor_name", default="DefaultPreprocessor", metavar="NAME", help="nnU-Net's preprocessor")
    add(
        "-overwrite_target_spacing",
        type=float,
        nargs=3,
        metavar="MM",
        help="spacing to resample 3d_fullres to, in the order of nnU-Net's axes; for 2D images: 999 MM MM",
    )
    add("-overwrite_plans_name", metavar="NAME", help="name of the plans (default: the planner's own)")
    add(
        "-device",
        choices=("cuda", "cpu"),
        default="cuda",
        help="cpu: plan for a time per training step, measured now on this machine",
    )
    add(
        "-step_seconds",
        type=float,
        metavar="S",
        help=f"seconds per training step to plan for, with -device cpu (default {DEFAULT_STEP_SECONDS:g})",
    )
    add(
        "--explain", action="store_true", help="print each choice, the rule behind it, and what other widths would cost"
    )
    add("--preprocess", action="store_true", help="preprocess the configurations that are not preprocessed yet")
    add(
        "-c",
        nargs="+",
        metavar="CONFIG",
        help=f"with --preprocess: configurations to preprocess (default: {' '.join(CONFIGURATIONS)})",
    )
    add(
        "-np",
        type=int,
        nargs="+",
        metavar="N",
        help="with --preprocess: number of processes, one for all or one per configuration",
    )
    add("--verbose", action="store_true", help="show the output of nnU-Net's planner")
    parser.set_defaults(run=run)


def planner_names() -> list[str]:
    """Return the names of the planners in nnunet_diffusion.planners, which are those of its modules."""
    import nnunet_diffusion.planners

    return sorted(module.name for module in pkgutil.iter_modules(nnunet_diffusion.planners.__path__))


def run(options: argparse.Namespace) -> int:
    """Plan each dataset, and preprocess it with `--preprocess`.

    Raises:
        CommandError: the environment, a dataset or an option is not valid for planning.
    """
    check_options(options)
    for name_or_id in options.d:
        dataset = find_raw_dataset(name_or_id, os.environ)
        with planning_threads():
            plans, following = plan(dataset, options)
        if options.preprocess:
            preprocess(dataset, plans, options)
        print(following)
    return 0


def check_options(options: argparse.Namespace) -> None:
    """Raise CommandError if options contradict each other or are out of range."""
    if options.pl not in planner_names():
        raise CommandError(f"-pl is {options.pl}; choose one of: {', '.join(planner_names())}")
    if options.step_seconds is not None and options.device != "cpu":
        raise CommandError("-step_seconds plans for a CPU: add -device cpu, or leave -step_seconds out")
    for name in ("gpu_memory_target", "step_seconds"):
        value = getattr(options, name)
        if value is not None and not 0 < value < float("inf"):
            raise CommandError(f"-{name} is {value:g}, but must be a positive number")
    for edge in options.overwrite_target_spacing or ():
        if not 0 < edge < float("inf"):
            raise CommandError(f"-overwrite_target_spacing has {edge:g}, but all three numbers must be positive")
    if options.overwrite_plans_name is not None and not PLANS_NAME.fullmatch(options.overwrite_plans_name):
        raise CommandError(
            f"-overwrite_plans_name is '{options.overwrite_plans_name}', but may have only letters, digits "
            "and the characters _ - ."
        )
    for name in ("c", "np"):
        if getattr(options, name) is not None and not options.preprocess:
            raise CommandError(f"-{name} needs --preprocess: add that, or leave -{name} out")
    names = options.c or list(CONFIGURATIONS)
    if options.np is not None and len(options.np) not in (1, len(names)):
        raise CommandError(
            f"-np has {len(options.np)} numbers, but must have one, or one for each configuration ({' '.join(names)})"
        )
    if options.np is not None and min(options.np) < 1:
        raise CommandError(f"-np is {min(options.np)}, but must be at least 1")


def find_raw_dataset(name_or_id: str, environment: Mapping[str, str]) -> str:
    """Return the name of the raw dataset, after checking that its fingerprint exists.

    Raises:
        CommandError: a folder, the dataset or its fingerprint is missing or damaged.
    """
    raw, preprocessed = (Path(folder_in(environment, name)) for name in (RAW, PREPROCESSED))
    found = datasets_in(raw, dataset_prefix(name_or_id))
    if len(found) != 1:
        missing = f"is not in {raw}; put it there in nnU-Net's format"
        ambiguous = f"is ambiguous in {raw} ({', '.join(found)}); give each dataset a number of its own"
        raise CommandError(f"dataset {name_or_id} {ambiguous if found else missing}")
    if not (raw / found[0] / "dataset.json").is_file():
        raise CommandError(f"{raw / found[0]} has no dataset.json; write it as nnU-Net's dataset_format.md describes")
    number = int(found[0][7:10])
    fingerprint = f"nnUNetv2_extract_fingerprint -d {number} --verify_dataset_integrity"
    if not (preprocessed / found[0] / "dataset_fingerprint.json").is_file():
        raise CommandError(f"{preprocessed / found[0]} has no dataset_fingerprint.json; run: {fingerprint}")
    with named_for_the_user(ValueError):
        path = raw / found[0] / "dataset.json"
        description = read_dictionary(path, RAW_CURE, RAW_KEYS)
        require(description, {"channel_names" if "channel_names" in description else "modality": dict}, path, RAW_CURE)
        path = preprocessed / found[0] / "dataset_fingerprint.json"
        read_dictionary(path, f"run: {fingerprint} --clean", FINGERPRINT_KEYS)
    return found[0]


def plan(dataset: str, options: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Write the plans of one dataset and print their summary; return the plans and the text with the next commands."""
    # nnU-Net reads its paths when it is imported
    import multiprocessing

    import torch

    from nnunet_diffusion.planning.budgets import TimeBudget
    from nnunet_diffusion.planning.explain import explanation
    from nnunet_diffusion.planning.summary import next_commands, summary

    check_preprocessor(options.preprocessor_name)
    planner_class = getattr(importlib.import_module(f"nnunet_diffusion.planners.{options.pl}"), options.pl)
    keywords = {"gpu_memory_target_in_gb": options.gpu_memory_target, "plans_name": options.overwrite_plans_name}
    budget = None
    if options.device == "cpu":
        torch.set_num_threads(multiprocessing.cpu_count())  # as nnUNetv2_train -device cpu
        budget = TimeBudget(options.step_seconds or DEFAULT_STEP_SECONDS)
    print(f"Planning {dataset} with {options.pl} ...", flush=True)
    shown = contextlib.nullcontext() if options.verbose else contextlib.redirect_stdout(io.StringIO())
    with named_for_the_user(ValueError), shown:
        planner = planner_class(
            dataset,
            preprocessor_name=options.preprocessor_name,
            overwrite_target_spacing=options.overwrite_target_spacing,
            budget=budget,
            denoiser=options.denoiser,
            **{key: value for key, value in keywords.items() if value is not None},
        )
        if options.denoiser == "hidiff" and options.overwrite_plans_name is None:
            planner.plans_identifier = hidiff_plans(planner.plans_identifier)
        earlier = Path(os.environ[PREPROCESSED]) / dataset / f"{planner.plans_identifier}.json"
        if earlier.is_file():  # nnU-Net keeps the configurations that users added
            read_plans(earlier, "remove that file; this command then writes a new one")
        plans = planner.plan_experiment()
    print(summary(planner, plans))
    if options.explain:
        usable = torch.device("cuda" if options.device == "cuda" and torch.cuda.is_available() else "cpu")
        print(explanation(planner, plans, usable))
    return plans, next_commands(planner, plans, options.c, preprocessed=options.preprocess)


def check_preprocessor(name: str) -> None:
    """Raise CommandError if nnU-Net has no preprocessor of that name; nnU-Net itself fails only when it preprocesses."""
    import nnunetv2
    from nnunetv2.utilities.find_class_by_name import recursive_find_python_class

    folder = os.path.join(nnunetv2.__path__[0], "preprocessing", "preprocessors")
    if recursive_find_python_class(folder, name, "nnunetv2.preprocessing.preprocessors") is None:
        raise CommandError(
            f"-preprocessor_name is {name}, but nnU-Net has no such preprocessor; leave it out for DefaultPreprocessor"
        )


def preprocess(dataset: str, plans: Mapping[str, Any], options: argparse.Namespace) -> None:
    """Run nnU-Net's preprocessing for the configurations with incomplete data.

    Raises:
        CommandError: the plans have no configuration of a name given with `-c`.
    """
    from nnunetv2.experiment_planning.plan_and_preprocess_api import preprocess_dataset
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager
    from nnunetv2.utilities.utils import get_filenames_of_train_images_and_targets

    from nnunet_diffusion.planning.data_reuse import is_complete

    cases = list(get_filenames_of_train_images_and_targets(os.path.join(os.environ[RAW], dataset)))
    folder, manager = Path(os.environ[PREPROCESSED]) / dataset, PlansManager(dict(plans))
    names = options.c or list(CONFIGURATIONS)
    if options.c and (unknown := [name for name in options.c if name not in manager.available_configurations]):
        known = ", ".join(manager.available_configurations)
        raise CommandError(f"the plans of {dataset} have no configuration {', '.join(unknown)}; they have: {known}")
    processes = options.np or [DEFAULT_PROCESSES.get(name, 4) for name in names]
    processes = processes * len(names) if len(processes) == 1 else processes
    for name, number in zip(names, processes, strict=True):
        if name not in manager.available_configurations:
            continue
        identifier = manager.get_configuration(name).data_identifier
        if is_complete(folder / identifier, cases):
            print(
                f"{name}: {identifier} is preprocessed already and is used as it is; if raw files have changed since, run: "
                + preprocess_command(dataset, plans["plans_name"], name)
            )
        else:
            preprocess_dataset(int(dataset[7:10]), plans["plans_name"], [name], [number])


@contextlib.contextmanager
def planning_threads() -> Iterator[None]:
    """Replace nnUNet_n_proc_DA=0 by 1 in a `with` block, because nnU-Net's planner sets torch's threads to that number."""
    name = "nnUNet_n_proc_DA"
    before = os.environ.get(name)
    if before == "0":
        os.environ[name] = "1"
    try:
        yield
    finally:
        if before is not None:
            os.environ[name] = before
