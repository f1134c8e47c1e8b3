"""Folders of images as users have them: stray files are named, and no output is written over an input."""

from pathlib import Path

import pytest

from nnunet_diffusion.input_files import find_images, refuse_overwriting


def fill(folder, *names):
    for name in names:
        (folder / name).touch()
    return folder


def test_stray_images_are_named_and_all_others_found(tmp_path):
    fill(tmp_path, "b_0000.png", "a_0000.png", "a_0001.png", "scan1.png", "c_0000.jpg", "c_0000.PNG")
    fill(tmp_path, "notes.txt", "dataset.json", "._a_0000.png", "a_00000.png")
    (tmp_path / "folder_0000.png").mkdir()
    found = find_images(tmp_path, ".png")
    assert {case: [Path(file).name for file in files] for case, files in found.cases.items()} == {
        "a": ["a_0000.png", "a_0001.png"],
        "b": ["b_0000.png"],
    }
    assert list(found.cases) == ["a", "b"]
    assert found.left_out == {
        "a_00000.png": "nnU-Net wants a_00000_0000.png",
        "c_0000.PNG": "the model's images end with .png",
        "c_0000.jpg": "the model's images end with .png",
        "scan1.png": "nnU-Net wants scan1_0000.png",
    }


def test_plain_nifti_beside_compressed_ones_is_named(tmp_path):
    found = find_images(fill(tmp_path, "a_0000.nii.gz", "b_0000.nii"), ".nii.gz")
    assert list(found.cases) == ["a"]
    assert list(found.left_out) == ["b_0000.nii"]


def test_a_channel_missing_in_between_is_among_the_files_of_its_case(tmp_path):
    found = find_images(fill(tmp_path, "a_0000.png", "a_0002.png", "b_0001.png"), ".png")
    names = {case: [Path(file).name for file in files] for case, files in found.cases.items()}
    assert names == {"a": ["a_0000.png", "a_0001.png", "a_0002.png"], "b": ["b_0000.png", "b_0001.png"]}


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["polyp.png"], "you have polyp.png; nnU-Net wants polyp_0000.png. Please rename"),
        (["polyp_0000.jpg"], "you have polyp_0000.jpg; the model's images end with .png. Please convert"),
        ([], "no file in it ends with _0000.png"),
    ],
)
def test_folder_without_an_image_is_refused_with_the_name_it_wants(tmp_path, names, reason):
    with pytest.raises(ValueError, match=reason):
        find_images(fill(tmp_path, *names), ".png")


def test_outputs_over_inputs_and_over_each_other_are_refused(tmp_path):
    images = [["one/a_0000.png"], ["two/a_0000.png"]]
    apart = [tmp_path / "a", tmp_path / "b"]
    refuse_overwriting(apart, ".png", images, {"-i": str(tmp_path / "images"), "--presegmentation": None})
    with pytest.raises(ValueError, match=r"one/a_0000.png and two/a_0000.png would both be written to .*/a.png"):
        refuse_overwriting([tmp_path / "a", tmp_path / "other" / ".." / "a"], ".png", images, {})
    with pytest.raises(ValueError, match="-o and -i are the same folder"):
        refuse_overwriting(apart, ".png", images, {"-i": f"{tmp_path}/."})
    with pytest.raises(ValueError, match="a_0000.png is an input and would be overwritten"):
        refuse_overwriting([tmp_path / "a_0000"], ".png", [[str(tmp_path / "a_0000.png")]], {})
