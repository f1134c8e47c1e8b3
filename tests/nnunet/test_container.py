"""`nnunet_diffusion container`, and what runs in the image, with tiny models: 2D and 3D, all kinds of images, isolated."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from scipy.spatial.transform import Rotation

from nnunet_diffusion.cli.main import main as command
from nnunet_diffusion.container import entry
from nnunet_diffusion.container.images import Geometry
from nnunet_diffusion.training import DiffusionTrainer, DiffusionTrainerUNet, HiDiffTrainer

REPOSITORY = Path(__file__).parents[2]
TINY_TRAINERS = REPOSITORY / "tests" / "nnunet" / "tiny_trainers"
PAGE = (REPOSITORY / "documentation" / "challenge.md").read_text(encoding="utf-8")
DOCKER = """#!/usr/bin/env bash
# runs the entry point where docker would run the image
set -e
echo "docker $*" >> "$LOG"
case $1 in run) ;; *) exit 0 ;; esac
while [ $# -gt 0 ]; do
  case $1 in --volume) shift; declare "at_$(basename "$(cut -d: -f2 <<< "$1")")=${1%%:*}" ;; esac
  shift
done
PYTHONPATH=app python -m nnunet_diffusion.container.entry \\
  --input "$at_input" --output "$at_output" --model "$at_model" --settings app/container.json
"""
pytestmark = [pytest.mark.nnunet, pytest.mark.slow]


@pytest.fixture(scope="module")
def models(hippocampus, tmp_path_factory):
    """Folders of models that were initialised, not trained: name -> folder."""
    root, found = tmp_path_factory.mktemp("models"), {}
    kinds = {
        "unet": (DiffusionTrainerUNet, "Tiny", "2d"),
        "unet3d": (DiffusionTrainerUNet, "Tiny3d", "3d_fullres"),
        "plain": (nnUNetTrainer, "Tiny", "2d"),
        "pgdiffseg": (DiffusionTrainer, "Tiny", "2d"),
        "hidiff": (HiDiffTrainer, "Tiny", "2d"),
        "own": (runpy.run_path(TINY_TRAINERS / "TinyDiffusionTrainer.py")["TinyDiffusionTrainerUNet"], "Tiny", "2d"),
    }
    with hippocampus.in_process(root):
        for name, (kind, plans, configuration) in kinds.items():
            torch.manual_seed(0)
            trainer = hippocampus.trainer(kind, plans, configuration)
            trainer.initialize()
            trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
            folder = Path(trainer.output_folder)
            folder.mkdir(parents=True, exist_ok=True)
            trainer.save_checkpoint(str(folder / "checkpoint_final.pth"))
            for file in ("dataset.json", "dataset_fingerprint.json"):
                shutil.copy(hippocampus.preprocessed / file, folder.parent / file)
            (folder.parent / "plans.json").write_text(json.dumps(trainer.plans_manager.plans))
            found[name] = folder.parent
    return found


@pytest.fixture(autouse=True)
def small(monkeypatch):
    """One thread, and test images of few voxels."""
    monkeypatch.setattr("nnunet_diffusion.container.context.LONGEST_TEST_AXIS", 12)
    for name in entry.THREADS:
        monkeypatch.setenv(name, "1")
    for name in entry.NNUNETS_FOLDERS:
        monkeypatch.setenv(name, "/tmp")


def context(model, folder, *words, interface="folder"):
    """Write a context; return it, its settings' file and the unpacked model."""
    assert command(["container", "-m", str(model), "-o", str(folder), "--interface", interface, *map(str, words)]) == 0
    with tarfile.open(folder / "model.tar.gz") as archive:
        archive.extractall(folder / "unpacked")
    return folder


def run(folder, source, target, **others):
    words = {"input": source, "output": target, "model": folder / "unpacked", "settings": folder / "app/container.json"}
    return entry.main([word for key, value in (words | others).items() for word in (f"--{key}", str(value))])


