"""Python imports this at its start where the folder is in PYTHONPATH: nnU-Net's pools of processes become pools of threads, and
it counts one core.

Each process of its many small pools would import torch and nnU-Net again, which takes longer than what it does for a tiny
dataset. Processes that are not of a pool stay as they are. On the CPU nnU-Net takes a thread of torch's for each core that it
counts, also where two tests run at once.
"""

import multiprocessing
from multiprocessing.pool import ThreadPool

multiprocessing.get_context("spawn").Pool = ThreadPool
multiprocessing.cpu_count = lambda: 1
