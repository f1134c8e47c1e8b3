"""`nnunet_diffusion container`: the folder from which a model's Docker image is built."""

from __future__ import annotations

import argparse
import os
import re
from pathlib import Path
from typing import Any

from nnunet_diffusion.cli.errors import CommandError, named_for_the_user
from nnunet_diffusion.cli.models import add_model_arguments, finished_folds, model_folder
from nnunet_diffusion.cli.trainers_directory import with_trainers

# those of container.entry, which this module need not import for --help
GRAND_CHALLENGE, FOLDER = INTERFACES = ("grand-challenge", "folder")
LEAST_MEMORY = 2.0


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `container` to the command line."""
    parser = subparsers.add_parser(
        "container",
        help="write what builds a Docker image of a model, for Grand Challenge or for a folder of images",
        description="Writes a folder with Dockerfile, the program, the model (model.tar.gz, apart from the image), a test "
        "image, and the scripts build.sh, test.sh and save.sh for docker or podman. Plain nnU-Net's models are taken, too.",
    )
    add = parser.add_argument
    add_model_arguments(parser)
    add("-f", nargs="+", metavar="FOLD", help="folds (all finished folds)")
    add("-o", required=True, metavar="FOLDER", help="new folder; its name is that of the image")
    add("--interface", required=True, choices=INTERFACES, help="Grand Challenge's sockets, or all images of a folder")
    add("--device", default="cpu", choices=("cpu", "cuda"), help="what PyTorch is installed for (cpu)")
    add(
        "--input-slug",
        nargs="+",
        default=["image"],
        metavar="SLUG",
        help="sockets of the channels, in their order (image)",
    )
    add("--output-slug", default="segmentation", metavar="SLUG", help="socket of the label map (segmentation)")
    add(
        "--probabilities-slug",
        nargs="+",
        metavar="SLUG",
        help="sockets of the probabilities, one for each foreground class",
    )
    add("--uncertainty-slug", metavar="SLUG", help="socket of the entropy, in nats")
    add(
        "--multi-rater",
        action="store_true",
        help="probabilities of all classes, and score.sh, which compares with raters",
    )
    add("--memory", type=float, default=16.0, metavar="GIB", help="of the container, of which 1 GiB is left free (16)")
    add(
        "--seconds-per-case",
        type=float,
        metavar="S",
        help="draw fewer samples, at least one, if a case would take longer",
    )
    add("--samples", type=int, metavar="N", help="number of samples (the model's, or that of predict --uncertainty)")
    add("--calibrated", action="store_true", help="probabilities at the temperature of nnunet_diffusion calibrate")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Write the folder. Return 0.

    Raises:
        CommandError: wrong arguments, or the model cannot be loaded.
    """
    check_options(options)
    folder = model_folder(options, os.environ)
    folds = options.f or finished_folds(folder, options.chk)
    os.environ.update(with_trainers(os.environ))
    # nnU-Net prints about its variables when it is imported: import it only now
    from nnunet_diffusion.container.context import write_context
    from nnunet_diffusion.container.prediction import Model

    with named_for_the_user(OSError, ValueError, NotImplementedError):
        uncertainty = options.uncertainty_slug is not None
        model = Model(folder, folds, options.chk, 1, options.samples, options.calibrated, uncertainty)
        settings = _settings(options, folds, model)
        write_context(Path(options.o), folder, model, settings, options.device, options.multi_rater)
    print(f"Written to {options.o}. Next: {options.o}/build.sh, {options.o}/test.sh, {options.o}/save.sh")
    return 0


def check_options(options: argparse.Namespace) -> None:
    """Raise CommandError if an argument is out of range, or if the folder is not empty."""
    folder = Path(options.o)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise CommandError(f"-o is {folder}, which is there already: give a new or empty folder")
    if not LEAST_MEMORY <= options.memory < float("inf"):
        raise CommandError(f"--memory is {options.memory:g}, but must be {LEAST_MEMORY:g} GiB or more")
    if options.seconds_per_case is not None and not 0 < options.seconds_per_case < float("inf"):
        raise CommandError(f"--seconds-per-case is {options.seconds_per_case:g}, but must be above 0")
    given = [*options.input_slug, options.output_slug, *(options.probabilities_slug or []), options.uncertainty_slug]
    for slug in given:
        if slug is not None and not re.fullmatch(r"[a-z0-9]+(-[a-z0-9]+)*", slug):
            raise CommandError(f"'{slug}' is not a slug: give lower-case letters, digits and dashes, such as ct-image")
    outputs = [slug for slug in given[len(options.input_slug) :] if slug is not None]
    for slugs in (options.input_slug, outputs):
        if len(set(slugs)) < len(slugs):
            raise CommandError(f"the slugs {', '.join(slugs)} are not all different: each socket has its own")


def _settings(options: argparse.Namespace, folds: list[str], model: Any) -> dict[str, Any]:
    from nnunet_diffusion.container.context import slug_of

    if len(options.input_slug) not in (1, model.channels):
        raise CommandError(
            f"--input-slug has {len(options.input_slug)} slugs, but the model has {model.channels} channels: give one for "
            "each, or one for an image that has them all"
        )
    maps = options.probabilities_slug
    if maps is None:
        maps = [f"{slug_of(name)}-probability" for name in model.classes] if options.multi_rater else []
    if maps and len(maps) != len(model.classes):
        raise CommandError(
            f"--probabilities-slug has {len(maps)} slugs, but must have one for each of {', '.join(model.classes)}"
        )
    if options.seconds_per_case is not None and model.samples < 2:
        raise CommandError(
            f"--seconds-per-case leaves samples out, but the model draws {model.samples}: give --samples 2 or more"
            + ("" if model.is_diffusion else ", which plain nnU-Net has not")
        )
    return {
        "interface": options.interface,
        "folds": folds,
        "checkpoint": options.chk,
        "channels": model.channels,
        "samples": options.samples,
        "calibrated": options.calibrated,
        "input_slugs": options.input_slug,
        "output_slug": options.output_slug,
        "probabilities_slugs": maps,
        "uncertainty_slug": options.uncertainty_slug,
        "memory_gib": options.memory,
        "seconds_per_case": options.seconds_per_case,
        "dataset": model.predictor.dataset_json,
    }
