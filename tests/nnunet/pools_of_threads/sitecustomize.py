"""Python imports this at its start where the folder is in PYTHONPATH: nnU-Net's pools of processes become pools of threads.

Each process of its many small pools would import torch and nnU-Net again, which takes longer than what it does for a tiny
dataset. Processes that are not of a pool stay as they are.
"""

import multiprocessing
from multiprocessing.pool import ThreadPool

multiprocessing.get_context("spawn").Pool = ThreadPool
