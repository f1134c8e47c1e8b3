"""What runs in a container: `python -m nnunet_diffusion.container.entry`, one process without network."""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import sys
import time
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nnunet_diffusion.cli.errors import first_line
from nnunet_diffusion.cli.trainers_directory import with_trainers
from nnunet_diffusion.files import COMPILE, read_dictionary

OK, SOME_FAILED, BAD_INPUT, BAD_MODEL, NO_MEMORY, NO_OUTPUT = range(6)
"""Exit codes; NO_OUTPUT also stands for errors that nobody expected."""
GRAND_CHALLENGE, FOLDER = INTERFACES = ("grand-challenge", "folder")
ENDINGS = (".mha", ".nii.gz", ".nii", ".nrrd", ".tif", ".tiff", ".png")
MOST_THREADS = 8  # each library has as many, and a container may have no more than 128 processes and threads
THREADS = (
    "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMEXPR_MAX_THREADS", "BLOSC_NTHREADS",
    "ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS", "nnUNet_def_n_proc",
)  # fmt: skip
NNUNETS_FOLDERS = ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results")


@dataclass(frozen=True)
class Case:
    """An image and where its results belong.

    Attributes:
        name: of its output, for messages; on Grand Challenge of its first image.
        files: one for each channel, or one with all channels.
        segmentation: path of the label map.
        others: path pattern of the other results, in which {} stands for a slug.
    """

    name: str
    files: tuple[Path, ...]
    segmentation: Path
    others: str


def ending_of(name: str) -> str | None:
    """Return the ending of an image's file name; None if it is of no known format."""
    return next((ending for ending in ENDINGS if name.lower().endswith(ending)), None)


def _images_in(folder: Path) -> list[Path]:
    found = sorted(folder.iterdir()) if folder.is_dir() else []
    return [path for path in found if path.is_file() and path.name[0] != "." and ending_of(path.name)]


def challenge_case(source: Path, target: Path, settings: Mapping[str, Any]) -> Case:
    """Return the case that Grand Challenge gives to a run.

    Args:
        source: folder with `inputs.json` and `images/SLUG/FILE`.
        target: folder for `images/SLUG/output.mha`.
        settings: of the container, with input_slugs and output_slug.

    Raises:
        ValueError: `inputs.json` is missing or damaged, its sockets are not those of this container, or a socket has not one
            image. The message tells what was found and what is known.
    """
    path, known = source / "inputs.json", settings["input_slugs"]
    folders = _sockets(path)
    if sorted(folders) != sorted(known):
        raise ValueError(
            f"{path} has the sockets {', '.join(sorted(folders)) or '(none)'}, but this container knows "
            f"{', '.join(sorted(known))}: choose these sockets for the phase, or build with --input-slug"
        )
    files = []
    for slug in known:
        folder = source / folders[slug]
        images = _images_in(folder)
        if len(images) != 1:
            raise ValueError(f"{folder} has {len(images)} images ({', '.join(ENDINGS)}), but must have one")
        files += images
    others = str(target / "images" / "{}" / "output.mha")
    return Case(files[0].name, tuple(files), Path(others.format(settings["output_slug"])), others)


