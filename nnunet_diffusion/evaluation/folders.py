"""Folders of segmentations: which classes they have, which cases, and the arrays of one case, checked against each other."""

from __future__ import annotations

import contextlib
import glob
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from nnunetv2.imageio.reader_writer_registry import (
    determine_reader_writer_from_dataset_json,
    determine_reader_writer_from_file_ending,
)
from nnunetv2.utilities.label_handling.label_handling import LabelManager
from numpy.typing import NDArray

from nnunet_diffusion.files import IMAGE_ENDINGS, read_dictionary
from nnunet_diffusion.inference.output import SAMPLES, map_of, numbers_file_of
from nnunet_diffusion.inference.presegmentation import check_geometry, check_shape, read_probabilities
from nnunet_diffusion.inference.reading import one_line, without_thickness
from nnunet_diffusion.inference.report import foreground_names
from nnunet_diffusion.inference.uncertainty import MAPS

PREDICTION, TRUTH = "prediction", "ground truth"


@dataclass(frozen=True)
class Classes:
    """What is compared.

    Attributes:
        labels: name of each class or region -> its labels.
        regions: whether they are regions, of which several may hold a voxel.
        known: all labels that a file may have, but for the ignore label; None if any.
        ignore: label of voxels of the ground truth that do not count; None without one.
        heads: labels of each channel of probabilities.
    """

    labels: dict[str, tuple[int, ...]]
    regions: bool = False
    known: tuple[int, ...] | None = None
    ignore: int | None = None
    heads: tuple[tuple[int, ...], ...] = ()


def classes_of(dataset_json: Mapping[str, Any], path: Path) -> Classes:
    """Return the classes of nnU-Net's dataset.json.

    Raises:
        ValueError: nnU-Net does not accept its labels.
    """
    try:
        manager = LabelManager(dataset_json["labels"], regions_class_order=dataset_json.get("regions_class_order"))
        regions = manager.has_regions
        foreground = manager.foreground_regions if regions else manager.foreground_labels
        heads = foreground if regions else manager.all_labels
    except Exception as error:  # nnU-Net asserts
        raise ValueError(f"{path}: nnU-Net does not accept its labels: {one_line(error)}; correct them") from error
    named = zip(foreground_names(manager), map(_as_labels, foreground), strict=True)
    return Classes(
        dict(named),
        regions,
        tuple(sorted({0, *map(int, manager.all_labels)})),
        None if manager.ignore_label is None else int(manager.ignore_label),
        tuple(_as_labels(each) for each in heads),
    )


def classes_of_labels(labels: Sequence[int], ignore: int | None = None) -> Classes:
    """Return classes named by their number; all other labels but the ignored one count as background."""
    return Classes({str(label): (label,) for label in labels}, ignore=ignore)


def _as_labels(value: Any) -> tuple[int, ...]:
    return tuple(int(each) for each in value) if isinstance(value, (list, tuple)) else (int(value),)


def find_dataset_json(given: str | None, folders: Sequence[Path]) -> Path | None:
    """Return the path of dataset.json: the given one, or that in a folder or the folder above, where nnU-Net puts it.

    Args:
        given: path that the user gave; None to search.
        folders: folders of predictions, then those of ground truth.

    Raises:
        FileNotFoundError: the given file is missing.
    """
    if given is not None:
        if not Path(given).is_file():
            raise FileNotFoundError(f"-djfile is {given}, which is missing: give the dataset.json of these labels")
        return Path(given)
    places = [folder / "dataset.json" for folder in folders] + [folder.parent / "dataset.json" for folder in folders]
    return next((place for place in places if place.is_file()), None)


