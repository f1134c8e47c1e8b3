"""Trainers of 2 (or 20) epochs of 2 + 1 iterations for tests; this folder stands beside `trainers/` in nnUNet_extTrainer."""

import os
import random
import time
from pathlib import Path

import numpy as np
import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.variants.data_augmentation.nnUNetTrainerNoMirroring import nnUNetTrainerNoMirroring

from nnunet_diffusion.training import (
    DiffusionTrainer,
    DiffusionTrainerNoMirroring,
    DiffusionTrainerUNet,
    HiDiffTrainer,
    nnUNetTrainerEMA,
)

CUDA = torch.device("cuda")


class Tiny:
    """Comes first among the bases; nnU-Net reads the names of these parameters."""

    def __init__(self, plans, configuration, fold, dataset_json, device=CUDA):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs, self.num_iterations_per_epoch, self.num_val_iterations_per_epoch = 2, 2, 1


class TinynnUNetTrainer(Tiny, nnUNetTrainer):
    pass


class TinynnUNetTrainerEMA(Tiny, nnUNetTrainerEMA):
    pass


class TinyDiffusionTrainer(Tiny, DiffusionTrainer):
    presegmentor_trainer = "TinynnUNetTrainer"


class LongTinynnUNetTrainer(TinynnUNetTrainer):
    def __init__(self, plans, configuration, fold, dataset_json, device=CUDA):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = 20


class LongTinyDiffusionTrainer(TinyDiffusionTrainer):
    presegmentor_trainer = "LongTinynnUNetTrainer"

    def __init__(self, plans, configuration, fold, dataset_json, device=CUDA):
        super().__init__(plans, configuration, fold, dataset_json, device)
        self.num_epochs = 20


class TinynnUNetTrainerNoMirroring(Tiny, nnUNetTrainerNoMirroring):
    pass


class TinyDiffusionTrainerNoMirroring(Tiny, DiffusionTrainerNoMirroring):
    presegmentor_trainer = "TinynnUNetTrainerNoMirroring"


class TinyDiffusionTrainerUNet(Tiny, DiffusionTrainerUNet):
    presegmentor_trainer = "TinynnUNetTrainer"


class TinyHiDiffTrainer(Tiny, HiDiffTrainer):
    presegmentor_trainer = "TinynnUNetTrainer"


class TinyHiDiffTrainerNoMirroring(TinyHiDiffTrainer, DiffusionTrainerNoMirroring):
    presegmentor_trainer = "TinynnUNetTrainerNoMirroring"


def seed(number):
    for each in (random.seed, np.random.seed, torch.manual_seed):
        each(number)


class Seeded(Tiny):
    """Each epoch starts from its own seed, so that a training that was stopped and continued equals one that was not.

    It stays in its second epoch while the folder TEST_HOLD has a file of its name.
    """

    def initialize(self):
        seed(0)
        super().initialize()

    def on_train_epoch_start(self):
        seed(self.current_epoch)
        super().on_train_epoch_start()

    def train_step(self, batch):
        if "TEST_HOLD" in os.environ and self.current_epoch == 1:
            while Path(os.environ["TEST_HOLD"], f"{type(self).__name__}__2d__fold_{self.fold}").exists():
                time.sleep(0.1)
        return super().train_step(batch)


class SeededTinynnUNetTrainer(Seeded, nnUNetTrainer):
    pass


class SeededTinyDiffusionTrainer(Seeded, DiffusionTrainerUNet):
    presegmentor_trainer = "SeededTinynnUNetTrainer"
