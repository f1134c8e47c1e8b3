"""`nnunet_diffusion ensemble` on small folders of predictions, as a user would run it."""

import json
import math
import os
import pickle
import re

import numpy as np
import pytest
import SimpleITK as sitk
from nnunetv2.ensembling.ensemble import merge_files
from nnunetv2.imageio.natural_image_reader_writer import NaturalImage2DIO
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.utilities.label_handling.label_handling import LabelManager

from nnunet_diffusion.cli.main import main
from nnunet_diffusion.inference import cases, maps, output
from nnunet_diffusion.inference.folds import Ensemble, needed_bytes
from nnunet_diffusion.inference.uncertainty import MAPS

SHAPE = (6, 9, 7)
SPACING = (0.5, 1.0, 3.0)
VOXEL_MM3 = 1.5
CLASSES = {"labels": {"background": 0, "left": 1, "right": 2}, "file_ending": ".nii.gz"}
IGNORE = {"labels": {**CLASSES["labels"], "ignore": 3}, "file_ending": ".nii.gz"}
REGIONS = {
    "labels": {"background": 0, "whole": [1, 2], "right": [2], "ignore": 3},
    "regions_class_order": [1, 2],
    "file_ending": ".nii.gz",
}
PICTURES = {**CLASSES, "file_ending": ".png"}
CASES = "ab"


def write_mask(path, array, spacing=SPACING, origin=(1, 2, 3)):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = sitk.GetImageFromArray(array.astype(np.uint8))
    image.SetSpacing(spacing[: image.GetDimension()])
    image.SetOrigin(origin[: image.GetDimension()])
    sitk.WriteImage(image, str(path))


def write_case(folder, case, soft, description):
    """Write what nnUNetv2_predict --save_probabilities does: segmentation, .npz and .pkl."""
    labels = manager_of(description).convert_probabilities_to_segmentation(soft)
    ending = description["file_ending"]
    path = folder / f"{case}{ending}"
    write_mask(path, labels[0] if ending == ".png" else labels)
    np.savez_compressed(folder / f"{case}.npz", probabilities=soft)
    (folder / f"{case}.pkl").write_bytes(pickle.dumps(reader_of(description).read_seg(str(path))[1]))


def manager_of(description):
    return LabelManager(description["labels"], description.get("regions_class_order"))


def reader_of(description):
    return NaturalImage2DIO() if description["file_ending"] == ".png" else SimpleITKIO()


def random_probabilities(seed, description):
    shape = (1, *SHAPE[1:]) if description["file_ending"] == ".png" else SHAPE
    manager = manager_of(description)
    logits = np.random.default_rng(seed).normal(0, 3, (manager.num_segmentation_heads, *shape)).astype(np.float32)
    return manager.apply_inference_nonlin(logits).numpy()


def certain(labels, heads=3):
    return np.stack([labels == label for label in range(heads)]).astype(np.float32)


def blocks():
    labels = np.zeros(SHAPE, int)
    labels[1:4, 2:6, 1:3] = 1
    labels[1:4, 2:6, 4:6] = 2
    return labels


def write_folder(folder, members, description):
    """Write the cases of a folder; `members` has the probabilities of each."""
    for case, soft in members.items():
        write_case(folder, case, soft, description)
    (folder / "dataset.json").write_text(json.dumps(description))


@pytest.fixture
def folds(tmp_path):
    """Three folders of two cases, with random probabilities of three classes."""
    for fold in range(3):
        members = {case: random_probabilities(10 * fold + place, CLASSES) for place, case in enumerate(CASES)}
        write_folder(tmp_path / f"fold_{fold}", members, CLASSES)
    return tmp_path


def ensemble(root, *words, code=0, folders=("fold_0", "fold_1", "fold_2"), processes=0):
    arguments = ["-i", *(str(root / folder) for folder in folders), "-o", str(root / "out")]
    arguments += [] if processes is None else ["-np", str(processes)]
    assert main(["ensemble", *arguments, *map(str, words)]) == code


def read(path):
    return sitk.GetArrayFromImage(sitk.ReadImage(str(path)))


def map_of(root, name, case="a", ending=".nii.gz"):
    return read(root / "out" / "uncertainty" / f"{case}_{name}{ending}")


