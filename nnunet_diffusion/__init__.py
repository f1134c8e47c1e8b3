"""Diffusion segmentation for nnU-Net v2: the PGDiffSeg denoiser run by few-step PD-DDPM."""

__version__ = "0.1.0"
