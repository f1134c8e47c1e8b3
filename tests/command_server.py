"""Runs console commands in forks of one process that has imported what nnU-Net imports from elsewhere.

Each command would spend most of its time on these imports, the same for all. nnU-Net and this package are imported by the
command itself, from its own environment, as ever.

Protocol: lines of JSON on standard input, [ID, {"start": {"words", "environment", "stdout", "stderr", "seconds"}}], which is
answered on standard output by "ID PROCESS", and [ID, {"wait": PROCESS}], answered by "ID EXITCODE" when it has ended.
"""

import importlib
import json
import os
import random
import runpy
import signal
import sys

import numpy as np
import torch

LIBRARIES = (
    "torch._dynamo",
    "torch.distributed.fsdp",
    "torch.nn.parallel",
    "scipy.ndimage",
    "scipy.stats",
    "skimage.measure",
    "skimage.morphology",
    "skimage.transform",
    "sklearn.model_selection",
    "seaborn",
    "matplotlib.pyplot",
    "pandas",
    "SimpleITK",
    "nibabel",
    "wandb",
    "dynamic_network_architectures.architectures.unet",
    "batchgenerators.dataloading.multi_threaded_augmenter",
    "batchgeneratorsv2.transforms.spatial.spatial",
)
"""None starts a thread, which a fork would lose."""


def serve():
    """Answer requests until there are no more."""
    for name in LIBRARIES:
        importlib.import_module(name)
    threads = len(os.listdir("/proc/self/task"))
    if threads > 1:
        raise RuntimeError(f"{threads} threads are running, which forks would lose: one of {LIBRARIES} started them")
    for line in sys.stdin:
        number, request = json.loads(line)
        if "wait" in request:
            answer = os.waitstatus_to_exitcode(os.waitpid(request["wait"], 0)[1])
        else:
            answer = os.fork()
            if answer == 0:
                become(**request["start"])
        print(number, answer, flush=True)


def become(words, environment, stdout, stderr, seconds):
    """Be the command from now on; does not return."""
    signal.alarm(seconds)
    written = os.O_WRONLY | os.O_CREAT | os.O_APPEND
    for number, (path, flags) in enumerate([(os.devnull, os.O_RDONLY), (stdout, written), (stderr, written)]):
        opened = os.open(path, flags)
        os.dup2(opened, number)
        os.close(opened)
    sys.stdout.reconfigure(line_buffering=True)
    os.environ.clear()
    os.environ.update(environment)
    # as in processes of their own, no two commands draw the same
    random.seed()
    np.random.seed()
    torch.seed()
    sys.argv = words
    sys.path[0] = os.path.dirname(words[0])
    runpy.run_path(words[0], run_name="__main__")
    sys.exit()


if __name__ == "__main__":
    serve()
