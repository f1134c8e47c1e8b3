"""`nnunet_diffusion explain`: where a trained model looked, per flow, stage and reverse step, and why its result differs."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nnunet_diffusion.cli.devices import DEVICES
from nnunet_diffusion.cli.errors import CommandError, named_for_the_user
from nnunet_diffusion.cli.folders import refuse_file_as_output
from nnunet_diffusion.cli.models import add_model_arguments, finished_folds, model_folder, with_drawn_process
from nnunet_diffusion.cli.stopping import until_stopped
from nnunet_diffusion.cli.trainers_directory import with_trainers
from nnunet_diffusion.files import COMPILE, find_images, read_dictionary

STEPS = 5
# the names in explain.explanation, repeated here so that --help does not import torch
TARGETS = ("class", "changed")
FAILURES = (ValueError, OSError, RuntimeError, ImportError, MemoryError)  # of a case; the others are explained


def add_parser(subparsers: argparse._SubParsersAction) -> None:
    """Add `explain` to the command line."""
    parser = subparsers.add_parser(
        "explain",
        help="draw where the denoiser looked, by flow, stage and step (Grad-CAM), and why the result differs from nnU-Net's",
        description="Runs one reverse process on each case and draws a page of it (PNG and PDF) in the manner of PGDiffSeg's "
        "Fig. 6 to 8: Grad-CAM of each stage at each step, before and after parameter-shared attention, and the prior branch. "
        "A JSON file has the numbers: shares of the heat inside the truth or the result, presence, and what the result becomes "
        "without each part.",
    )
    add = parser.add_argument
    add("-i", required=True, metavar="PATH", help="folder of images with channel numbers (_0000), or one image file")
    add("-o", required=True, metavar="FOLDER", help="output folder; created if it does not exist")
    add_model_arguments(parser)
    add("-f", metavar="FOLD", help="fold (the first that is finished)")
    add("-g", metavar="FOLDER", help="ground truth, to which the shares then refer")
    add("-device", default="cuda", choices=DEVICES)
    add("--cases", nargs="+", metavar="CASE", help="names of cases in the folder (all)")
    add("--class", dest="classes", nargs="+", metavar="NAME", help="names or numbers of classes in dataset.json (all)")
    add(
        "--target",
        choices=TARGETS,
        default="class",
        help="explain the voxels of the class, or those in which it differs from nnU-Net's segmentation (class)",
    )
    add(
        "--stages", type=int, nargs="+", metavar="N", help="stages of each flow, from 1 in the order of computing (all)"
    )
    add("--steps", type=int, metavar="N", help=f"evaluations of the reverse process ({STEPS}, at most T')")
    add("--start_step", type=int, metavar="T'", help="T' of PD-DDPM (the model's)")
    add("--sampler", help="sampler (the model's)")
    add("--seed", type=int, help="seed of the noise (the model's)")
    add(
        "--voxel",
        type=int,
        nargs="+",
        metavar="N",
        help="z y x, of a 2D image y x, from 0: show what this voxel attends to",
    )
    add("--maps", action="store_true", help="also write all maps in the images' geometry")
    parser.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Explain the cases. Return 0; 1 if a case failed; 130 if interrupted; 143 if terminated.

    Raises:
        CommandError: wrong arguments, or the model cannot be loaded.
    """
    check_options(options)
    model = model_folder(options, os.environ)
    fold = options.f or finished_folds(model, options.chk)[0]
    cases, folder = find_cases(options, model)
    # gradients of compiled networks would be compiled too
    os.environ.update({**with_trainers(os.environ), COMPILE: "f"})

    def how_far() -> str:
        return f"; finished pages are in {options.o}"

    return until_stopped("explain", lambda: _explain(options, model, fold, cases, folder), how_far)


def check_options(options: argparse.Namespace) -> None:
    """Raise CommandError if a number is out of range or a path does not exist."""
    if not Path(options.i).exists():
        raise CommandError(f"-i is {options.i}, which does not exist: correct it")
    if options.g is not None and not Path(options.g).is_dir():
        raise CommandError(f"-g is {options.g}, but there is no such folder: correct it")
    refuse_file_as_output(options.o)
    if options.steps is not None and options.steps < 1:
        raise CommandError(f"--steps is {options.steps}, but must be 1 or more")


def find_cases(options: argparse.Namespace, model: Path) -> tuple[list[str], dict[str, Sequence[str]]]:
    """Return the names of the cases to explain, and the files of all cases in their folder.

    Raises:
        CommandError: there is no such case.
    """
    with named_for_the_user(FileNotFoundError, ValueError):
        description = read_dictionary(
            model / "dataset.json", "restore it from where the model was trained", {"file_ending": str}
        )
        path = Path(options.i)
        found = find_images(path if path.is_dir() else path.parent, description["file_ending"])
    files: dict[str, Sequence[str]] = dict(found.cases)
    if not path.is_dir():
        named = [name for name, images in files.items() if str(path) in map(str, images)]
        if not named:
            raise CommandError(
                f"-i is {path}, which is not named as nnU-Net names images: CASE_0000{description['file_ending']}"
            )
        return named, files
    if unknown := sorted(set(options.cases or ()) - set(files)):
        raise CommandError(
            f"--cases has {unknown[0]}, but {path} has no such case; it has {', '.join(list(files)[:10])}"
            + (" and others" if len(files) > 10 else "")
        )
    return list(options.cases or files), files


