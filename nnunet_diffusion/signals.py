"""SIGTERM, with which Slurm, Kubernetes and `kill` end a job, as an exception, so that the job can tidy up."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType

EXIT_TERMINATED = 128 + signal.SIGTERM  # 143
EXIT_INTERRUPTED = 128 + signal.SIGINT  # 130


class Terminated(SystemExit):
    """The job was sent SIGTERM; uncaught, it ends the process with exit code 143."""

    def __init__(self) -> None:
        super().__init__(EXIT_TERMINATED)


@contextlib.contextmanager
def terminated() -> Iterator[None]:
    """Have SIGTERM raise Terminated in a `with` block, in the main thread; in another thread this does nothing.

    A second SIGTERM is ignored until the end of the block, so that it does not break the tidying up. Processes forked in
    the block end at once with SIGTERM, as they would without it.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, _raise)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if previous is None else previous)


def _raise(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Terminated


def _default_in_child() -> None:
    if signal.getsignal(signal.SIGTERM) is _raise:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_default_in_child)
