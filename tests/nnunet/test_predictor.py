"""`nnunet_diffusion predict` and DiffusionPredictor on real images, with the tiny trained model."""

import contextlib
import dataclasses
import functools
import gzip
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.imageio.simpleitk_reader_writer import SimpleITKIO
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from nnunet_diffusion.cli.main import main
from nnunet_diffusion.inference import DiffusionPredictor
from nnunet_diffusion.inference.cases import FailedCases
from nnunet_diffusion.inference.presegmentation import PRESEGMENTATION, read_probabilities
from nnunet_diffusion.inference.volume_run import VolumeRun

pytestmark = [pytest.mark.nnunet, pytest.mark.slow]
MODEL = "TinyDiffusionTrainer__Tiny__2d"
STOCK = "TinynnUNetTrainer__Tiny__2d"


def words(place, out, *arguments, images=None):
    return [
        "predict", "-i", str(images or place.raw / "imagesTs"), "-o", str(out), "-m", str(place.results / MODEL), "-f", "0",
        "-device", "cpu", *map(str, arguments),
    ]  # fmt: skip


def predict(place, out, *arguments, images=None, code=0):
    assert main(words(place, out, "--sequential", *arguments, images=images)) == code
    return {path.name: path for path in sorted(Path(out).glob("*.nii.gz"))}


def test_the_model_may_be_named_as_for_nnunet(place, tmp_path):
    """-d, -p, -tr and -c instead of its folder; its only model needs -d alone, and no folds."""
    results = tmp_path / "results"
    model = results / place.dataset / MODEL
    shutil.copytree(place.results / MODEL, model, ignore=shutil.ignore_patterns("fold_[1-9]"))
    by_folder = predict(place, tmp_path / "a")
    for number, named in enumerate((["-d", "4", "-p", "Tiny", "-tr", "TinyDiffusionTrainer", "-c", "2d"], ["-d", "4"])):
        out = tmp_path / f"out_{number}"
        arguments = words(place, out, "--sequential")
        start = arguments.index("-m")
        arguments[start : start + 4] = named  # -m and -f
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("nnUNet_results", str(results))
            assert main(arguments) == 0
        assert_same(by_folder, {path.name: path for path in out.glob("*.nii.gz")})


def label_maps(files):
    return {name: sitk.GetArrayFromImage(sitk.ReadImage(str(path))) for name, path in files.items()}


def assert_same(one, other):
    assert one
    assert set(one) == set(other)
    for name, path in one.items():
        assert path.read_bytes() == other[name].read_bytes()


def loaded(place, **settings):
    predictor = DiffusionPredictor(device=torch.device("cpu"), allow_tqdm=False, **settings)
    predictor.initialize_from_trained_model_folder(str(place.results / MODEL), (0,))
    return predictor


def test_all_weight_on_the_presegmentor_gives_nnunets_own_segmentation(place, tmp_path):
    """The volume's pre-segmentation is what stock nnU-Net predicts, mirrored and in its own sliding window."""
    stock = nnUNetPredictor(device=torch.device("cpu"), allow_tqdm=False)
    stock.initialize_from_trained_model_folder(str(place.results / STOCK), (0,), "checkpoint_final.pth")
    (tmp_path / "stock").mkdir()
    stock.predict_from_files_sequential(str(place.raw / "imagesTs"), str(tmp_path / "stock"), save_probabilities=True)
    ours = predict(place, tmp_path / "ours", "--presegmentation_weight", 1, "--save_probabilities")
    theirs = label_maps({path.name: path for path in (tmp_path / "stock").glob("*.nii.gz")})
    for name, found in label_maps(ours).items():
        assert np.array_equal(found, theirs[name])
        files = [folder / name.replace(".nii.gz", ".npz") for folder in (tmp_path / "stock", tmp_path / "ours")]
        one, other = (np.load(path)["probabilities"] for path in files)
        assert np.abs(one - other).max() < 1e-3


