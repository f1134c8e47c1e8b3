"""Networks that read like the figures of their papers; they know no diffusion and no nnU-Net."""

from nnunet_diffusion.networks.pgdiffseg import Condition, PGDiffSeg

__all__ = ["Condition", "PGDiffSeg"]