def numbers_of(root, case="a"):
    return json.loads((root / "out" / "uncertainty" / f"{case}.json").read_text())


def files_in(folder):
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def test_mean_and_volumes_by_hand(tmp_path):
    for fold, certainty in enumerate((0.9, 0.6)):
        soft = np.full((3, *SHAPE), (1 - certainty) / 2, np.float32)
        np.put_along_axis(soft, blocks()[None], certainty, 0)
        write_folder(tmp_path / f"fold_{fold}", {"a": soft}, CLASSES)
    ensemble(tmp_path, "--save_probabilities", folders=("fold_0", "fold_1"))
    mean = np.load(tmp_path / "out" / "a.npz")["probabilities"]
    assert mean.dtype == np.float32
    assert np.take_along_axis(mean, blocks()[None], 0) == pytest.approx(0.75)
    assert np.array_equal(read(tmp_path / "out" / "a.nii.gz"), blocks())
    expected = -(0.75 * math.log(0.75) + 2 * 0.125 * math.log(0.125))
    assert map_of(tmp_path, "entropy") == pytest.approx(expected, rel=1e-5)
    numbers = numbers_of(tmp_path)
    assert (numbers["samples"], numbers["members"]) == (2, 2)
    assert numbers["volume_mm3"]["left"]["mean"] == pytest.approx(24 * VOXEL_MM3)
    assert [name.rsplit(os.sep)[-1] for name in numbers["settings"]["folders"]] == ["fold_0", "fold_1"]


def test_equal_folders_do_not_disagree(folds):
    for fold in (1, 2):
        for path in (folds / "fold_0").iterdir():
            (folds / f"fold_{fold}" / path.name).write_bytes(path.read_bytes())
    ensemble(folds)
    assert map_of(folds, "epistemic").max() < 1e-5
    assert map_of(folds, "variance").max() < 1e-5
    assert map_of(folds, "agreement").min() == 1
    assert map_of(folds, "entropy") == pytest.approx(map_of(folds, "aleatoric"), abs=1e-5)
    assert numbers_of(folds)["scores"] == {"left": 1, "right": 1}
    assert np.array_equal(read(folds / "out" / "a.nii.gz"), read(folds / "fold_0" / "a.nii.gz"))


def test_certain_folders_that_contradict_each_other(tmp_path):
    other = blocks()
    other[1:3, 2:6, 1:3] = 0  # 16 of 24 voxels of class 1
    differs = other != blocks()
    for fold, labels in enumerate((blocks(), other)):
        write_folder(tmp_path / f"fold_{fold}", {"a": certain(labels)}, CLASSES)
    ensemble(tmp_path, folders=("fold_0", "fold_1"))
    expected = {"entropy": math.log(2), "aleatoric": 0, "epistemic": math.log(2), "variance": 0.5, "agreement": 0.5}
    for name in MAPS:
        found = map_of(tmp_path, name)
        assert found[differs] == pytest.approx(expected[name], abs=1e-6), name
        assert found[~differs] == pytest.approx(float(name == "agreement"), abs=1e-6), name
    # 2 x 8 shared voxels of 24 + 8
    assert numbers_of(tmp_path)["scores"] == {"left": pytest.approx(0.5), "right": 1}
    assert numbers_of(tmp_path)["volume_mm3"]["left"]["low"] == pytest.approx(8 * VOXEL_MM3)


def test_regions_that_contradict_each_other(tmp_path):
    for fold, value in enumerate((0.9, 0.1)):
        soft = np.full((2, *SHAPE), 0.1, np.float32)
        soft[0, :3], soft[1, :2] = 0.9, value
        write_folder(tmp_path / f"fold_{fold}", {"a": soft}, REGIONS)
    ensemble(tmp_path, folders=("fold_0", "fold_1"))
    of_one = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    epistemic, agreement = map_of(tmp_path, "epistemic"), map_of(tmp_path, "agreement")
    assert map_of(tmp_path, "aleatoric") == pytest.approx(2 * of_one)
    assert epistemic[:2] == pytest.approx(math.log(2) - of_one, rel=1e-5)
    assert epistemic[2:] == pytest.approx(0, abs=1e-6)
    # the heads' shares of votes are 1 and 1/2; below 0.5 there is no region
    assert agreement[:2] == pytest.approx(0.75) and (agreement[2:] == 1).all()
    assert numbers_of(tmp_path)["scores"] == {"whole": 1, "right": 0}


