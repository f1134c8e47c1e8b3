"""A training of nnU-Net's own trainers that can be ended at any time: it loses no finished epoch and leaves no process."""

from __future__ import annotations

import multiprocessing

import torch
from torch.backends import cudnn

from nnunet_diffusion.training.ending import tidy_end
from nnunet_diffusion.training.presegmentor import ensure_presegmentor


def train_or_continue(trainer: str, dataset: str, configuration: str, fold: str, plans: str, device: str) -> None:
    """Train and validate a fold from its last checkpoint, or from the beginning, as a pre-segmentor is trained.

    nnU-Net saves every 50 epochs, and SIGTERM ends it without ending its augmentation workers. Here each epoch is saved, and
    the process ends with exit code 143 after its workers. The validation keeps probabilities.

    Args:
        trainer: name of a trainer that nnU-Net's own search finds.
        dataset: name of the dataset, DatasetXXX_NAME.
        configuration: name of the configuration.
        fold: number of the fold, or "all".
        plans: name of the plans.
        device: "cuda", "cpu" or "mps".

    Raises:
        SystemExit: Ctrl-C (exit code 130) or SIGTERM (143) ended the training.
    """
    torch.set_num_threads(multiprocessing.cpu_count() if device == "cpu" else 1)  # as nnUNetv2_train
    cudnn.benchmark = torch.cuda.is_available()
    number = fold if fold == "all" else int(fold)
    words = dataset, configuration, number, plans, torch.device(device)

    def tell(line: str) -> None:
        print(line.removeprefix("Pre-segmentor: "), flush=True)

    with tidy_end(lambda cause: tell(f"{cause}. To continue, give the same command.")):
        ensure_presegmentor(trainer, *words, tell)
