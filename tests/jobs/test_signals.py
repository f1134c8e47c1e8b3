"""SIGTERM and Ctrl-C as exceptions: once, in the main thread, and not in forked workers."""

import multiprocessing
import os
import signal
import threading
import time

import pytest

from nnunet_diffusion.jobs.signals import Terminated, stopped, terminated


def send(which):
    os.kill(os.getpid(), which)
    time.sleep(1)


def test_sigterm_ends_a_block_by_the_exit_code_of_shells():
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as end, terminated():
        send(signal.SIGTERM)
    assert isinstance(end.value, Terminated) and end.value.code == 143
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_second_signal_does_not_break_the_tidying_up():
    codes, tidied = [], False
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), stopped(codes.append):
        try:
            send(signal.SIGINT)
        finally:
            os.kill(os.getpid(), signal.SIGINT)
            tidied = True
    assert tidied and codes == [130]
    assert signal.getsignal(signal.SIGINT) is before


def test_in_another_thread_nothing_changes():
    before, seen = signal.getsignal(signal.SIGTERM), []

    def run():
        with terminated():
            seen.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [before]


def sleep_after_a_word(pipe):
    pipe.send("running")
    time.sleep(30)


def test_forked_workers_end_at_once():
    here, there = multiprocessing.Pipe()
    with terminated():
        worker = multiprocessing.get_context("fork").Process(target=sleep_after_a_word, args=(there,))
        worker.start()
        assert here.recv() == "running"
        worker.terminate()
        worker.join(20)
        assert worker.exitcode == -signal.SIGTERM