@pytest.mark.parametrize("description", [CLASSES, IGNORE, REGIONS, PICTURES], ids=["3d", "ignore", "regions", "2d"])
@pytest.mark.parametrize("kind", [np.float32, np.float16])
def test_segmentation_and_probabilities_are_nnunets(tmp_path, description, kind):
    folders = [tmp_path / f"fold_{fold}" for fold in range(3)]
    for seed, folder in enumerate(folders):
        write_folder(folder, {"a.b": random_probabilities(seed, description).astype(kind)}, description)
    ensemble(tmp_path, "--save_probabilities")
    ending, expected = description["file_ending"], tmp_path / "expected"
    expected.mkdir()
    files = [str(folder / "a.b.npz") for folder in folders]
    reader, manager = reader_of(description), manager_of(description)
    merge_files(files, str(expected / "a.b"), ending, reader, manager, True)
    found, theirs = (np.load(each / "a.b.npz")["probabilities"] for each in (tmp_path / "out", expected))
    assert found.dtype == theirs.dtype and np.array_equal(found, theirs)
    assert (tmp_path / "out" / f"a.b{ending}").read_bytes() == (expected / f"a.b{ending}").read_bytes()
    # nnU-Net can use the result as a member of another ensemble
    merge_files([str(tmp_path / "out" / "a.b.npz")], str(expected / "again"), ending, reader, manager)
    assert (expected / f"again{ending}").read_bytes() == (expected / f"a.b{ending}").read_bytes()


def test_evaluate_finds_everything(folds):
    for place, case in enumerate(CASES):
        write_mask(folds / "truth" / f"{case}.nii.gz", np.roll(blocks(), place))
    ensemble(folds, "--save_probabilities")
    assert main(["evaluate", "-p", str(folds / "out"), "-g", str(folds / "truth"), "-np", "0"]) == 0
    found = json.loads((folds / "out" / "evaluation" / "evaluation.json").read_text())["predictions"]["out"]
    assert {*MAPS, "entropy of the probabilities"} <= set(found["errors"])
    assert set(found["failure_detection"]) == {"confidence", "pairwise Dice"}
    assert found["failure_detection"]["pairwise Dice"]["cases"] == 2
    assert found["volumes"]["left"]["interval"] == "range of 3 samples"
    assert found["calibration"]["band"]["ece"]["cases"] == 2


def test_pictures_have_maps_in_tiff(tmp_path):
    for fold in range(2):
        write_folder(tmp_path / f"fold_{fold}", {"a": random_probabilities(fold, PICTURES)}, PICTURES)
    ensemble(tmp_path, folders=("fold_0", "fold_1"))
    assert map_of(tmp_path, "entropy", ending=".tif").shape == SHAPE[1:]
    pixels = [np.count_nonzero(read(tmp_path / f"fold_{fold}" / "a.png") == 1) for fold in range(2)]
    assert numbers_of(tmp_path)["volume_mm3"]["left"]["mean"] == pytest.approx(sum(pixels) / 2)
    assert set(files_in(tmp_path / "out")) == {
        "a.png",
        "dataset.json",
        "uncertainty/a.json",
        *(f"uncertainty/a_{name}.tif" for name in MAPS),
    }


