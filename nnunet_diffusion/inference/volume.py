"""Reverse processes on a volume, which the denoiser evaluates in tiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from nnunet_diffusion.diffusion.process import Process
from nnunet_diffusion.diffusion.samplers import Estimate, OnStep, sample, timestep_grid
from nnunet_diffusion.model import labels
from nnunet_diffusion.model.drawing import LEVEL, deciding
from nnunet_diffusion.model.segmenter import Conditions, DiffusionSegmenter

Tile = tuple[slice | int, ...]
"""Index of a tile in (channels, *volume), as nnU-Net's slicers; in 2D an integer selects the slice of a volume."""
NOISE_OF_START, NOISE_OF_STEPS = 0, 1


@dataclass(frozen=True)
class Tiling:
    """The tiles of a volume and the weights with which their predictions are blended.

    Attributes:
        tiles: nnU-Net's slicers; they cover the volume.
        weight: (*patch), float32, positive: nnU-Net's Gaussian, or ones.
        batch: largest number of patches that the network evaluates at once.
        device: device of the network.
    """

    tiles: Sequence[Tile]
    weight: Tensor
    batch: int
    device: torch.device

    @property
    def samples_per_call(self) -> int:
        """Number of samples of each tile that the denoiser evaluates together; above 1 if all tiles do not fill a batch.

        It does not depend on the free memory. So the batches of a sample, and thus its last bits, are the same however many
        samples fit into memory.
        """
        return max(1, self.batch // len(self.tiles))

    def groups(self) -> Iterator[Sequence[Tile]]:
        """Yield full batches of tiles, then the rest in groups whose sizes are powers of two.

        This keeps the number of different batch sizes small. For each new size cuDNN's benchmark, which nnU-Net enables,
        searches for the fastest convolutions, and torch.compile compiles again.
        """
        first = 0
        while first < len(self.tiles):
            left = len(self.tiles) - first
            count = self.batch if left >= self.batch else 1 << (left.bit_length() - 1)
            yield self.tiles[first : first + count]
            first += count

    def total_weight(self, volume: torch.Size, device: torch.device) -> Tensor:
        """Return the sum of the weights of all tiles, (*volume)."""
        total = torch.zeros(volume, device=device)
        weight = self.weight.to(device)
        for tile in self.tiles:
            total[tile[1:]] += weight
        return total


@dataclass
class Evaluations:
    """Number of patches evaluated by each network."""

    presegmentor: int = 0
    condition: int = 0
    denoiser: int = 0


@dataclass
class VolumeProcess:
    """Reverse processes of one volume. The state covers the volume, and the network evaluates it in tiles.

    In each step the clean estimates of all tiles are blended (weighted mean, float32), then the sampler advances the whole
    state. All tiles share one noise field, so only the network's limited field of view can cause visible tile borders.

    Attributes:
        segmenter: in evaluation mode, on the tiling's device.
        image: (C, *volume), preprocessed, padded to at least one patch.
        tiling: tiles of the volume.
        presegmentation: probabilities (K, *volume) to start from; None if the settings start from noise.
        seed: seed of all noise.
        state_device: device of the volume's state.
        on_tiles: called with the number of finished tiles after each batch.
        evaluations: counts of network evaluations, updated during the run.
        fold: fold of the weights. Each fold has its own noise, so that an ensemble also averages over noise.
        mirrored: spatial axes along which the networks see the volume mirrored.
        condition_bytes: memory of the tiling's device in which the conditions of tiles are kept for the next steps and samples.
        on_step: called as (timestep, noisy, clean) after each evaluation of the whole state, (S, K, *volume).
    """

    segmenter: DiffusionSegmenter
    image: Tensor
    tiling: Tiling
    presegmentation: Tensor | None
    seed: int
    state_device: torch.device
    on_tiles: Callable[[int], object] = lambda count: None
    evaluations: Evaluations = field(default_factory=Evaluations)
    fold: int = 0
    mirrored: tuple[int, ...] = ()
    condition_bytes: float = 0
    on_step: OnStep | None = None

    def __post_init__(self) -> None:
        """Prepare the data shared by all samples."""
        # with the image in main memory the GPU would wait for each group of tiles
        self.image = self.image.to(self.state_device)
        if self.presegmentation is not None:
            self.presegmentation = self.presegmentation.to(self.state_device)
        volume = self.image.shape[1:]
        self._heads = self.segmenter.denoiser.state_channels
        self.total_weight = self.tiling.total_weight(volume, self.state_device)
        self._kept: dict[str, Conditions] = {}
        self._last: tuple[str, Conditions] | None = None
        self._room = self.condition_bytes

    def run(self, samples: Sequence[int]) -> Tensor:
        """Return the probabilities of these samples, (len(samples), K, *volume), float32; reproducible for a given seed.

        Args:
            samples: numbers of the samples, from 0; they share the condition flow.
        """
        process = self.segmenter.reverse_process.towards(_batch_of_one(self.presegmentation))
        return self._sample(process, self._evaluate, self._starts(samples), [(number,) for number in samples])

    def run_tile_wise(self, samples: Sequence[int]) -> Tensor:
        """As `run`, but with a separate reverse process for each tile; the results are blended at the end."""
        starts = self._starts(samples)
        total = torch.zeros_like(starts)
        for number, tile in enumerate(self.tiling.tiles):
            start = starts[_all_samples(tile)].to(self.tiling.device)

            def evaluate(noisy: Tensor, timestep: int, tile: Tile = tile) -> Tensor:
                return self._clean_of_tiles([tile], noisy[None], timestep)[0]

            prior = None if self.presegmentation is None else self.presegmentation[tile].to(start.device)
            process = self.segmenter.reverse_process.towards(_batch_of_one(prior))
            # the levels of all tiles are those of one volume
            own = () if self.segmenter.settings.draw == LEVEL else (number + 1,)
            probabilities = self._sample(process, evaluate, start, [(each, *own) for each in samples])
            total[_all_samples(tile)] += (probabilities * self.tiling.weight).to(self.state_device)
        return total / self.total_weight

    def _sample(self, process: Process, evaluate: Estimate, start: Tensor, names: Sequence[tuple[int, ...]]) -> Tensor:
        """Run reverse processes from `start`; `names` are numbers that seed the noise of each."""
        settings = self.segmenter.settings
        last = timestep_grid(settings.start_step, settings.steps)[-1]
        generators = [self._generator(number, NOISE_OF_STEPS, *tile) for number, *tile in names]
        with torch.no_grad():
            clean = sample(
                settings.sampler,
                deciding(evaluate, settings.estimate_draw, last, process, settings.regions, generators),
                start,
                settings.start_step,
                settings.steps,
                process,
                generator=generators,
                eta=settings.eta,
                on_step=self.on_step,
            )
        # in place, because the samples of a large volume fill the memory
        found = process.to_probabilities(clean, in_place=True)
        return labels.normalised(found, settings.regions)

    def _generator(self, *numbers: int) -> torch.Generator:
        """Return a separate CPU generator for each purpose, so that noise depends neither on the order nor on the device."""
        branch = (self.fold,) if self.fold else ()
        state = np.random.SeedSequence([self.seed, *numbers], spawn_key=branch).generate_state(1, np.uint64)[0]
        return torch.Generator().manual_seed(int(state >> np.uint64(1)))

    def _starts(self, samples: Sequence[int]) -> Tensor:
        """Return the noisy start states (S, K, *volume)."""
        settings, shape = self.segmenter.settings, (self._heads, *self.image.shape[1:])
        states = torch.empty((len(samples), *shape), device=self.state_device)
        for state, number in zip(states, samples, strict=True):
            generator = self._generator(number, NOISE_OF_START)
            state.copy_(self.segmenter.reverse_process.draw_noise((1, *shape), generator)[0])
        if settings.from_noise or self.presegmentation is None:
            return states
        # in place, because a large volume fills the memory: one more volume instead of four
        presegmentation = self.presegmentation[None]
        process = self.segmenter.reverse_process.towards(presegmentation)
        return process.start(presegmentation, settings.start_step, states, in_place=True)

    def _evaluate(self, noisy: Tensor, timestep: int) -> Tensor:
        """Return the blended clean estimate of the whole state, (S, K, *volume)."""
        total = torch.zeros_like(noisy)
        for tiles in self.tiling.groups():
            states = torch.stack([noisy[_all_samples(tile)] for tile in tiles]).to(self.tiling.device)
            clean = self._clean_of_tiles(tiles, states, timestep)
            weighted = (clean * self.tiling.weight).to(total.device)
            for tile, estimate in zip(tiles, weighted, strict=True):
                total[_all_samples(tile)] += estimate
        return total.div_(self.total_weight)

    def _clean_of_tiles(self, tiles: Sequence[Tile], states: Tensor, timestep: int) -> Tensor:
        """Return the clean estimates of noisy tiles (B, S, K, *patch); all samples of a tile share its condition."""
        conditions = self._conditions_of(tiles)
        before = conditions.evaluations
        condition = conditions.at(timestep)
        self._keep_last()
        self.evaluations.condition += conditions.evaluations - before
        if self.segmenter.settings.uses_features:
            self.evaluations.presegmentor += conditions.evaluations - before
        clean = self.segmenter.clean_estimate(self._mirror(states), timestep, condition, self.tiling.samples_per_call)
        self.evaluations.denoiser += len(tiles) * states.shape[1]
        self.on_tiles(len(tiles))
        return self._mirror(clean)

    def _mirror(self, patches: Tensor) -> Tensor:
        """Mirror patches, whose last axes are the spatial ones."""
        return patches.flip([axis - self.tiling.weight.ndim for axis in self.mirrored]) if self.mirrored else patches

    def _conditions_of(self, tiles: Sequence[Tile]) -> Conditions:
        """Return the conditions of these tiles, reused from an earlier call if they were kept."""
        key = str(tiles)
        if key in self._kept:
            return self._kept[key]
        if self._last is None or self._last[0] != key:
            self._last = None  # not both in memory at once
            self._last = key, Conditions(self.segmenter, self._mirror(self.seen(tiles)))
        return self._last[1]

    def seen(self, tiles: Sequence[Tile]) -> Tensor:
        """Return what the condition flow sees of these tiles, (B, C, *patch), not mirrored."""
        device = self.tiling.device
        image = torch.stack([self.image[tile] for tile in tiles]).to(device)
        given = None
        if self.presegmentation is not None and self.segmenter.settings.shows_presegmentation:
            given = torch.stack([self.presegmentation[tile] for tile in tiles]).to(device)
        return self.segmenter.condition_image(image, given)

    def forget_conditions(self) -> bool:
        """Free the conditions that are kept, and keep none from now on. Return whether there were any."""
        had = bool(self._kept)
        self._kept.clear()
        self._last, self._room = None, 0
        return had

    def _keep_last(self) -> None:
        """Keep the last conditions beside the earlier ones, if there is room; those of a large volume's tiles may not fit."""
        if self._last is None or not self._room:
            return
        key, conditions = self._last
        if key not in self._kept and (needed := conditions.bytes) <= self._room:
            self._room -= needed
            self._kept[key] = conditions


def _batch_of_one(probabilities: Tensor | None) -> Tensor | None:
    return None if probabilities is None else probabilities[None]


def _all_samples(tile: Tile) -> Tile:
    return (slice(None), *tile)
