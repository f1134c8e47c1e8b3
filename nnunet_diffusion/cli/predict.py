"""`nnunet_diffusion predict`: prediction with nnUNetv2_predict's arguments and those of the reverse process."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from nnunet_diffusion.cli.devices import DEVICES, check_device
from nnunet_diffusion.cli.errors import CommandError, named_for_the_user
from nnunet_diffusion.cli.folders import refuse_file_as_output
from nnunet_diffusion.cli.models import add_model_arguments, finished_folds, model_folder, settings_named_as_options
from nnunet_diffusion.cli.stopping import until_stopped
from nnunet_diffusion.cli.trainers_directory import with_trainers
from nnunet_diffusion.files import find_images, read_dictionary, refuse_overwriting

# the names in diffusion.samplers, inference.fusion and model.drawing, repeated here so that --help does not import torch
SAMPLERS = ("ddpm", "ddim", "dpm_solver", "dpm_solver++", "unipc")
FUSIONS = ("mean", "majority", "staple", "dice", "rankseg")
DRAWS = ("no", "voxels", "level")


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `predict` to the command line."""
    parser = subparsers.add_parser(
        "predict",
        help="segment images: one reverse process per volume, any sampler, any pre-segmentation",
        description="nnUNetv2_predict for diffusion models, with one reverse process per volume. Mirroring applies to the "
        "pre-segmentation and, with --mirror_samples, to the samples. Settings that are not given come from the model's plans. "
        "Defaults are in parentheses.",
    )
    _add_arguments_of_nnunet(parser)
    _add_reverse_process_arguments(parser)
    _add_output_arguments(parser)
    _add_computing_arguments(parser)
    parser.set_defaults(run=run)