def test_only_changed_cases_are_repeated(folds):
    ensemble(folds, "--save_probabilities")
    first = files_in(folds / "out")
    assert {"a.nii.gz", "a.npz", "a.pkl", "dataset.json", "uncertainty/b.json"} <= set(first)
    ensemble(folds, "--save_probabilities", processes=None)
    assert files_in(folds / "out") == first
    write_case(folds / "fold_1", "b", random_probabilities(99, CLASSES), CLASSES)
    ensemble(folds, "--save_probabilities")
    second = files_in(folds / "out")
    changed = {name for name in first if second[name] != first[name]}
    assert changed == {name for name in first if name.split("/")[-1].startswith("b")}
    (folds / "out" / "uncertainty" / "a_entropy.nii.gz").unlink()
    ensemble(folds, "--save_probabilities")
    assert set(files_in(folds / "out")) == set(first)
    before = numbers_of(folds)["settings"]
    os.utime(folds / "fold_2" / "a.npz")
    ensemble(folds, "--save_probabilities")
    assert numbers_of(folds)["settings"] != before
    # other settings: everything anew, and no file of the earlier run remains
    ensemble(folds)
    assert set(first) - set(files_in(folds / "out")) == {f"{case}{end}" for case in CASES for end in (".npz", ".pkl")}
    before = numbers_of(folds)
    ensemble(folds, folders=("fold_0", "fold_1"))
    assert (before["samples"], numbers_of(folds)["samples"]) == (3, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda soft: soft[..., 1:], r"a\.npz has shape .*, the segmentation .*a\.nii\.gz .*resample"),
        (lambda soft: soft[:2], "has 2 channels, but must have 3.*same dataset"),
        (lambda soft: soft * np.nan, "holds values from nan.*predict it again"),
        (lambda soft: soft / 2, "sum over the classes is 0.5.*predict it again"),
    ],
)
def test_a_case_with_wrong_probabilities_is_named_and_the_others_are_written(folds, capsys, change, message):
    path = folds / "fold_1" / "a.npz"
    ensemble(folds)
    np.savez_compressed(path, probabilities=change(np.load(path)["probabilities"]))
    ensemble(folds, code=1)
    assert re.search(f"ensemble: a failed: The file .*fold_1.*{message}", capsys.readouterr().err)
    # nothing of the earlier run remains of it
    assert {name.split("/")[-1][0] for name in files_in(folds / "out")} == {"b", "d"}


@pytest.mark.parametrize(
    ("geometry", "message"),
    [
        ({"spacing": (0.5, 1.0, 3.1)}, "has spacing"),
        ({"origin": (1, 2, 9)}, "has origin"),
        ({"array": blocks()[1:]}, "has shape"),
    ],
)
def test_other_geometry_is_named(folds, capsys, geometry, message):
    write_mask(folds / "fold_2" / "b.nii.gz", **{"array": blocks(), **geometry})
    ensemble(folds, code=1)
    error = capsys.readouterr().err
    assert re.search(rf"b failed: The segmentation .*fold_2.b\.nii\.gz {message}.*fold_0.*resample", error)
    assert (folds / "out" / "a.nii.gz").is_file() and not (folds / "out" / "b.nii.gz").exists()


def test_damaged_files_are_named_by_several_processes_too(folds, capsys):
    (folds / "fold_1" / "a.nii.gz").write_bytes(b"nothing")
    write_folder(folds / "fold_0", {"c": random_probabilities(7, CLASSES)}, CLASSES)
    for fold in (1, 2):
        write_folder(folds / f"fold_{fold}", {"c": random_probabilities(8, CLASSES)}, CLASSES)
    (folds / "fold_2" / "c.npz").write_bytes(b"nothing")
    ensemble(folds, code=1, processes=1)
    error = capsys.readouterr().err
    assert re.search(r"a failed: The segmentation .*fold_1.a\.nii\.gz cannot be read.*predict it again", error)
    assert re.search(r"c failed: The file .*fold_2.c\.npz is not an \.npz", error)
    left = {"b.nii.gz", "dataset.json", "uncertainty/b.json", *(f"uncertainty/b_{name}.nii.gz" for name in MAPS)}
    assert set(files_in(folds / "out")) == left


def test_a_case_whose_writing_ends_has_no_files_and_is_continued(folds, capsys, monkeypatch):
    replace = os.replace

    def interrupted(source, target):
        if str(target).endswith("b_variance.nii.gz"):
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patched:
        patched.setattr(output.os, "replace", interrupted)
        ensemble(folds, code=130)
    assert "finished cases are kept" in capsys.readouterr().err
    assert {name.split("/")[-1][0] for name in files_in(folds / "out")} == {"a", "d"}
    first = files_in(folds / "out")
    ensemble(folds)
    assert first.items() <= files_in(folds / "out").items()
    assert (folds / "out" / "b.nii.gz").is_file()


def test_a_full_disk_is_named(folds, capsys, monkeypatch):
    def full(*arguments, **settings):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", full)
    ensemble(folds, "--save_probabilities", code=1)
    assert re.search("a failed: .*a.nii.gz could not be written .*No space.*the same command", capsys.readouterr().err)


