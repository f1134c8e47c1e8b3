"""`-tr nnUNetTrainerEMA`: nnU-Net with averaged weights, alone or as `presegmentor.trainer` of the plans; 1000 epochs."""

from nnunet_diffusion.training import nnUNetTrainerEMA

__all__ = ["nnUNetTrainerEMA"]
