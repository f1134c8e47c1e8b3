"""Names of images: what nnU-Net would stop at, or drop without a word, is named."""

from pathlib import Path

import pytest

from nnunet_diffusion.files import find_images, refuse_overwriting


@pytest.fixture
def folder(tmp_path):
    def fill(*names):
        for name in names:
            (tmp_path / name).touch()
        return tmp_path

    return fill


def test_cases_and_what_is_left_out(folder):
    place = folder(
        "b_0000.png", "a_0000.png", "a_0001.png", "scan1.png", "c_0000.jpg", "notes.txt", ".hidden.png", "x_00.png"
    )
    (place / "samples").mkdir()
    found = find_images(place, ".png")
    assert found.cases == {"a": [f"{place}/a_0000.png", f"{place}/a_0001.png"], "b": [f"{place}/b_0000.png"]}
    assert found.left_out == {
        "scan1.png": "nnU-Net wants scan1_0000.png",
        "x_00.png": "nnU-Net wants x_00_0000.png",
        "c_0000.jpg": "the model's images end with .png",
    }


def test_channel_that_is_missing_is_its_cases_affair(folder):
    place = folder("a_0001.nii.gz", "b_0000.nii.gz", "b_0000.nii")
    found = find_images(place, ".nii.gz")
    assert found.cases["a"] == [f"{place}/a_0000.nii.gz", f"{place}/a_0001.nii.gz"]
    assert list(found.left_out) == ["b_0000.nii"]


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        ([], "no file in it ends with _0000.png"),
        (["polyp.png"], "you have polyp.png; nnU-Net wants polyp_0000.png. Please rename"),
        (["polyp_0000.jpg"], "you have polyp_0000.jpg; the model's images end with .png. Please convert"),
    ],
)
def test_folder_without_a_case_is_refused(folder, names, reason):
    with pytest.raises(ValueError, match=reason):
        find_images(folder(*names), ".png")


def test_outputs_are_files_of_their_own(tmp_path):
    out = [tmp_path / "out" / "a", tmp_path / "out" / "b"]
    refuse_overwriting(out, ".png", [["x/a_0000.png"], ["x/b_0000.png"]], {"-i": "x", "--presegmentation": None})
    with pytest.raises(ValueError, match="x/a_0000.png and y/a_0000.png would both be written to"):
        refuse_overwriting([out[0], out[0]], ".png", [["x/a_0000.png"], ["y/a_0000.png"]], {})
    with pytest.raises(ValueError, match=f"-o and -i are the same folder, {tmp_path / 'out'}"):
        refuse_overwriting(out, ".png", [[f"{tmp_path}/out/a_0000.png"], ["b_0000.png"]], {"-i": str(tmp_path / "out")})
    with pytest.raises(ValueError, match="is an input and would be overwritten"):
        refuse_overwriting([Path("x/a")], ".png", [["x/a.png"]], {})
