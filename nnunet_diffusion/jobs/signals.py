"""Turns signals that end a job into exceptions, so that it can clean up.

These are SIGTERM, which Slurm, Kubernetes and `kill` send, and SIGINT (Ctrl-C).
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

EXIT_TERMINATED = 128 + signal.SIGTERM  # 143
EXIT_INTERRUPTED = 128 + signal.SIGINT  # 130

_FORKED: dict[signal.Signals, Any] = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
_handled: set[signal.Signals] = set()


class Terminated(SystemExit):
    """The job was sent SIGTERM; uncaught, it ends the process with exit code 143."""

    def __init__(self) -> None:
        super().__init__(EXIT_TERMINATED)


@contextlib.contextmanager
def terminated() -> Iterator[None]:
    """Make SIGTERM raise Terminated inside a `with` block of the main thread; other threads are not affected.

    A second SIGTERM is ignored until the end of the block, so that it does not interrupt the cleanup. Processes forked
    inside the block end immediately on SIGTERM, as they would without it.
    """
    with _raised(signal.SIGTERM, Terminated):
        yield


@contextlib.contextmanager
def stopped(noticed: Callable[[int], object]) -> Iterator[None]:
    """As `terminated`; also, Ctrl-C raises KeyboardInterrupt once, and is then ignored until the end of the block.

    Args:
        noticed: called with the exit code before either exception is raised.
    """
    with (
        _raised(signal.SIGTERM, Terminated, lambda: noticed(EXIT_TERMINATED)),
        _raised(signal.SIGINT, KeyboardInterrupt, lambda: noticed(EXIT_INTERRUPTED)),
    ):
        yield


@contextlib.contextmanager
def _raised(
    which: signal.Signals, error: type[BaseException], noticed: Callable[[], object] = lambda: None
) -> Iterator[None]:
    def handle(number: int, frame: FrameType | None) -> None:
        signal.signal(which, signal.SIG_IGN)
        noticed()
        raise error

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    nested = which in _handled
    previous: Any = signal.getsignal(which) or signal.SIG_DFL  # None: a handler that C code set
    signal.signal(which, handle)
    _handled.add(which)
    try:
        yield
    finally:
        if not nested:
            _handled.discard(which)
        signal.signal(which, previous)


def _restore_in_child() -> None:
    for which in _handled:
        signal.signal(which, _FORKED[which])
    _handled.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_restore_in_child)
