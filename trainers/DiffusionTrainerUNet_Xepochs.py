"""Shorter trainings of nnU-Net's network as denoiser, named as nnU-Net names its own."""

from nnunet_diffusion.training import DiffusionTrainerUNet


class DiffusionTrainerUNet_1epoch(DiffusionTrainerUNet):
    """1 epoch."""

    epochs = 1
    presegmentor_trainer = "nnUNetTrainer_1epoch"


class DiffusionTrainerUNet_5epochs(DiffusionTrainerUNet):
    """5 epochs."""

    epochs = 5
    presegmentor_trainer = "nnUNetTrainer_5epochs"


class DiffusionTrainerUNet_10epochs(DiffusionTrainerUNet):
    """10 epochs."""

    epochs = 10
    presegmentor_trainer = "nnUNetTrainer_10epochs"


class DiffusionTrainerUNet_20epochs(DiffusionTrainerUNet):
    """20 epochs."""

    epochs = 20
    presegmentor_trainer = "nnUNetTrainer_20epochs"


class DiffusionTrainerUNet_50epochs(DiffusionTrainerUNet):
    """50 epochs."""

    epochs = 50
    presegmentor_trainer = "nnUNetTrainer_50epochs"


class DiffusionTrainerUNet_100epochs(DiffusionTrainerUNet):
    """100 epochs."""

    epochs = 100
    presegmentor_trainer = "nnUNetTrainer_100epochs"


class DiffusionTrainerUNet_250epochs(DiffusionTrainerUNet):
    """250 epochs."""

    epochs = 250
    presegmentor_trainer = "nnUNetTrainer_250epochs"
