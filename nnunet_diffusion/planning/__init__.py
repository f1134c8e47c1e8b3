"""Plans for nnU-Net and the denoiser: cost of both training steps, sizing rules, and the mixin of the planners."""
