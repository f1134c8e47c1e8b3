"""The mathematics of the diffusion processes and their samplers: torch only, no network and no nnU-Net."""