def _sockets(path: Path) -> dict[str, str]:
    """Return slug -> folder of its image, relative to the input."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        sockets = [value.get("socket") or value["interface"] for value in content]
        return {each["slug"]: each.get("relative_path") or f"images/{each['slug']}" for each in sockets}
    except OSError as error:
        raise ValueError(
            f"{path} is missing or cannot be read: Grand Challenge writes it; for other input build with --interface folder"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a list of sockets with slugs, as Grand Challenge writes it") from error


def folder_cases(source: Path, target: Path, settings: Mapping[str, Any]) -> list[Case]:
    """Return the cases of a folder: those named as nnU-Net names them (`CASE_0000.mha` and so on), and one of each other file.

    Args:
        source: folder of the images.
        target: folder for `CASE.mha`, and `SLUG/CASE.mha` of the other results.
        settings: of the container, with channels.

    Raises:
        ValueError: there is no image, or two cases have the same output.
    """
    names = {path.name for path in _images_in(source)}
    cases: dict[str, Case] = {}
    channels = [f"_{number:04d}" for number in range(settings["channels"])]
    left = set(names)
    for name in sorted(names):
        ending = name[-len(ending_of(name) or "") :]
        stem = name.removesuffix(ending)
        group = [name]
        if stem.endswith("_0000"):
            stem = stem.removesuffix("_0000")
            together = [f"{stem}{channel}{ending}" for channel in channels]
            group = together if left.issuperset(together) else group
        elif name not in left or (match := re.fullmatch(r"(.+)_\d{4}", stem)) and f"{match[1]}_0000{ending}" in names:
            if name in left and settings["channels"] == 1:
                raise ValueError(f"{source / name} is a second channel, but the model has one: remove it, or rename it")
            continue
        left -= set(group)
        output = f"{stem}{ending}"
        if output in cases:
            raise ValueError(
                f"{source} has {cases[output].files[0].name} and {name}, but both would be written to {output}"
            )
        number_ending = ".tif" if ending.lower() == ".png" else ending
        files = tuple(source / each for each in group)
        cases[output] = Case(output, files, target / output, str(target / "{}" / f"{stem}{number_ending}"))
    if not cases:
        raise ValueError(f"{source} has no image ({', '.join(ENDINGS)}): mount the folder of the images there")
    return list(cases.values())


def main(arguments: Sequence[str] | None = None) -> int:
    """Segment what lies in the input folder, and return the exit code. Each error is one line on standard error.

    Args:
        arguments: --input, --output, --model and --settings; None for those of this process.

    Returns:
        0: done. 1: some cases of a folder failed. 2: the input is wrong. 3: the model or its settings are wrong. 4: there is
        too little memory. 5: nothing can be written, or another error.
    """
    parser = argparse.ArgumentParser(prog="python -m nnunet_diffusion.container.entry", description=__doc__)
    parser.add_argument("--input", type=Path, default=Path("/input"))
    parser.add_argument("--output", type=Path, default=Path("/output"))
    parser.add_argument("--model", type=Path, default=Path("/opt/ml/model"))
    parser.add_argument("--settings", type=Path, default=Path("/opt/app/container.json"))
    options = parser.parse_args(arguments)
    set_environment()
    try:
        settings = read_dictionary(options.settings, "write the container's folder again", {"interface": str})
        model = _load(options.model, settings)
    except Exception as error:
        return _fail(error, BAD_MODEL)
    try:
        find = challenge_case if settings["interface"] == GRAND_CHALLENGE else folder_cases
        found = find(options.input, options.output, settings)
    except Exception as error:
        return _fail(error, BAD_INPUT)
    if isinstance(found, Case):
        return run_case(model, found, settings)
    codes = [run_case(model, case, settings) for case in found]
    print(f"{codes.count(OK)} of {len(codes)} cases are in {options.output}", flush=True)
    return SOME_FAILED if any(codes) else OK


def set_environment() -> None:
    """Set variables that libraries read when they are imported: few threads, no files but in /tmp, and where trainers are."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    for name in THREADS:
        os.environ.setdefault(name, str(min(cores, MOST_THREADS)))
    for name in NNUNETS_FOLDERS:  # nnU-Net warns if they are not set; nothing is read or written there
        os.environ.setdefault(name, "/tmp")
    os.environ[COMPILE] = "f"
    logging.getLogger("nibabel.global").setLevel(logging.ERROR)  # its warnings of headers that are refused
    os.environ.update(with_trainers(os.environ))


def _load(folder: Path, settings: Mapping[str, Any]) -> Any:
    from nnunet_diffusion.container.prediction import Model

    threads = int(os.environ["OMP_NUM_THREADS"])
    keys = ("folds", "checkpoint", "samples", "calibrated")
    uncertainty = settings["uncertainty_slug"] is not None
    return Model(folder, threads=threads, uncertainty=uncertainty, **{key: settings[key] for key in keys})


def run_case(model: Any, case: Case, settings: Mapping[str, Any]) -> int:
    """Segment a case and write its results, all or none. Return an exit code."""
    from nnunet_diffusion.container.images import read_case, write_result
    from nnunet_diffusion.container.prediction import deadline_of, memory_limit

    begin, written = time.perf_counter(), []
    try:
        limit = memory_limit(settings["memory_gib"])
        image = read_case(case.files, model.reader, limit)
        deadline = deadline_of(begin, settings["seconds_per_case"])
        result = model.predict(str(case.files[0]), image, limit, deadline)
        outputs = {}
        for slug, values in zip(settings["probabilities_slugs"], model.class_probabilities(result), strict=False):
            outputs[Path(case.others.format(slug))] = values
        if settings["uncertainty_slug"] is not None:
            outputs[Path(case.others.format(settings["uncertainty_slug"]))] = model.entropy(result)
        outputs[case.segmentation] = result.segmentation
        for path, values in outputs.items():
            write_result(values, path, image)
            written.append(path)
    except Exception as error:
        for path in written:
            path.unlink(missing_ok=True)
        return _fail(error, prefix=f"{case.name}: ")
    print(f"{case.name}: {time.perf_counter() - begin:.1f} s", flush=True)
    return OK


def _fail(error: Exception, code: int | None = None, prefix: str = "") -> int:
    """Print an error in one line, and return its exit code."""
    lack = isinstance(error, MemoryError) or re.search(r"out of memory|can't allocate memory", str(error)) is not None
    if code is None:
        code = NO_MEMORY if lack else BAD_INPUT if isinstance(error, ValueError) else NO_OUTPUT
    text = " ".join(str(error).split()) if isinstance(error, (ValueError, OSError, MemoryError)) else first_line(error)
    expected = isinstance(error, (ValueError, OSError, NotImplementedError)) or lack
    if not expected:
        traceback.print_exception(error, file=sys.stdout)
        text = f"unexpected {type(error).__name__}: {text}"
    print(f"error {code}: {prefix}{text}", file=sys.stderr, flush=True)
    return code


if __name__ == "__main__":
    # errors are one line: what libraries written in C print goes to standard output
    sys.stderr = os.fdopen(os.dup(2), "w")
    os.dup2(1, 2)
    sys.exit(main())
