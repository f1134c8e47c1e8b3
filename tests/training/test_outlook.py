"""What the log says of the two networks and of the hours left."""

import pytest

from nnunet_diffusion.training import DiffusionTrainer, outlook
from nnunet_diffusion.training.job import describe
from nnunet_diffusion.training.outlook import announce, remaining_time, two_networks

pytestmark = pytest.mark.nnunet


class Clock:
    """Stands in for `time`: each epoch takes `seconds`."""

    def __init__(self):
        self.now = 100.0

    def perf_counter(self):
        return self.now


class Trainer:
    """The part of nnU-Net's trainer that counts epochs."""

    def __init__(self, clock, seconds, num_epochs, current_epoch=0):
        self.clock, self.seconds = clock, seconds
        self.num_epochs, self.current_epoch = num_epochs, current_epoch

    def on_epoch_start(self):
        pass

    def on_epoch_end(self):
        self.clock.now += self.seconds[self.current_epoch]
        self.current_epoch += 1

    def run(self):
        for _ in range(self.current_epoch, self.num_epochs):
            self.on_epoch_start()
            self.on_epoch_end()


def lines_of(monkeypatch, *arguments):
    clock, lines = Clock(), []
    monkeypatch.setattr(outlook, "time", clock)
    trainer = Trainer(clock, *arguments)
    announce(trainer, "denoiser", lines.append)
    trainer.run()
    return lines


def test_hours_left_are_said_once_after_the_first_epoch(monkeypatch):
    first, then = lines_of(monkeypatch, [90, 500, 500], 3)
    assert first == "Now training the denoiser: 3 epochs."
    assert then == (
        "An epoch of the denoiser took 90.0 s. At this pace its remaining epochs (2) take about 3 minutes, "
        "without the validation at the end."
    )


def test_a_resumed_training_counts_from_its_own_first_epoch(monkeypatch):
    first, then = lines_of(monkeypatch, [0, 0, 7200, 5, 5], 5, 2)
    assert first == "Now training the denoiser: 5 epochs, of which 2 are done."
    assert "took 7200.0 s" in then
    assert "(2) take about 4.0 hours" in then


@pytest.mark.parametrize("epochs, done", [(1, 0), (3, 2), (3, 3)])
def test_nothing_is_estimated_where_nothing_is_left(monkeypatch, epochs, done):
    assert len(lines_of(monkeypatch, [9] * 3, epochs, done)) == 1


@pytest.mark.parametrize("seconds, words", [(36, "9.9 hours"), (1.2, "20 minutes"), (0.05, "50 s")])
def test_durations_are_in_units_of_their_size(seconds, words):
    assert f"take about {words}," in remaining_time("denoiser", seconds, 990 if seconds > 0.1 else 1000)


def test_block_names_both_networks_and_what_is_done():
    block = two_networks("nnUNetTrainer", "trained already, 1000 epochs", "DiffusionTrainer", 1000).splitlines()
    assert len(block) == 4
    assert block[1].strip() == "1. pre-segmentor, an ordinary nnU-Net (nnUNetTrainer): trained already, 1000 epochs"
    assert "(DiffusionTrainer): 1000 epochs" in block[2]
    assert "starts out of fold" in two_networks("nnUNetTrainer", "", "DiffusionTrainer", 1000, halves=True)
    resumed = two_networks("nnUNetTrainer", "", "DiffusionTrainer", 1000, 7)
    assert "starts out of fold" not in resumed
    assert "resumed after 7 of 1000 epochs" in resumed


@pytest.mark.parametrize(
    "resumed, words", [(False, "to be trained and validated first"), (True, "in this model's checkpoint")]
)
def test_a_training_begins_with_the_block(workplace, monkeypatch, resumed, words):
    trainer, lines = workplace.trainer(DiffusionTrainer), []
    trainer.resumed, trainer.current_epoch = resumed, 3 * resumed
    monkeypatch.setattr(trainer, "print_to_log_file", lines.append)
    describe(trainer)
    (block,) = lines
    assert "(nnUNetTrainer): " in block
    assert words in block
    assert ("resumed after 3 of 1000 epochs" in block) == resumed
