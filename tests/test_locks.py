"""Locks between jobs, by flock and, where a file system has none, by a marker with a heartbeat."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time

import pytest

from nnunet_diffusion import locks
from nnunet_diffusion.locks import HeldLock

WITHOUT_FLOCK = """
import errno, fcntl
def refuse(descriptor, operation):
    raise OSError(errno.ENOLCK, "No locks available")
fcntl.flock = refuse
"""
HOLD = """
import os, sys, time
from nnunet_diffusion import locks
locks.BEAT_SECONDS = 0.1
lock = locks.HeldLock(sys.argv[1])
print(lock.acquire(), flush=True)
if "fork" in sys.argv and not os.fork():
    time.sleep(60)
time.sleep(60)
"""


@pytest.fixture(params=["flock", "marker"])
def kind(request, monkeypatch):
    if request.param == "marker":
        without_flock(monkeypatch, errno.ENOLCK)
    monkeypatch.setattr(locks, "BEAT_SECONDS", 0.1)
    monkeypatch.setattr(locks, "STALE_SECONDS", 1.0)
    return request.param


def without_flock(monkeypatch, number):
    def refuse(descriptor, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(locks.fcntl, "flock", refuse)


def holder(path, kind, *words):
    code = (WITHOUT_FLOCK if kind == "marker" else "") + HOLD
    process = subprocess.Popen([sys.executable, "-c", code, path, *words], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "True\n"
    return process


def seconds_until_acquired(lock, most=20.0):
    began = time.monotonic()
    while not lock.acquire():
        assert time.monotonic() - began < most
        time.sleep(0.05)
    return time.monotonic() - began


def test_one_holds_it_and_nothing_is_left(kind, tmp_path):
    first, second = HeldLock(tmp_path / "lock"), HeldLock(tmp_path / "lock")
    assert first.acquire() and first.acquire()
    assert first.kind == kind
    assert not second.acquire()
    assert first.held and not second.held
    with first:
        pass
    assert not first.held
    assert not list(tmp_path.iterdir())
    assert second.acquire()


def test_living_holder_keeps_it(kind, tmp_path):
    process = holder(tmp_path / "lock", kind)
    try:
        lock, end = HeldLock(tmp_path / "lock"), time.monotonic() + 2.5 * locks.STALE_SECONDS
        while time.monotonic() < end:
            assert not lock.acquire()
            time.sleep(0.05)
        assert lock.seen_alive
    finally:
        process.kill()
        process.wait()


def test_killed_holder_loses_it(kind, tmp_path):
    process = holder(tmp_path / "lock", kind)
    process.kill()
    process.wait()
    lock = HeldLock(tmp_path / "lock")
    seconds = seconds_until_acquired(lock)
    assert seconds < 1 if kind == "flock" else seconds >= locks.STALE_SECONDS
    assert not lock.seen_alive
    lock.release()
    assert not list(tmp_path.iterdir())


def test_workers_of_a_killed_holder_do_not_keep_it(kind, tmp_path):
    """nnU-Net's workers are forks that outlive a killed training."""
    process = holder(tmp_path / "lock", kind, "fork")
    worker = int(subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True).stdout)
    process.kill()
    process.wait()
    try:
        assert seconds_until_acquired(HeldLock(tmp_path / "lock")) < 5
    finally:
        os.kill(worker, signal.SIGKILL)


@pytest.mark.parametrize("number", sorted(locks.NO_FLOCK))
def test_file_systems_without_flock_get_a_marker(number, tmp_path, monkeypatch):
    without_flock(monkeypatch, number)
    first, second = HeldLock(tmp_path / "lock"), HeldLock(tmp_path / "lock")
    assert first.acquire()
    assert first.kind == "marker"
    assert not second.acquire()
    assert first.held, "looking for flock must not remove another job's marker"


def test_marker_taken_over_is_noticed_by_its_first_holder(kind, tmp_path):
    """The holder was stopped for longer than STALE_SECONDS, as a laptop that sleeps is."""
    if kind == "flock":
        pytest.skip("a flock cannot be taken over")
    process = holder(tmp_path / "lock", kind)
    process.send_signal(signal.SIGSTOP)
    lock = HeldLock(tmp_path / "lock")
    seconds_until_acquired(lock)
    process.send_signal(signal.SIGCONT)
    time.sleep(0.5)
    assert lock.held, "its heartbeat must not write into the new holder's marker"
    process.kill()
    process.wait()


def test_wait_starts_anew_after_a_gap(tmp_path, monkeypatch):
    """A waiter that slept itself must not take the holder for dead in its first look."""
    without_flock(monkeypatch, errno.ENOLCK)
    monkeypatch.setattr(locks, "STALE_SECONDS", 0.2)
    monkeypatch.setattr(locks, "GAP_SECONDS", 0.1)
    first, second = HeldLock(tmp_path / "lock"), HeldLock(tmp_path / "lock")
    assert first.acquire()
    assert not second.acquire()
    time.sleep(0.3)
    assert not second.acquire()


def test_folder_that_is_not_there_is_named(tmp_path):
    with pytest.raises(OSError, match=r"missing/lock \(No such file or directory\): make its folder writable"):
        HeldLock(tmp_path / "missing" / "lock").acquire()
