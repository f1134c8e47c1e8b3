"""`nnunet_diffusion diagnose`: what a trained denoiser does with its start, on the validation cases of its fold."""

from __future__ import annotations

import argparse
import os

from nnunet_diffusion.cli.devices import DEVICES
from nnunet_diffusion.cli.errors import CommandError, named_for_the_user
from nnunet_diffusion.cli.models import add_model_arguments, finished_folds, model_folder, with_validation_cases
from nnunet_diffusion.cli.trainers_directory import with_trainers
from nnunet_diffusion.files import COMPILE, write_json

FILE = "diagnostic.json"


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `diagnose` to the command line."""
    parser = subparsers.add_parser(
        "diagnose",
        help="show whether a model's denoiser copies, uses or ignores its start",
        description="Takes one step from the truth, nnU-Net's output, an empty mask and the mask of another image at several "
        "T', and one step with parts of the denoiser switched off, on the validation cases of one fold. Prints two tables "
        f"and writes {FILE} into the fold's folder. The preprocessed data must be there.",
    )
    add = parser.add_argument
    add_model_arguments(parser)
    add("-f", metavar="FOLD", help="fold (the first that is finished)")
    add("-device", default="cuda", choices=DEVICES)
    add("--cases", type=int, metavar="N", help="number of validation cases, evenly spaced in their list (all)")
    add("--start_steps", type=int, nargs="+", metavar="T'", help="noising steps (50 100 300 500 700, max_train_step)")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Run the diagnostic and print its tables.

    Raises:
        CommandError: wrong arguments, or the model or its preprocessed data cannot be read.
    """
    if options.cases is not None and options.cases < 2:
        raise CommandError(f"--cases is {options.cases}, but must be 2 or more: one start is another case's mask")
    model = model_folder(options, os.environ)
    fold = options.f or finished_folds(model, options.chk)[0]
    # not compiled: a compiled network does not notice that a part is switched off
    os.environ.update({**with_trainers(os.environ), COMPILE: "f"})
    # nnU-Net reads its paths from the environment: import it only now
    from nnunet_diffusion.evaluation.diagnostic import diagnose

    predictor, found, load = with_validation_cases(model, [fold], options, os.environ)

    with named_for_the_user(FileNotFoundError, ValueError, MemoryError):
        measured = diagnose(
            predictor, found[fold], load, options.start_steps, lambda name: print(f"{name} ...", flush=True)
        )
    path = model / f"fold_{fold}" / FILE
    write_json(measured.to_json(), path)
    print(f"\n{measured.tables()}\nWritten to {path}")
    return 0
