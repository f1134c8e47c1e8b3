"""`-tr HiDiffTrainer`: nnUNetTrainer (1000 epochs), then as many epochs of HiDiff, which trains both networks in turns."""

from nnunet_diffusion.training import HiDiffTrainer

__all__ = ["HiDiffTrainer"]