@dataclass(frozen=True)
class CasePaths:
    """Files of one case.

    Attributes:
        name: name of the case.
        prediction: label map.
        truths: label map of each rater.
    """

    name: str
    prediction: Path
    truths: tuple[Path, ...]

    @property
    def probabilities(self) -> Path:
        """Where nnU-Net saves probabilities."""
        return self.prediction.with_name(f"{self.name}.npz")

    @property
    def uncertainty(self) -> Path:
        """Where `nnunet_diffusion predict --uncertainty` writes its numbers."""
        return numbers_file_of(self.prediction.with_name(self.name))

    def maps(self) -> dict[str, Path]:
        """Return the maps of uncertainty that are there: name -> file."""
        ending = self.prediction.name.removeprefix(self.name)
        paths = {name: map_of(self.prediction.with_name(self.name), name, ending) for name in MAPS}
        return {name: path for name, path in paths.items() if path.is_file()}

    def samples(self) -> list[Path]:
        """Return the samples that `nnunet_diffusion predict --keep_samples` wrote."""
        return sorted((self.prediction.parent / SAMPLES).glob(f"*/{glob.escape(self.prediction.name)}"))

    def used(self) -> list[Path]:
        """Return all files that are there."""
        optional = [path for path in (self.probabilities, self.uncertainty) if path.is_file()]
        return [self.prediction, *self.truths, *optional, *self.maps().values(), *self.samples()]


@dataclass(frozen=True)
class FoundCases:
    """Cases of a folder of predictions.

    Attributes:
        cases: cases that are there and have a truth.
        without_truth: names of predictions that have none.
        without_prediction: names of truths that have none.
    """

    cases: list[CasePaths]
    without_truth: list[str] = field(default_factory=list)
    without_prediction: list[str] = field(default_factory=list)


def find_cases(prediction: Path, truths: Sequence[Path], ending: str) -> FoundCases:
    """Find the cases that a folder of predictions and all folders of ground truth have.

    Raises:
        FileNotFoundError: no case is in all folders, or a rater lacks a case of the first.
    """
    predicted, *true = ({_name(path, ending) for path in _files(folder, ending)} for folder in (prediction, *truths))
    for folder, names in zip(truths[1:], true[1:], strict=True):
        if missing := sorted((true[0] - names) & predicted):
            raise FileNotFoundError(
                f"{folder} lacks {missing[0]}{ending}, which {truths[0]} has ({len(missing)} missing in all): each rater "
                "needs each case; take the case out of the first folder, or add it"
            )
    both = sorted(predicted & true[0])
    if not both:
        raise FileNotFoundError(
            f"{prediction} and {truths[0]} have no file of the same name that ends with {ending}: give the folder of the "
            "segmentations (-p) and that of the ground truth (-g)"
        )
    cases = [
        CasePaths(name, prediction / f"{name}{ending}", tuple(folder / f"{name}{ending}" for folder in truths))
        for name in both
    ]
    return FoundCases(cases, sorted(predicted - true[0]), sorted(true[0] - predicted))


def common_ending(folder: Path) -> str:
    """Return the file ending of a folder's images, where no dataset.json tells it.

    Raises:
        ValueError: it has no image, or images of several endings.
    """
    names = [path.name for path in folder.iterdir() if path.is_file()]
    # the longest ending first: .nii.gz before .gz
    found = {next((each for each in IMAGE_ENDINGS if name.lower().endswith(each)), "") for name in names} - {""}
    if len(found) != 1:
        there = f"images of several kinds ({', '.join(sorted(found))})" if found else "no image"
        raise ValueError(
            f"{folder} holds {there}: give a folder of label maps of one kind, or a dataset.json (-djfile)"
        )
    return found.pop()


def reader_for(ending: str, dataset_json: Mapping[str, Any] | None, examples: Sequence[Path]) -> Any:
    """Return an instance of nnU-Net's reader for these files, the first that can read one of the examples.

    Raises:
        ValueError: nnU-Net has none that can.
    """
    description = None if dataset_json is None else {**dataset_json, "file_ending": ending}
    for example in examples:
        # nnU-Net prints a traceback for each reader that it tries in vain
        with contextlib.suppress(RuntimeError), contextlib.redirect_stderr(io.StringIO()):
            if description is None:
                return determine_reader_writer_from_file_ending(ending, str(example), verbose=False)()
            return determine_reader_writer_from_dataset_json(description, str(example), verbose=False)()
    raise ValueError(f"nnU-Net has no reader for {examples[0]}: it is damaged, or must be converted to .nii.gz")


def _files(folder: Path, ending: str) -> list[Path]:
    return [path for path in folder.iterdir() if path.name.endswith(ending) and not path.name.startswith(".")]


def _name(path: Path, ending: str) -> str:
    return path.name.removesuffix(ending)


