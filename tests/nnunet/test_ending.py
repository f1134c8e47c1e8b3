"""Ctrl-C and SIGTERM end a training within seconds: no worker is left, and the command that goes on is named and does."""

import os
import signal
import subprocess
import time

import pytest

from nnunet_diffusion.training.checkpoints import read_checkpoint

pytestmark = [pytest.mark.nnunet, pytest.mark.slow]
# 20 epochs: a busy machine must not finish the training before the signal arrives
TRAIN = ["4", "2d", "0", "-tr", "LongTinyDiffusionTrainer", "-p", "Tiny", "-device", "cpu"]


def processes_of(group):
    """Process numbers of a group that still run."""
    found = subprocess.run(["ps", "-eo", "pid=,pgid=,stat="], capture_output=True, text=True, check=True).stdout
    rows = [line.split() for line in found.splitlines()]
    return [pid for pid, owner, state in rows if owner == str(group) and not state.startswith("Z")]


def ended_at(place, results, moment, send, arguments=()):
    """Start the training, send a signal at the first line that `moment` is true of; return exit code and all lines."""
    variables = {"nnUNet_results": str(results), "PYTHONUNBUFFERED": "1", "nnUNet_n_proc_DA": "2"}
    lines, sent = [], None
    with place.start("nnUNetv2_train", *TRAIN, *arguments, **variables) as job:
        for line in job.stdout:
            lines.append(line)
            if sent is None and moment(lines):
                send(job.pid)
                sent = time.monotonic()
    assert sent is not None, "".join(lines[-40:])
    assert time.monotonic() - sent < 30
    # multiprocessing's resource tracker ends when it notices that its parent has
    end = time.monotonic() + 10
    while processes_of(job.pid) and time.monotonic() < end:
        time.sleep(0.1)
    assert processes_of(job.pid) == []
    return job.returncode, lines


def seen(text, times=1):
    return lambda lines: text in lines[-1] and sum(text in line for line in lines) == times


def to_the_job(pid):
    os.kill(pid, signal.SIGTERM)


def to_the_group(pid):
    os.killpg(pid, signal.SIGINT)  # as a terminal does


def test_a_training_is_ended_three_times_and_goes_on_as_each_line_says(hippocampus, tmp_path):
    results = tmp_path / hippocampus.dataset
    code, lines = ended_at(hippocampus, tmp_path, seen("Epoch 1"), to_the_job)
    first = results / "LongTinynnUNetTrainer__Tiny__2d" / "fold_0"
    assert code == 143
    text = "".join(lines)
    assert "Traceback" not in text, text[-3000:]
    assert "Ended by SIGTERM: the denoiser has no finished epoch yet; the pre-segmentor's" in text
    assert f"{first / 'checkpoint_latest.pth'} is on disk. To continue" in text
    assert "To continue: nnUNetv2_train " + " ".join(TRAIN) + "\n" in text
    assert read_checkpoint(first / "checkpoint_latest.pth")["current_epoch"] in range(1, 20)

    ours = results / "LongTinyDiffusionTrainer__Tiny__2d" / "fold_0"
    code, lines = ended_at(hippocampus, tmp_path, epoch_of_denoiser, to_the_group)
    text = "".join(lines)
    assert code == 130 and "Traceback" not in text and "KeyboardInterrupt" not in text, text[-3000:]
    assert f"Interrupted: {ours / 'checkpoint_latest.pth'} is on disk, with the last finished epoch" in text
    assert "To continue: nnUNetv2_train " + " ".join([*TRAIN, "--c"]) in text
    assert read_checkpoint(ours / "checkpoint_latest.pth")["current_epoch"] in range(1, 20)

    code, lines = ended_at(hippocampus, tmp_path, seen("predicting"), to_the_group, ["--c"])
    text = "".join(lines)
    assert code == 130, text[-3000:]
    # nnU-Net's export workers are still importing and may print tracebacks of their own: our line comes after them
    assert f"Interrupted: {ours / 'checkpoint_final.pth'} is on disk, with all epochs" in text.strip().splitlines()[-1]
    done = hippocampus.run("nnUNetv2_train", *TRAIN, "--c", nnUNet_results=str(tmp_path))
    assert "This training is finished" in done.stdout
    assert (ours / "validation" / "summary.json").is_file()


def epoch_of_denoiser(lines):
    return "Epoch 1" in lines[-1] and any("Now training the denoiser" in line for line in lines)
