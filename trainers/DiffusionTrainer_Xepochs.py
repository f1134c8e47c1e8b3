"""Shorter trainings, named as nnU-Net names them; each has the nnU-Net trainer of the same length as pre-segmentor."""

from nnunet_diffusion.training import DiffusionTrainer


class DiffusionTrainer_1epoch(DiffusionTrainer):
    """1 epoch."""

    epochs = 1
    presegmentor_trainer = "nnUNetTrainer_1epoch"


class DiffusionTrainer_5epochs(DiffusionTrainer):
    """5 epochs."""

    epochs = 5
    presegmentor_trainer = "nnUNetTrainer_5epochs"


class DiffusionTrainer_10epochs(DiffusionTrainer):
    """10 epochs."""

    epochs = 10
    presegmentor_trainer = "nnUNetTrainer_10epochs"


class DiffusionTrainer_20epochs(DiffusionTrainer):
    """20 epochs."""

    epochs = 20
    presegmentor_trainer = "nnUNetTrainer_20epochs"


class DiffusionTrainer_50epochs(DiffusionTrainer):
    """50 epochs."""

    epochs = 50
    presegmentor_trainer = "nnUNetTrainer_50epochs"


class DiffusionTrainer_100epochs(DiffusionTrainer):
    """100 epochs."""

    epochs = 100
    presegmentor_trainer = "nnUNetTrainer_100epochs"


class DiffusionTrainer_250epochs(DiffusionTrainer):
    """250 epochs."""

    epochs = 250
    presegmentor_trainer = "nnUNetTrainer_250epochs"
