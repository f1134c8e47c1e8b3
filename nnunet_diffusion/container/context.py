"""The folder from which a model's image is built."""

from __future__ import annotations

import gzip
import importlib.metadata
import json
import os
import platform
import re
import shutil
import tarfile
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from packaging.requirements import Requirement

from nnunet_diffusion import __version__
from nnunet_diffusion.cli.trainers_directory import search_path, trainers_directory
from nnunet_diffusion.container import templates
from nnunet_diffusion.container.entry import GRAND_CHALLENGE
from nnunet_diffusion.container.prediction import Model

DISTRIBUTION = "nnunet-diffusion"
TORCH = ("torch", "torchvision")  # nnU-Net's search for trainers imports both: they must come from one index
ONLY_OF_TORCH = re.compile(r"(nvidia|cuda)-|triton$")  # which brings those that its build needs
INDEX = {"cpu": "https://download.pytorch.org/whl/cpu", "cuda": "https://pypi.org/simple"}
MODEL_FILES = ("dataset.json", "dataset_fingerprint.json", "plans.json")
LONGEST_TEST_AXIS = 128


def slug_of(name: str) -> str:
    """Return a name as Grand Challenge writes it: lower-case letters, digits, and dashes between them."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def write_context(
    folder: Path,
    model_folder: Path,
    model: Model,
    settings: Mapping[str, Any],
    device: str,
    multi_rater: bool,
) -> None:
    """Write Dockerfile, scripts, the program, the model and a test image.

    Args:
        folder: new or empty.
        model_folder: of the trained model.
        model: the same, loaded.
        settings: content of `container.json`.
        device: "cpu" or "cuda", for which PyTorch is installed.
        multi_rater: also write `score.sh`.
    """
    app = folder / "app"
    trainers = _copy_program(app)
    (app / "container.json").write_text(json.dumps(settings, indent=2) + "\n")
    pinned = requirements()
    others = [f"{name}=={version}" for name, version in pinned.items() if name not in TORCH]
    (folder / "requirements.txt").write_text("\n".join([*others, ""]))
    pack_model(model_folder, settings["folds"], settings["checkpoint"], folder / "model.tar.gz")
    _write_test_input(folder / "test" / "input", model, settings)
    memory = settings["memory_gib"]
    words = {
        "NAME": slug_of(folder.resolve().name) or "segmentation",
        "PYTHON": ".".join(platform.python_version_tuple()[:2]),
        "TORCH_INDEX": INDEX[device],
        "TORCH": " ".join(f"{name}=={pinned[name]}" for name in TORCH if name in pinned),
        "TRAINERS": ":".join(trainers),
        "MEMORY": f"{memory:g}",
        "SHARED": f"{memory / 2:g}",
        "CUDA": "true" if device == "cuda" else "false",
        "DEVICE": "a GPU, runs without, too" if device == "cuda" else "CPUs",
        "MODEL": model_folder.resolve().name,
        "FOLDS": ", ".join(settings["folds"]),
        "CLASSES": ", ".join(model.classes),
        **_described(model, settings),
    }
    files = {
        ".dockerignore": templates.DOCKERIGNORE,
        "Dockerfile": templates.DOCKERFILE, "build.sh": templates.BUILD, "test.sh": templates.TEST,
        "save.sh": templates.SAVE, "README.md": templates.README,
    }  # fmt: skip
    if multi_rater:
        files["score.sh"] = templates.SCORE
    for name, text in files.items():
        path = folder / name
        path.write_text(re.sub(r"@([A-Z_]+)@", lambda match: words[match[1]], text))
        path.chmod(0o755 if path.suffix == ".sh" else 0o644)


def _described(model: Model, settings: Mapping[str, Any]) -> dict[str, str]:
    challenge, slugs = settings["interface"] == GRAND_CHALLENGE, settings["input_slugs"]
    if challenge:
        where = (
            f"Grand Challenge's: `/input/inputs.json` with the sockets {_listed(slugs)}, the image in "
            f"`/input/images/SLUG/`, the label map in `/output/images/{settings['output_slug']}/output.mha`. One case a run."
        )
    else:
        where = (
            "All images of `/input`: `CASE_0000.mha`, `CASE_0001.mha` for each channel, or one file for each case (MHA, NIfTI, "
            "NRRD, TIFF, PNG). The label maps have their names, without the channel, in `/output`. A case that fails does not "
            "stop the others."
        )
    results = "Numbers are 32-bit floats."
    form = (
        "`/output/images/SLUG/output.mha`"
        if challenge
        else "`/output/SLUG/`, with the names of the label maps (`.tif` of PNG),"
    )
    if settings["probabilities_slugs"]:
        pairs = zip(settings["probabilities_slugs"], model.classes, strict=True)
        named = ", ".join(f"`{slug}` ({name})" for slug, name in pairs)
        results += f" Probabilities of the classes, 0 to 1, are in {form} with the slugs {named}."
    if settings["uncertainty_slug"]:
        results += f" The entropy in nats is in {form} with the slug `{settings['uncertainty_slug']}`."
    drawn, seconds = "", settings["seconds_per_case"]
    if seconds is not None:
        drawn = f" A case has {seconds:g} seconds: after the first of {model.samples} samples as many are drawn as fit."
    return {
        "IMAGES": f"images of {model.channels} channel{'s' * (model.channels > 1)}",
        "INTERFACE": where,
        "RESULTS": results if settings["probabilities_slugs"] or settings["uncertainty_slug"] else "",
        "SECONDS": drawn,
    }


def _listed(slugs: Sequence[str]) -> str:
    return ", ".join(f"`{slug}`" for slug in slugs)


def _copy_program(app: Path) -> list[str]:
    """Copy this package with its trainers, and the user's trainers. Return the folders of the latter in the image."""
    package = app / "nnunet_diffusion"
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
    spec = find_spec("nnunet_diffusion")
    assert spec is not None and spec.origin is not None
    shutil.copytree(Path(spec.origin).parent, package, ignore=ignored)
    if not (package / "trainers").is_dir():  # in a checkout they lie beside the package
        shutil.copytree(trainers_directory(), package / "trainers", ignore=ignored)
    information = app / f"nnunet_diffusion-{__version__}.dist-info"
    information.mkdir()
    (information / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {DISTRIBUTION}\nVersion: {__version__}\n")
    others = [path for path in search_path(os.environ) if Path(path).resolve() != trainers_directory()]
    names = [f"trainers_{number}" for number, _ in enumerate(others)]
    for name, path in zip(names, others, strict=True):
        (app / name).mkdir()
        for file in sorted(Path(path).glob("*.py")):
            shutil.copy(file, app / name)
    return [f"/opt/app/{name}" for name in names]


def requirements(distribution: str = DISTRIBUTION) -> dict[str, str]:
    """Return name -> installed version of all that a distribution needs, without itself; sorted by name.

    What only PyTorch's builds for GPUs need is left out, and the local part of a version, such as +cpu.

    Raises:
        ValueError: a package is not installed. The message names it.
    """
    found: dict[str, str] = {}
    waiting = [(distribution, frozenset({"solvers"} if find_spec("diffusers") else ()))]
    seen = set()
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            about = importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError as error:
            raise ValueError(f"{name} is not installed, but {distribution} needs it: pip install {name}") from error
        found[name] = about.version.split("+")[0]
        for line in about.requires or ():
            needed = Requirement(line)
            key = re.sub(r"[-_.]+", "-", needed.name).lower()
            wanted = needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for extra in ("", *extras))
            if wanted and not ONLY_OF_TORCH.match(key):
                waiting.append((key, frozenset(needed.extras)))
    del found[distribution]
    return dict(sorted(found.items()))


