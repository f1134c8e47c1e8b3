"""A cross-validation as a graph of tasks, run on this machine or by Slurm; nnU-Net and torch are not imported here."""
