"""A lock between jobs on one or several machines. It is released when its process ends, even if that is killed."""

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
BEAT_SECONDS = 5.0  # interval between two heartbeats of a marker
STALE_SECONDS = 120.0  # a marker that has not changed for this long belongs to a dead job
GAP_SECONDS = 30.0  # if two checks are further apart (machine suspended, file server hung), the wait restarts

_LOCKS: weakref.WeakSet[HeldLock] = weakref.WeakSet()


class HeldLock:
    """A lock on a path, by flock, or by a marker file with a heartbeat where the file system has no flock.

    A marker holds a random token and a counter that a thread rewrites every `BEAT_SECONDS`. A job that waits for the lock
    considers the marker dead once it has not changed for `STALE_SECONDS` on the waiting job's own clock. Clocks of
    different machines are never compared.

    `with lock:` only releases the lock at the end of the block; call `acquire` first.

    Attributes:
        path: lock file. It exists only while the lock is held, or after its holder was killed. The name of a marker has
            the additional ending ".beat".
        kind: "flock" or "marker" once `acquire` has been called; for the log.
        seen_alive: whether the last `acquire` that returned False saw a living holder. It is False while the marker may
            belong to a dead job; in that case call `acquire` again every few seconds.
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
        """Acquire the lock if it is free, without waiting. Return whether this object holds it.

        Raises:
            OSError: the lock file cannot be created. The message names the file and what to do.
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
        """True while this object holds the lock; False after `release`, or if the file was removed or taken over as stale."""
        if self._descriptor is not None:
            return self._is_path(self._descriptor)
        return bool(self._token) and self._token.encode() in (_content(self._marker) or b"")

    def release(self) -> None:
        """Release the lock and remove its file. This does nothing if the object does not hold it."""
        self._stop.set()
        with contextlib.suppress(OSError):  # if the file remains, it counts as a dead job's
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
        """Return whether the lock was acquired, or None if the file system has no flock."""
        while True:
            existed = self.path.exists()
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._is_path(descriptor):  # otherwise the holder removed the file between open and flock
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
        """Read the marker and return whether it has not changed for `STALE_SECONDS`."""
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
        """Remove the stale marker. Return False if it has been replaced meanwhile, or if its holder is alive."""
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
    return f"{token} {count:012d}\n".encode()  # fixed length, so that a heartbeat needs no additional disk space


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _beat(path: Path, token: str, stop: threading.Event) -> None:
    """Rewrite the marker until `stop` is set or the marker belongs to another job."""
    count = 0
    while not stop.wait(BEAT_SECONDS):
        count += 1
        # a file server that does not respond now may respond to the next heartbeat
        with contextlib.suppress(OSError), path.open("r+b") as file:
            if not file.read().startswith(token.encode()):
                return
            file.seek(0)
            file.write(_line(token, count))
            file.flush()
            os.fsync(file.fileno())  # makes it visible to other machines


def _forget_in_child() -> None:
    """A forked worker must not keep its parent's lock alive, nor release it."""
    for lock in list(_LOCKS):
        lock._forget()


def release_all() -> None:
    """Release every lock of this process, as at its exit."""
    for lock in list(_LOCKS):
        lock.release()


atexit.register(release_all)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_in_child)
