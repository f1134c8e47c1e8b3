"""Shorter trainings of nnU-Net's network as denoiser, named by the epochs of nnU-Net; the denoiser has a quarter of them."""

from nnunet_diffusion.training import DiffusionTrainerUNet


class DiffusionTrainerUNet_1epoch(DiffusionTrainerUNet):
    """1 epoch of nnU-Net, 1 of the denoiser."""

    epochs = 1
    presegmentor_trainer = "nnUNetTrainer_1epoch"


class DiffusionTrainerUNet_5epochs(DiffusionTrainerUNet):
    """5 epochs of nnU-Net, 2 of the denoiser."""

    epochs = 2
    presegmentor_trainer = "nnUNetTrainer_5epochs"


class DiffusionTrainerUNet_10epochs(DiffusionTrainerUNet):
    """10 epochs of nnU-Net, 3 of the denoiser."""

    epochs = 3
    presegmentor_trainer = "nnUNetTrainer_10epochs"


class DiffusionTrainerUNet_20epochs(DiffusionTrainerUNet):
    """20 epochs of nnU-Net, 5 of the denoiser."""

    epochs = 5
    presegmentor_trainer = "nnUNetTrainer_20epochs"


class DiffusionTrainerUNet_50epochs(DiffusionTrainerUNet):
    """50 epochs of nnU-Net, 13 of the denoiser."""

    epochs = 13
    presegmentor_trainer = "nnUNetTrainer_50epochs"


class DiffusionTrainerUNet_100epochs(DiffusionTrainerUNet):
    """100 epochs of nnU-Net, 25 of the denoiser."""

    epochs = 25
    presegmentor_trainer = "nnUNetTrainer_100epochs"


class DiffusionTrainerUNet_250epochs(DiffusionTrainerUNet):
    """250 epochs of nnU-Net, 63 of the denoiser."""

    epochs = 63
    presegmentor_trainer = "nnUNetTrainer_250epochs"
