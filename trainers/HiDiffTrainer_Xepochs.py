"""Shorter trainings of HiDiff, named as nnU-Net names them; each starts from the nnU-Net of the same length."""

from nnunet_diffusion.training import HiDiffTrainer


class HiDiffTrainer_1epoch(HiDiffTrainer):
    """1 epoch."""

    epochs = 1
    presegmentor_trainer = "nnUNetTrainer_1epoch"


class HiDiffTrainer_5epochs(HiDiffTrainer):
    """5 epochs."""

    epochs = 5
    presegmentor_trainer = "nnUNetTrainer_5epochs"


class HiDiffTrainer_10epochs(HiDiffTrainer):
    """10 epochs."""

    epochs = 10
    presegmentor_trainer = "nnUNetTrainer_10epochs"


class HiDiffTrainer_20epochs(HiDiffTrainer):
    """20 epochs."""

    epochs = 20
    presegmentor_trainer = "nnUNetTrainer_20epochs"


class HiDiffTrainer_50epochs(HiDiffTrainer):
    """50 epochs."""

    epochs = 50
    presegmentor_trainer = "nnUNetTrainer_50epochs"


class HiDiffTrainer_100epochs(HiDiffTrainer):
    """100 epochs."""

    epochs = 100
    presegmentor_trainer = "nnUNetTrainer_100epochs"


class HiDiffTrainer_250epochs(HiDiffTrainer):
    """250 epochs."""

    epochs = 250
    presegmentor_trainer = "nnUNetTrainer_250epochs"
