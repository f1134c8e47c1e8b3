"""`nnunet_diffusion tune`: choose a model's inference settings by its validation cases, and write them into its plans."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

from nnunet_diffusion.cli.errors import named_for_the_user
from nnunet_diffusion.cli.models import add_fold_arguments, trained_folds
from nnunet_diffusion.files import write_json

FILE = "tuning.json"
CURE = "Free some space, then give the command again: the plans are as before."


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `tune` to the command line."""
    parser = subparsers.add_parser(
        "tune",
        help="choose T', steps, the weight of nnU-Net and a presence threshold by a model's validation cases",
        description="Measures choices of T', steps, the weight of nnU-Net's probabilities and the presence threshold on the "
        "validation cases of the trained folds, each predicted by the fold that was not trained on it. Writes the choice into "
        "the `inference` settings of the model's plans.json, where prediction reads it, and all figures into "
        f"{FILE} beside it. The preprocessed data must be there.",
    )
    add_fold_arguments(parser)
    add = parser.add_argument
    add("--start_steps", type=int, nargs="+", metavar="T'", help="T' to try (50 100 300 500 700, max_train_step)")
    add("--steps", type=int, nargs="+", metavar="N", help="steps to try (1 2 5)")
    add("--samples", type=int, help="samples of each reverse process (those of the plans)")
    add(
        "--mirror_samples",
        action=argparse.BooleanOptionalAction,
        help="whether the samples see the image mirrored in turn (as in the plans)",
    )
    add("--dry_run", action="store_true", help="leave the plans as they are")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Tune, print both tables, and write the choice.

    Raises:
        CommandError: wrong arguments, or the model or its preprocessed data cannot be read.
    """
    asked = {"samples": options.samples, "mirror_samples": options.mirror_samples}
    folds = trained_folds(options, **asked)
    # nnU-Net has been imported with its paths set
    from nnunet_diffusion.evaluation.tuning import tune

    model, predictor = folds.model, folds.predictor
    with named_for_the_user(FileNotFoundError, ValueError, NotImplementedError, MemoryError):
        tuned = tune(
            folds.predictor_of, folds.cases, folds.load, options.start_steps, options.steps,
            on_case=lambda name: print(f"{name} ...", flush=True),
        )  # fmt: skip
    used = {key: getattr(predictor.network.settings, key) for key in asked}
    print(f"\n{tuned.tables()}")
    with named_for_the_user(OSError):
        write_json({"folds": predictor.folds, **used, **tuned.to_json()}, model / FILE)
    print(f"Written to {model / FILE}")
    if options.dry_run:
        print(f"Chosen: {tuned.chosen}. The plans are as before (--dry_run).")
        return 0
    # what calibrate fitted belongs to the settings that it was fitted with
    changes = {**tuned.chosen.settings(), **used, "temperature": 0.0, "volume_half_widths": ()}
    with named_for_the_user(OSError):
        write_inference(model / "plans.json", predictor.identity["configuration"], predictor.network.settings, changes)
    alone = " (but for the presence threshold, which only nnunet_diffusion predict applies)"
    print(
        f"Chosen: {tuned.chosen}. It is in {model / 'plans.json'}, where prediction reads it. The folds' validations are still "
        "those of the settings before: nnUNetv2_train ... --val makes them again"
        f"{alone if tuned.chosen.presence_threshold else ''}."
    )
    return 0


def write_inference(path: Path, configuration: str, settings: Any, changes: dict[str, Any]) -> None:
    """Write inference settings into a model's plans.json, whose `diffusion` section gets the present layout.

    Args:
        path: path of plans.json.
        configuration: name of the model's configuration.
        settings: the model's DiffusionSettings.
        changes: inference settings that change.

    Raises:
        OSError: the file cannot be written.
    """
    from nnunet_diffusion.model.settings import PLANS_KEY
    from nnunet_diffusion.training.checkpoints import write_aside

    plans = json.loads(path.read_text(encoding="utf-8"))
    plans["configurations"][configuration][PLANS_KEY] = dataclasses.replace(settings, **changes).to_plans()
    write_aside(lambda aside: Path(aside).write_text(json.dumps(plans, indent=4), encoding="utf-8"), path, CURE)
