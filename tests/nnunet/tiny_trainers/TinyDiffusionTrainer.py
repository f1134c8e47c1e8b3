"""Trainers of 2 epochs of 2 + 1 iterations for tests; this folder stands beside `trainers/` in nnUNet_extTrainer."""

import torch
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
from nnunetv2.training.nnUNetTrainer.variants.data_augmentation.nnUNetTrainerNoMirroring import nnUNetTrainerNoMirroring

from nnunet_diffusion.training import DiffusionTrainer, DiffusionTrainerNoMirroring

CUDA = torch.device("cuda")


def shorten(trainer):
    trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = 2, 2, 1


class TinynnUNetTrainer(nnUNetTrainer):
    def __init__(self, plans, configuration, fold, dataset_json, device=CUDA):
        super().__init__(plans, configuration, fold, dataset_json, device)
        shorten(self)


class TinyDiffusionTrainer(DiffusionTrainer):
    presegmentor_trainer = "TinynnUNetTrainer"

    def __init__(self, plans, configuration, fold, dataset_json, device=CUDA):
        super().__init__(plans, configuration, fold, dataset_json, device)
        shorten(self)


class TinynnUNetTrainerNoMirroring(nnUNetTrainerNoMirroring):
    def __init__(self, plans, configuration, fold, dataset_json, device=CUDA):
        super().__init__(plans, configuration, fold, dataset_json, device)
        shorten(self)


class TinyDiffusionTrainerNoMirroring(DiffusionTrainerNoMirroring):
    presegmentor_trainer = "TinynnUNetTrainerNoMirroring"

    def __init__(self, plans, configuration, fold, dataset_json, device=CUDA):
        super().__init__(plans, configuration, fold, dataset_json, device)
        shorten(self)
