"""Labels of several raters: preprocessed as the first one's, drawn with equal shares, refused by name if they do not fit."""

import os
import shutil

import numpy as np
import pytest
import SimpleITK as sitk

from nnunet_diffusion.training import DiffusionTrainer
from nnunet_diffusion.training.raters import SeveralRaters, folder_of, prepare_raters

pytestmark = pytest.mark.nnunet


def trainer_of(workplace, *names):
    return workplace.trainer(DiffusionTrainer, training={"raters": list(names)})


def change(path, function):
    image = sitk.ReadImage(str(path))
    changed = sitk.GetImageFromArray(function(sitk.GetArrayFromImage(image).astype(np.uint8)))
    if changed.GetSize() == image.GetSize():
        changed.CopyInformation(image)
    sitk.WriteImage(changed, str(path))


@pytest.fixture
def swapped(workplace):
    """The folder of a second rater, who takes each class for the other; it and what is made of it are removed."""
    folder = shutil.copytree(workplace.raw / "labelsTr", workplace.raw / "labelsTr_swapped")
    for path in folder.iterdir():
        change(path, lambda labels: np.choose(labels, [0, 2, 1]))
    yield folder
    shutil.rmtree(folder)
    for made in workplace.preprocessed.glob("*_swapped"):
        shutil.rmtree(made)


def test_each_rater_is_drawn_with_the_same_share_and_with_its_own_locations(workplace, swapped):
    trainer = trainer_of(workplace, "swapped")
    prepare_raters(trainer)
    training, validation = trainer.get_tr_and_val_datasets()
    assert isinstance(training, SeveralRaters)
    assert not isinstance(validation, SeveralRaters)
    case = training.identifiers[0]
    image, first, _, properties = training.raters[0].load_case(case)
    other_image, second, _, others = training.raters[1].load_case(case)
    assert np.array_equal(image[:], other_image[:])
    assert np.array_equal(np.where(first[:] > 0, 3 - first[:], first[:]), second[:])
    locations = [set(map(tuple, each)) for each in (properties["class_locations"][1], others["class_locations"][2])]
    assert locations[0] == locations[1]
    np.random.seed(0)
    drawn = [np.array_equal(training.load_case(case)[1][:], second[:]) for _ in range(200)]
    # standard error 0.035
    assert np.mean(drawn) == pytest.approx(0.5, abs=0.12)


def test_loaders_give_the_labels_of_both(workplace, swapped):
    trainer = trainer_of(workplace, "swapped")
    trainer.initialize()
    prepare_raters(trainer)
    loader, _ = trainer.get_dataloaders()
    seen = {}
    for _ in range(30):
        batch = next(loader)
        for key, target in zip(batch["keys"], batch["target"], strict=True):
            # of the middle slices the two classes lie at different ends
            seen.setdefault(str(key), set()).add(
                tuple(np.bincount(target.numpy().astype(int).clip(0).ravel(), minlength=3))
            )
    assert max(len(found) for found in seen.values()) > 1


def test_cases_are_preprocessed_once_and_again_if_the_first_raters_are_newer(workplace, swapped):
    trainer = trainer_of(workplace, "swapped")
    prepare_raters(trainer)
    made = {path: path.stat().st_mtime_ns for path in folder_of(trainer, "swapped").iterdir()}
    assert len(made) == 30
    prepare_raters(trainer)
    assert {path: path.stat().st_mtime_ns for path in made} == made
    case = next(path for path in made if path.suffix == ".pkl")
    os.utime(case, (1, 1))
    prepare_raters(trainer)
    assert case.stat().st_mtime > 1


def test_without_the_setting_nothing_changes(workplace):
    trainer = trainer_of(workplace)
    prepare_raters(trainer)
    training, _ = trainer.get_tr_and_val_datasets()
    assert not isinstance(training, SeveralRaters)
    assert not list(workplace.preprocessed.glob("*_swapped"))


def test_labels_that_do_not_fit_are_named(workplace, swapped, monkeypatch):
    trainer, path = trainer_of(workplace, "swapped"), sorted(swapped.iterdir())[0]
    content = path.read_bytes()
    change(path, lambda labels: labels[:-1])
    with pytest.raises(ValueError, match=f"{path} does not fit .*Shape mismatch"):
        prepare_raters(trainer)
    path.write_bytes(content)
    change(path, lambda labels: labels * 3)
    with pytest.raises(ValueError, match=f"{path} has label 3"):
        prepare_raters(trainer)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"{path} is missing .1 of "):
        prepare_raters(trainer)
    with pytest.raises(
        FileNotFoundError, match="labelsTr_nobody, the folder of the labels of rater 'nobody', is missing"
    ):
        prepare_raters(trainer_of(workplace, "nobody"))
    monkeypatch.delenv("nnUNet_raw")
    with pytest.raises(FileNotFoundError, match="nnUNet_raw is not set"):
        prepare_raters(trainer_of(workplace, "nobody"))
    for names in (["a b"], ["a", "a"]):
        with pytest.raises(ValueError, match="must be a list of different names"):
            trainer_of(workplace, *names)
