"""What a build context holds, without a model."""

import importlib.metadata
import re
import shutil
import subprocess
import tarfile

import pytest

from nnunet_diffusion.cli.main import main
from nnunet_diffusion.container import templates
from nnunet_diffusion.container.context import pack_model, requirements, slug_of

SCRIPTS = {name: getattr(templates, name) for name in ("BUILD", "TEST", "SAVE", "SCORE")}


def test_every_package_has_the_installed_version():
    found = requirements()
    assert {"nnunetv2", "torch", "torchvision", "numpy", "simpleitk"} <= set(found) and "nnunet-diffusion" not in found
    assert all(importlib.metadata.version(name).split("+")[0] == version for name, version in found.items())
    assert not [name for name in found if name.startswith("nvidia-")] and "pytest" not in found


def test_a_packed_model_has_what_prediction_needs_and_the_same_bytes(tmp_path):
    for name in ("plans.json", "dataset.json", "fold_0/a.pth", "fold_0/progress.png", "fold_1/a.pth", "fold_2/a.pth"):
        (tmp_path / "model" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "model" / name).write_text(name)
    for number in range(2):
        pack_model(tmp_path / "model", ["1", "0"], "a.pth", tmp_path / f"{number}.tar.gz")
        (tmp_path / "model/plans.json").touch()
    assert (tmp_path / "0.tar.gz").read_bytes() == (tmp_path / "1.tar.gz").read_bytes()
    with tarfile.open(tmp_path / "0.tar.gz") as archive:
        members = {member.name: archive.extractfile(member).read().decode() for member in archive}
    assert members == {name: name for name in ("dataset.json", "fold_0/a.pth", "fold_1/a.pth", "plans.json")}


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_sound(name, tmp_path):
    path = tmp_path / "script.sh"
    path.write_text(re.sub(r"@(NAME|MEMORY|SHARED|CUDA)@", "true", SCRIPTS[name]))
    assert subprocess.run(["bash", "-n", path]).returncode == 0
    if shutil.which("shellcheck"):
        done = subprocess.run(["shellcheck", path], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout


def test_slugs():
    assert [slug_of(name) for name in ("Left Kidney", "whole_tumor", "T2/ADC ")] == [
        "left-kidney",
        "whole-tumor",
        "t2-adc",
    ]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--memory", "1"], "--memory is 1, but must be 2 GiB or more"),
        (["--seconds-per-case", "0"], "--seconds-per-case is 0, but must be above 0"),
        (["--input-slug", "CT image"], "'CT image' is not a slug"),
        (["--output-slug", "a", "--uncertainty-slug", "a"], "the slugs a, a are not all different"),
        ([], "there is no model folder of that name"),
    ],
)
def test_wrong_arguments_are_named(words, said, tmp_path, capsys):
    start = ["container", "-m", str(tmp_path / "none"), "-o", str(tmp_path / "new"), "--interface", "grand-challenge"]
    assert main([*start, *words]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_a_folder_with_files_is_kept(tmp_path, capsys):
    (tmp_path / "file").touch()
    assert main(["container", "-m", str(tmp_path), "-o", str(tmp_path), "--interface", "folder"]) == 2
    assert "is there already: give a new or empty folder" in capsys.readouterr().err