def test_output_is_nnunets_and_its_commands_take_it(place, tmp_path):
    found = predict(place, tmp_path / "a", "--save_probabilities", "--samples", 2, "--keep_samples", "--steps", 2)
    case = next(iter(found)).removesuffix(".nii.gz")
    for name in ("dataset.json", "plans.json", "predict_from_raw_data_args.json", f"{case}.npz", f"{case}.pkl"):
        assert (tmp_path / "a" / name).is_file()
    place.assert_geometry_and_labels({name: sitk.ReadImage(str(path)) for name, path in found.items()})
    report = json.loads((tmp_path / "a" / "reports" / f"{case}.json").read_text())
    assert (report["samples"], report["steps"], report["seed"]) == (2, 2, 1234)
    counted = report["network_evaluations"]
    assert counted["denoiser"] == 2 * counted["condition"]
    assert counted["presegmentor"] == 2 * counted["condition"]  # mirrored on two axes, against two steps
    samples = [tmp_path / "a" / "samples" / f"fold_0_sample_{number}" for number in range(2)]
    for folder in samples:
        assert {path.name for path in folder.iterdir()} == set(found)
    assert not list((tmp_path / "a").glob(".*"))

    predict(place, tmp_path / "b", "--save_probabilities", "--seed", 5)
    place.run("nnUNetv2_ensemble", "-i", tmp_path / "a", tmp_path / "b", "-o", tmp_path / "both", "-np", 1)
    assert len(list((tmp_path / "both").glob("*.nii.gz"))) == 2
    shutil.copytree(tmp_path / "a", tmp_path / "truth", ignore=shutil.ignore_patterns("samples", "reports"))
    description = ["-djfile", tmp_path / "a" / "dataset.json", "-pfile", tmp_path / "a" / "plans.json"]
    place.run("nnUNetv2_evaluate_folder", tmp_path / "truth", samples[0], *description, "-np", 1)
    assert json.loads((samples[0] / "summary.json").read_text())["foreground_mean"]["Dice"] > 0


def test_same_seed_gives_the_same_files_however_the_work_is_shared(place, tmp_path):
    settings = ("--samples", 2, "--sampler", "ddpm", "--steps", 2)
    alone = predict(place, tmp_path / "alone", *settings)
    parts = [predict(place, tmp_path / "parts", *settings, "-num_parts", 2, "-part_id", part) for part in (1, 0)]
    assert len(parts[0]) == 1
    assert_same(alone, parts[1])
    assert main(words(place, tmp_path / "pool", *settings, "-npp", 1, "-nps", 2)) == 0
    assert_same(alone, {path.name: path for path in (tmp_path / "pool").glob("*.nii.gz")})
    other = predict(place, tmp_path / "other", *settings, "--seed", 1)
    assert any(path.read_bytes() != other[name].read_bytes() for name, path in alone.items())


def test_finished_cases_are_left_out(place, tmp_path):
    first, second = predict(place, tmp_path / "out").values()
    kept, before = second.read_bytes(), first.stat().st_mtime_ns
    second.unlink()
    predict(place, tmp_path / "out", "--continue_prediction")
    assert second.read_bytes() == kept
    assert first.stat().st_mtime_ns == before


