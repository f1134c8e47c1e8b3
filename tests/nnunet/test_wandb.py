"""nnU-Net's Weights & Biases logger, offline: each of the two networks has a run of its own."""

import re

import pytest

pytest.importorskip("wandb")
pytestmark = [pytest.mark.nnunet, pytest.mark.slow]


def test_each_network_logs_into_a_run_of_its_own(hippocampus, tmp_path):
    variables = {"nnUNet_wandb_enabled": "1", "nnUNet_wandb_mode": "offline", "nnUNet_results": str(tmp_path)}
    words = [4, "2d", 0, "-tr", "TinyDiffusionTrainer", "-p", "Tiny", "-device", "cpu"]
    done = hippocampus.run("nnUNetv2_train", *words, **variables)
    output = done.stdout + done.stderr
    assert not re.findall(r"wandb: WARNING.*step.*", output)  # both networks count their epochs from 0
    for trainer in ("TinynnUNetTrainer", "TinyDiffusionTrainer"):
        fold = tmp_path / hippocampus.dataset / f"{trainer}__Tiny__2d" / "fold_0"
        (record,) = fold.glob("wandb/offline-run-*/*.wandb")
        text = record.read_bytes()
        assert b"train_losses" in text
        assert (b"denoising_loss" in text) is (trainer == "TinyDiffusionTrainer")
