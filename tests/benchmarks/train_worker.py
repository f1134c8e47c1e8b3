"""nnUNetv2_train that saves every epoch and stops between two epochs when its time is up.

Usage: train_worker.py [--deadline SECONDS_SINCE_1970] [--no-validation] -- ARGUMENTS OF nnUNetv2_train
"""

from __future__ import annotations

import argparse
import itertools
import multiprocessing
import os
import sys
import time

from nnunetv2.run.run_training import run_training_entry
from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer

EPOCH_MARGIN = 1.15


def save_every_epoch() -> None:
    """Stock nnU-Net saves every 50 epochs; a shorter training could not be resumed."""
    original = nnUNetTrainer.on_train_start

    def on_train_start(self: nnUNetTrainer) -> None:
        self.save_every = 1
        original(self)

    nnUNetTrainer.on_train_start = on_train_start


def stop_before(deadline: float) -> None:
    """End the process before an epoch that would outlast `deadline`; all earlier epochs are saved by then."""
    original = nnUNetTrainer.on_epoch_start
    starts: list[float] = []

    def on_epoch_start(self: nnUNetTrainer) -> None:
        now = time.time()
        longest = max((end - start for start, end in itertools.pairwise([*starts, now])), default=0.0)
        if now + EPOCH_MARGIN * longest > deadline:
            self.print_to_log_file(f"Time is up before epoch {self.current_epoch}; run again to go on.")
            for loader in (self.dataloader_train, self.dataloader_val):
                if hasattr(loader, "_finish"):
                    loader._finish()
            sys.exit(os.EX_TEMPFAIL)
        starts.append(now)
        original(self)

    nnUNetTrainer.on_epoch_start = on_epoch_start


def main() -> None:
    """Read our own options, leave the rest to nnU-Net."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--deadline", type=float, default=float("inf"))
    parser.add_argument("--no-validation", action="store_true")
    separator = sys.argv.index("--")
    options = parser.parse_args(sys.argv[1:separator])
    if "OMP_NUM_THREADS" in os.environ:
        # on the CPU nnU-Net takes all cores for each training, whatever this variable says
        threads = int(os.environ["OMP_NUM_THREADS"])
        multiprocessing.cpu_count = lambda: threads
    save_every_epoch()
    stop_before(options.deadline)
    if options.no_validation:
        # the comparison predicts the same cases itself, at every setting
        nnUNetTrainer.perform_actual_validation = lambda self, save_probabilities=False: None
    sys.argv = ["nnUNetv2_train", *sys.argv[separator + 1 :]]
    run_training_entry()


if __name__ == "__main__":
    main()
