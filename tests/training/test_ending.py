"""A signal ends a training even where its main thread hangs; a block that ends by itself leaves nothing changed."""

import signal
import subprocess
import sys
import textwrap
import threading

import pytest

from nnunet_diffusion.training.ending import tidy_end


def run_script(body):
    script = "import os, signal, sys, time\nfrom nnunet_diffusion.training import ending\nending.TIDY_SECONDS = 0.5\n"
    return subprocess.run(
        [sys.executable, "-c", script + textwrap.dedent(body)], capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize(
    ("name", "code", "cause"), [("SIGINT", 130, "Interrupted"), ("SIGTERM", 143, "Ended by SIGTERM")]
)
def test_a_main_thread_that_hangs_after_the_signal_and_ignores_a_second_one_is_ended(name, code, cause):
    done = run_script(
        f"""
        with ending.tidy_end(lambda cause: print(cause, flush=True)):
            try:
                os.kill(os.getpid(), signal.{name})
                time.sleep(60)
            except BaseException:
                os.kill(os.getpid(), signal.{name})
                time.sleep(60)
        """
    )
    assert (done.returncode, done.stdout, done.stderr) == (code, cause + "\n", "")


def test_a_block_that_ends_after_the_signal_is_reported_once():
    done = run_script(
        """
        with ending.tidy_end(lambda cause: print(cause, flush=True)):
            os.kill(os.getpid(), signal.SIGINT)
        """
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "Interrupted\n", "")


def test_the_hooks_are_as_before_after_the_block():
    before = threading.excepthook, signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit), tidy_end(lambda cause: None):
        signal.raise_signal(signal.SIGINT)
    assert (threading.excepthook, signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
