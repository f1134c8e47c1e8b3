"""A lock is held by one process, ends with it however that ends, and needs no flock and no common clock."""

import errno
import multiprocessing
import subprocess
import sys
import time

import pytest

from nnunet_diffusion.jobs import locks
from nnunet_diffusion.jobs.locks import HeldLock

HOLD = """
import errno, sys, time
from nnunet_diffusion.jobs import locks
if sys.argv[2] != "flock":
    def refused(*_):
        raise OSError(getattr(errno, sys.argv[2]), "no locks here")
    locks.fcntl.flock = refused
locks.BEAT_SECONDS = 0.1
lock = locks.HeldLock(sys.argv[1])
assert lock.acquire()
print(lock.kind, flush=True)
time.sleep(60)
"""
KINDS = {"flock": "flock", "ENOLCK": "marker", "EOPNOTSUPP": "marker", "ENOSYS": "marker"}


@pytest.fixture
def holder(tmp_path, monkeypatch):
    """Starts a process that holds the lock, on a file system without flock if wanted; returns it."""
    jobs = []

    def start(refusal):
        if refusal != "flock":

            def refused(*_):
                raise OSError(getattr(errno, refusal), "no locks here")

            monkeypatch.setattr(locks.fcntl, "flock", refused)
        words = [sys.executable, "-c", HOLD, str(tmp_path / "a.lock"), refusal]
        jobs.append(subprocess.Popen(words, stdout=subprocess.PIPE, text=True))
        assert jobs[-1].stdout.readline().strip() == KINDS[refusal]
        return jobs[-1]

    yield start
    for job in jobs:
        job.kill()
        job.wait()


def acquired_within(lock, seconds):
    end = time.monotonic() + seconds
    while not lock.acquire():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


@pytest.mark.parametrize("refusal", KINDS)
def test_lock_is_another_processs_until_that_is_killed(holder, tmp_path, monkeypatch, refusal):
    monkeypatch.setattr(locks, "STALE_SECONDS", 1.0)
    job, lock = holder(refusal), HeldLock(tmp_path / "a.lock")
    assert not acquired_within(lock, 2.5)  # longer than a marker may be silent
    assert lock.seen_alive and not lock.held
    job.kill()
    job.wait()
    assert acquired_within(lock, 5)
    assert lock.held and lock.kind == KINDS[refusal]
    lock.release()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("refusal", ["flock", "ENOLCK"])
def test_lock_is_free_after_release_and_can_be_taken_again(holder, tmp_path, monkeypatch, refusal):
    if refusal != "flock":

        def refused(*_):
            raise OSError(errno.ENOLCK, "no locks here")

        monkeypatch.setattr(locks.fcntl, "flock", refused)
    first, second = HeldLock(tmp_path / "a.lock"), HeldLock(tmp_path / "a.lock")
    with first:
        assert first.acquire() and first.acquire() and not second.acquire()
    assert not first.held
    assert second.acquire()
    second.release()


def test_marker_that_a_living_job_was_robbed_of_is_not_its_own_any_more(tmp_path, monkeypatch):
    monkeypatch.setattr(locks, "fcntl", None)
    lock = HeldLock(tmp_path / "a.lock")
    assert lock.acquire()
    (tmp_path / "a.lock.beat").write_text("another job's\n")
    assert not lock.held
    lock.release()
    assert (tmp_path / "a.lock.beat").read_text() == "another job's\n"


def test_forked_worker_does_not_keep_its_parents_lock(tmp_path):
    lock = HeldLock(tmp_path / "a.lock")
    assert lock.acquire()
    worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(30,))
    worker.start()
    try:
        lock.release()
        assert HeldLock(tmp_path / "a.lock").acquire()
    finally:
        worker.kill()
        worker.join()


def test_folder_that_is_not_there_is_named_with_the_cure(tmp_path):
    with pytest.raises(OSError, match=r"Could not make the lock .*a\.lock.*make its folder writable"):
        HeldLock(tmp_path / "nowhere" / "a.lock").acquire()
