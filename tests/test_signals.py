"""SIGTERM as an exception."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

import pytest

from nnunet_diffusion.signals import Terminated, terminated

SENT = """
import os, signal, sys, time
from nnunet_diffusion.signals import terminated
with terminated():
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(60)
    finally:
        os.kill(os.getpid(), signal.SIGTERM)  # a second one, as schedulers send
        print("tidied", flush=True)
"""


def test_sigterm_ends_the_block_with_143_after_tidying_up():
    done = subprocess.run([sys.executable, "-c", SENT], capture_output=True, text=True)
    assert done.returncode == 143, done.stderr
    assert done.stdout == "tidied\n"
    assert not done.stderr


def test_handler_is_restored():
    def mine(number, frame):
        pass

    previous = signal.signal(signal.SIGTERM, mine)
    try:
        with pytest.raises(Terminated), terminated():
            os.kill(os.getpid(), signal.SIGTERM)
            signal.pause()
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, previous)


def test_forked_process_ends_at_once():
    ready, begun = os.pipe()
    with terminated():
        child = os.fork()
        if not child:
            os.write(begun, b"!")
            signal.pause()
            os._exit(1)
        os.read(ready, 1)
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGTERM


def test_other_threads_are_left_alone():
    failed = []

    def run():
        try:
            with terminated():
                pass
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert not failed
