"""A training that is stopped and resumed equals one that was not, bit for bit, with nnU-Net's real loader."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from nnunet_diffusion.training import DiffusionTrainer, HiDiffTrainer
from nnunet_diffusion.training.checkpoints import read_checkpoint

pytestmark = [pytest.mark.nnunet, pytest.mark.slow]
EPOCHS = 3


@pytest.fixture(params=[DiffusionTrainer, HiDiffTrainer])
def train(request, workplace, monkeypatch):
    """Trains, or goes on from the last checkpoint, with a loader that starts each epoch from that epoch's seed."""
    denoiser = request.param.denoiser
    section = {"learning_rate": 3e-3} if denoiser is None else {"denoiser": denoiser, "learning_rate": 3e-3}
    monkeypatch.setattr(DiffusionTrainer, "_embed_presegmentor", lambda self: None)

    def run(stop_before=None, resume=False):
        for seed in (random.seed, np.random.seed, torch.manual_seed):
            seed(0)  # of the weights, and of the patches on which the pre-segmentor is measured
        trainer = workplace.trainer(request.param, **section)
        trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = EPOCHS, 3, 1
        begin = trainer.on_train_epoch_start

        def on_train_epoch_start():
            if trainer.current_epoch == stop_before:
                raise KeyboardInterrupt
            for seed in (random.seed, np.random.seed, torch.manual_seed):
                seed(trainer.current_epoch)
            begin()

        trainer.on_train_epoch_start = on_train_epoch_start
        folder = Path(trainer.output_folder)
        if resume:
            torch.manual_seed(1)  # another process would build other weights
            trainer.load_checkpoint(folder / "checkpoint_latest.pth")
        if stop_before is None:
            trainer.run_training()
            return read_checkpoint(folder / "checkpoint_final.pth")
        with pytest.raises(SystemExit, match="130"):  # as the process ends by Ctrl-C
            trainer.run_training()
        return read_checkpoint(folder / "checkpoint_latest.pth")

    return run


def differences(one, other, path=""):
    """Names of what differs, tensors bit by bit."""
    if isinstance(one, dict):
        assert one.keys() == other.keys()
        return [name for key in one for name in differences(one[key], other[key], f"{path}/{key}")]
    if isinstance(one, (list, tuple)):
        assert len(one) == len(other), path
        return [
            name for i, pair in enumerate(zip(one, other, strict=True)) for name in differences(*pair, f"{path}/{i}")
        ]
    same = torch.equal(one, other) if isinstance(one, torch.Tensor) else np.array_equal(one, other)
    return [] if same else [path]


def test_stopped_and_resumed_equals_uninterrupted(train):
    whole = train()
    for stop in (1, 2):
        half = train(stop_before=stop)
        assert half["current_epoch"] == stop
        assert differences(half["network_weights"], whole["network_weights"])
        resumed = train(resume=True)
        for part in ("network_weights", "optimizer_state", "diffusion", "_best_ema", "current_epoch"):
            assert not differences(whole[part], resumed[part])
        times = {"epoch_start_timestamps", "epoch_end_timestamps"}
        curves = [
            {key: value for key, value in each["logging"].items() if key not in times} for each in (whole, resumed)
        ]
        assert not differences(*curves)
        terms = [key for key in curves[0] if key.endswith("_loss") and not key.startswith(("train", "val"))]
        assert terms and all(len(curves[0][key]) == EPOCHS for key in terms)
        further = resumed["diffusion"]["further_learners"]
        assert list(further) == (["presegmentor"] if "collaboration_loss" in terms else [])
        for state in further.values():
            assert state["averaged_steps"] == 3 * EPOCHS and state["optimizer"]["state"]
