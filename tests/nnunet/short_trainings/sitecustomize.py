"""Python imports this at its start where the folder is in PYTHONPATH: every training is one epoch of two steps.

So the commands of the documentation can be run as they are typed.
"""

import importlib.abc
import importlib.machinery
import sys

MODULE = "nnunetv2.training.nnUNetTrainer.nnUNetTrainer"


class ShortTrainings(importlib.machinery.SourceFileLoader):
    """Loads nnU-Net's trainer and shortens it."""

    def exec_module(self, module):
        super().exec_module(module)
        begin = module.nnUNetTrainer.on_train_start

        def on_train_start(trainer):
            trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = 1, 2, 1
            begin(trainer)

        module.nnUNetTrainer.on_train_start = on_train_start


class Finder(importlib.abc.MetaPathFinder):
    """Finds that module as Python does, with the loader above."""

    def find_spec(self, name, path, target=None):
        if name != MODULE:
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        spec.loader = ShortTrainings(name, spec.origin)
        return spec


sys.meta_path.insert(0, Finder())
