"""Small nnU-Net workplaces made from real cases, shared by all tests that run nnU-Net."""

import contextlib
import json
import multiprocessing
import os
import subprocess
import sys
from dataclasses import dataclass
from multiprocessing.pool import ThreadPool
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import SimpleITK as sitk
import torch

REPOSITORY = Path(__file__).parents[1]
DATA = Path(os.environ.get("NNUNET_DIFFUSION_TEST_DATA", REPOSITORY / "../shared/data")).resolve()
TINY_TRAINERS = REPOSITORY / "tests" / "nnunet" / "tiny_trainers"
TRAINERS = REPOSITORY / "trainers"
SMALL_FIGURES = REPOSITORY / "tests" / "nnunet" / "matplotlibrc"
COMMAND_SECONDS = 800
TEST_SLICES = 12
"""Of a test case: in 2D each takes an evaluation for every tile and mirror."""


@dataclass(frozen=True)
class Workplace:
    """nnU-Net's three folders with one small dataset, planned and preprocessed."""

    root: Path
    dataset: str

    @property
    def raw(self):
        return self.root / "raw" / self.dataset

    @property
    def preprocessed(self):
        return self.root / "preprocessed" / self.dataset

    @property
    def results(self):
        return self.root / "results" / self.dataset

    @property
    def environment(self):
        return {
            "nnUNet_raw": str(self.root / "raw"),
            "nnUNet_preprocessed": str(self.root / "preprocessed"),
            "nnUNet_results": str(self.root / "results"),
            "nnUNet_extTrainer": os.pathsep.join((str(TRAINERS), str(TINY_TRAINERS))),
            "nnUNet_n_proc_DA": "0",
            "nnUNet_def_n_proc": "1",
            "OMP_NUM_THREADS": "1",
        }

    @staticmethod
    def words(command, *arguments):
        """Return the path of a console command of this environment, and its arguments."""
        return [str(Path(sys.executable).parent / command), *map(str, arguments)]

    def variables(self, **changes):
        """Return the environment of a command; `changes` are variables that differ."""
        return {**os.environ, "MATPLOTLIBRC": str(SMALL_FIGURES), **self.environment, **changes}

    def start(self, command, *arguments, stdout=subprocess.PIPE, **variables):
        """Start a command in a session of its own; return the process, whose two outputs go to `stdout`."""
        return subprocess.Popen(
            self.words(command, *arguments),
            env=self.variables(**variables),
            stdout=stdout,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, command, *arguments, check=True, **variables):
        """Run a console command, as a user types it; return the finished process."""
        done = subprocess.run(
            self.words(command, *arguments),
            env=self.variables(**variables),
            capture_output=True,
            text=True,
            timeout=COMMAND_SECONDS,
        )
        if check and done.returncode != 0:
            pytest.fail(
                f"{command} {arguments} ended with {done.returncode}:\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
            )
        return done

    def assert_geometry_and_labels(self, found):
        """Check the segmentations of the two test cases, by file name: the images' geometry and the dataset's labels."""
        images = sorted((self.raw / "imagesTs").iterdir())
        assert len(found) == len(images) == 2
        for path in images:
            image, segmentation = sitk.ReadImage(str(path)), found[path.name.replace("_0000", "")]
            for key in ("GetSize", "GetSpacing", "GetOrigin", "GetDirection"):
                assert getattr(segmentation, key)() == pytest.approx(getattr(image, key)())
            assert set(np.unique(sitk.GetArrayFromImage(segmentation))) <= {0, 1, 2}

    @contextlib.contextmanager
    def in_process(self, results):
        """Set nnU-Net's variables in this process for a `with` block, the results elsewhere; one thread."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)  # small networks: on busy cores a second thread costs more than it gives
        with pytest.MonkeyPatch.context() as patch:
            for key, value in {**self.environment, "nnUNet_results": str(results)}.items():
                patch.setenv(key, value)
            patch.setattr(multiprocessing, "cpu_count", lambda: 1)  # -device cpu sets the threads by it
            for key, value in matplotlib.rc_params_from_file(SMALL_FIGURES, use_default_template=False).items():
                patch.setitem(matplotlib.rcParams, key, value)
            try:
                yield self
            finally:
                torch.set_num_threads(threads)

    @contextlib.contextmanager
    def planned_in_process(self, results, configuration, patch, **description):
        """Plan and preprocess the raw files that are there, with plans `Tiny`, then stay `in_process` for a `with` block.

        Args:
            results: as for `in_process`.
            configuration: to preprocess.
            patch: of the plans `Tiny`.
            description: dataset.json.
        """
        from nnunetv2.experiment_planning.plan_and_preprocess_api import (
            extract_fingerprints,
            plan_experiments,
            preprocess,
        )

        (self.raw / "dataset.json").write_text(json.dumps(description))
        number = int(self.dataset[7:10])
        with self.in_process(results), pytest.MonkeyPatch.context() as patched:
            patched.setattr(multiprocessing.get_context("spawn"), "Pool", ThreadPool)
            patched.setenv("nnUNet_n_proc_DA", "1")  # the planner takes it for its number of threads
            extract_fingerprints([number], num_processes=1, check_dataset_integrity=True)
            plan_experiments([number])
            preprocess([number], configurations=[configuration], num_processes=[1])
            patched.setenv("nnUNet_n_proc_DA", "0")
            self.write_plans("Tiny", configuration, patch=patch)
            yield self

    def trainer(self, kind, plans="Tiny", configuration="2d", fold=0, change=None, description=None, **section):
        """Build a trainer on the CPU, inside `in_process`; `change` may alter the plans, `section` is its settings."""
        content = json.loads((self.preprocessed / f"{plans}.json").read_text())
        if section:
            content["configurations"][configuration]["diffusion"] = section
        if change is not None:
            change(content)
        description = description or json.loads((self.preprocessed / "dataset.json").read_text())
        return kind({**content, "continue_training": False}, configuration, fold, description, torch.device("cpu"))

    def write_plans(self, name, configuration, base="nnUNetPlans", batch=2, features=(8, 8, 16), patch=None, **section):
        """Derive small plans with a `diffusion` section from nnU-Net's own."""
        plans = json.loads((self.preprocessed / f"{base}.json").read_text())
        plans["plans_name"] = name
        chosen = plans["configurations"][configuration]
        keywords = chosen["architecture"]["arch_kwargs"]
        stages = len(features)
        chosen["batch_size"], keywords["n_stages"], keywords["features_per_stage"] = batch, stages, list(features)
        chosen["patch_size"] = patch or chosen["patch_size"]
        for key in ("kernel_sizes", "strides", "n_conv_per_stage", "n_blocks_per_stage"):
            if key in keywords:
                keywords[key] = keywords[key][:stages]
        keywords["n_conv_per_stage_decoder"] = keywords["n_conv_per_stage_decoder"][: stages - 1]
        if section:
            chosen["diffusion"] = section
        plans["configurations"] = {configuration: chosen}
        (self.preprocessed / f"{name}.json").write_text(json.dumps(plans))


