"""`nnunet_diffusion sweep`: mean and variance of Dice against the number of network evaluations, for every sampler."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from nnunet_diffusion.cli.devices import DEVICES
from nnunet_diffusion.cli.errors import CommandError, named_for_the_user
from nnunet_diffusion.cli.folders import refuse_file_as_output
from nnunet_diffusion.cli.models import add_model_arguments, finished_folds, model_folder, with_validation_cases
from nnunet_diffusion.cli.predict import SAMPLERS
from nnunet_diffusion.cli.stopping import until_stopped
from nnunet_diffusion.cli.trainers_directory import with_trainers
from nnunet_diffusion.files import COMPILE

FOLDER, FIGURE = "sweep", "sweep.png"
STEPS = (1, 2, 3, 5, 7, 10, 20, 50, 100)
# the names in evaluation.sweep_results, repeated here so that --help does not import torch
STARTS = ("noise", "presegmentation")


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `sweep` to the command line."""
    parser = subparsers.add_parser(
        "sweep",
        help="draw a model's Dice against the number of evaluations, for every sampler",
        description="Measures the denoiser alone on the validation cases of one fold: mean and variance of Dice over several "
        "seeds, for every sampler and number of steps, from noise and from nnU-Net's segmentation, with nnU-Net as a line "
        "(PGDiffSeg, Fig. 10 and 11). Writes sweep.csv, sweep_summary.csv and sweep.png. Finished cases are kept: the same "
        "command continues. The preprocessed data must be there.",
    )
    add = parser.add_argument
    add_model_arguments(parser)
    add("-f", metavar="FOLD", help="fold (the first that is finished)")
    add("-o", metavar="FOLDER", help=f"output folder ({FOLDER} in the fold's folder)")
    add("-device", default="cuda", choices=DEVICES)
    add("--cases", type=int, metavar="N", help="number of validation cases, evenly spaced in their list (all)")
    add("--samplers", nargs="+", default=SAMPLERS, choices=SAMPLERS, help="samplers (all that the model can use)")
    add("--starts", nargs="+", default=STARTS, choices=STARTS, help="starts (both)")
    add("--steps", type=int, nargs="+", default=STEPS, metavar="N", help=f"steps ({' '.join(map(str, STEPS))})")
    add("--start_step", type=int, metavar="T'", help="T' of the start from nnU-Net's segmentation (the model's)")
    add("--seeds", type=int, default=5, metavar="N", help="number of seeds, 0 to N - 1 (5); a variance needs two")
    add("--overwrite", action="store_true", help="measure finished cases again")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the sweep. Return 0; 130 if interrupted; 143 if terminated.

    Raises:
        CommandError: wrong arguments, the model or its preprocessed data cannot be read, or the output folder has cases of
            other settings or cannot be written.
    """
    check_options(options)
    model = model_folder(options, os.environ)
    fold = options.f or finished_folds(model, options.chk)[0]
    folder = Path(options.o) if options.o is not None else model / f"fold_{fold}" / FOLDER
    # not compiled: a sweep may continue another, and compiled networks do not give the same result in each run
    os.environ.update({**with_trainers(os.environ), COMPILE: "f"})

    def how_far() -> str:
        return f"; finished cases are kept in {folder}, and the same command without --overwrite continues"

    return until_stopped("sweep", lambda: _sweep(options, model, fold, folder), how_far)


def check_options(options: argparse.Namespace) -> None:
    """Raise CommandError if a number is out of range or the output folder is a file."""
    for name, values in (("cases", [options.cases]), ("steps", options.steps), ("seeds", [options.seeds])):
        if wrong := [value for value in values if value is not None and value < 1]:
            raise CommandError(f"--{name} is {wrong[0]}, but must be 1 or more")
    refuse_file_as_output(options.o)


def _sweep(options: argparse.Namespace, model: Path, fold: str, folder: Path) -> int:
    # nnU-Net reads its paths from the environment: import it only now
    from nnunet_diffusion.evaluation.sweep import points, sweep
    from nnunet_diffusion.evaluation.sweep_results import SUMMARY, TABLE, markdown, summarise, write_tables
    from nnunet_diffusion.explain.sweep_figure import sweep_figure

    predictor, found, load = with_validation_cases(model, [fold], options, os.environ)
    cases, seeds = found[fold], options.seeds
    with named_for_the_user(OSError, ValueError, ImportError, MemoryError):
        plan = points(
            predictor.network.settings,
            options.samplers,
            options.steps,
            options.starts,
            range(seeds),
            options.start_step,
        )
        for each in plan.left_out:
            print(f"Left out: {each}.")
        if seeds == 1:
            print("One seed gives no variance: --seeds 2 or more does.")
        print(f"{len(plan.points)} points with {plan.evaluations} evaluations of the denoiser in each case", flush=True)
        dice = sweep(predictor, cases, load, plan.points, folder, options.overwrite)
        summaries = summarise(dice)
        write_tables(dice, summaries, folder)
        dataset = predictor.plans_manager.dataset_name
        title = f"{dataset}, fold {fold}; cases: {len(cases)}, seeds: {seeds}\n{model.name}"
        sweep_figure(summaries, title, folder / FIGURE)
    print(f"\n{markdown(summaries)}\nWritten to {folder}: {TABLE}, {SUMMARY}, {FIGURE}")
    return 0
