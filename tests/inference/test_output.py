"""Folders in which a case's files are made: removed when their job is dead, never under a living one."""

import os
import socket
import subprocess
import sys

from nnunet_diffusion.inference.output import FOREIGN_SECONDS, UNFINISHED, remove_unfinished

HERE = socket.gethostname()


def test_only_what_dead_jobs_left_is_removed(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    removed, kept = [], []

    def unfinished(owner, seconds, into):
        path = tmp_path / f"{UNFINISHED}{owner}_x_y"
        path.mkdir()
        (path / "case.nii.gz").write_bytes(b"half")
        then = os.stat(path).st_mtime - seconds
        os.utime(path, (then, then))
        into.append(path.name)

    unfinished(f"{ended.pid}_{HERE}", 0, removed)
    unfinished(f"{os.getpid()}_{HERE}", 10 * FOREIGN_SECONDS, kept)  # a large case takes long
    unfinished(f"{ended.pid}_elsewhere", 0.5 * FOREIGN_SECONDS, kept)
    unfinished(f"{ended.pid}_other", 1.5 * FOREIGN_SECONDS, removed)
    unfinished("abc", 1.5 * FOREIGN_SECONDS, removed)
    gone = tmp_path / f"{UNFINISHED}gone"  # removed by another job, between being listed and being looked at
    gone.symlink_to(tmp_path / "nowhere")
    remove_unfinished(tmp_path)
    gone.unlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)
