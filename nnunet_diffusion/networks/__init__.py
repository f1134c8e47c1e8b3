"""Networks, written to follow the figures of their papers. They depend neither on the diffusion code nor on nnU-Net."""

from nnunet_diffusion.networks.pgdiffseg import Condition, PGDiffSeg

__all__ = ["Condition", "PGDiffSeg"]
