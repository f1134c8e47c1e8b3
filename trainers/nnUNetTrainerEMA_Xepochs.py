"""Shorter trainings of nnU-Net with averaged weights, named as nnU-Net names its own."""

from nnunet_diffusion.training import nnUNetTrainerEMA


class nnUNetTrainerEMA_1epoch(nnUNetTrainerEMA):
    """1 epoch."""

    epochs = 1


class nnUNetTrainerEMA_5epochs(nnUNetTrainerEMA):
    """5 epochs."""

    epochs = 5


class nnUNetTrainerEMA_10epochs(nnUNetTrainerEMA):
    """10 epochs."""

    epochs = 10


class nnUNetTrainerEMA_20epochs(nnUNetTrainerEMA):
    """20 epochs."""

    epochs = 20


class nnUNetTrainerEMA_50epochs(nnUNetTrainerEMA):
    """50 epochs."""

    epochs = 50


class nnUNetTrainerEMA_100epochs(nnUNetTrainerEMA):
    """100 epochs."""

    epochs = 100


class nnUNetTrainerEMA_250epochs(nnUNetTrainerEMA):
    """250 epochs."""

    epochs = 250
