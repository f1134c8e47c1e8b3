"""Environment variables of our own, beside nnU-Net's."""

PRESEGMENTOR_FOLDER = "nnUNet_diffusion_presegmentor"
"""Model folder of a trained network of nnU-Net's, to start from instead of training one."""
