"""Progress of a run over many cases: a bar in a terminal, otherwise one line per case."""

from __future__ import annotations

import sys
import time

from tqdm import tqdm


class Progress:
    """Counts cases and reports how many are left.

    Attributes:
        total: number of cases.
        finished: number of cases that succeeded.
    """

    def __init__(self, total: int, bar: bool) -> None:
        self.total, self.finished = total, 0
        self._done, self._begin = 0, time.perf_counter()
        self._bar = tqdm(total=total, unit="case", disable=None if bar else True)
        if self._bar.disable:
            print(f"0/{total} cases", flush=True)

    def count(self, name: str, failure: str) -> None:
        """Count one case; it succeeded if `failure` is empty."""
        self._done += 1
        self.finished += not failure
        self._bar.update()
        if failure:
            tqdm.write(f"{name} failed: {failure}", file=sys.stderr)
        if self._bar.disable:
            left = (time.perf_counter() - self._begin) / self._done * (self.total - self._done)
            print(f"{self._done}/{self.total} cases, about {in_words(left)} left ({name})", flush=True)

    def close(self) -> None:
        """Close the bar."""
        self._bar.close()


def in_words(seconds: float) -> str:
    """Return a duration as text: 90 s, 12 min, 3.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 100 * 60 else f"{seconds / 3600:.1f} h"
