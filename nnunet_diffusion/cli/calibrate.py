"""`nnunet_diffusion calibrate`: fit a temperature and the volumes' intervals to the validation cases of a model's folds."""

from __future__ import annotations

import argparse

from nnunet_diffusion.cli.errors import named_for_the_user
from nnunet_diffusion.cli.models import add_fold_arguments, trained_folds
from nnunet_diffusion.cli.tune import write_inference


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `calibrate` to the command line."""
    parser = subparsers.add_parser(
        "calibrate",
        help="fit the temperature and the volumes' intervals that predict --calibrated uses",
        description="Predicts the validation cases of the folds as predict --uncertainty does and fits one temperature by "
        "negative log-likelihood to the voxels near borders, and for each class the level sets of the probabilities between "
        "which nine of ten true volumes lie. Writes them into the model's plans.json. The preprocessed data must be there. "
        "Tune first: other settings of prediction need another calibration.",
    )
    add_fold_arguments(parser)
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Fit both, print what they do, and write them.

    Raises:
        CommandError: wrong arguments, or the model or its preprocessed data cannot be read.
    """
    folds = trained_folds(options, uncertainty=True)
    # nnU-Net has been imported with its paths set
    from nnunet_diffusion.evaluation.calibrate import fit
    from nnunet_diffusion.inference.report import foreground_names

    with named_for_the_user(FileNotFoundError, ValueError, NotImplementedError, MemoryError):
        fitted = fit(folds.predictor_of, folds.cases, folds.load, lambda name: print(f"{name} ...", flush=True))
    predictor = folds.predictor
    plans = folds.model / "plans.json"
    with named_for_the_user(OSError):
        changes = {"temperature": fitted.temperature, "volume_half_widths": fitted.half_widths}
        # not the settings that uncertainty samples with: plain prediction stays as it was
        write_inference(plans, predictor.identity["configuration"], predictor.planned, changes)
    if fitted.is_at_an_end:
        print("The temperature is at the end of the range that is searched: the probabilities are far from calibrated.")
    print(
        f"\nVoxels within 5 voxels of a border, {len(folds.cases)} validation cases:\n\n{fitted.table()}\n"
        f"The temperature of all cases is {fitted.temperature:.3f}. "
        f"{fitted.about_volumes(foreground_names(predictor.label_manager))}\n"
        f"The calibration is in {plans}; nnunet_diffusion predict --calibrated uses it."
    )
    return 0
