"""Trainers that `nnUNetv2_train -tr` names; installed as nnunet_diffusion.trainers.

nnU-Net imports every module of this folder as a top-level module, so each file is named after the class that it
offers and imports nothing optional.
"""
