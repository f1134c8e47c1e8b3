"""`nnunet_diffusion container`, and what runs in the image, with tiny models: 2D and 3D, all kinds of images, isolated."""

import json
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import SimpleITK as sitk
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

from nnunet_diffusion.cli.main import main as command
from nnunet_diffusion.container import entry, prediction
from nnunet_diffusion.container.images import Geometry
from nnunet_diffusion.container.score import main as score
from nnunet_diffusion.training import DiffusionTrainerUNet, HiDiffTrainer

pytestmark = [pytest.mark.nnunet, pytest.mark.slow]


@pytest.fixture(scope="module")
def models(hippocampus, tmp_path_factory):
    """Folders of models that were initialised, not trained: name -> folder."""
    root, found = tmp_path_factory.mktemp("models"), {}
    kinds = {
        "unet": (DiffusionTrainerUNet, "Tiny", "2d"),
        "unet3d": (DiffusionTrainerUNet, "Tiny3d", "3d_fullres"),
        "plain": (nnUNetTrainer, "Tiny", "2d"),
        "hidiff": (HiDiffTrainer, "Tiny", "2d"),
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
def one_thread(monkeypatch):
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


@pytest.mark.parametrize("name", ["unet", "unet3d", "plain", "hidiff"])
def test_grand_challenge(models, name, tmp_path, capsys):
    words = ["--input-slug", "mr", "--output-slug", "hippocampus", "--uncertainty-slug", "doubt"]
    folder = context(models[name], tmp_path / "My Algorithm", *words, interface="grand-challenge")
    assert run(folder, folder / "test/input", tmp_path / "out") == 0, capsys.readouterr()
    print(capsys.readouterr())
    print(sorted(tmp_path.rglob("output.mha")))
