"""How busy the machine is while steps are timed, and what a busy machine's seconds are taken for."""

import multiprocessing

import pytest
import torch

from nnunet_diffusion.planning import timing as timings_of_steps
from nnunet_diffusion.planning.budgets import TimeBudget
from nnunet_diffusion.planning.timing import Timing, free_share, quiet_seconds


def test_more_threads_than_processors_get_a_part_of_what_they_ask_for():
    """As beside programs that keep the processors busy: four threads a processor cannot get more than a quarter."""
    assert 0 < free_share(1) <= 1
    assert free_share(4 * multiprocessing.cpu_count()) <= 0.3


@pytest.mark.parametrize(
    ("measured", "seconds"),
    [
        ({"wall": 2.0, "processor": 1.9, "before": 1.0, "after": 1.0}, 2.0),
        ({"wall": 2.0, "processor": 0.9, "before": 0.4, "after": 0.6}, 1.0),
        ({"wall": 2.0, "processor": 1.8, "before": 0.4, "after": 0.6}, 1.8),
        ({"wall": 2.0, "processor": 0.1, "before": 0.0, "after": 0.0}, 0.5),
    ],
    ids=["quiet", "busy", "busy between the steps only", "a container's limit, which slows the training too"],
)
def test_seconds_of_a_busy_machine_are_taken_for_those_of_a_quiet_one(measured, seconds):
    assert quiet_seconds(**measured) == pytest.approx(seconds)


def test_a_step_is_timed_by_its_fastest_repeat_and_the_share_beside_it(monkeypatch):
    seconds, now = iter([9.0, 2.0, 1.0, 4.0]), [0.0]

    def step():
        now[0] += next(seconds)

    monkeypatch.setattr(timings_of_steps.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(timings_of_steps, "free_share", lambda threads: 0.5)
    timing = timings_of_steps._timed(step, torch.device("cpu"))
    assert timing == Timing(seconds=0.5, spread=2.0, share=0.5), "the first step is a warm-up"


@pytest.mark.parametrize(
    ("timings", "told"),
    [
        ([], None),
        ([Timing(1.0), Timing(1.0, 1.1, 0.95)], None),
        ([Timing(1.0, share=0.5)] * 2 + [Timing(1.0)], "only 50% of the processor time"),
        ([Timing(1.0, spread=1.6)] * 2 + [Timing(1.0)], "1.6 times as long"),
    ],
)
def test_a_busy_machine_is_told_from_a_quiet_one(timings, told):
    sign = TimeBudget(1.0, timings=timings).busy()
    assert sign is None if told is None else told in sign
