"""A lock that jobs on one or several machines share; it ends with its process, however that ends."""

from __future__ import annotations

import atexit
import contextlib
import errno
import os
import threading
import time
import uuid
import weakref
from pathlib import Path
from types import TracebackType

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

NO_FLOCK = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS}  # NFS without lockd, Lustre without -o flock
BEAT_SECONDS = 5.0  # between two beats of a marker
STALE_SECONDS = 120.0  # a marker that did not change for so long is a dead job's
GAP_SECONDS = 30.0  # after so long without a look (this machine slept, the file server hung) the wait starts anew

_LOCKS: weakref.WeakSet[HeldLock] = weakref.WeakSet()


class HeldLock:
    """A lock on a path, by flock, or by a marker file with a heartbeat where the file system has no flock.

    A marker holds a random token and a counter that a thread rewrites every `BEAT_SECONDS`. Whoever wants the lock takes
    the marker for dead once it has not changed for `STALE_SECONDS` of its own clock; clocks are never compared.

    `with lock:` releases it at the end of the block; it does not acquire.

    Attributes:
        path: of the lock file. It is there only while somebody holds the lock or was killed. A marker's name ends on
            ".beat" in addition.
        kind: "flock" or "marker", once `acquire` was called; for the log.
        seen_alive: whether the last `acquire` that returned False saw a living holder. It is False while a marker may be a
            dead job's: `acquire` again, every few seconds.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._marker = self.path.with_name(f"{self.path.name}.beat")
        self.kind = ""
        self.seen_alive = False
        self._descriptor: int | None = None
        self._token = ""
        self._seen: tuple[bytes, float, float] | None = None  # content of the marker, since when, last look
        self._stop = threading.Event()
        _LOCKS.add(self)

    def acquire(self) -> bool:
        """Take the lock if it is free, without waiting; return whether this object holds it.

        Raises:
            OSError: the lock file cannot be made; names it and the cure.
        """
        if self._descriptor is not None or self._token:
            return True
        try:
            if fcntl is not None and self.kind != "marker":
                taken = self._acquire_flock()
                if taken is not None:
                    self.kind, self.seen_alive = "flock", not taken
                    return taken
            self.kind = "marker"
            return self._acquire_marker()
        except OSError as error:
            raise OSError(
                error.errno,
                f"Could not make the lock {self.path} ({error.strerror}): make its folder writable, free some space, or "
                "remove that file if it is a dead job's.",
            ) from error

    @property
    def held(self) -> bool:
        """True while the lock is ours; False after `release`, or if the file was removed or, as stale, taken over."""
        if self._descriptor is not None:
            return self._is_path(self._descriptor)
        return bool(self._token) and self._token.encode() in (_content(self._marker) or b"")

    def release(self) -> None:
        """Give the lock back and remove its file; nothing happens if this object does not hold it."""
        self._stop.set()
        with contextlib.suppress(OSError):  # a file that stays behind is taken for a dead job's
            if self.held:
                (self._marker if self._token else self.path).unlink()
        self._forget()

    def __enter__(self) -> HeldLock:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def __del__(self) -> None:
        if hasattr(self, "_stop"):
            self.release()

    def _forget(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
        self._descriptor, self._token, self._seen = None, "", None

    def _is_path(self, descriptor: int) -> bool:
        try:
            return os.path.samestat(os.fstat(descriptor), os.stat(self.path))
        except FileNotFoundError:
            return False

    def _acquire_flock(self) -> bool | None:
        """Return None where the file system has no flock."""
        while True:
            existed = self.path.exists()
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._is_path(descriptor):  # else its holder removed the file between open and flock
                    self._descriptor = descriptor
                    return True
            except OSError as error:
                if error.errno in NO_FLOCK:
                    if not existed:
                        self.path.unlink(missing_ok=True)
                    return None
                if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                    return False
                raise
            finally:
                if self._descriptor is None:
                    os.close(descriptor)

    def _acquire_marker(self) -> bool:
        if self._stale() and not self._remove_stale():
            return False
        token = uuid.uuid4().hex
        try:
            descriptor = os.open(self._marker, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        except FileExistsError:
            return False
        try:
            os.write(descriptor, _line(token, 0))
        finally:
            os.close(descriptor)
        self._token, self._stop = token, threading.Event()
        threading.Thread(target=_beat, args=(self._marker, token, self._stop), daemon=True).start()
        return True

    def _stale(self) -> bool:
        """Look at the marker; return whether it has not changed for `STALE_SECONDS`."""
        content, now = _content(self._marker), time.monotonic()
        if content is None:
            self._seen = None
            return False
        if self._seen is None or content != self._seen[0] or now - self._seen[2] > GAP_SECONDS:
            self.seen_alive = self._seen is not None and content != self._seen[0]
            self._seen = (content, now, now)
        self._seen = (content, self._seen[1], now)
        return now - self._seen[1] > STALE_SECONDS

    def _remove_stale(self) -> bool:
        """Remove the marker found stale; False if it is another one by now, or its holder lives after all."""
        assert self._seen is not None
        aside = self.path.with_name(f"{self.path.name}.{uuid.uuid4().hex}")
        try:
            os.rename(self._marker, aside)
        except OSError:  # another job was faster; on Windows, its holder has the file open
            return False
        dead = _content(aside) == self._seen[0]
        self._seen = None
        if not dead and not self._marker.exists():
            os.rename(aside, self._marker)
            return False
        aside.unlink()
        return dead


def _line(token: str, count: int) -> bytes:
    return f"{token} {count:012d}\n".encode()  # always as long, so that a beat needs no space on the disk


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _beat(path: Path, token: str, stop: threading.Event) -> None:
    """Rewrite the marker until `stop` or until it is no longer ours."""
    count = 0
    while not stop.wait(BEAT_SECONDS):
        count += 1
        # a file server that does not answer now may answer the next beat
        with contextlib.suppress(OSError), path.open("r+b") as file:
            if not file.read().startswith(token.encode()):
                return
            file.seek(0)
            file.write(_line(token, count))
            file.flush()
            os.fsync(file.fileno())  # another machine sees it from now on


def _forget_in_child() -> None:
    """A forked worker must not keep its parent's lock alive, nor release it."""
    for lock in list(_LOCKS):
        lock._forget()


def release_all() -> None:
    """Give back every lock of this process, as its end does."""
    for lock in list(_LOCKS):
        lock.release()


atexit.register(release_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
