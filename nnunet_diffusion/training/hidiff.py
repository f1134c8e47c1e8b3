"""Training of HiDiff."""

from __future__ import annotations

from nnunet_diffusion.training.diffusion_trainer import DiffusionTrainer


class HiDiffTrainer(DiffusionTrainer):
    """HiDiff (Chen et al. 2024): a refiner with a Bernoulli diffusion, trained in turns with nnU-Net, the segmentor.

    It starts from the trained nnU-Net of the same fold, which the model then keeps in its further trained form: predict with
    `presegmentation_weight` 1 for that alone. Plans made for another denoiser give it nothing but the pre-segmentor
    (`planned_settings`).
    """

    denoiser = "hidiff"
