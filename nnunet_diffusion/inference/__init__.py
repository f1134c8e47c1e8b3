"""Prediction of whole volumes: one reverse process per volume, from any pre-segmentation, with any sampler (layer 3)."""

from nnunet_diffusion.inference.predictor import DiffusionPredictor

__all__ = ["DiffusionPredictor"]
