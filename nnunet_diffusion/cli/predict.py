"""`nnunet_diffusion predict`: nnUNetv2_predict's arguments and those of the reverse process."""

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
from nnunet_diffusion.cli.models import finished_folds, model_folder
from nnunet_diffusion.cli.trainers_directory import with_trainers
from nnunet_diffusion.files import find_images, read_dictionary, refuse_overwriting
from nnunet_diffusion.jobs.signals import EXIT_INTERRUPTED, EXIT_TERMINATED, Terminated, stopped

# what diffusion.samplers and inference.fusion know, without their imports: help must not wait for torch
SAMPLERS = ("ddpm", "ddim", "dpm_solver", "dpm_solver++", "unipc")
FUSIONS = ("mean", "majority", "staple")


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `predict` to the command line."""
    parser = subparsers.add_parser(
        "predict",
        help="segment images: one reverse process per volume, any sampler, any pre-segmentation",
        description="nnUNetv2_predict for models of DiffusionTrainer, with one reverse process per volume. Mirroring applies "
        "to the pre-segmentation only. What is not given comes from the model's plans.",
    )
    _add_arguments_of_nnunet(parser)
    _add_own_arguments(parser)
    parser.set_defaults(run=run)


def _add_arguments_of_nnunet(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-i", required=True, metavar="FOLDER", help="images, with channel numbers (_0000)")
    add("-o", required=True, metavar="FOLDER", help="output; made if it does not exist")
    add("-d", metavar="ID", help="dataset, number or name")
    add("-p", help="plans (those of the one trained model)")
    add("-tr", help="trainer of the model (that of the one trained model)")
    add("-c", metavar="CONFIG", help="configuration, for example 2d (that of the one trained model)")
    add("-m", metavar="FOLDER", help="model folder, in the place of -d, -p, -tr and -c")
    add("-f", nargs="+", metavar="FOLD", help="folds (all that are finished)")
    add("-step_size", type=float, default=0.5, help="step of the tiles, share of the patch, at most 1 (0.5)")
    add("--disable_tta", action="store_true", help="do not mirror the pre-segmentation: faster, less accurate")
    add("--verbose", action="store_true")
    add("--save_probabilities", action="store_true", help="also write .npz, for nnUNetv2_ensemble")
    add("--continue_prediction", action="store_true", help="leave out cases that are finished, with the same settings")
    add("-chk", default="checkpoint_final.pth", help="checkpoint (checkpoint_final.pth)")
    add("-npp", type=int, default=_number_in("nnUNet_npp"), help="processes that preprocess (by cores and cases)")
    add("-nps", type=int, default=_number_in("nnUNet_nps"), help="processes that write (by cores and cases)")
    add("-prev_stage_predictions", metavar="FOLDER", help="segmentations of the cascade's previous stage")
    add("-num_parts", type=int, default=1, help="calls that share the images (1)")
    add("-part_id", type=int, default=0, help="which of them this is, from 0")
    add("-device", default="cuda", choices=DEVICES)
    add("--disable_progress_bar", action="store_true")
    add("--not_on_device", action="store_true", help="keep volumes in the CPU's memory")


def _number_in(variable: str) -> int | None:
    """Number in an environment variable that nnU-Net reads too; None for anything else."""
    text = os.environ.get(variable, "")
    return int(text) if text.isdecimal() else None


def _add_own_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("reverse process")
    add = group.add_argument
    add("--sampler", choices=SAMPLERS)
    add("--steps", type=int, help="evaluations of one reverse process")
    add("--start_step", type=int, help="T' of PD-DDPM: noising steps at the start")
    add("--samples", type=int, help="reverse processes; probabilities are their mean")
    add(
        "--presegmentation_weight",
        type=float,
        help="share of the pre-segmentation's probabilities in the result, 0 to 1",
    )
    add("--fusion", choices=FUSIONS, default="mean", help="of samples to a segmentation (mean)")
    add("--keep_samples", action="store_true", help="write each sample to OUT/samples")
    add("--seed", type=int, help="of the noise")
    add("--presegmentation", metavar="FOLDER", help="segmentations or .npz probabilities to start from")
    add("--tile_wise", action="store_true", help="one reverse process per tile, as stock prediction has it")
    add("--sequential", action="store_true", help="no further processes, as -npp 0 -nps 0")
    add(
        "--state_memory",
        type=float,
        metavar="GIB",
        help="memory of the device that a volume's state may take (what is free)",
    )
    add(
        "--threads",
        type=int,
        metavar="N",
        help="of the CPU; results depend on it in the last bits (cores; with a GPU 1)",
    )
    add("--deterministic", action="store_true", help="the same bits on a GPU in each run; slower")
    add("--trust_checkpoint", action="store_true", help="load a checkpoint that may run code")
    add("--quiet", action="store_true", help="print errors only")


def run(options: argparse.Namespace) -> int:
    """Predict; returns 0, 1 if a case failed or an image was left out, 130 or 143 if interrupted or terminated.

    Raises:
        CommandError: wrong arguments, or the model cannot be loaded.
    """
    check_options(options)
    model = model_folder(options, os.environ)
    folds = options.f or finished_folds(model, options.chk)
    check_names(options, model)
    os.environ.update(with_trainers(os.environ))
    predictor = None
    with _silence(options.quiet), stopped(lambda code: None):
        try:
            predictor = _loaded_predictor(options, model, folds)
            return _predict(predictor, options)
        except (KeyboardInterrupt, Terminated) as stop:
            interrupted = isinstance(stop, KeyboardInterrupt)
            print(f"nnunet_diffusion predict: {_stopped(predictor, options, interrupted)}", file=sys.stderr)
            return EXIT_INTERRUPTED if interrupted else EXIT_TERMINATED


def _stopped(predictor: Any, options: argparse.Namespace, interrupted: bool) -> str:
    """Say how far a run got that was told to end, and how to go on."""
    what = "interrupted" if interrupted else "terminated"
    if predictor is None or predictor.progress is None:
        return f"{what} before the first case; run the same command again"
    done = f"{predictor.progress.finished} of {predictor.progress.total} cases are finished"
    return f"{what}, {done} in {options.o}; go on with --continue_prediction"


def check_options(options: argparse.Namespace) -> None:
    """Raise CommandError on arguments that do not go together, and on folders that are not there."""
    for name in ("i", "presegmentation", "prev_stage_predictions"):
        folder = getattr(options, name)
        if folder is not None and not Path(folder).is_dir():
            wrong = (
                "is a file: give the folder that it is in" if Path(folder).exists() else "does not exist: correct it"
            )
            raise CommandError(f"-{'-' * (name == 'presegmentation')}{name} is {folder}, which {wrong}")
    if Path(options.o).exists() and not Path(options.o).is_dir():
        raise CommandError(f"-o is {options.o}, which is a file: give a folder for the output")
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
    """Name the images that will be left out.

    Raises:
        CommandError: no image is named as nnU-Net wants it, two give one output, or the output would overwrite input.
    """
    with named_for_the_user(FileNotFoundError, ValueError):
        description = read_dictionary(
            model / "dataset.json", "bring it back from where the model was trained", {"file_ending": str}
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
    # nnU-Net reads its paths from the environment: import it only now
    import torch

    from nnunet_diffusion.inference import DiffusionPredictor

    check_device(options.device)
    with named_for_the_user(FileNotFoundError, ValueError, RuntimeError):
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
            samples=options.samples,
            seed=options.seed,
            presegmentation_weight=options.presegmentation_weight,
            fusion=options.fusion,
            joint=not options.tile_wise,
            keep_samples=options.keep_samples,
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


@contextlib.contextmanager
def _silence(quiet: bool) -> Iterator[None]:
    """Swallow what nnU-Net prints, not its errors."""
    if not quiet:
        yield
        return
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        yield
