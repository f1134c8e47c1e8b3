"""What the entry point makes of its input folder, without a model."""

import json
import re
from pathlib import Path

import pytest

from nnunet_diffusion.container.entry import BAD_MODEL, challenge_case, folder_cases, main

SETTINGS = {"input_slugs": ["t2", "adc"], "output_slug": "lesions", "channels": 2}


def given(folder, sockets, key="socket"):
    """Write what Grand Challenge writes: slug -> names of the files of its image."""
    content = []
    for slug, files in sockets.items():
        place = folder / "images" / slug
        place.mkdir(parents=True)
        for name in files:
            (place / name).touch()
        content.append({"file": None, "value": None, key: {"slug": slug, "kind": "Image"}})
    (folder / "inputs.json").write_text(json.dumps(content))


@pytest.mark.parametrize("key", ["socket", "interface"])
def test_sockets_are_channels_in_the_order_of_the_settings(tmp_path, key):
    given(tmp_path, {"adc": ["b.tif", ".hidden.mha", "notes.txt"], "t2": ["a.mha"]}, key)
    case = challenge_case(tmp_path, Path("/output"), SETTINGS)
    assert case.files == (tmp_path / "images/t2/a.mha", tmp_path / "images/adc/b.tif")
    assert str(case.segmentation) == "/output/images/lesions/output.mha"
    assert case.others.format("doubt") == "/output/images/doubt/output.mha"


def test_the_path_of_a_socket_may_differ_from_its_slug(tmp_path):
    given(tmp_path, {"prostate": ["a.mha"]})
    socket = {"slug": "prostate-mri", "relative_path": "images/prostate"}
    (tmp_path / "inputs.json").write_text(json.dumps([{"socket": socket}]))
    settings = {"input_slugs": ["prostate-mri"], "output_slug": "lesions"}
    assert challenge_case(tmp_path, tmp_path, settings).files == (tmp_path / "images/prostate/a.mha",)


@pytest.mark.parametrize(
    ("sockets", "said"),
    [
        ({"t2": ["a.mha"], "dwi": ["b.mha"]}, "has the sockets dwi, t2, but this container knows adc, t2: "),
        ({"t2": ["a.mha"], "adc": []}, "adc has 0 images .*, but must have one"),
        ({"t2": ["a.mha", "b.mha"], "adc": ["c.mha"]}, "t2 has 2 images .*, but must have one"),
    ],
)
def test_other_sockets_are_named(tmp_path, sockets, said):
    given(tmp_path, sockets)
    with pytest.raises(ValueError, match=said):
        challenge_case(tmp_path, tmp_path, SETTINGS)


@pytest.mark.parametrize("text", [None, "{", "3", '{"a": 1}', "[1]", '[{"socket": {}}]', '[{"socket": "t2"}]'])
def test_damaged_inputs_are_one_sentence(tmp_path, text):
    if text is not None:
        (tmp_path / "inputs.json").write_text(text)
    with pytest.raises(ValueError, match="inputs.json is (missing|not a list of sockets)"):
        challenge_case(tmp_path, tmp_path, SETTINGS)


def cases(folder, *names, channels=2):
    for name in names:
        (folder / name).touch()
    found = folder_cases(folder, Path("/output"), {"channels": channels})
    return {case.name: [path.name for path in case.files] for case in found}


def test_cases_of_a_folder_have_nnunets_names_or_one_file_each(tmp_path):
    found = cases(
        tmp_path, "a_0000.nii.gz", "a_0001.nii.gz", "b.tif", "c_0000.png", "d_0007.mha", "notes.txt", ".e.mha"
    )
    assert found == {
        "a.nii.gz": ["a_0000.nii.gz", "a_0001.nii.gz"], "b.tif": ["b.tif"],
        "c.png": ["c_0000.png"], "d_0007.mha": ["d_0007.mha"],
    }  # fmt: skip


def test_maps_of_a_png_are_tif(tmp_path):
    (tmp_path / "a_0000.png").touch()
    (case,) = folder_cases(tmp_path, Path("/output"), {"channels": 1})
    assert (str(case.segmentation), case.others.format("doubt")) == ("/output/a.png", "/output/doubt/a.tif")


@pytest.mark.parametrize(
    ("names", "channels", "said"),
    [
        ((), 1, "has no image"),
        (("a.mha", "a_0000.mha"), 1, "a.mha and a_0000.mha, but both would be written to a.mha"),
        (("a_0000.mha", "a_0001.mha"), 1, "a_0001.mha is a second channel, but the model has one"),
    ],
)
def test_what_cannot_be_a_case_is_named(tmp_path, names, channels, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        cases(tmp_path, *names, channels=channels)


def test_a_missing_model_or_settings_is_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("os.environ", {})
    words = ["--input", str(tmp_path), "--output", str(tmp_path), "--model", str(tmp_path)]
    assert main([*words, "--settings", str(tmp_path / "container.json")]) == BAD_MODEL
    said = capsys.readouterr().err
    assert re.fullmatch(r"error 3: .*container.json is missing; write the container's folder again\n", said)
