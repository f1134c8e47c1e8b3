"""README, quick start and worked example, block by block as a reader types them, in one shell a page."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch

ROOT = Path(__file__).parents[2]
README, QUICK_START, EXAMPLE = (
    (ROOT / name).read_text(encoding="utf-8")
    for name in ("README.md", "documentation/quick_start.md", "documentation/worked_example.md")
)
SHORT_TRAININGS = ROOT / "tests" / "nnunet" / "short_trainings"
SETS_UP = re.compile(r"pip install|make demo")  # blocks that install, or are run by tests of their own
TAKES_A_DEVICE = ("nnunet_diffusion plan", "nnunet_diffusion train", "nnUNetv2_train", "nnUNetv2_predict")
TRAINS = re.compile(r"nnUNetv2_(train|predict)|nnunet_diffusion train")
CPU_PLANS = " -p nnUNetDiffusionPlans"


def blocks(page, language="bash"):
    """The blocks of a language, in order; of bash those that are not about installing."""
    return [block for block in re.findall(rf"```{language}\n(.*?)```", page, re.DOTALL) if not SETS_UP.search(block)]


def typed(text, root, **words):
    """What the reader makes of a block: the words replaced that the pages name, and, without a GPU, what they tell to add."""
    text = re.sub(r"/path/to/(\w+)", rf"{root}/\1", text)
    for word, value in words.items():
        text = re.sub(rf"\b{word}\b", value, text)
    lines = text.splitlines()
    if not torch.cuda.is_available():
        lines = [without_gpu(line) if line.startswith(TAKES_A_DEVICE) else line for line in lines]
    return [re.sub(r" *#.*", "", line) for line in lines]


def without_gpu(line):
    line = re.sub(r"-tr (DiffusionTrainer(UNet)?)\b(?!_)", r"-tr \1_5epochs", line)
    return line if "-device cpu" in line else f"{line} -device cpu"


def run(lines, folder):
    """Run the lines in one shell that stops at the first that fails; return what they print."""
    own = {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "PYTHONPATH": os.pathsep.join([str(SHORT_TRAININGS), str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "nnUNet_n_proc_DA": "0",
        "nnUNet_def_n_proc": "1",
        "nnUNet_compile": "f",
        "OMP_NUM_THREADS": "1",
        "MATPLOTLIBRC": str(ROOT / "tests" / "nnunet" / "matplotlibrc"),
    }
    others = {name: value for name, value in os.environ.items() if not name.startswith("nnUNet_")}
    # nnU-Net's planner takes the number of augmentation workers for its number of threads
    lines = [re.sub("^nnUNetv2_plan", "nnUNet_n_proc_DA=1 nnUNetv2_plan", line) for line in lines]
    script = "\n".join(["set -e", *lines])
    done = subprocess.run(
        ["bash", "-c", script], env=others | own, cwd=folder, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, f"{script}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def commands_of(page, root, **words):
    return [line for block in blocks(page) for line in typed(block, root, **words)]


def test_every_training_and_prediction_is_on_plans_that_the_page_makes():
    for block in (blocks(README)[0], "\n".join(blocks(QUICK_START))):
        assert "nnUNetv2_plan_and_preprocess" in block
        found = [line for line in block.splitlines() if TRAINS.match(line)]
        assert found and not any(" -p " in line for line in found)
    for block in (blocks(README)[1], "\n".join(blocks(EXAMPLE))):
        assert "nnunet_diffusion plan" in block
        found = [line for line in block.splitlines() if TRAINS.match(line)]
        assert found and all(CPU_PLANS in line for line in found)


def test_readme_has_the_commands_of_the_quick_start():
    """So they are run by the test below."""
    exports = re.compile("export ")
    short = [line for line in typed(blocks(README)[0], "/r") if not exports.match(line)]
    long = iter(commands_of(QUICK_START, "/r"))
    assert len(short) == 3 and all(line in long for line in short), "the same, in the same order"
    variables = [set(re.findall(r"(nnUNet_\w+)=", "\n".join(blocks(page)))) for page in (README, QUICK_START)]
    assert variables[0] == variables[1]


def test_readme_has_the_same_commands_without_a_gpu():
    with_gpu, without = ([line for line in block.splitlines() if line] for block in blocks(README))
    trained = [line for line in with_gpu if TRAINS.match(line)]
    assert without[:2] == [
        "nnUNetv2_extract_fingerprint -d 4 --verify_dataset_integrity",
        "nnunet_diffusion plan -d 4 --preprocess -c 2d -device cpu",
    ]
    assert without[2:] == [without_gpu(line + CPU_PLANS) for line in trained]


def test_readme_is_short():
    assert len(README.splitlines()) <= 80


def test_pages_tell_what_to_add_without_a_gpu():
    for page in (README, QUICK_START):
        text = " ".join(page.split())
        assert "Without a GPU add `-device cpu`" in text or "Without one, add `-device cpu`" in text
        assert "use `-tr DiffusionTrainerUNet_5epochs` in" in text


def copy_middle_slice(source, folder):
    """So nnU-Net plans no 3D networks, whose steps would be timed as well."""
    volume = sitk.ReadImage(str(source))
    middle = volume.GetSize()[2] // 2
    sitk.WriteImage(volume[:, :, middle : middle + 1], str(folder / source.name))


@pytest.mark.slow
@pytest.mark.nnunet
def test_quick_start(hippocampus_data, workplace_type, tmp_path):
    place = workplace_type(tmp_path, "Dataset004_Hippocampus")
    for name in ("preprocessed", "results"):
        (tmp_path / name).mkdir()
    cases = sorted(path.name.removesuffix(".nii.gz") for path in (hippocampus_data / "labelsTr").iterdir())[:6]
    for folder in ("imagesTr", "labelsTr", "imagesTs"):
        (place.raw / folder).mkdir(parents=True)
    for case in cases:
        copy_middle_slice(hippocampus_data / "imagesTr" / f"{case}_0000.nii.gz", place.raw / "imagesTr")
        copy_middle_slice(hippocampus_data / "labelsTr" / f"{case}.nii.gz", place.raw / "labelsTr")
    copy_middle_slice(hippocampus_data / "imagesTr" / f"{cases[0]}_0000.nii.gz", place.raw / "imagesTs")
    stock = json.loads((hippocampus_data / "dataset.json").read_text())
    (place.raw / "dataset.json").write_text(json.dumps({**stock, "numTraining": len(cases)}))
    words = {"INPUT_FOLDER": str(place.raw / "imagesTs"), "OUTPUT_FOLDER": str(tmp_path / "out")}
    lines = commands_of(QUICK_START, tmp_path, **words)
    assert sum(line.startswith(("nnUNetv2_", "nnunet_diffusion")) for line in lines) == 6
    printed = run(lines, tmp_path)
    assert "\nready\n" in printed
    assert "\n  nnunet_diffusion train 4 2d 0 -p nnUNetDiffusionPlans" in printed
    assert (tmp_path / "results" / place.dataset / "DiffusionTrainerUNet_5epochs__nnUNetPlans__2d").is_dir()
    assert (tmp_path / "out" / f"{cases[0]}.nii.gz").is_file()


@pytest.mark.slow
@pytest.mark.nnunet
def test_worked_example(tmp_path):
    """On generated photographs of two frames each of six videos: bright discs on a texture."""
    for name in ("preprocessed", "results", "raw"):
        (tmp_path / name).mkdir()
    write_photographs(tmp_path / "polyps")
    for script in blocks(EXAMPLE, "python"):
        (name,) = re.findall(r"^# (\w+\.py)\n", script)
        (tmp_path / name).write_text(script)
    run(commands_of(EXAMPLE, tmp_path), tmp_path)

    raw, preprocessed = (tmp_path / kind / "Dataset120_Polyps" for kind in ("raw", "preprocessed"))
    assert set(np.unique(sitk.GetArrayFromImage(sitk.ReadImage(str(raw / "labelsTr" / "video1_0.png"))))) == {0, 1}
    splits = json.loads((preprocessed / "splits_final.json").read_text())
    assert len(splits) == 5 and {case for fold in splits for case in fold["val"]} == set(
        splits[0]["train"] + splits[0]["val"]
    )
    for fold in splits:
        groups = [{case.split("_")[0] for case in fold[part]} for part in ("train", "val")]
        assert groups[0] and groups[1] and not groups[0] & groups[1], "a video is on both sides"
    (model,) = (tmp_path / "results" / "Dataset120_Polyps").glob("DiffusionTrainerUNet_5epochs__*")
    validated = {path.stem for path in (model / "fold_0" / "validation").glob("*.png")}
    assert validated == set(splits[0]["val"]), "nnU-Net takes the split"
    for name in ("video7_0", "video7_1"):
        image = sitk.ReadImage(str(tmp_path / "overlays" / f"{name}.png"))
        assert image.GetSize() == (72, 64) and image.GetNumberOfComponentsPerPixel() == 3


def write_photographs(folder):
    generator = np.random.default_rng(0)
    for name in ("images", "masks", "test"):
        (folder / name).mkdir(parents=True)
    rows, columns = np.mgrid[:64, :72]
    for video in range(1, 8):
        for frame in range(2):
            disc = (rows - generator.integers(20, 44)) ** 2 + (columns - generator.integers(20, 52)) ** 2 < 120
            pixels = generator.integers(60, 120, (64, 72, 3)) + 100 * disc[..., None]
            image = sitk.GetImageFromArray(pixels.astype(np.uint8), isVector=True)
            place = folder / ("test" if video == 7 else "images")
            sitk.WriteImage(image, str(place / f"video{video}_{frame}.jpg"))
            if video < 7:
                mask = sitk.GetImageFromArray(disc.astype(np.uint8) * 255)
                sitk.WriteImage(mask, str(folder / "masks" / f"video{video}_{frame}.png"))