def refused(root, capsys, message, *words, **settings):
    before = files_in(root)
    ensemble(root, *words, code=2, **settings)
    error = capsys.readouterr().err
    assert re.search(f"nnunet_diffusion ensemble: error: .*{message}", error), error
    assert len(error.splitlines()) == 1
    assert files_in(root) == before


def test_wrong_folders_are_named(folds, capsys):
    refused(folds, capsys, "fold_0 alone, but an ensemble has two folders or more", folders=("fold_0",))
    refused(folds, capsys, "nowhere, which does not exist", folders=("fold_0", "nowhere"))
    refused(folds, capsys, "dataset.json, which is a file: give the folder", folders=("fold_0", "fold_0/dataset.json"))
    refused(folds, capsys, "fold_1 twice", folders=("fold_1", "fold_0", "fold_0/../fold_1"))
    refused(folds, capsys, "-o is .*fold_1, which is also one of -i", "-o", folds / "fold_1")
    refused(folds, capsys, "-o is .*json, which is a file", "-o", folds / "fold_1" / "dataset.json")
    refused(folds, capsys, "but .*json is a file: give a folder", "-o", folds / "fold_1" / "dataset.json" / "out")
    refused(folds, capsys, "-np is -1, but must be 0", processes=-1)
    (folds / "empty").mkdir()
    refused(folds, capsys, r"empty have no case in common \(CASE.nii.gz", folders=("fold_0", "empty"))


def test_wrong_descriptions_are_named(folds, capsys):
    refused(folds, capsys, "-djfile is nothing.json, which is missing", "-djfile", "nothing.json")
    wrong = folds / "wrong.json"
    for content, message in (
        ({"labels": {"left": 1}, "file_ending": ".nii.gz"}, "nnU-Net does not accept its labels"),
        ({"labels": CLASSES["labels"]}, "'file_ending' is missing"),
    ):
        wrong.write_text(json.dumps(content))
        refused(folds, capsys, f"wrong.json.*{message}", "-djfile", wrong)
    (folds / "given.json").write_text((folds / "fold_0" / "dataset.json").read_text())
    for fold in range(3):
        (folds / f"fold_{fold}" / "dataset.json").unlink()
    refused(folds, capsys, r"there is no dataset.json .*\(-djfile\)")
    ensemble(folds, "-djfile", folds / "given.json")
    assert json.loads((folds / "out" / "dataset.json").read_text()) == CLASSES


def test_cases_that_are_not_in_all_folders_are_named_before_anything_is_written(folds, capsys):
    (folds / "fold_0" / "._a.nii.gz").write_bytes(b"macOS")
    (folds / "fold_2" / "a.npz").rename(folds / "away")
    refused(folds, capsys, "fold_2 lacks .npz of the case a .1 such cases in all.*--save_probabilities")
    (folds / "fold_2" / "a.nii.gz").unlink()
    refused(folds, capsys, "fold_2 lacks all files of the case a .*predict it there too")
    (folds / "away").rename(folds / "fold_2" / "a.npz")
    refused(folds, capsys, "fold_2 lacks .nii.gz of the case a .*geometry")


def test_a_reader_without_maps_is_named(folds, capsys, monkeypatch):
    monkeypatch.delitem(maps.WRITERS, "SimpleITKIO")
    refused(folds, capsys, "read with SimpleITKIO, for which maps .*use nnUNetv2_ensemble")


def test_processes_by_memory(folds, monkeypatch):
    members = tuple(folds / f"fold_{fold}" for fold in range(3))
    task = Ensemble(members, folds / "out", CLASSES, SimpleITKIO())
    voxels = math.prod(SHAPE)
    needed = [needed_bytes(task, case) for case in CASES]
    assert needed[0] == pytest.approx(4 * voxels * (3 * 6 + 12), rel=0.05)
    monkeypatch.setattr(cases, "available_cores", lambda: 8)
    for free, expected in ((1, 0), (1.5, 0), (2.5, 2), (9, 2)):
        monkeypatch.setattr(cases, "free_bytes", lambda device, free=free: free * max(needed))
        assert cases.fitting_processes(needed) == expected
    assert cases.fitting_processes([0]) == 0
