"""Models whose denoiser is exchanged, for tests of what is measured on them."""

from pathlib import Path

import pytest
import torch

from nnunet_diffusion.evaluation.preprocessed import preprocessed_cases
from nnunet_diffusion.inference import DiffusionPredictor
from nnunet_diffusion.training import DiffusionTrainer


@pytest.fixture
def loaded(workplace):
    """A function of a denoiser's class that returns a predictor, two validation cases and what loads one."""

    def load(kind):
        torch.manual_seed(0)
        trainer = workplace.trainer(DiffusionTrainer)
        trainer.initialize()
        if kind is not None:
            trainer.segmenter.denoiser = kind(trainer.segmenter.process)
        trainer.configure_rotation_dummyDA_mirroring_and_inital_patch_size()
        predictor = DiffusionPredictor(device=torch.device("cpu"), allow_tqdm=False, threads=1)
        predictor.manual_initialization(
            trainer.segmenter, trainer.plans_manager, trainer.configuration_manager, None, trainer.dataset_json,
            "DiffusionTrainer", (0, 1),
        )  # fmt: skip
        folder, manager = Path(trainer.preprocessed_dataset_folder), trainer.label_manager
        return predictor, trainer.do_split()[1][:2], lambda name: next(preprocessed_cases(folder, [name], manager))

    return load
