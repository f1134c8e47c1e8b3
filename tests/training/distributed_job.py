"""One rank of `nnUNetv2_train ... -num_gpus 2`, on the CPU, for test_distributed.py: distributed_job.py RANK FOLDER.

It runs what nnU-Net runs in each process. nnU-Net offers distributed training on GPUs only, so its communication (nccl)
and its choice of the device are replaced.
"""

import functools
import sys
from pathlib import Path

import torch
from nnunetv2.run import run_training
from nnunetv2.training.nnUNetTrainer import nnUNetTrainer as nnunet_module
from one_rank import RANKS, join


def main() -> None:
    """Join the other rank and train both networks from nothing to the validation."""
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    trainer_class = nnunet_module.nnUNetTrainer
    build = trainer_class.__init__

    @functools.wraps(build)  # nnU-Net reads the names of the parameters
    def on_the_cpu(self, *arguments, **keywords):
        build(self, *arguments, **keywords)
        self.device = torch.device("cpu")

    trainer_class.__init__ = on_the_cpu
    run_training.setup_ddp = lambda rank, ranks: join(rank, folder)
    torch.cuda.set_device = lambda device: None
    run_training.run_ddp(
        rank, "4", "2d", 0, "TinyDiffusionTrainer", "Tiny", False, False, False, None, False, False, RANKS
    )


if __name__ == "__main__":
    main()
