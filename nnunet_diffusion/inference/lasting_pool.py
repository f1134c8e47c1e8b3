"""A pool of processes that outlives the death of one: the work it died of fails, the rest is done by others."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable
from concurrent.futures import Executor, Future, wait
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from queue import SimpleQueue
from typing import Any

KILLED = (
    "the process that worked on it was killed, mostly for lack of memory (or of space in /dev/shm): take a machine with more "
    "memory, or predict it alone with --sequential"
)


class LastingPool(Executor):
    """Executor whose work goes on in new processes when one was killed, as the system does where memory ends.

    Nothing tells what the dead process worked on. So all unfinished work is begun again, from then on by one process, which
    works in the order of submission: should it die too, it did so of the oldest work, which fails with a RuntimeError.

    Args:
        make: number of processes -> pool of them.
        number: of processes.
    """

    def __init__(self, make: Callable[[int], Executor], number: int) -> None:
        self._make, self._number = make, number
        self._pool, self._closing = make(number), False
        self._lock = threading.RLock()
        self._open: dict[Future, Callable[[], Any]] = {}  # in the order of submission
        # pools call back while they hold their own locks: another thread does what then has to be done
        self._ended: SimpleQueue = SimpleQueue()
        self._thread = threading.Thread(target=self._follow, daemon=True)
        self._thread.start()

    def submit(self, fn: Callable, /, *args: Any, **kwargs: Any) -> Future:
        """Begin `fn(*args, **kwargs)` in a process, as every executor does."""
        future: Future = Future()
        with self._lock:
            self._open[future] = partial(fn, *args, **kwargs)
            self._begin(future)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """End the processes, as every executor does; what is open is finished first, or cancelled unless it has begun."""
        if wait and not cancel_futures:
            self._wait()
        with self._lock:
            self._closing, pool = True, self._pool
        pool.shutdown(wait, cancel_futures=cancel_futures)
        self._ended.put(None)
        if wait:
            self._thread.join()

    def _wait(self) -> None:
        with self._lock:
            futures = list(self._open)
        wait(futures)

    def _begin(self, future: Future) -> None:
        pool = self._pool
        try:
            given = pool.submit(self._open[future])
        except BrokenProcessPool:  # the death was noticed just now, or nothing was open when it came
            self._renew()
            return
        given.add_done_callback(lambda ended: self._ended.put((future, pool, ended)))

    def _renew(self) -> None:
        if self._number > 1:
            print(
                "A process was killed, mostly for lack of memory: from here on there is one in its place",
                file=sys.stderr,
            )
        self._number = 1
        self._pool = self._make(1)
        for future in list(self._open):
            self._begin(future)

    def _follow(self) -> None:
        while (report := self._ended.get()) is not None:
            self._end(*report)
            del report  # what was returned is the caller's now

    def _end(self, future: Future, pool: Executor, ended: Future) -> None:
        """Pass on how one piece of work ended, unless it was begun again since."""
        error = None if ended.cancelled() else ended.exception()
        killed = isinstance(error, BrokenProcessPool)
        with self._lock:
            if future not in self._open or (killed and pool is not self._pool):
                return
            alone = self._number == 1
            if alone or self._closing or not killed:
                del self._open[future]
            if killed and not self._closing:
                self._renew()
            if killed and not (alone or self._closing):
                return
        if ended.cancelled():
            future.cancel()
            future.set_running_or_notify_cancel()
        elif error is not None:
            future.set_exception(RuntimeError(KILLED) if killed else error)
        else:
            future.set_result(ended.result())
