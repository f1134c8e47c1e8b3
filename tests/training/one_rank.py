"""One rank of a distributed training step on the CPU, for test_distributed.py: one_rank.py RANK|alone FOLDER.

nnU-Net offers distributed training on GPUs only: its device and its wrapper's device list are replaced here.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from nnunetv2.training.nnUNetTrainer import nnUNetTrainer as nnunet_module
from torch.nn.parallel import DistributedDataParallel

from nnunet_diffusion.training import DiffusionTrainer

RANKS = 2


def take_step(folder: Path, rows: slice) -> dict:
    """Make one step on these rows of the batch; return gradients, averaged weights and the pre-segmentor's weights."""
    given = torch.load(folder / "given.pt")
    plans = json.loads((folder / "plans.json").read_text())
    description = json.loads((folder / "dataset.json").read_text())
    trainer = DiffusionTrainer({**plans, "continue_training": False}, "2d", 0, description, torch.device("cpu"))
    trainer.device = torch.device("cpu")
    torch.manual_seed(trainer.local_rank)  # the wrapper gives all ranks the weights of the first
    trainer.initialize()
    trainer.on_train_epoch_start()
    drawn = trainer._generator.initial_seed()
    trainer.objective.draw_noise = lambda clean, generator: (given["timestep"][rows], given["noise"][rows])
    losses = trainer.train_step({key: given[key][rows] for key in ("data", "target")})
    presegmentor = trainer.segmenter.presegmentor
    return {
        "gradients": {
            f"{name}.{key}": parameter.grad
            for name, learner in trainer.learners.items()
            for key, parameter in learner.module.named_parameters()
            if parameter.requires_grad
        },
        "average": trainer.learners["denoiser"].average.module.state_dict(),
        "presegmentor": presegmentor.state_dict(),
        "losses": {key: float(value) for key, value in losses.items()},
        "seed": drawn,
        "wrapped": type(trainer.learners["denoiser"]._wrapped).__name__,
    }


def join(rank: int, folder: Path) -> None:
    """Join the other rank over the CPU, and have nnU-Net wrap its network for the CPU."""
    nnunet_module.DDP = lambda network, device_ids: DistributedDataParallel(network)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=RANKS)


def main() -> None:
    """Join the other rank, step, leave the result in FOLDER/RANK.pt; alone, with the whole batch."""
    folder = Path(sys.argv[2])
    if sys.argv[1] == "alone":
        torch.save(take_step(folder, slice(None)), folder / "alone.pt")
        return
    rank = int(sys.argv[1])
    join(rank, folder)
    torch.save(take_step(folder, slice(rank, rank + 1)), folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