def heads_of(names: Sequence[str], numbers: Sequence[Any], asked: Sequence[str] | None, first: int) -> dict[str, int]:
    """Return class -> index among the network's outputs.

    Args:
        names: of the foreground classes or regions, in the order of the outputs.
        numbers: their labels.
        asked: names or numbers that the user gave; None for all.
        first: index of the first one, 1 if the background has an output.

    Raises:
        CommandError: a class does not exist.
    """
    every = {name: place + first for place, name in enumerate(names)}
    by_number = {str(number): name for name, number in zip(names, numbers, strict=True)}
    found = {}
    for each in names if asked is None else asked:
        name = each if each in every else by_number.get(each)
        if name is None:
            known = ", ".join(f"{name} ({number})" for number, name in by_number.items())
            raise CommandError(f"--class has {each}, but the model's classes are {known}")
        found[name] = every[name]
    return found


def _explain(
    options: argparse.Namespace, model: Path, fold: str, cases: Sequence[str], files: dict[str, Sequence[str]]
) -> int:
    print(f"Loading the model {model} (fold {fold}) ...", flush=True)
    predictor = with_drawn_process(
        options,
        model,
        fold,
        "explain",
        STEPS,
        sampler=options.sampler,
        seed=options.seed,
        samples=1,
        presegmentation_weight=0.0,
    )
    # nnU-Net reads its paths from the environment: import it only now
    from nnunet_diffusion.explain.explained_cases import Request, asked_of, explain_class
    from nnunet_diffusion.explain.explanation import NothingToExplain, ablations, reverse
    from nnunet_diffusion.inference.report import foreground_names

    manager = predictor.label_manager
    foreground = manager.foreground_regions if manager.has_regions else manager.foreground_labels
    heads = heads_of(foreground_names(manager), foreground, options.classes, 0 if manager.has_regions else 1)
    _check_units(options, predictor)
    out = Path(options.o)
    with named_for_the_user(OSError):
        out.mkdir(parents=True, exist_ok=True)
    if not os.access(out, os.W_OK):
        raise CommandError(f"-o is {out}, which cannot be written: make it writable, or choose another folder")
    voxel = None if options.voxel is None else tuple(options.voxel)
    truths = None if options.g is None else Path(options.g)
    request = Request(out, heads, options.target, voxel, truths, options.maps, tuple(options.stages or ()))
    failed = written = 0
    for name in cases:
        try:
            asked = asked_of(predictor, request, name, files[name])
            found = reverse(predictor, asked.case)
            without = ablations(found, _another_image(predictor, name, files))
        except FAILURES as error:
            print(f"nnunet_diffusion explain: {name}: {error}", file=sys.stderr)
            failed += 1
            continue
        for label in heads:
            try:
                page = explain_class(predictor, request, name, asked, found, without, label)
                print(f"{name}, {label}: {page}", flush=True)
                written += 1
            except NothingToExplain as nothing:
                print(f"{name}: nothing to explain: {nothing}", flush=True)
            except FAILURES as error:
                print(f"nnunet_diffusion explain: {name}, {label}: {error}", file=sys.stderr)
                failed += 1
    print(f"{written} pages are in {out}")
    return 1 if failed else 0


def _another_image(predictor: Any, name: str, files: Mapping[str, Sequence[str]]) -> Any:
    """Return the image of the next case in the folder, (C, *volume), that can be read; None without one."""
    import torch

    from nnunet_diffusion.explain.explained_cases import read_image

    names = list(files)
    place = names.index(name)
    for other in (*names[place + 1 :], *names[:place]):
        try:
            return torch.from_numpy(read_image(predictor, other, files[other]).data)
        except FAILURES as error:
            print(f"{name}: the image of {other} is not put in its place: {error}", file=sys.stderr)
    return None


def _check_units(options: argparse.Namespace, predictor: Any) -> None:
    """Raise CommandError if a stage does not exist, or has no attention for the voxel that is named."""
    from nnunet_diffusion.explain.units import units_of

    with named_for_the_user(NotImplementedError):
        units = units_of(predictor.network.denoiser)
    last, attended = max(unit.stage for unit in units), sorted({unit.stage for unit in units if unit.attended})
    for stage in options.stages or ():
        if not 1 <= stage <= last:
            raise CommandError(f"--stages has {stage}, but the flows of this model have stages 1 to {last}")
    if options.voxel is not None and not attended:
        raise CommandError(
            "--voxel shows parameter-shared attention, which this model's denoiser does not have (only PGDiffSeg's has): "
            "leave it out"
        )
    if options.voxel is not None and not set(options.stages or attended) & set(attended):
        raise CommandError(
            f"--voxel shows parameter-shared attention, which this model has at stages {', '.join(map(str, attended))} only, "
            f"not at {', '.join(map(str, options.stages))} (--stages)"
        )