def page_environment(**changes):
    """What a reader's shell has, with this environment's commands and this checkout."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    variables = {"PATH": path, "PYTHONPATH": str(REPOSITORY), "nnUNet_extTrainer": "", "PYTHONWARNINGS": "ignore"}
    return {**os.environ, **variables, **changes}


def assert_geometry(found, image):
    assert Geometry.of(sitk.ReadImage(str(found))).equals(Geometry.of(sitk.ReadImage(str(image)))), found


@pytest.mark.parametrize("name", ["unet", "unet3d", "plain", "pgdiffseg", "hidiff"])
def test_grand_challenge(models, name, tmp_path, capsys):
    words = ["--input-slug", "mr", "--output-slug", "hippocampus", "--uncertainty-slug", "doubt"]
    folder = context(models[name], tmp_path / "My Algorithm", *words, interface="grand-challenge")
    assert run(folder, folder / "test/input", tmp_path / "out") == 0, capsys.readouterr().err
    assert capsys.readouterr().err == ""
    found = {path.parent.name: path for path in (tmp_path / "out").rglob("*.*")}
    assert found == {slug: tmp_path / f"out/images/{slug}/output.mha" for slug in ("hippocampus", "doubt")}
    for path in found.values():
        assert_geometry(path, folder / "test/input/images/mr/image.mha")
    labels, doubt = (sitk.ReadImage(str(found[slug])) for slug in ("hippocampus", "doubt"))
    assert labels.GetPixelID() == sitk.sitkUInt8 and set(np.unique(sitk.GetArrayFromImage(labels))) <= {0, 1, 2}
    values = sitk.GetArrayFromImage(doubt)
    assert doubt.GetPixelID() == sitk.sitkFloat32 and values.min() >= 0 and 0 < values.max() <= np.log(3) + 1e-5


def test_the_segmentations_are_those_of_predict_and_raters_score_them(hippocampus, models, tmp_path):
    folder, images = context(models["unet"], tmp_path / "c", "--multi-rater"), hippocampus.raw / "imagesTs"
    assert run(folder, images, tmp_path / "out") == 0
    words = [
        "-i",
        images,
        "-o",
        tmp_path / "predicted",
        "-m",
        models["unet"],
        "-device",
        "cpu",
        "--sequential",
        "--threads",
        1,
    ]
    assert command(["predict", *map(str, words)]) == 0
    names = [path.name.replace("_0000", "") for path in sorted(images.iterdir())]
    for number, name in enumerate(names):
        labels, predicted = (sitk.ReadImage(str(tmp_path / part / name)) for part in ("out", "predicted"))
        assert np.array_equal(sitk.GetArrayFromImage(labels), sitk.GetArrayFromImage(predicted))
        assert_geometry(tmp_path / "out" / name, sorted(images.iterdir())[number])
        maps = [sitk.ReadImage(str(tmp_path / f"out/{end}-probability" / name)) for end in ("anterior", "posterior")]
        one, two = map(sitk.GetArrayFromImage, maps)
        assert one.dtype == np.float32 and one.min() >= 0 and (one + two).max() <= 1 + 1e-5
        raters = (predicted, sitk.BinaryDilate(predicted))
        for rater, truth in enumerate(raters):
            (tmp_path / f"rater{rater}").mkdir(exist_ok=True)
            sitk.WriteImage(truth, str(tmp_path / f"rater{rater}" / name))
    words = [
        tmp_path / "out",
        tmp_path / "scores",
        tmp_path / "rater0",
        tmp_path / "rater1",
    ]
    done = subprocess.run([folder / "score.sh", *words], env=page_environment(), capture_output=True, text=True)
    table = done.stdout.splitlines()
    assert done.returncode == 0 and "ECE" in table[0] and "| 2 |" in table[2], done


def test_a_time_budget_leaves_samples_out_and_keeps_the_first(models, tmp_path, capsys):
    folder = context(models["unet"], tmp_path / "c", "--multi-rater", "--samples", 4, "--seconds-per-case", 1)
    path = folder / "app/container.json"
    settings, found = json.loads(path.read_text()), {}
    changes = {"short": (4, 1e-3), "long": (4, 600), "one": (1, None), "all": (4, None)}
    capsys.readouterr()
    for name, (samples, seconds) in changes.items():
        path.write_text(json.dumps({**settings, "samples": samples, "seconds_per_case": seconds}))
        assert run(folder, folder / "test/input", tmp_path / name) == 0
        found[name] = sitk.GetArrayFromImage(sitk.ReadImage(str(tmp_path / name / "anterior-probability/test.mha")))
    said = capsys.readouterr().out
    assert "1 of 4 samples of fold 0" in said and "4 of 4 samples of fold 0" in said
    assert np.allclose(found["short"], found["one"], atol=1e-5) and np.allclose(found["long"], found["all"], atol=1e-5)
    assert not np.allclose(found["short"], found["long"], atol=1e-5)


def test_too_little_memory_is_one_line(models, tmp_path, capsys):
    folder = context(models["unet"], tmp_path / "c", interface="grand-challenge")
    path = folder / "app/container.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "memory_gib": 1.0}))
    assert run(folder, folder / "test/input", tmp_path / "out") == entry.NO_MEMORY
    assert re.fullmatch(r"error 4: image.mha: .* need .* free.*\n", capsys.readouterr().err)


def volume(kind=np.int16, shape=(6, 20, 18), spacing=(1.0, 1.0, 1.0), direction=None, fill=None, vector=False):
    random = np.random.default_rng(0)
    values = random.normal(100, 30, shape) if fill is None else np.full(shape, fill, float)
    if fill is not None and not np.isfinite(fill):
        values[..., 1:] = 5
    image = sitk.GetImageFromArray(values.astype(kind), isVector=vector)
    axes = image.GetDimension()
    image.SetSpacing((*spacing, 1.0)[:axes])
    image.SetOrigin((7.5, -20.25, 3.0, 0.0)[:axes])
    if direction is not None:
        image.SetDirection(direction)
    return image


TURN = tuple(Rotation.from_euler("xyz", (10, 20, 30), degrees=True).as_matrix().ravel())
FLIPPED, SWAPPED = (-1, 0, 0, 0, 1, 0, 0, 0, 1), (0, 0, 1, 1, 0, 0, 0, 1, 0)
GOOD = {
    "int16.mha": {}, "uint8.mha": {"kind": np.uint8}, "float64.mha": {"kind": np.float64}, "int32.nrrd": {"kind": np.int32},
    "int16.nii.gz": {}, "float32.nii": {"kind": np.float32}, "oblique.mha": {"direction": TURN},
    "oblique.nii.gz": {"direction": TURN}, "flipped.mha": {"direction": FLIPPED}, "flipped.nii.gz": {"direction": FLIPPED},
    "swapped.mha": {"direction": SWAPPED}, "coarse.mha": {"spacing": (1.1, 0.9, 4.0)}, "one_slice.mha": {"shape": (1, 20, 18)},
    "thin_x.mha": {"shape": (6, 20, 1)}, "thin_y.nii.gz": {"shape": (6, 1, 18)}, "one_voxel.mha": {"shape": (1, 1, 1)},
    "flat.mha": {"shape": (20, 18), "spacing": (0.7, 1.3)}, "turned_flat.mha": {"shape": (20, 18), "direction": (0, -1, 1, 0)},
    "flat.tif": {"shape": (20, 18), "kind": np.uint8}, "flat_16.tif": {"shape": (20, 18), "kind": np.uint16},
    "stack.tif": {"kind": np.uint8}, "flat.png": {"shape": (20, 18), "kind": np.uint8}, "constant.mha": {"fill": 7},
}  # fmt: skip
BAD = {
    "colours.tif": {"kind": np.uint8, "shape": (20, 18, 3), "vector": True}, "empty.mha": {"fill": 0},
    "nan.mha": {"kind": np.float32, "fill": np.nan}, "nan.nii.gz": {"kind": np.float64, "fill": np.nan},
    "infinite.mha": {"kind": np.float32, "fill": np.inf}, "too_large.mha": {"kind": np.float64, "fill": 1e300},
    "four_axes.nii.gz": {"shape": (2, 6, 20, 18)}, "complex.nii.gz": {"kind": np.complex64},
    "tiny_spacing.mha": {"spacing": (1e-7, 1e-7, 1e-7)},
}  # fmt: skip
IN_3D = {
    "oblique.mha",
    "flipped.nii.gz",
    "swapped.mha",
    "coarse.mha",
    "thin_x.mha",
    "one_voxel.mha",
    "flat.tif",
    "flat.png",
}
"""Those that the 3D model sees, which takes longer."""
HEADER = (
    "ObjectType = Image\nNDims = 3\nBinaryData = True\nBinaryDataByteOrderMSB = False\nOffset = 1 2 3\n"
    "ElementSpacing = 1 {} 3\nDimSize = {} 20 18\nElementType = MET_UCHAR\nElementDataFile = LOCAL\n"
)


@pytest.fixture
def images(tmp_path):
    """Images of all kinds."""
    folder = tmp_path / "images"
    folder.mkdir()
    for name, about in (GOOD | BAD).items():
        sitk.WriteImage(volume(**about), str(folder / name))
    voxels = bytes(np.random.default_rng(0).integers(1, 255, 6 * 20 * 18, np.uint8))
    (folder / "negative.mha").write_bytes(HEADER.format(-2, 6).encode() + voxels)
    (folder / "cut_off.mha").write_bytes(HEADER.format(2, 6).encode() + voxels[:99])
    (folder / "enormous.mha").write_bytes(HEADER.format(2, 10**9).encode() + voxels)
    (folder / "text.mha").write_text("no image")
    (folder / "nothing.tif").write_bytes(b"")
    damaged = bytearray((folder / "float32.nii").read_bytes())
    damaged[80:84] = np.float32(0).tobytes()  # pixdim[1]
    (folder / "no_spacing.nii").write_bytes(damaged)
    return folder


@pytest.mark.parametrize("name", ["unet", "unet3d"])
def test_every_image_gives_a_result_of_its_geometry_or_one_line(models, name, images, tmp_path, capsys):
    folder = context(models[name], tmp_path / "c")
    for each in set(GOOD) - IN_3D if name == "unet3d" else ():
        (images / each).unlink()
    capsys.readouterr()
    assert run(folder, images, tmp_path / "out") == entry.SOME_FAILED
    said = capsys.readouterr()
    lines = said.err.splitlines()
    failed = {line.split(": ")[1]: line for line in lines}
    done = {path.name for path in (tmp_path / "out").iterdir()}
    assert len(lines) == len(failed) and "unexpected" not in said.err, said
    everything = {path.name for path in images.iterdir()}
    assert done | {path for path in everything if path in failed} == everything and not done & set(failed), said
    for each in done:
        assert_geometry(tmp_path / "out" / each, images / each)
    if name == "unet3d":
        assert done == (IN_3D | {"negative.mha"}) - {"flat.tif", "flat.png"}, said.err
    else:
        assert done == {*GOOD, "negative.mha"}, said.err


def hidden(path):
    """The outermost folder above a path that other users cannot enter; None if they can enter all."""
    return next((parent for parent in reversed(path.parents) if not parent.stat().st_mode & 0o001), None)


def test_another_user_without_network_in_little_room(models, tmp_path, monkeypatch):
    """A user's own trainer in namespaces: nothing but /output and /tmp can be written, no network, few threads."""
    if os.getuid() != 0 or subprocess.run(["unshare", "-mnpif", "true"], capture_output=True).returncode:
        pytest.skip("namespaces are not permitted here")
    monkeypatch.setenv("nnUNet_extTrainer", str(TINY_TRAINERS))
    folder = context(models["own"], tmp_path / "c", "--samples", 2)
    assert "nnUNet_extTrainer=/opt/app/trainers_0\n" in (folder / "Dockerfile").read_text()
    home = Path(tempfile.mkdtemp())
    try:
        home.chmod(0o755)
        for part in ("app", "unpacked", "test"):
            shutil.copytree(folder / part, home / part)
        (home / "test/input/cut_off.mha").write_bytes(HEADER.format(2, 6).encode())
        for part in ("out", "tmp"):
            (home / part).mkdir()
        (home / "out").chmod(0o777)
        script = ["set -e", "mount --make-rprivate /", "mount -t proc proc /proc"]
        for number, python in enumerate({Path(sys.prefix).resolve(), Path(sys.base_prefix).resolve()}):
            if (above := hidden(python)) is not None:
                kept = home / f"python{number}"
                script += [
                    f"mkdir {kept}",
                    f"mount --bind {python} {kept}",
                    f"mount -t tmpfs -o mode=755 tmpfs {above}",
                ]
                script += [f"mkdir -p {python}", f"mount --bind {kept} {python}"]
        script += [
            f"mount -t tmpfs -o mode=1777,size=64m tmpfs {home}/tmp",
            "mount -t tmpfs -o size=64k tmpfs /dev/shm",
            f"mount --bind {home}/out {home}/out",
            "mount -o remount,bind,ro /",
            "ulimit -u 128",
            f"exec setpriv --reuid 54321 --regid 54321 --clear-groups --no-new-privs --bounding-set=-all bash {home}/inner",
        ]
        entry_point = (
            f"{sys.executable} -m nnunet_diffusion.container.entry --input {home}/test/input --output {home}/out"
        )
        (home / "inner").write_text(
            f"cd {home}/tmp; id -u; grep -c : /proc/net/dev; touch {home}/x /var/tmp/x 2>/dev/null && exit 99\n"
            f"exec {entry_point} --model {home}/unpacked --settings {home}/app/container.json\n"
        )
        variables = {
            "PATH": os.environ["PATH"],
            "PYTHONPATH": f"{home}/app",
            "HOME": f"{home}/tmp",
            "TMPDIR": f"{home}/tmp",
        }
        variables |= {
            "PYTHONWARNINGS": "ignore",
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
            "nnUNet_extTrainer": f"{home}/app/trainers_0",
            "MPLCONFIGDIR": f"{home}/tmp",
        }
        words = ["unshare", "-mnpif", "prlimit", f"--as={16 * 2**30}", "bash", "-c", "\n".join(script)]
        done = subprocess.run(words, env=variables, capture_output=True, text=True, timeout=300)
        assert done.returncode == entry.SOME_FAILED, done
        assert re.fullmatch("error 2: cut_off.mha: .* cannot be read: .*\n", done.stderr), done
        assert done.stdout.splitlines()[:2] == ["54321", "1"]
        assert [path.name for path in (home / "out").iterdir()] == ["test.mha"]
        assert_geometry(home / "out/test.mha", home / "test/input/test_0000.mha")
    finally:
        shutil.rmtree(home)