@dataclass(frozen=True, eq=False)
class CaseArrays:
    """The arrays of one case, all of one shape (*image).

    Attributes:
        spacing_mm: voxel size along each axis.
        prediction: label map.
        truths: label map of each rater.
        known: voxels that count in all truths.
        probabilities: (K, *image), float32; None if they were not saved.
        maps: name -> map of uncertainty.
        samples: label map of each kept sample; empty unless they are read.
        numbers: what `predict --uncertainty` wrote; empty without.
    """

    spacing_mm: tuple[float, ...]
    prediction: NDArray
    truths: list[NDArray]
    known: NDArray[np.bool_]
    probabilities: NDArray | None = None
    maps: dict[str, NDArray] = field(default_factory=dict)
    samples: list[NDArray] = field(default_factory=list)
    numbers: dict[str, Any] = field(default_factory=dict)

    def compared(self, classes: Classes, rater: int = 0) -> tuple[NDArray, NDArray]:
        """Return prediction and a rater's truth with labels that are not compared as background.

        Where the truth is not known it is the prediction, so that no border and no error is there.
        """
        labels = sorted({label for each in classes.labels.values() for label in each})
        prediction, truth = (np.where(np.isin(each, labels), each, 0) for each in (self.prediction, self.truths[rater]))
        return prediction, np.where(self.known, truth, prediction)


def read_case(case: CasePaths, classes: Classes, reader: Any, with_samples: bool = False) -> CaseArrays:
    """Read a case and check that its files have one grid and known labels.

    Args:
        case: its files.
        classes: what is compared.
        reader: instance of one of nnU-Net's readers.
        with_samples: whether to read kept samples.

    Raises:
        ValueError: a file cannot be read, or its geometry, labels or probabilities are wrong. The message names the file, the
            value found and the expected one.
    """
    first, properties = _read(TRUTH, case.truths[0], classes, reader)
    where = f"the {TRUTH} {case.truths[0]}"

    def beside(what: str, path: Path, labels: Classes | None) -> NDArray:
        found, theirs = _read(what, path, labels, reader)
        check_shape(what, path, found.shape, first.shape, where)
        if labels is not None:  # a map is as its segmentation; a TIFF of floats has no spacing beside it
            check_geometry(what, path, theirs, properties, where)
        return found

    truths = [first, *(beside(TRUTH, path, classes) for path in case.truths[1:])]
    known = np.ones(first.shape, bool)
    for truth in truths if classes.ignore is not None else ():
        known &= truth != classes.ignore
    prediction = beside(PREDICTION, case.prediction, classes)
    probabilities = None
    if case.probabilities.is_file() and classes.heads:
        probabilities = read_probabilities(
            "file", case.probabilities, first.shape, len(classes.heads), classes.regions, where
        )
    numbers = read_dictionary(case.uncertainty, "predict again") if case.uncertainty.is_file() else {}
    return CaseArrays(
        without_thickness(properties["spacing"]),
        prediction,
        truths,
        known,
        probabilities,
        {name: beside("map", path, None) for name, path in case.maps().items()},
        [beside("sample", path, classes) for path in case.samples()] if with_samples else [],
        numbers,
    )


def _read(what: str, path: Path, classes: Classes | None, reader: Any) -> tuple[NDArray, dict[str, Any]]:
    """Read a label map, or without classes any numbers; return (*image) and nnU-Net's properties."""
    try:
        found, properties = reader.read_images([str(path)]) if classes is None else reader.read_seg(str(path))
    except Exception as error:  # the exception depends on the reader's library
        raise ValueError(f"The {what} {path} cannot be read: {one_line(error)}") from error
    if len(found) != 1:
        raise ValueError(f"The {what} {path} has {len(found)} channels (a colour image?), but must have one.")
    if not np.isfinite(found).all():
        raise ValueError(f"The {what} {path} has NaN or infinite voxels: write it again.")
    if classes is None:
        return found[0], properties
    ignored = {classes.ignore} if what == TRUTH else set()
    if classes.known is not None and (unknown := sorted(set(np.unique(found).tolist()) - {*classes.known, *ignored})):
        raise ValueError(
            f"The {what} {path} has label {unknown[0]:g}, which is not in dataset.json ({list(classes.known)}): correct the "
            "file, give another -djfile, or choose labels (-l)."
        )
    return found[0].astype(np.int16 if np.abs(found).max(initial=0) < 2**15 else np.int32), properties
