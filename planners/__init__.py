"""Experiment planners; installed as nnunet_diffusion.planners."""