def test_the_page_from_a_model_to_an_upload(models, tmp_path):
    """Its commands as typed, with a docker that runs the entry point."""
    blocks = re.findall(r"```bash\n(.*?)```", PAGE, re.DOTALL)
    assert len(blocks) == 3 and "score.sh OUTPUTS SCORES RATER_1 RATER_2" in blocks[2]
    (tmp_path / "bin").mkdir()
    docker = tmp_path / "bin" / "docker"
    docker.write_text(DOCKER)
    docker.chmod(0o755)
    lines = [
        re.sub(r"MODEL_FOLDER", str(models["unet"]), line)
        for line in "".join(blocks).splitlines()
        if "score" not in line
    ]
    variables = page_environment(LOG=str(tmp_path / "log"), nnUNet_results=str(tmp_path))
    variables["PATH"] = os.pathsep.join([str(tmp_path / "bin"), variables["PATH"]])
    done = subprocess.run(
        ["bash", "-c", "\n".join(["set -e", *lines])],
        cwd=tmp_path,
        env=variables,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done
    verbs = [line.split()[1] for line in (tmp_path / "log").read_text().splitlines() if line != "docker info"]
    assert verbs == ["build", "run", "save"]
    asked = (tmp_path / "log").read_text()
    for limit in (
        "--network none",
        "--read-only",
        "--shm-size 8g",
        "--memory 16g",
        "--pids-limit 128",
        "--cap-drop ALL",
    ):
        assert limit in asked
    results = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("output.mha"))
    slugs = ("lesion-uncertainty", "lesions")
    assert results == [
        f"{at}/images/{slug}/output.mha" for at in ("my-algorithm/test/output", "result") for slug in slugs
    ]
    assert (tmp_path / "raters" / "score.sh").is_file()
