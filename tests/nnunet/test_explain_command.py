"""`nnunet_diffusion explain` on the tiny trained model and real cases: pages, maps in their geometry, numbers, refusals."""

import json
import shutil

import numpy as np
import pytest
import SimpleITK as sitk
from PIL import Image

from nnunet_diffusion.cli.main import main

pytestmark = [pytest.mark.nnunet, pytest.mark.slow]
MODEL = "TinyDiffusionTrainer__Tiny__2d"


def explain(place, out, *arguments):
    words = [
        "-i",
        place.raw / "imagesTs",
        "-o",
        out,
        "-m",
        place.results / MODEL,
        "-f",
        0,
        "-device",
        "cpu",
        *arguments,
    ]
    return main(["explain", *map(str, words)])


def test_pages_maps_and_numbers(place, tmp_path, capsys):
    out, images = tmp_path / "out", sorted((place.raw / "imagesTs").iterdir())
    name = images[0].name.removesuffix("_0000.nii.gz")
    image = sitk.ReadImage(str(images[0]))
    size = image.GetSize()[::-1]
    middle = [str(edge // 2) for edge in size]
    truth = tmp_path / "truth"
    truth.mkdir()
    assert main(["predict", *map(str, ["-i", place.raw / "imagesTs", "-o", truth, "-m", place.results / MODEL, "-f", 0,
                                       "-device", "cpu", "--sequential"])]) == 0  # fmt: skip
    capsys.readouterr()
    words = ("--cases", name, "--steps", 2, "--maps", "--voxel", *middle, "-g", truth)
    assert explain(place, out, *words) == 0, capsys.readouterr().err
    numbers = [json.loads(path.read_text()) for path in sorted(out.glob("*.json"))]
    assert numbers, capsys.readouterr().out
    for each in numbers:
        stem = f"{name}_{each['class']}"
        assert np.asarray(Image.open(out / f"{stem}.png").convert("L")).std() > 1
        assert (out / f"{stem}.pdf").read_bytes().startswith(b"%PDF")
        assert each["reference"] == "truth" and len(each["noising_steps"]) == 2
        assert 0 <= each["prior_branch"]["presence"] <= 1
        maps = sorted((out / "maps").glob(f"{stem}_*.nii.gz"))
        steps = [path for path in maps if "_T_" in path.name]
        units = sum(len(stages) for stages in each["share_of_heat_in_reference"].values())
        assert len(steps) == 2 * units
        for path in maps:
            found = sitk.ReadImage(str(path))
            for key in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
                assert getattr(found, key)() == pytest.approx(getattr(image, key)())
    # refused case by case, with the values
    assert explain(place, out, "--cases", name, "--voxel", *size) == 1
    assert f"but the image has {' x '.join(map(str, size))} voxels, counted from 0" in capsys.readouterr().err
    assert explain(place, out, "--cases", name, "--voxel", 1, 2) == 1
    assert "--voxel has 2 numbers, but this image has 3 axes: give z y x" in capsys.readouterr().err
    assert explain(place, out, "--stages", 9) == 2
    assert "--stages has 9, but the flows of this model have stages 1 to 2" in capsys.readouterr().err
    assert explain(place, out, "--class", "Liver") == 2
    assert "--class has Liver, but the model's classes are" in capsys.readouterr().err
    assert explain(place, out, "--cases", name, "--steps", 5000) == 2
    assert "--steps is 5000, more than diffusion.inference.start_step" in capsys.readouterr().err
    shutil.rmtree(truth)
    truth.mkdir()
    assert explain(place, out, "--cases", name, "-g", truth) == 1
    assert f"{truth / f'{name}.nii.gz'} is missing" in capsys.readouterr().err


def test_a_damaged_neighbour_does_not_fail_a_good_case(place, tmp_path, capsys):
    folder = tmp_path / "images"
    folder.mkdir()
    image = sorted((place.raw / "imagesTs").iterdir())[0]
    shutil.copy(image, folder)
    (folder / "zzz_0000.nii.gz").write_bytes(b"no image")
    words = ["-i", folder / image.name, "-o", tmp_path / "out", "-m", place.results / MODEL, "-f", 0, "-device", "cpu"]
    assert main(["explain", *map(str, words), "--steps", "1"]) == 0
    assert "the image of zzz is not put in its place" in capsys.readouterr().err