def pack_model(folder: Path, folds: Sequence[str], checkpoint: str, target: Path) -> None:
    """Pack what prediction needs of a model folder into a .tar.gz that has the same bytes each time.

    Args:
        folder: of the model.
        folds: their names.
        checkpoint: name of the checkpoint file.
        target: path of the archive.
    """
    names = [name for name in MODEL_FILES if (folder / name).is_file()]
    names += [f"fold_{fold}/{checkpoint}" for fold in folds]
    with (
        open(target, "wb") as file,
        gzip.GzipFile("", "wb", 6, file, mtime=0) as packed,
        tarfile.open(fileobj=packed, mode="w") as archive,
    ):
        for name in sorted(names):
            member = tarfile.TarInfo(name)
            member.size, member.mode = (folder / name).stat().st_size, 0o644
            with open(folder / name, "rb") as content:
                archive.addfile(member, content)


def _write_test_input(folder: Path, model: Model, settings: Mapping[str, Any]) -> None:
    """Write noise in the size and spacing of the training images, at most 128 voxels along each axis."""
    plans = model.predictor.plans_manager
    back = plans.transpose_backward
    shape = [min(LONGEST_TEST_AXIS, int(plans.plans["original_median_shape_after_transp"][axis])) for axis in back]
    spacing = [float(plans.plans["original_median_spacing_after_transp"][axis]) for axis in back]
    if shape[0] == 1:
        shape, spacing = shape[1:], spacing[1:]
    slugs = settings["input_slugs"] if settings["interface"] == GRAND_CHALLENGE else ["image"] * model.channels
    together = len(slugs) == 1 and model.channels > 1
    values = np.random.default_rng(0).integers(1, 256, (*shape, model.channels), np.uint8)
    sockets = []
    for number, slug in enumerate(slugs):
        voxels = values if together else values[..., number]
        image = sitk.GetImageFromArray(voxels, isVector=together)
        image.SetSpacing(spacing[::-1])
        name = f"images/{slug}/image.mha" if settings["interface"] == GRAND_CHALLENGE else f"test_{number:04d}.mha"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        sitk.WriteImage(image, str(folder / name), True)
        socket = {"slug": slug, "kind": "Image", "relative_path": f"images/{slug}"}
        sockets.append({"file": None, "image": {"name": "image.mha"}, "value": None, "socket": socket})
    if settings["interface"] == GRAND_CHALLENGE:
        (folder / "inputs.json").write_text(json.dumps(sockets, indent=2) + "\n")
