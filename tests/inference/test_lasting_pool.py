"""A pool whose processes are killed: one piece of work fails, the others are done."""

import multiprocessing
import os
import signal
import threading
import time
from concurrent.futures import CancelledError, ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool

import pytest

from nnunet_diffusion.inference.lasting_pool import LastingPool


def forked(number):
    """Processes that start at once; those of predictions import torch anew."""
    return ProcessPoolExecutor(number, multiprocessing.get_context("fork"))


def die():
    time.sleep(0.05)
    os.kill(os.getpid(), signal.SIGKILL)


def double(value):
    time.sleep(0.01)
    return 2 * value


def fail():
    raise KeyError("own error")


@pytest.mark.parametrize("number", [1, 3])
def test_killed_work_alone_fails_and_the_rest_is_done(number, capfd):
    with LastingPool(forked, number) as pool:
        works = [pool.submit(die) if place in (2, 5) else pool.submit(double, place) for place in range(8)]
        for place, work in enumerate(works):
            if place in (2, 5):
                with pytest.raises(RuntimeError, match=r"was killed, mostly for lack of memory .*: take a machine"):
                    work.result(20)
            else:
                assert work.result(20) == 2 * place
        assert pool.submit(double, 10).result(20) == 20
    assert capfd.readouterr().err.count("A process was killed") == (number > 1)


def test_process_that_dies_idle_costs_nothing():
    with LastingPool(forked, 1) as pool:
        first = pool.submit(os.getpid).result(20)
        os.kill(first, signal.SIGKILL)
        time.sleep(0.2)
        assert pool.submit(double, 3).result(20) == 6


def test_own_errors_and_results_pass_through():
    with LastingPool(forked, 2) as pool:
        with pytest.raises(KeyError, match="own error"):
            pool.submit(fail).result(20)
        assert pool.submit(double, 4).result(20) == 8


def test_left_by_an_error_it_finishes_what_has_begun_and_drops_the_rest():
    go = threading.Event()
    pool = LastingPool(ThreadPoolExecutor, 1)
    begun, waiting = pool.submit(lambda: go.wait(20)), pool.submit(double, 1)
    threading.Timer(0.1, go.set).start()
    pool.shutdown(cancel_futures=True)
    assert begun.result(0) is True
    with pytest.raises(CancelledError):
        waiting.result(0)


def test_without_an_error_it_finishes_everything():
    pool = LastingPool(ThreadPoolExecutor, 1)
    works = [pool.submit(double, place) for place in range(5)]
    pool.shutdown()
    assert [work.result(0) for work in works] == [0, 2, 4, 6, 8]


def test_pool_that_breaks_while_it_ends_leaves_no_work_open():
    class Breaking(ThreadPoolExecutor):
        def shutdown(self, wait=True, *, cancel_futures=False):
            go.set()
            super().shutdown(wait)

    def broken():
        go.wait(20)
        raise BrokenProcessPool

    go = threading.Event()
    pool = LastingPool(Breaking, 1)
    work = pool.submit(broken)
    pool.shutdown(cancel_futures=True)
    with pytest.raises(RuntimeError, match="was killed"):
        work.result(0)