def _add_arguments_of_nnunet(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-i", required=True, metavar="FOLDER", help="images, with channel numbers (_0000)")
    add("-o", required=True, metavar="FOLDER", help="output folder; created if it does not exist")
    add_model_arguments(parser)
    add("-f", nargs="+", metavar="FOLD", help="folds (all finished folds)")
    add("-step_size", type=float, default=0.5, help="step between tiles as a fraction of the patch, at most 1 (0.5)")
    add("--disable_tta", action="store_true", help="do not mirror: faster, less accurate")
    add("--verbose", action="store_true")
    add("--save_probabilities", action="store_true", help="also write .npz, for nnUNetv2_ensemble")
    add("--continue_prediction", action="store_true", help="skip cases that are finished with the same settings")
    add("-npp", type=int, default=_number_in("nnUNet_npp"), help="preprocessing processes (by cores and cases)")
    add("-nps", type=int, default=_number_in("nnUNet_nps"), help="writing processes (by cores and cases)")
    add("-prev_stage_predictions", metavar="FOLDER", help="segmentations of the cascade's previous stage")
    add("-num_parts", type=int, default=1, help="number of parts into which the images are divided (1)")
    add("-part_id", type=int, default=0, help="part to predict, from 0 (0)")
    add("-device", default="cuda", choices=DEVICES)
    add("--disable_progress_bar", action="store_true")
    add("--not_on_device", action="store_true", help="keep volumes in the CPU's memory")


def _number_in(variable: str) -> int | None:
    """Return the number in an environment variable of nnU-Net's; None if it is not set or not a number."""
    text = os.environ.get(variable, "")
    return int(text) if text.isdecimal() else None


def _add_reverse_process_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("reverse process").add_argument
    add("--sampler", choices=SAMPLERS)
    add("--steps", type=int, help="number of evaluations in one reverse process")
    add(
        "--start_step",
        type=int,
        nargs="+",
        metavar="T'",
        help="T' of PD-DDPM: number of noising steps at the start; of several values, the samples take one in turn",
    )
    add("--start_snr", type=float, help="T' as a signal-to-noise ratio, which means the same in every noise schedule")
    add(
        "--draw",
        choices=DRAWS,
        help="what is noised again between two steps: the estimate, or a mask drawn from it, voxel by voxel or a level set",
    )
    add("--samples", type=int, help="number of reverse processes, whose probabilities are averaged")
    add(
        "--mirror_samples",
        action=argparse.BooleanOptionalAction,
        help="mirror the image for the samples in turn, as nnU-Net mirrors it; for --samples 2 or more",
    )
    add(
        "--presegmentation_weight",
        type=float,
        help="weight of the pre-segmentation's probabilities in the result, 0 to 1",
    )
    add(
        "--presence_threshold",
        type=float,
        help="largest probability in the image below which a foreground class is left out, 0 to 1",
    )
    add("--seed", type=int, help="seed of the noise")
    add("--presegmentation", metavar="FOLDER", help="segmentations or .npz probabilities to start from")
    add("--tile_wise", action="store_true", help="one reverse process per tile, as in nnU-Net's own prediction")


def _add_output_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("output").add_argument
    add("--fusion", choices=FUSIONS, default="mean", help="how samples are combined into a segmentation (mean)")
    add("--keep_samples", action="store_true", help="write each sample to OUT/samples")
    add(
        "--uncertainty",
        action="store_true",
        help="write maps of uncertainty, and volumes and agreement of the samples, to OUT/uncertainty; 2 samples or more (5)",
    )
    add(
        "--figures",
        action="store_true",
        help="--uncertainty, --keep_samples, and a picture of each case; the least certain cases on a sheet",
    )
    add(
        "--calibrated",
        action="store_true",
        help="use the temperature and the volumes' intervals that nnunet_diffusion calibrate fitted",
    )
    add("--quiet", action="store_true", help="print errors only")


def _add_computing_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("computing").add_argument
    add("--sequential", action="store_true", help="use no other processes, as with -npp 0 -nps 0")
    add(
        "--state_memory",
        type=float,
        metavar="GIB",
        help="limit of the device memory for a volume's state and its tiles' conditions (the free memory)",
    )
    add(
        "--threads",
        type=int,
        metavar="N",
        help="number of CPU threads, on which the last bits of the results depend (cores; 1 with a GPU)",
    )
    add("--deterministic", action="store_true", help="identical bits in each run on a GPU; slower")
    add("--trust_checkpoint", action="store_true", help="load a checkpoint that may run code")


def run(options: argparse.Namespace) -> int:
    """Predict. Return 0; 1 if a case failed or an image was left out; 130 if interrupted; 143 if terminated.

    Raises:
        CommandError: wrong arguments, or the model cannot be loaded.
    """
    check_options(options)
    if options.figures:
        options.uncertainty = options.keep_samples = True
    model = model_folder(options, os.environ)
    folds = options.f or finished_folds(model, options.chk)
    check_names(options, model)
    os.environ.update(with_trainers(os.environ))
    predictor = None

    def work() -> int:
        nonlocal predictor
        predictor = _loaded_predictor(options, model, folds)
        code = _predict(predictor, options)
        if options.figures:
            _draw(predictor, options)
        return code

    with _silence(options.quiet):
        return until_stopped("predict", work, lambda: _how_far(predictor, options))


def _how_far(predictor: Any, options: argparse.Namespace) -> str:
    """Return how far an interrupted or terminated run got, and how to continue."""
    if predictor is None or predictor.progress is None:
        return " before the first case; run the same command again"
    done = f"{predictor.progress.finished} of {predictor.progress.total} cases are finished"
    return f", {done} in {options.o}; to continue, run the same command with --continue_prediction"


def check_options(options: argparse.Namespace) -> None:
    """Raise CommandError if arguments are out of range, or if a folder does not exist."""
    for name in ("i", "presegmentation", "prev_stage_predictions"):
        folder = getattr(options, name)
        if folder is not None and not Path(folder).is_dir():
            wrong = (
                "is a file: give the folder that it is in" if Path(folder).exists() else "does not exist: correct it"
            )
            raise CommandError(f"-{'-' * (name == 'presegmentation')}{name} is {folder}, which {wrong}")
    refuse_file_as_output(options.o)
    if not 0 <= options.part_id < options.num_parts:
        raise CommandError(f"-part_id is {options.part_id}, but must be 0 to num_parts - 1 = {options.num_parts - 1}")
    if not 0 < options.step_size <= 1:
        raise CommandError(f"-step_size is {options.step_size}, but must be above 0 and at most 1")
    for name in ("npp", "nps"):
        if (getattr(options, name) or 0) < 0:
            raise CommandError(f"-{name} is {getattr(options, name)}, but must be 0 (no further process) or more")
    if options.threads is not None and options.threads < 1:
        raise CommandError(f"--threads is {options.threads}, but must be 1 or more")
    if options.state_memory is not None and not 0 <= options.state_memory < float("inf"):
        raise CommandError(f"--state_memory is {options.state_memory:g}, but must be a number of GiB, 0 or more")
    for fold in options.f or ():
        if fold != "all" and not fold.isdecimal():
            raise CommandError(f"-f has '{fold}', but folds are 0, 1, 2, ... or 'all'")


def check_names(options: argparse.Namespace, model: Path) -> None:
    """Print the images that will be left out because of their names.

    Raises:
        CommandError: no image name follows nnU-Net's convention, two images have the same output, or the output would
            overwrite input.
    """
    with named_for_the_user(FileNotFoundError, ValueError):
        description = read_dictionary(
            model / "dataset.json", "restore it from where the model was trained", {"file_ending": str}
        )
        ending = description["file_ending"]
        images = find_images(options.i, ending)
        folders = {"-i": options.i, "--presegmentation": options.presegmentation}
        folders["-prev_stage_predictions"] = options.prev_stage_predictions
        targets = [Path(options.o, case) for case in images.cases]
        refuse_overwriting(targets, ending, list(images.cases.values()), folders)
    for name, why in images.left_out.items():
        print(f"nnunet_diffusion predict: {name} is left out: {why}", file=sys.stderr)


def _loaded_predictor(options: argparse.Namespace, model: Path, folds: list[str]) -> Any:
    print(f"Loading the model {model} (fold {', '.join(folds)}) ...", flush=True)
    # nnU-Net reads its paths from the environment when it is imported, so import it only now
    import torch

    from nnunet_diffusion.inference import DiffusionPredictor

    check_device(options.device)
    with named_for_the_user(FileNotFoundError, ValueError, RuntimeError), settings_named_as_options(options):
        predictor = DiffusionPredictor(
            tile_step_size=options.step_size,
            use_mirroring=not options.disable_tta,
            perform_everything_on_device=not options.not_on_device,
            device=torch.device(options.device),
            verbose=options.verbose,
            verbose_preprocessing=options.verbose,
            allow_tqdm=not (options.disable_progress_bar or options.quiet),
            sampler=options.sampler,
            steps=options.steps,
            start_step=options.start_step,
            start_snr=options.start_snr,
            draw=options.draw,
            samples=options.samples,
            mirror_samples=options.mirror_samples,
            seed=options.seed,
            presegmentation_weight=options.presegmentation_weight,
            presence_threshold=options.presence_threshold,
            fusion=options.fusion,
            joint=not options.tile_wise,
            keep_samples=options.keep_samples,
            uncertainty=options.uncertainty,
            calibrated=options.calibrated,
            trust_checkpoint=options.trust_checkpoint,
            state_memory_gb=options.state_memory,
            threads=options.threads,
            deterministic=options.deterministic,
        )
        predictor.initialize_from_trained_model_folder(str(model), folds, options.chk)
    return predictor


def _predict(predictor: Any, options: argparse.Namespace) -> int:
    try:
        predictor.predict_from_files(
            options.i,
            options.o,
            options.save_probabilities,
            not options.continue_prediction,
            0 if options.sequential else options.npp,
            0 if options.sequential else options.nps,
            options.prev_stage_predictions,
            options.num_parts,
            options.part_id,
            options.presegmentation,
        )
    except ValueError as error:
        raise CommandError(str(error)) from error
    except (RuntimeError, OSError) as error:
        print(f"nnunet_diffusion predict: {error}", file=sys.stderr)
        return 1
    return 0


def _draw(predictor: Any, options: argparse.Namespace) -> None:
    from nnunet_diffusion.explain.prediction_figures import draw_predictions

    ending = predictor.dataset_json["file_ending"]
    reader = predictor.plans_manager.image_reader_writer_class()
    with named_for_the_user(ValueError, OSError):
        images = find_images(options.i, ending).cases
        names = list(images)[options.part_id :: options.num_parts]
        sheet = draw_predictions(Path(options.o), {name: images[name] for name in names}, ending, reader)
    if sheet is not None:
        print(f"The least certain cases: {sheet}", flush=True)


@contextlib.contextmanager
def _silence(quiet: bool) -> Iterator[None]:
    """Suppress standard output in a `with` block if `quiet`; errors are still shown."""
    if not quiet:
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield
