"""Reverse processes on volumes, around denoisers whose answer is known."""

import dataclasses
import itertools
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from nnunetv2.inference.sliding_window_prediction import compute_gaussian, compute_steps_for_sliding_window
from torch import nn

from nnunet_diffusion.diffusion.gaussian import GaussianProcess
from nnunet_diffusion.diffusion.predictions import PREDICTION_TYPES
from nnunet_diffusion.diffusion.samplers import SAMPLERS, timestep_grid
from nnunet_diffusion.diffusion.schedules import noise_schedule
from nnunet_diffusion.inference.out_of_memory import run_group
from nnunet_diffusion.inference.volume import NOISE_OF_START, NOISE_OF_STEPS, Tiling, VolumeProcess
from nnunet_diffusion.inference.volume_run import VolumeRun
from nnunet_diffusion.model import labels
from nnunet_diffusion.model.drawing import level_noise
from nnunet_diffusion.model.segmenter import DiffusionSegmenter
from nnunet_diffusion.model.settings import HIDIFF_DENOISER, DiffusionSettings

CPU = torch.device("cpu")
SETTINGS = DiffusionSettings(
    features_per_stage=(8,), start_step=300, steps=4, samples=3, presegmentation_weight=0.0, starts={"truth": 1.0}
)

HIDIFF = DiffusionSettings(
    (8,), **{**HIDIFF_DENOISER, "steps": 4}, denoiser="hidiff", presegmentation_weight=0.0, starts={"truth": 1.0}
)


def clean_state(label_map, classes):
    """The state in -1 and 1 of a label map (B, 1, *spatial)."""
    return 2 * labels.labels_to_masks(label_map, classes) - 1


def probabilities_of(state):
    return labels.normalised((state + 1) / 2)


@dataclass(eq=False)
class ImageCondition:
    """The image itself as condition."""

    image: torch.Tensor

    def repeat_interleave(self, samples):
        return ImageCondition(self.image.repeat_interleave(samples, 0))


class Denoiser(nn.Module):
    """`answer(noisy, image)`; counts what it sees."""

    def __init__(self, classes, answer):
        super().__init__()
        self.state_channels, self.answer = classes, answer
        self.encoded = self.evaluated = 0

    def encode(self, image, timestep, features=None):
        self.encoded += len(image)
        return ImageCondition(image)

    def forward(self, noisy, timestep, condition):
        self.evaluated += len(noisy)
        return self.answer(noisy, condition.image)


def tiling(volume, patch, step, batch=4):
    """Tiles as nnU-Net places them."""
    places = compute_steps_for_sliding_window(volume[-len(patch) :], patch, step)
    tiles = [
        (slice(None), *[slice(a, a + size) for a, size in zip(corner, patch, strict=True)])
        for corner in itertools.product(*places)
    ]
    if len(volume) > len(patch):
        tiles = [(tile[0], number, *tile[1:]) for number in range(volume[0]) for tile in tiles]
    weight = compute_gaussian(tuple(patch), value_scaling_factor=10, dtype=torch.float32, device=CPU)
    return Tiling(tiles, weight, batch, CPU)


def process(denoiser, image, tiles, settings=SETTINGS, presegmentation=None, seed=1):
    network = DiffusionSegmenter(nn.Identity(), denoiser, settings).eval()
    if presegmentation is None:
        presegmentation = torch.full((denoiser.state_channels, *image.shape[1:]), 1 / denoiser.state_channels)
    return VolumeProcess(network, image, tiles, presegmentation, seed, CPU)


def local_denoiser(classes=2, dimension=2):
    """Answers depend on the surroundings of a voxel, so at a tile's border on what the tile sees."""
    torch.manual_seed(0)
    conv = (nn.Conv2d if dimension == 2 else nn.Conv3d)(classes + 1, classes, 3, padding=1)
    return Denoiser(classes, lambda noisy, image: torch.tanh(conv(torch.cat((noisy, image), 1))))


@pytest.mark.parametrize(
    ("tiles", "batch", "sizes", "samples"),
    [
        (37, 12, [12, 12, 12, 1], 1),
        (23, 12, [12, 8, 2, 1], 1),
        (3, 49, [2, 1], 16),
        (5, 1, [1] * 5, 1),
        (2, 4, [2], 2),
    ],
)
def test_groups_of_tiles_have_few_sizes(tiles, batch, sizes, samples):
    tiling = Tiling(range(tiles), torch.ones(1), batch, CPU)
    groups = list(tiling.groups())
    assert [len(group) for group in groups] == sizes
    assert tiling.samples_per_call == samples
    assert [tile for group in groups for tile in group] == list(range(tiles))


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    ("volume", "patch", "step"),
    [((20, 17), (8, 8), 0.5), ((20, 17), (8, 16), 1.0), ((3, 20, 17), (8, 8), 0.3), ((9, 10, 11), (8, 8, 8), 0.5)],
)
def test_perfect_denoiser_leaves_no_seams(sampler, volume, patch, step):
    truth = torch.randint(0, 3, (1, *volume))
    state = clean_state(truth[None], 3)[0]
    perfect = Denoiser(3, lambda noisy, image: clean_state(image[:, :1], 3))
    settings = dataclasses.replace(SETTINGS, sampler=sampler)
    found = process(perfect, truth.float(), tiling(volume, patch, step), settings).run([0, 1])
    wanted = probabilities_of(state[None])
    assert found.shape == (2, 3, *volume)
    assert (found - wanted).abs().max() < 1e-5


class KnowsTheTruth(Denoiser):
    """Predicts what its prediction type asks for, exactly; the image is the label map."""

    def __init__(self, kind):
        super().__init__(3, None)
        self.kind, self.process = kind, GaussianProcess(noise_schedule("linear", 1000))

    def forward(self, noisy, timestep, condition):
        clean = clean_state(condition.image[:, :1], 3)
        noise = self.process.to_noise(clean, noisy, timestep)
        alpha_bar = self.process.schedule.at(timestep, noisy)
        return {
            "x0": clean,
            "epsilon": noise,
            "v": alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * clean,
            "logits": 20 * clean,
        }[self.kind]


@pytest.mark.parametrize("from_noise", [False, True])
@pytest.mark.parametrize("kind", PREDICTION_TYPES)
def test_every_prediction_type_gives_the_truth(kind, from_noise):
    truth = torch.randint(0, 3, (1, 12, 10))
    settings = dataclasses.replace(
        SETTINGS, prediction_type=kind, from_noise=from_noise, start_step=1000 if from_noise else 300
    )
    joint = process(KnowsTheTruth(kind), truth.float(), tiling((12, 10), (8, 8), 0.5), settings)
    wanted = probabilities_of(clean_state(truth[None], 3))
    for found in (joint.run([0]), joint.run_tile_wise([0])):
        assert (found - wanted).abs().max() < 1e-3


class KnowsTheFlips(Denoiser):
    """A perfect refiner, which also sees the segmentor's probabilities; the image is the label map."""

    image_channels = 1

    def __init__(self):
        super().__init__(3, None)
        self.seen = []

    def encode(self, image, timestep, features=None):
        self.encoded += len(image)
        return GuidanceOfVolume(image)

    def forward(self, noisy, timestep, condition):
        self.seen.append(noisy)
        clean = labels.labels_to_masks(condition.image[:, :1], 3)
        return 80 * (2 * (noisy - clean).abs() - 1)


class GuidanceOfVolume(ImageCondition):
    """The image with the prior beside it."""

    @property
    def prior(self):
        return self.image[:, 1:]

    def repeat_interleave(self, samples):
        return GuidanceOfVolume(self.image.repeat_interleave(samples, 0))


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
@pytest.mark.parametrize("mirrored", [(), (0, 1)])
def test_hidiff_finds_the_truth_of_a_volume_from_draws_of_its_prior(sampler, mirrored, monkeypatch):
    monkeypatch.setattr(DiffusionSegmenter, "features", lambda self, image: ())
    hidiff = dataclasses.replace(HIDIFF, sampler=sampler)
    truth, prior = torch.randint(0, 3, (1, 12, 10)), torch.rand(3, 12, 10)
    prior[:, :4] = torch.tensor([1.0, 0.0, 0.0])[:, None, None]  # certain: drawn as it is
    for joint in (True, False):
        refiner = KnowsTheFlips()
        run = process(refiner, truth.float(), tiling((12, 10), (8, 8), 0.5), hidiff, presegmentation=prior)
        run = dataclasses.replace(run, mirrored=mirrored)
        found = run.run([0, 1]) if joint else run.run_tile_wise([0, 1])
        assert (found - labels.labels_to_masks(truth[None], 3)).abs().max() < 1e-4
        assert all(set(noisy.unique().tolist()) <= {0, 1} for noisy in refiner.seen)
        assert refiner.encoded and run.evaluations.denoiser == 2 * 4 * len(run.tiling.tiles)
    start = run._starts([0, 1])
    assert torch.equal(start[:, :, :4], prior[None, :, :4].expand(2, -1, -1, -1))
    assert not torch.equal(start[0], start[1])


def test_level_draws_of_a_volume_are_the_same_level_in_all_tiles(monkeypatch):
    monkeypatch.setattr(DiffusionSegmenter, "features", lambda self, image: ())
    hidiff = dataclasses.replace(HIDIFF, draw="level")
    truth = torch.randint(0, 3, (1, 12, 10))
    prior = torch.rand(3, 12, 10)
    run = process(KnowsTheFlips(), truth.float(), tiling((12, 10), (8, 8), 0.5), hidiff, presegmentation=prior)
    start = run._starts([0, 1, 2])
    for state, probability in zip(start[:, 1].bool(), prior[1].expand(3, -1, -1), strict=True):
        if state.any() and not state.all():
            assert probability[state].min() >= probability[~state].max()
    assert len(start[:, 1].flatten(1).sum(1).unique()) > 1
    for found in (run.run([0, 1]), run.run_tile_wise([0, 1])):
        assert (found - labels.labels_to_masks(truth[None], 3)).abs().max() < 1e-4
    # in each step all tiles of a sample draw with the same number
    drawn = []
    source = level_noise(False)
    monkeypatch.setattr(
        "nnunet_diffusion.model.segmenter.level_noise",
        lambda regions: lambda shape, generator: drawn.append(source(shape, generator)) or drawn[-1],
    )
    run.run_tile_wise([0])
    levels = [round(float(noise.flatten()[-1]), 6) for noise in drawn[1:]]  # the first is the start of the volume
    per_tile = len(levels) // len(run.tiling.tiles)
    assert per_tile > 1 and levels == levels[:per_tile] * len(run.tiling.tiles)


def test_one_tile_is_the_same_jointly_and_tile_wise():
    image = torch.randn(1, 8, 8)
    one = process(local_denoiser(), image, tiling((8, 8), (8, 8), 0.5))
    assert torch.allclose(one.run([0, 1]), one.run_tile_wise([0, 1]), atol=1e-6)


def test_joint_process_is_what_a_loop_over_steps_and_tiles_gives():
    """A slow implementation by itself: DDIM at eta 0, written out."""
    image, tiles = torch.randn(1, 12, 10), tiling((12, 10), (8, 8), 0.5)
    denoiser = local_denoiser()
    joint = process(denoiser, image, tiles)
    alpha_bar = joint.segmenter.process.schedule.alpha_bar
    noise = torch.randn((2, 12, 10), generator=joint._generator(0, NOISE_OF_START)).double()
    grid = timestep_grid(300, 4)
    state = (1 - alpha_bar[grid[0]]).sqrt() * noise  # the start, probabilities of 1/2, is a state of 0
    for now, following in zip(grid, [*grid[1:], None], strict=True):
        total, weights = torch.zeros(2, 12, 10).double(), torch.zeros(12, 10).double()
        for tile in tiles.tiles:
            clean = denoiser.answer(state[tile][None].float(), image[tile][None])[0].double()
            total[tile] += clean.detach() * tiles.weight
            weights[tile[1:]] += tiles.weight
        clean = total / weights
        epsilon = (state - alpha_bar[now].sqrt() * clean) / (1 - alpha_bar[now]).sqrt()
        after = torch.ones(()) if following is None else alpha_bar[following]
        state = after.sqrt() * clean + (1 - after).sqrt() * epsilon
    wanted = probabilities_of(state[None])[0].float()
    assert torch.allclose(joint.run([0])[0], wanted, atol=1e-5)


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_samples_share_the_condition_flow_and_do_not_depend_on_their_company(sampler):
    settings = dataclasses.replace(SETTINGS, sampler=sampler)
    image, tiles = torch.randn(1, 12, 10), tiling((12, 10), (8, 8), 0.5, batch=6)
    together = process(local_denoiser(), image, tiles, settings)
    found = together.run([0, 1, 2])
    evaluations, denoiser = together.evaluations, together.segmenter.denoiser
    assert evaluations.condition == denoiser.encoded == len(tiles.tiles) * 4
    assert evaluations.denoiser == denoiser.evaluated == len(tiles.tiles) * 4 * 3
    alone = torch.cat([process(local_denoiser(), image, tiles, settings).run([number]) for number in range(3)])
    assert torch.allclose(found, alone, atol=1e-6)
    assert not torch.allclose(found[0], found[1], atol=1e-2)


TILE_BYTES = 4 * 8 * 8


@pytest.mark.parametrize("joint", [True, False])
@pytest.mark.parametrize(("room", "kept"), [(0, 0), (7 * TILE_BYTES, 7), (1000 * TILE_BYTES, 16)])
def test_conditions_are_kept_where_there_is_room(room, kept, joint):
    settings = dataclasses.replace(SETTINGS, time_in_condition_flow=False)
    image, tiles = torch.randn(1, 20, 18), tiling((20, 18), (8, 8), 0.5, batch=3 if joint else 1)
    assert len(tiles.tiles) == 16
    without, run = (process(local_denoiser(), image, tiles, settings) for _ in range(2))
    run = dataclasses.replace(run, condition_bytes=room)
    first, second = (run.run, without.run) if joint else (run.run_tile_wise, without.run_tile_wise)
    assert torch.equal(first([0, 1]), second([0, 1]))
    encoded = run.segmenter.denoiser.encoded
    # jointly, those without room in each of four steps; tile by tile, one after the other
    assert encoded == run.evaluations.condition == (16 + 3 * (16 - kept) if joint else 16)
    assert torch.equal(first([2]), second([2]))
    assert run.segmenter.denoiser.encoded - encoded == (4 if joint else 1) * (16 - kept)


def test_conditions_are_forgotten_and_every_mirroring_has_the_same_room():
    settings = dataclasses.replace(SETTINGS, time_in_condition_flow=False)
    image, tiles = torch.randn(1, 20, 18), tiling((20, 18), (8, 8), 0.5, batch=3)
    run = dataclasses.replace(process(local_denoiser(), image, tiles, settings), condition_bytes=7 * TILE_BYTES)
    run.run([0])
    assert run.forget_conditions() and not run.forget_conditions()
    encoded = run.segmenter.denoiser.encoded
    assert encoded == 43
    mirrored = dataclasses.replace(run, mirrored=(0,))
    mirrored.run([1])
    assert run.segmenter.denoiser.encoded - encoded == encoded
    # one that has been told to forget keeps nothing any more
    run.run([0])
    assert run.segmenter.denoiser.encoded - 2 * encoded == 64


@pytest.mark.parametrize(("batch", "tiles", "together"), [(3, 4, 1), (8, 4, 2), (30, 4, 7)])
def test_bits_of_a_sample_do_not_depend_on_how_many_run_at_once(batch, tiles, together):
    """The denoiser's batches are the same, whatever memory allows; 3D and many channels, where convolutions differ by batch."""
    torch.manual_seed(0)
    conv = nn.Conv3d(3, 32, 3, padding=1)
    back = nn.Conv3d(32, 2, 3, padding=1)
    denoiser = Denoiser(2, lambda noisy, image: torch.tanh(back(conv(torch.cat((noisy, image), 1)).relu())))
    image, made = torch.randn(1, 5, 21, 19), tiling((5, 21, 19), (5, 16, 16), 0.5, batch)
    assert (len(made.tiles), made.samples_per_call) == (tiles, together)
    whole = process(denoiser, image, made).run(range(7))
    for at_once in range(together, 7, together):
        parts = [
            process(denoiser, image, made).run(range(7)[first : first + at_once]) for first in range(0, 7, at_once)
        ]
        assert torch.equal(torch.cat(parts), whole), at_once


def test_more_samples_than_fit_into_a_batch_are_evaluated_in_parts():
    image = torch.randn(1, 12, 10)
    small, large = (process(local_denoiser(), image, tiling((12, 10), (8, 8), 0.5, batch)) for batch in (2, 64))
    assert torch.allclose(small.run(range(5)), large.run(range(5)), atol=1e-6)
    assert small.evaluations == large.evaluations


def test_seed_decides():
    image, tiles = torch.randn(1, 12, 10), tiling((12, 10), (8, 8), 0.5)
    one, same, other = (process(local_denoiser(), image, tiles, seed=seed).run([0]) for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.allclose(one, other, atol=1e-2)


def test_each_fold_has_noise_of_its_own():
    processes = [process(local_denoiser(), torch.randn(1, 8, 8), tiling((8, 8), (8, 8), 0.5)) for _ in range(3)]
    first, other, again = (
        dataclasses.replace(each, fold=fold) for each, fold in zip(processes, (0, 3, 3), strict=True)
    )
    for numbers in ((0, NOISE_OF_START), (0, NOISE_OF_STEPS, 3)):
        noises = [torch.randn(100, generator=each._generator(*numbers)) for each in (first, other, again)]
        assert torch.equal(noises[1], noises[2])
        assert abs(float(torch.corrcoef(torch.stack(noises[:2]))[0, 1])) < 0.5


@pytest.mark.parametrize("joint", [True, False])
def test_identity_denoiser_returns_the_presegmentation_without_noise(joint):
    settings = dataclasses.replace(SETTINGS, start_step=1, steps=1)
    given = torch.rand(2, 12, 10).softmax(0)
    identity = process(
        Denoiser(2, lambda noisy, image: noisy), torch.randn(1, 12, 10), tiling((12, 10), (8, 8), 0.5), settings, given
    )
    found = (identity.run if joint else identity.run_tile_wise)([0])[0]
    assert (found - given).abs().max() < 0.05  # one step of noise has a standard deviation of 0.01 in the state


# a GPU whose memory ends: fewer patches at once, then the state on the CPU, then an error

GPU = torch.device("cpu", 0)  # told apart from CPU, yet one memory
VOLUME, PATCH = (24, 24), (16, 16)


def failing(denoiser, times):
    """The same answers, but the first calls find no memory."""
    calls = iter(range(times))

    def answer(noisy, image):
        if next(calls, None) is not None:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return denoiser.answer(noisy, image)

    return Denoiser(denoiser.state_channels, answer)


def volume_process(denoiser):
    torch.manual_seed(1)
    made = process(denoiser, torch.randn(1, *VOLUME), tiling(VOLUME, PATCH, 0.5, batch=4))
    made.state_device = GPU
    return made


@pytest.mark.parametrize(("times", "batch", "device", "notes"), [(0, 4, GPU, 0), (1, 2, GPU, 1), (3, 1, CPU, 3)])
def test_what_does_not_fit_gives_way_and_the_result_stays(times, batch, device, notes):
    denoiser, told = local_denoiser(), []
    wanted = volume_process(denoiser).run([0, 1])
    used, found = run_group(volume_process(failing(denoiser, times)), [0, 1], True, told)
    torch.testing.assert_close(found, wanted)
    assert (used.tiling.batch, used.state_device, len(told)) == (batch, device, notes)


def test_kept_conditions_give_way_first_and_without_a_note():
    told, settings = [], dataclasses.replace(SETTINGS, time_in_condition_flow=False)
    torch.manual_seed(1)
    image, tiles = torch.randn(1, *VOLUME), tiling(VOLUME, PATCH, 0.5, batch=2)
    wanted = process(local_denoiser(), image, tiles, settings).run([0, 1])
    answers = local_denoiser().answer
    calls = []

    def answer(noisy, image):
        calls.append(1)
        if len(calls) == 2:  # the second batch, when the first one's conditions are kept
            raise torch.cuda.OutOfMemoryError("CUDA out of memory")
        return answers(noisy, image)

    given = dataclasses.replace(process(Denoiser(2, answer), image, tiles, settings), condition_bytes=1e9)
    used, found = run_group(given, [0, 1], True, told)
    torch.testing.assert_close(found, wanted)
    assert used is given and told == [] and not used.forget_conditions()


def test_one_patch_that_does_not_fit_is_refused_with_the_cure():
    with pytest.raises(MemoryError, match=r"one patch of \[16, 16\]: take a larger GPU, or -device cpu"):
        run_group(volume_process(failing(local_denoiser(), 4)), [0], True, [])


@pytest.mark.parametrize("joint", [True, False])
def test_a_mirrored_process_sees_everything_mirrored(joint):
    """A denoiser that shifts the image by one voxel to the right shifts it to the left where it sees it mirrored."""
    shifted = Denoiser(2, lambda noisy, image: torch.roll(image, 1, -1))
    image = torch.rand(1, 6, 8)
    image = torch.cat((image, -image))
    one_step = dataclasses.replace(SETTINGS, steps=1, samples=2)
    right, left = (labels.normalised((torch.roll(image, by, -1)[None] + 1) / 2)[0] for by in (1, -1))
    for mirrored, wanted in {(): right, (0,): right, (1,): left, (0, 1): left}.items():
        run = dataclasses.replace(process(shifted, image, tiling((6, 8), (6, 8), 1.0), one_step), mirrored=mirrored)
        for found in (run.run if joint else run.run_tile_wise)(range(2)):
            torch.testing.assert_close(found, wanted)


def test_a_mirrored_process_has_the_same_noise():
    """A denoiser that looks at single voxels gives the same however it is mirrored."""
    pointwise = Denoiser(2, lambda noisy, image: torch.tanh(noisy + image))
    image = torch.rand(2, 9, 12)
    plain = process(pointwise, image, tiling((9, 12), (6, 8), 0.5))
    mirrored = dataclasses.replace(plain, mirrored=(0, 1))
    torch.testing.assert_close(mirrored.run(range(3)), plain.run(range(3)))


def test_samples_are_mirrored_along_nnunets_axes_in_turn():
    class Run:
        settings = dataclasses.replace(SETTINGS, mirror_samples=True)
        predictor = SimpleNamespace(use_mirroring=True, allowed_mirroring_axes=(0, 1))

    run = Run()
    assert VolumeRun._mirrors(run) == [(), (0,), (1,), (0, 1)]
    for change in ({"use_mirroring": False}, {"allowed_mirroring_axes": None}):
        run.predictor = SimpleNamespace(**{**vars(Run.predictor), **change})
        assert VolumeRun._mirrors(run) == [()]
    run.predictor, run.settings = Run.predictor, SETTINGS
    assert VolumeRun._mirrors(run) == [()]