@pytest.fixture(scope="session")
def hippocampus_data():
    """The real dataset's folder."""
    folder = DATA / "Dataset004_Hippocampus"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent; set NNUNET_DIFFUSION_TEST_DATA")
    return folder


def copy_slices(source, target, slices, alter=None):
    """Copy the middle slices of a volume, all if `slices` is None, into a folder; `alter` may change the array."""
    image = sitk.ReadImage(str(source))
    depth = image.GetSize()[2]
    first = 0 if slices is None else max((depth - slices) // 2, 0)
    part = image[:, :, first : depth if slices is None else first + slices]
    if alter is not None:
        altered = sitk.GetImageFromArray(alter(sitk.GetArrayFromImage(part)))
        altered.CopyInformation(part)
        part = altered
    sitk.WriteImage(part, str(target / source.name))


def make_workplace(
    data,
    root,
    dataset="Dataset004_Hippocampus",
    number=10,
    alter=None,
    configurations=("2d", "3d_fullres"),
    slices=None,
    **description,
):
    """Plan and preprocess so many real training cases and two test cases of few slices, with small plans.

    Args:
        data: folder of the real dataset.
        root: of nnU-Net's three folders.
        dataset: name of the copy.
        number: of training cases.
        alter: label map -> another, of the training cases.
        configurations: to preprocess.
        slices: of each training case, its middle ones; None for all.
        description: entries of dataset.json that differ.
    """
    place = Workplace(root, dataset)
    cases = sorted(path.name.removesuffix(".nii.gz") for path in (data / "labelsTr").iterdir())
    for folder in ("imagesTr", "labelsTr", "imagesTs"):
        (place.raw / folder).mkdir(parents=True)
    for case in cases[:number]:
        copy_slices(data / "imagesTr" / f"{case}_0000.nii.gz", place.raw / "imagesTr", slices)
        copy_slices(data / "labelsTr" / f"{case}.nii.gz", place.raw / "labelsTr", slices, alter)
    for case in cases[-2:]:
        copy_slices(data / "imagesTr" / f"{case}_0000.nii.gz", place.raw / "imagesTs", TEST_SLICES)
    stock = json.loads((data / "dataset.json").read_text())
    (place.raw / "dataset.json").write_text(json.dumps({**stock, "numTraining": number, **description}))
    words = ["-d", int(dataset[7:10]), "-c", *configurations, "-npfp", 2, "-np", *[2] * len(configurations)]
    # the planner takes the number of augmentation workers for its number of threads
    place.run("nnUNetv2_plan_and_preprocess", *words, "--verify_dataset_integrity", nnUNet_n_proc_DA="1")
    if "2d" in configurations:
        place.write_plans("Tiny", "2d", patch=[32, 32])
    if "3d_fullres" in configurations:
        place.write_plans("Tiny3d", "3d_fullres", patch=[32, 48, 32])
    return place


@pytest.fixture(scope="session")
def workplace_maker():
    """`make_workplace`, for test modules that need a variant of the dataset."""
    return make_workplace


@pytest.fixture(scope="session")
def workplace_type():
    """`Workplace`, for test modules that make a dataset of their own."""
    return Workplace


@pytest.fixture(scope="session")
def hippocampus(hippocampus_data, tmp_path_factory):
    """Ten real training cases and two test cases, preprocessed in 2d and 3d_fullres with small plans `Tiny`."""
    return make_workplace(hippocampus_data, tmp_path_factory.mktemp("nnunet"), slices=20)


@pytest.fixture(scope="session")
def trained_2d(hippocampus):
    """The 2d model trained by the one command a user types; its pre-segmentor is trained by it too."""
    words = [4, "2d", 0, "-tr", "TinyDiffusionTrainer", "-p", "Tiny", "-device", "cpu"]
    done = hippocampus.run("nnUNetv2_train", *words)
    return hippocampus, done.stdout


@pytest.fixture
def place(trained_2d):
    """The trained 2d model's workplace, its variables set in this process."""
    with trained_2d[0].in_process(trained_2d[0].root / "results") as workplace:
        yield workplace


@pytest.fixture
def workplace(hippocampus, tmp_path):
    """The small dataset for trainers in this process; their results go into the test's own folder."""
    with hippocampus.in_process(tmp_path / "results") as place:
        yield place