def contents(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_continuing_with_other_settings_is_refused_before_anything_is_written(place, tmp_path, capsys):
    out = tmp_path / "out"
    names = list(predict(place, out))
    (out / names[1]).unlink()
    before = contents(out)

    def refused(reason, *arguments):
        predict(place, out, "--continue_prediction", *arguments, code=2)
        message = capsys.readouterr().err
        assert f"{out / names[0]} {reason}" in message
        assert "leave --continue_prediction out" in message
        assert contents(out) == before

    refused("was predicted with samples 1, which is 2 now", "--samples", 2)
    refused("was predicted with start_step 100, which is 900 now", "--start_step", 900)
    refused("was predicted with seed 1234, which is 5 now", "--seed", 5)
    refused("was predicted with presegmentation_weight 0.5, which is 0.25", "--presegmentation_weight", 0.25)
    refused("was predicted with tile_step_size 0.5, which is 1.0 now", "-step_size", 1)
    refused("was predicted with mirrored_presegmentation True, which is False", "--disable_tta")
    given = tmp_path / "given"
    given.mkdir()
    refused(f"was predicted with presegmentation_folder None, which is {given}", "--presegmentation", given)
    refused("was predicted with keep_samples False, which is True now", "--keep_samples")
    # another part of the same images has not begun, but lies in the same folder
    refused("was predicted with seed 1234", "--seed", 5, "-num_parts", 2, "-part_id", 1)
    # another model of the same name
    model = tmp_path / "model" / MODEL
    shutil.copytree(place.results / MODEL, model, ignore=shutil.ignore_patterns("fold_[1-9]"))
    path = model / "fold_0" / "checkpoint_final.pth"
    checkpoint = torch.load(path, weights_only=False)
    next(iter(checkpoint["network_weights"].values())).add_(0.01)
    torch.save(checkpoint, path)
    refused("was predicted with weights_sha256", "-m", model)
    (out / "reports" / names[0].replace(".nii.gz", ".json")).unlink()
    before = contents(out)
    refused("has no readable report")
    # device and processes are none; what is empty or no image is not finished
    (out / names[0]).write_bytes(b"")
    assert main(words(place, out, "--continue_prediction", "--seed", 5, "-npp", 1, "-nps", 0)) == 0
    assert 'seed": 5' in (out / "predict_from_raw_data_args.json").read_text()
    assert_same({name: out / name for name in names}, predict(place, tmp_path / "other", "--seed", 5))


def test_predicting_again_leaves_nothing_of_the_run_before(place, tmp_path):
    images, out = tmp_path / "images", tmp_path / "out"
    shutil.copytree(place.raw / "imagesTs", images)
    names = list(predict(place, out, "--samples", 2, "--keep_samples", "--save_probabilities", images=images))
    (images / names[1].replace(".nii.gz", "_0000.nii.gz")).write_bytes(b"no image any more")
    predict(place, out, "--keep_samples", images=images, code=1)
    case = names[0].removesuffix(".nii.gz")
    described = {"dataset.json", "plans.json", "predict_from_raw_data_args.json"}
    expected = {names[0], f"reports/{case}.json", f"samples/fold_0_sample_0/{names[0]}"} | described
    assert set(contents(out)) == expected
    assert sorted(path.name for path in (out / "samples").iterdir()) == ["fold_0_sample_0"]


def test_stray_images_are_left_out_by_name_and_all_others_predicted(place, tmp_path, capsys):
    images = tmp_path / "images"
    shutil.copytree(place.raw / "imagesTs", images)
    first = sorted(images.iterdir())[0]
    shutil.copy(first, images / "scan1.nii.gz")
    shutil.copy(first, images / "other_0001.nii.gz")
    (images / "picture_0000.png").touch()
    found = predict(place, tmp_path / "out", images=images, code=1)
    assert len(found) == 2
    before, _, after = capsys.readouterr().err.partition("1 of 3 cases failed")
    for message in (before, after):
        assert "scan1.nii.gz" in message and "nnU-Net wants scan1_0000.nii.gz" in message
        assert "picture_0000.png" in message
    assert f"  other: {images / 'other_0000.nii.gz'} is missing" in after
    with pytest.raises(FailedCases) as failed:
        loaded(place).predict_from_files_sequential(str(images), str(tmp_path / "again"))
    assert set(failed.value.left_out) == {"scan1.nii.gz", "picture_0000.png"}
    assert set(failed.value.failures) == {"other"}


def test_standard_output_tells_how_far_it_is_and_nothing_nobody_asked_for(place, tmp_path, capsys):
    names = [name.removesuffix(".nii.gz") for name in predict(place, tmp_path / "out")]
    first, *others = capsys.readouterr().out.splitlines()
    assert first.startswith("Loading the model ") and first.endswith("(fold 0) ...")
    assert others[0] == "0/2 cases"
    assert [line.split(" left ")[1] for line in others[1:]] == [f"({name})" for name in names]
    predict(place, tmp_path / "out", "--quiet")
    assert capsys.readouterr().out == ""


@pytest.fixture
def with_bad_cases(place, tmp_path):
    """One good case and one of each kind of bad one."""
    folder = tmp_path / "images"
    folder.mkdir()
    good = sorted((place.raw / "imagesTs").iterdir())[0]
    shutil.copy(good, folder / "good_0000.nii.gz")
    image = sitk.ReadImage(str(good), sitk.sitkFloat32)
    values = sitk.GetArrayFromImage(image)

    def write(name, array):
        changed = sitk.GetImageFromArray(array)
        changed.CopyInformation(image)
        sitk.WriteImage(changed, str(folder / f"{name}.nii.gz"))

    write("empty_0000", values * 0)
    write("nan_0000", np.where(values == values.max(), np.nan, values))
    write("two_0000", values)
    write("two_0001", values)
    (folder / "broken_0000.nii.gz").write_bytes(gzip.compress(b"no image"))
    return folder


@pytest.mark.parametrize("processes", [["--sequential"], ["-npp", 1, "-nps", 1]])
def test_bad_cases_are_named_and_the_others_finished(place, tmp_path, with_bad_cases, capsys, processes):
    assert main(words(place, tmp_path / "out", *processes, images=with_bad_cases)) == 1
    message = capsys.readouterr().err
    assert "4 of 5 cases failed" in message
    for name, reason in {
        "empty": "every voxel is 0",
        "nan": "has NaN or infinite voxels",
        "two": "2 channels",
        "broken": "is damaged",
    }.items():
        line = next(line for line in message.splitlines() if line.startswith(f"  {name}: "))
        assert reason in line
        assert name in line
    assert [path.name for path in (tmp_path / "out").glob("*.nii.gz")] == ["good.nii.gz"]


def test_folder_without_images_is_refused(place, tmp_path, capsys):
    predict(place, tmp_path / "out", images=tmp_path, code=2)
    assert "no file in it ends with _0000.nii.gz" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_presegmentations_from_outside(place, tmp_path):
    weak = tmp_path / "weak"
    predict(place, weak, "--presegmentation_weight", 1, "--save_probabilities")
    probabilities = predict(place, tmp_path / "from_npz", "--presegmentation", weak)
    # Hippocampus is not resampled in 2d, so the probabilities are those the embedded network gives
    own = label_maps(predict(place, tmp_path / "own"))
    for name, found in label_maps(probabilities).items():
        assert (found != own[name]).mean() < 1e-3
    for path in weak.glob("*.npz"):
        path.unlink()
    maps = predict(place, tmp_path / "from_maps", "--presegmentation", weak)
    assert set(maps) == set(probabilities)
    report = json.loads(next((tmp_path / "from_maps" / "reports").iterdir()).read_text())
    assert report["start"].endswith(".nii.gz")
    assert report["network_evaluations"]["presegmentor"] == 0
    kept = predict(place, tmp_path / "kept", "--presegmentation", weak, "--start_step", 1, "--samples", 3)
    assert set(kept) == set(maps)


def test_presegmentation_that_does_not_fit_is_refused_by_file(place, tmp_path, capsys):
    given = tmp_path / "given"
    files = list(predict(place, given).values())
    image = sitk.ReadImage(str(files[0]))

    def refused(reason, changed):
        sitk.WriteImage(changed, str(files[0]))
        predict(place, tmp_path / "out", "--presegmentation", given, code=1)
        message = capsys.readouterr().err
        assert str(files[0]) in message
        assert reason in message
        assert [path.name for path in (tmp_path / "out").glob("*.nii.gz")] == [files[1].name]
        shutil.rmtree(tmp_path / "out")

    moved = sitk.Image(image)
    moved.SetOrigin([value + 3 for value in image.GetOrigin()])
    refused("has origin", moved)
    stretched = sitk.Image(image)
    stretched.SetSpacing([1.0, 2.0, 1.0])
    refused("has spacing", stretched)
    refused("has shape", image[:-1])
    refused("label 7, which is not in dataset.json", sitk.Clamp(image * 0 + 7, sitk.sitkUInt8, 0, 255))
    files[0].unlink()
    predict(place, tmp_path / "out", "--presegmentation", given, code=1)
    assert f"{given} has neither" in capsys.readouterr().err


@pytest.mark.parametrize("place_in_file", [0.2, 0.4, 0.6, 0.8, 0.99])
def test_damaged_probabilities_are_refused_by_file(tmp_path, place_in_file):
    path = tmp_path / "case.npz"
    np.savez_compressed(path, probabilities=np.random.default_rng(0).random((3, 4, 5, 6)).astype(np.float16))
    content = bytearray(path.read_bytes())
    content[int(place_in_file * len(content))] ^= 255
    path.write_bytes(content)
    with pytest.raises(ValueError, match=f"{path} is not an .npz"):
        read_probabilities(PRESEGMENTATION, path, (4, 5, 6), 3, regions=False)


@pytest.mark.parametrize("fusion", ["majority", "staple"])
def test_fused_segmentation_stands_beside_the_mean_probabilities(place, tmp_path, fusion):
    settings = ("--samples", 3, "--save_probabilities", "--start_step", 900)
    mean = predict(place, tmp_path / "mean", *settings)
    fused = predict(place, tmp_path / "fused", *settings, "--fusion", fusion, "--keep_samples")
    differing = 0
    for name in mean:
        paths = (tmp_path / "fused" / "samples").glob(f"*/{name}")
        votes = np.stack([sitk.GetArrayFromImage(sitk.ReadImage(str(path))) for path in paths])
        unanimous = (votes == votes[0]).all(0)
        assert len(votes) == 3 and unanimous.any()
        if fusion == "majority":
            assert np.array_equal(label_maps(fused)[name][unanimous], votes[0][unanimous])
        one, other = (
            np.load(tmp_path / kind / name.replace(".nii.gz", ".npz"))["probabilities"] for kind in ("mean", "fused")
        )
        assert np.array_equal(one, other)
        differing += (label_maps(mean)[name] != label_maps(fused)[name]).mean() / len(mean)
    assert 0 < differing < 1


def test_class_returns_what_nnunets_returns(place, tmp_path):
    predictor = loaded(place, samples=2)
    found = predict(place, tmp_path / "out", "--samples", 2, "--save_probabilities")
    paths = sorted((place.raw / "imagesTs").iterdir())
    names = [path.name.replace("_0000.nii.gz", "") for path in paths]
    image, properties = SimpleITKIO().read_images([str(paths[0])])
    segmentation, probabilities = predictor.predict_single_npy_array(
        image, properties, None, None, save_or_return_probabilities=True
    )
    assert np.array_equal(segmentation, label_maps(found)[f"{names[0]}.nii.gz"])
    assert np.allclose(probabilities, np.load(tmp_path / "out" / f"{names[0]}.npz")["probabilities"], atol=1e-6)
    assert np.array_equal(predictor.predict_single_npy_array(image, properties), segmentation)

    with pytest.raises(ValueError, match="NaN"):
        predictor.predict_single_npy_array(np.where(image > image.mean(), np.nan, image), properties)

    listed = predictor.predict_from_files_sequential([[str(path)] for path in paths], None)
    assert all(
        np.array_equal(each, label_maps(found)[f"{name}.nii.gz"]) for each, name in zip(listed, names, strict=True)
    )
    arrays = predictor.predict_from_list_of_npy_arrays([image], None, [properties], None, 1, False, 1)
    assert np.array_equal(arrays[0], segmentation)
    with pytest.raises(FailedCases, match="nothing_0000.nii.gz is missing") as failed:
        predictor.predict_from_files_sequential([[str(paths[0])], [str(tmp_path / "nothing_0000.nii.gz")]], None)
    assert set(failed.value.failures) == {"nothing"}


def test_class_gives_the_commands_bits_whatever_threads_torch_had(place, tmp_path, monkeypatch):
    monkeypatch.setattr(multiprocessing, "cpu_count", lambda: 2)
    found = predict(place, tmp_path / "out", "--samples", 3, "--save_probabilities")
    torch.set_num_threads(1)  # `place` restores them
    for path in sorted((place.raw / "imagesTs").iterdir()):
        segmentation, probabilities = loaded(place, samples=3).predict_single_npy_array(
            *SimpleITKIO().read_images([str(path)]), save_or_return_probabilities=True
        )
        output = found[path.name.replace("_0000", "")]
        assert np.array_equal(segmentation, label_maps({"": output})[""])
        saved = np.load(str(output).replace(".nii.gz", ".npz"))["probabilities"]
        assert np.array_equal(probabilities.astype(saved.dtype), saved)
        assert torch.get_num_threads() == 1
    report = json.loads(next((tmp_path / "out" / "reports").iterdir()).read_text())
    assert (report["threads"], report["deterministic"]) == (2, False)


def test_outputs_may_have_other_names_and_folders_than_the_images(place, tmp_path):
    """Starts go by the image's name; cases of one name are told apart."""
    predictor, image = loaded(place), str(sorted((place.raw / "imagesTs").iterdir())[0])
    own = Path(image).name.replace("_0000", "")
    predictor.predict_from_files_sequential([[image]], [str(tmp_path / "starts" / own.removesuffix(".nii.gz"))])
    lost, renamed = str(tmp_path / "lost_0000.nii.gz"), str(tmp_path / "new" / "folder" / "renamed")
    targets = [str(tmp_path / "a" / "x"), str(tmp_path / "b" / "x"), renamed]
    with pytest.raises(FailedCases, match="2 of 3 cases failed") as failed:
        predictor.predict_from_files_sequential(
            [[lost], [lost], [image]], targets, presegmentation_folder=str(tmp_path / "starts")
        )
    assert set(failed.value.failures) == set(targets[:2])
    assert Path(f"{renamed}.nii.gz").is_file()


def test_iterators_files_are_removed_as_nnunet_does(place, tmp_path):
    image, properties = SimpleITKIO().read_images([str(sorted((place.raw / "imagesTs").iterdir())[0])])
    predictor, path = loaded(place), tmp_path / "image.npy"
    source = predictor.get_data_iterator_from_raw_npy_data([image], None, [properties], None, 1)
    (item,) = list(source)
    (expected,) = predictor.predict_from_data_iterator([item], False, 1)
    np.save(path, item["data"])
    (found,) = predictor.predict_from_data_iterator([{**item, "data": str(path)}], False, 1)
    assert np.array_equal(found, expected) and not path.exists()


@pytest.mark.parametrize("part", ["presegmentor", "denoiser"])
def test_nan_of_a_network_is_no_segmentation(place, part):
    predictor = loaded(place)
    for weights in predictor.list_of_parameters:
        name = [key for key in weights if key.startswith(part) and weights[key].is_floating_point()][-1]
        weights[name] = torch.full_like(weights[name], torch.nan)
    with pytest.raises(ValueError, match="The network returned NaN for a finite image"):
        predictor.predict_volume(torch.randn(1, 1, 32, 32))
    network = predictor.network.eval()
    with torch.inference_mode(), pytest.raises(ValueError, match="The network returned NaN for a finite image"):
        network(torch.randn(1, 1, 32, 32))
    with torch.no_grad():  # as in the epochs of a training: one overflow must not end it
        assert network(torch.randn(1, 1, 32, 32)).isnan().any()


def test_settings_and_folds_are_the_predictors_own(place):
    first = loaded(place, samples=3)

    def take(network, **settings):
        predictor = DiffusionPredictor(device=torch.device("cpu"), **settings)
        predictor.folds = ["0", "1", "2"]  # of a model before
        managers = first.plans_manager, first.configuration_manager
        predictor.manual_initialization(network, *managers, None, first.dataset_json, "DiffusionTrainer", None)
        assert predictor.folds == ["0"] and len(predictor.list_of_parameters) == 1
        return predictor

    second = take(first.network)
    third = take(second.network, samples=2)
    assert [each.network.settings.samples for each in (first, second, third)] == [3, 3, 2]


def test_previous_stage_is_refused_where_there_is_none(place, tmp_path):
    with pytest.raises(ValueError, match="has no previous stage"):
        loaded(place).predict_from_files_sequential(
            str(place.raw / "imagesTs"), str(tmp_path / "out"), folder_with_segs_from_prev_stage=str(tmp_path)
        )


def test_memory_limit_is_kept_or_refused(place, tmp_path, capsys):
    whole = predict(place, tmp_path / "whole", "--samples", 2)
    assert "at a time" not in capsys.readouterr().out
    limited = predict(place, tmp_path / "limited", "--samples", 2, "--state_memory", 0.0018)  # room for one sample
    lines = [line for line in capsys.readouterr().out.splitlines() if "2 samples: 1 at a time" in line]
    assert [line.split(":")[0] for line in lines] == [name.removesuffix(".nii.gz") for name in whole]
    for name, found in label_maps(whole).items():
        assert (found != label_maps(limited)[name]).mean() < 1e-3
    predict(place, tmp_path / "none", "--state_memory", 0.00003, code=1)
    assert "MiB are allowed (--state_memory)" in capsys.readouterr().err


@pytest.mark.parametrize("shape", [(1, 1, 32, 32), (1, 2, 20, 24)])
def test_the_presegmentor_counts_by_its_weight(place, shape):
    """Also in a volume smaller than the patch, which is padded and cut again."""
    data, found = torch.randn(shape), {}
    for weight in (0.0, 0.3, 1.0):
        logits = loaded(place, presegmentation_weight=weight).predict_volume(data).logits
        assert logits.shape == (3, *shape[1:])
        found[weight] = logits.softmax(0)
    assert (found[0.0] - found[1.0]).abs().max() > 0.05
    assert torch.allclose(found[0.3], 0.7 * found[0.0] + 0.3 * found[1.0], atol=1e-4)


def test_tile_wise_sampling_and_folds(place, tmp_path):
    joint = predict(place, tmp_path / "joint", "--samples", 1)
    tile_wise = predict(place, tmp_path / "tiles", "--samples", 1, "--tile_wise")
    # one step: the clean estimates are blended here, and there what they amount to after clamping
    for name, found in label_maps(joint).items():
        assert (found != label_maps(tile_wise)[name]).mean() < 0.02
    # in a folder of its own: other tests may have trained fold 1
    model = tmp_path / "model"
    shutil.copytree(place.results / MODEL, model, ignore=shutil.ignore_patterns("fold_[1-9]"))
    shutil.copytree(model / "fold_0", model / "fold_1")
    found = {}
    for folds in ((0,), (1,), (0, 1)):
        out = tmp_path / "".join(map(str, folds))
        predict(place, out, "-m", model, "-f", *folds, "--save_probabilities", "--samples", 1)
        found[folds] = [np.load(path)["probabilities"].astype(float) for path in sorted(out.glob("*.npz"))]
        assert len(found[folds]) == 2
    # the same weights, but each fold has noise of its own
    for one, other, both in zip(*found.values(), strict=True):
        assert np.abs(one - other).max() > 1e-2
        assert np.allclose((one + other) / 2, both, atol=2e-3)


def test_a_given_start_is_refused_where_the_model_starts_from_noise(place, tmp_path):
    predictor = loaded(place)
    noise = {"from_noise": True, "start_step": 1000}
    predictor.network.settings = dataclasses.replace(predictor.network.settings, **noise)
    with pytest.raises(ValueError, match=r"starts from pure noise .*: give a start step too \(--start_step\)"):
        predictor.predict_from_files(
            str(place.raw / "imagesTs"), str(tmp_path / "out"), presegmentation_folder=str(tmp_path)
        )
    assert not (tmp_path / "out").exists()


def test_autocast_ends_with_each_fold(place, monkeypatch):
    """It keeps its casts of the weights: torch before 2.10 would evaluate the second fold with the first one's."""
    predictor, events = loaded(place), []
    predictor.list_of_parameters, predictor.folds = predictor.list_of_parameters * 2, ["0", "1"]
    load = predictor.network.load_state_dict

    @contextlib.contextmanager
    def autocast(self):
        events.append("begins")
        yield
        events.append("ends")

    monkeypatch.setattr(VolumeRun, "_autocast", autocast)
    monkeypatch.setattr(predictor.network, "load_state_dict", lambda weights: (events.append("loaded"), load(weights)))
    predictor.predict_volume(torch.randn(1, 1, 32, 32))
    assert events == ["loaded", "begins", "ends"] * 2


def test_killed_run_leaves_no_half_file_and_goes_on(place, tmp_path):
    images, out = tmp_path / "images", tmp_path / "out"
    images.mkdir()
    source = sorted((place.raw / "imagesTs").iterdir())[0]
    for number in range(12):
        shutil.copy(source, images / f"case{number:02d}_0000.nii.gz")
    arguments = words(place, out, "--save_probabilities", "-npp", 1, "-nps", 1, images=images)
    command = [sys.executable, "-m", "nnunet_diffusion.cli.main", *arguments]
    ends = ((signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 130), (signal.SIGTERM, 143))
    for how, code in ends:
        before = len(list(out.glob("*.nii.gz")))
        job = subprocess.Popen(
            [*command, "--continue_prediction"],
            env={**os.environ, **place.environment},
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        while len(list(out.glob("*.nii.gz"))) < before + 2:
            time.sleep(0.02)
            assert job.poll() is None
        # a terminal and a cluster send it to all processes of a job
        (job.send_signal if how == signal.SIGKILL else functools.partial(os.killpg, job.pid))(how)
        message = job.communicate(timeout=60)[1]
        assert job.returncode == code
        finished = sorted(out.glob("*.nii.gz"))
        assert before + 2 <= len(finished) < 12
        assert how == signal.SIGKILL or not list(out.glob(".*"))
        if how != signal.SIGKILL:
            done = f"{len(finished) - before} of {12 - before} cases are finished in {out}"
            line = next(line for line in message.splitlines() if done in line)
            assert "--continue_prediction" in line
            assert {path.name.split(".")[0] for path in finished} == {path.stem for path in out.glob("*.npz")}
            assert "Traceback" not in message
        for path in finished:
            sitk.ReadImage(str(path))
            np.load(str(path).replace(".nii.gz", ".npz"))["probabilities"]
    predict(place, out, "--continue_prediction", "--save_probabilities", images=images)
    assert len(list(out.glob("*.nii.gz"))) == 12
    assert len({path.read_bytes() for path in out.glob("*.nii.gz")}) == 1


def test_full_disk_is_named_and_leaves_nothing(place, tmp_path, capsys, monkeypatch):
    def no_space(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(SimpleITKIO, "write_seg", no_space)
    predict(place, tmp_path / "out", code=1)
    message = capsys.readouterr().err
    assert "No space left on device" in message
    assert "--continue_prediction" in message
    assert not list((tmp_path / "out").glob("*.nii.gz"))
    assert not list((tmp_path / "out").glob(".*"))
