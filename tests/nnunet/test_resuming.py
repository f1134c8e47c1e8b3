"""Jobs that are killed at any moment go on where they were, by nnU-Net's own commands."""

import os
import signal
from itertools import pairwise

import pytest

from nnunet_diffusion.training.checkpoints import read_checkpoint

pytestmark = [pytest.mark.nnunet, pytest.mark.slow]
TRAIN = [4, "2d", 0, "-tr", "TinyDiffusionTrainer", "-p", "Tiny", "-device", "cpu"]


def killed_at(place, results, moment, arguments=()):
    """Start the training and kill it, workers included, at the first line that `moment` is true of."""
    variables = {"nnUNet_results": str(results), "PYTHONUNBUFFERED": "1"}
    words, lines = [*TRAIN, *arguments], []
    with place.start("nnUNetv2_train", *words, **variables) as job:
        for line in job.stdout:
            lines.append(line)
            if moment(lines):
                os.killpg(job.pid, signal.SIGKILL)
                break
    assert job.returncode == -signal.SIGKILL, "".join(lines[-40:])


def seen(text, times):
    """Whether the last of the lines is the `times`-th with `text`."""
    return lambda lines: text in lines[-1] and sum(text in line for line in lines) == times


def complete(folder):
    """Return the final checkpoint after checking that nothing of the training is missing or there twice."""
    assert (folder / "validation" / "summary.json").is_file()
    assert not [path for path in folder.iterdir() if path.suffix == ".tmp"]
    checkpoint = read_checkpoint(folder / "checkpoint_final.pth")
    assert checkpoint["current_epoch"] == 2
    curves = checkpoint["logging"]
    assert len(curves["train_losses"]) == len(curves["epoch_end_timestamps"]) == 2
    assert all(earlier < later for earlier, later in pairwise(curves["epoch_start_timestamps"]))
    return checkpoint


def test_killed_while_the_presegmentor_trains(hippocampus, tmp_path):
    killed_at(hippocampus, tmp_path, seen("Epoch 1", 1))
    first = tmp_path / hippocampus.dataset / "TinynnUNetTrainer__Tiny__2d" / "fold_0"
    before = read_checkpoint(first / "checkpoint_latest.pth")
    assert before["current_epoch"] == 1
    hippocampus.run("nnUNetv2_train", *TRAIN, nnUNet_results=str(tmp_path))
    after = complete(first)
    assert after["logging"]["train_losses"][0] == before["logging"]["train_losses"][0]
    complete(first.parents[1] / "TinyDiffusionTrainer__Tiny__2d" / "fold_0")


def test_killed_while_the_denoiser_trains_then_while_it_is_validated(hippocampus, tmp_path):
    # the pre-segmentor's two epochs come first, then its validation on two cases
    killed_at(hippocampus, tmp_path, seen("Epoch 1", 2))
    ours = tmp_path / hippocampus.dataset / "TinyDiffusionTrainer__Tiny__2d" / "fold_0"
    before = read_checkpoint(ours / "checkpoint_latest.pth")
    assert before["current_epoch"] == 1

    killed_at(hippocampus, tmp_path, seen("predicting", 1), ["--c"])
    trained = read_checkpoint(ours / "checkpoint_final.pth")
    assert not (ours / "validation" / "summary.json").exists()
    for curve in ("train_losses", "denoising_loss", "mean_fg_dice"):
        assert trained["logging"][curve][0] == before["logging"][curve][0]
    assert int(before["diffusion"]["averaged_steps"]) == 2
    assert int(trained["diffusion"]["averaged_steps"]) == 4

    hippocampus.run("nnUNetv2_train", *TRAIN, "--c", nnUNet_results=str(tmp_path))
    after = complete(ours)
    for key, value in trained["network_weights"].items():
        assert (after["network_weights"][key] == value).all(), key
