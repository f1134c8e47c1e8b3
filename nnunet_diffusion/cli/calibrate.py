"""`nnunet_diffusion calibrate`: fit a temperature to the validation cases of a model's folds."""

from __future__ import annotations

import argparse
import os

from nnunet_diffusion.cli.devices import DEVICES
from nnunet_diffusion.cli.errors import CommandError, named_for_the_user
from nnunet_diffusion.cli.models import add_model_arguments, finished_folds, model_folder, with_validation_cases
from nnunet_diffusion.cli.trainers_directory import with_trainers
from nnunet_diffusion.cli.tune import write_inference


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `calibrate` to the command line."""
    parser = subparsers.add_parser(
        "calibrate",
        help="fit a temperature, with which predict --calibrated scales the probabilities",
        description="Predicts the validation cases of the folds with the settings of the plans and fits one temperature by "
        "negative log-likelihood to the voxels near borders. Writes it into the model's plans.json. The preprocessed data "
        "must be there. Tune first: other settings of prediction need another temperature.",
    )
    add = parser.add_argument
    add_model_arguments(parser)
    add("-f", nargs="+", metavar="FOLD", help="folds (all that are finished)")
    add("-device", default="cuda", choices=DEVICES)
    add(
        "--cases",
        type=int,
        metavar="N",
        help="number of validation cases of each fold, evenly spaced in their list (all)",
    )
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Fit the temperature, print what it does, and write it.

    Raises:
        CommandError: wrong arguments, or the model or its preprocessed data cannot be read.
    """
    if options.cases is not None and options.cases < 1:
        raise CommandError(f"--cases is {options.cases}, but must be 1 or more")
    model = model_folder(options, os.environ)
    if not os.access(model, os.W_OK):
        raise CommandError(
            f"{model} cannot be written, but the temperature belongs into its plans.json: make it writable"
        )
    folds = options.f or finished_folds(model, options.chk)
    os.environ.update(with_trainers(os.environ))
    # nnU-Net reads its paths from the environment: import it only now
    from nnunet_diffusion.evaluation.temperature import fit
    from nnunet_diffusion.evaluation.tuning import with_fold

    predictor, found, load = with_validation_cases(model, folds, options, os.environ)
    cases = [(fold, name) for fold, names in found.items() for name in names]
    predictors = {fold: with_fold(predictor, place) for place, fold in enumerate(predictor.folds)}
    with named_for_the_user(FileNotFoundError, ValueError, NotImplementedError, MemoryError):
        fitted = fit(predictors, cases, load, lambda name: print(f"{name} ...", flush=True))
    plans = model / "plans.json"
    with named_for_the_user(OSError):
        changes = {"temperature": fitted.temperature}
        write_inference(plans, predictor.identity["configuration"], predictor.network.settings, changes)
    if fitted.is_at_an_end:
        print("The temperature is at the end of the range that is searched: the probabilities are far from calibrated.")
    print(
        f"\nVoxels within 5 voxels of a border, {len(cases)} validation cases:\n\n{fitted.table()}\n"
        f"The temperature of all cases is {fitted.temperature:.3f}. It is in {plans}; nnunet_diffusion predict --calibrated "
        "uses it."
    )
    return 0
