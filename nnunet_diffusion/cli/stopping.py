"""Commands that Ctrl-C and SIGTERM end with a sentence and an exit code instead of a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable

from nnunet_diffusion.jobs.signals import EXIT_INTERRUPTED, EXIT_TERMINATED, Terminated, stopped


def until_stopped(command: str, work: Callable[[], int], how_far: Callable[[], str]) -> int:
    """Return the exit code of a command's work; 130 if it is interrupted, 143 if it is terminated.

    Args:
        command: name of the subcommand, for the message.
        work: what the command does.
        how_far: returns what is finished and how to continue, the end of the message.
    """
    with stopped(lambda code: None):
        try:
            return work()
        except (KeyboardInterrupt, Terminated) as stop:
            interrupted = isinstance(stop, KeyboardInterrupt)
            what = "interrupted" if interrupted else "terminated"
            print(f"nnunet_diffusion {command}: {what}{how_far()}", file=sys.stderr)
            return EXIT_INTERRUPTED if interrupted else EXIT_TERMINATED
