"""Settings of a diffusion segmentation, in the plans under `configurations.<name>.diffusion`, by owner (layer 2)."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from nnunet_diffusion.diffusion.predictions import FLIP, PREDICTION_TYPES
from nnunet_diffusion.diffusion.samplers import SAMPLERS
from nnunet_diffusion.diffusion.schedules import SCHEDULES, NoiseSchedule, bernoulli_schedule, noise_schedule
from nnunet_diffusion.diffusion.solvers import SOLVERS
from nnunet_diffusion.model.drawing import DRAWS, NOTHING
from nnunet_diffusion.model.precision import PRECISIONS
from nnunet_diffusion.networks.attention import ATTENTIONS
from nnunet_diffusion.networks.blocks import NORMS
from nnunet_diffusion.networks.pgdiffseg import GUIDANCES

PLANS_KEY = "diffusion"
HIDIFF = "hidiff"
DENOISERS = ("pgdiffseg", "nnunet", HIDIFF)
CONDITIONS = ("own", "presegmentor")
VERSION = 3
SECTIONS = ("process", "network", "training", "inference", "presegmentor")
"""Owners of settings; exactly those of `inference` may change after training."""
SPECIAL = {
    "features_per_stage": ("half of nnU-Net's", "positive integers, one per stage"),
    "attention_stages": ("all: `[]`", "ascending integers, 1 to the number of stages - 1"),
    "presegmentor_architecture": ("`{}`", "as `architecture` in the plans"),
    "raters": ("none: `[]`", "names of folders, without `labelsTr_`"),
    "volume_half_widths": ("not fitted: `[]`", "numbers, one per foreground class, 0 to 100"),
    "starts": ('`{"truth": 0.5, "corrupted": 0.5}`', "shares with the sum 1"),
}
"""Settings of no plain type: default and legal values as text."""
START_SNR = "start_snr"
"""Key of `inference` that states T' as a signal-to-noise ratio; it is read as `start_step`."""
NNUNET_DENOISER: Mapping[str, Any] = {"prediction_type": "logits", "signal_scale": 0.1, "mirror_samples": True}
"""Defaults that differ where the denoiser is nnU-Net's network."""
HIDIFF_DENOISER: Mapping[str, Any] = {
    "prediction_type": FLIP, "timesteps": 10, "max_train_step": 10, "start_step": 10, "mirror_samples": True,
}  # fmt: skip
"""Defaults that differ with HiDiff."""
STARTS = ("truth", "corrupted", "presegmentation", "out_of_fold", "recycled")
"""What noise is added to in training; see `training.starts`."""
EARLIER_STARTS = {"corruption_probability": "corrupted", "presegmentation_start_probability": "presegmentation"}
"""Training settings of earlier versions that are read as shares of `training.starts`."""
REMOVED = ("min_snr_gamma",)
"""Training settings of earlier versions that exist no more (documentation/design_decisions.md); plans with them are read."""


def _setting(
    section: str,
    default: Any,
    doc: str,
    *,
    choices: Sequence[str] = (),
    low: float | None = None,
    high: float | None = None,
) -> Any:
    return field(
        default=default, metadata={"section": section, "doc": doc, "choices": tuple(choices), "low": low, "high": high}
    )


@dataclass(frozen=True)
class DiffusionSettings:
    """Every choice a user may make without writing code.

    Sources: PGDiffSeg (Feng et al. 2024, arXiv:2410.17812) for the denoiser and its losses; PD-DDPM (Guo et al. 2022)
    for `start_step`; the defaults are those of `default_settings`, chosen by documentation/experiments/defaults.md.

    Raises:
        NotImplementedError: two values are not supported together.
        ValueError: naming the key, its value and the legal choices or range, if a value is out of range, of the wrong
            type, or contradicts another.
    """

    features_per_stage: tuple[int, ...] = field(
        metadata={
            "section": "network",
            "doc": "Denoiser width at each stage of nnU-Net's topology; the first is that of the slim dense blocks.",
        }
    )
    # the diffusion process
    prediction_type: str = _setting(
        "process", "x0", "What the denoiser predicts; `flip` is HiDiff's.", choices=(*PREDICTION_TYPES, FLIP)
    )
    schedule: str = _setting("process", "linear", "Noise schedule; `linear` is the paper's.", choices=tuple(SCHEDULES))
    timesteps: int = _setting("process", 1000, "Length T of the forward process, in steps.", low=2)
    signal_scale: float = _setting(
        "process",
        1.0,
        "Scale b of the clean state under the noise: the signal-to-noise ratio is multiplied by b^2. Below 1 the noisy state "
        "shows less of the mask (Chen 2023).",
        low=1e-3,
        high=1,
    )
    # the denoiser
    denoiser: str = _setting(
        "network",
        "pgdiffseg",
        "`pgdiffseg`, or `nnunet`: nnU-Net's own network, which starts from the pre-segmentor's weights and sees the noisy "
        "segmentation as further input channels. The sizes of PGDiffSeg in this section are then without effect. `hidiff`: "
        "HiDiff's refiner, with a Bernoulli process, trained in turns with the pre-segmentor.",
        choices=DENOISERS,
    )
    condition: str = _setting(
        "network",
        "own",
        "`own`: a flow that encodes the image (the paper); `presegmentor`: the frozen nnU-Net's features in its place.",
        choices=CONDITIONS,
    )
    sdb_depth: int = _setting("network", 4, "Layers of each slim dense block (PGDiffSeg Fig. 3).", low=1, high=16)
    attention_tokens: int = _setting(
        "network",
        1024,
        "Attention is exact up to this many tokens; above, keys and values are pooled to at most as many.",
        low=16,
    )
    attention_stages: tuple[int, ...] = field(
        default=(),
        metadata={
            "section": "network",
            "doc": "Stages after whose downsampling parameter-shared attention stands; none named: all (the paper).",
        },
    )
    norm: str = _setting(
        "network",
        "batch",
        "Normalisation in the slim dense blocks and the prior branch; `batch` is the paper's.",
        choices=NORMS,
    )
    time_in_condition_flow: bool = _setting(
        "network",
        True,
        "Embed the timestep in the condition flow too (the paper); false makes that flow a constant of the image.",
    )
    guidance: str = _setting(
        "network",
        "paper",
        "`paper` adds both flows and the prior branch as they are (Eq. 6); `normalised` normalises each of them first, and "
        "gives the location map to every up unit.",
        choices=GUIDANCES,
    )
    attention: str = _setting(
        "network",
        "paper",
        "`paper`: each flow attends to itself (Eq. 2-5); `cross`: the denoising flow attends to the condition flow.",
        choices=ATTENTIONS,
    )
    condition_on_presegmentation: bool = _setting(
        "network", False, "Give the start's probabilities to the condition flow as further image channels."
    )
    image_input: bool = _setting(
        "network", True, "HiDiff: the refiner sees the image itself, beside nnU-Net's probabilities and features."
    )
    binary: bool = _setting("network", False, "HiDiff: binarise the convolutions of the refiner's blocks.")
    regions: bool = _setting(
        "network",
        False,
        "The heads are overlapping regions, not classes; written by the trainer, as dataset.json has it.",
    )
    # training
    max_train_step: int = _setting(
        "training", 1000, "Training draws timesteps below this one; `start_step` to `timesteps`.", low=1
    )
    starts: Mapping[str, float] = field(
        default_factory=lambda: {"truth": 0.5, "corrupted": 0.5},
        metadata={
            "section": "training",
            "doc": "Share of the training samples whose noisy state is made from each kind of start; the target stays the "
            "truth. `corrupted`: a truth with mistakes as large as the pre-segmentor's on new patches; `presegmentation`: the "
            "pre-segmentor's output; `out_of_fold`: that of an nnU-Net that was not trained on the case; `recycled`: the "
            "denoiser's own estimate, in the last tenth of the epochs.",
        },
    )
    raters: tuple[str, ...] = field(
        default=(),
        metadata={
            "section": "training",
            "doc": "Further raters: for each NAME the folder `labelsTr_NAME` beside `labelsTr` holds labels of all cases. Each "
            "time that a case is loaded for training, one of all raters is drawn. Validation is that of `labelsTr`.",
        },
    )
    presence_weight: float = _setting("training", 1.0, "lambda 1 of Eq. 10: weight of the presence loss.", low=0)
    location_weight: float = _setting("training", 1.0, "lambda 2 of Eq. 10: weight of the location loss.", low=0)
    collaboration_weight: float = _setting(
        "training",
        0.1,
        "HiDiff: weight lambda of the refiner's loss in nnU-Net's turn; 0: the refiner learns from nnU-Net alone.",
        low=0,
    )
    learning_rate: float = _setting(
        "training", 1e-3, "Initial learning rate of AdamW; decays as nnU-Net's (poly 0.9).", low=0
    )
    weight_decay: float = _setting("training", 1e-2, "Weight decay of AdamW.", low=0)
    precision: str = _setting(
        "training",
        "auto",
        "Precision of the denoiser's training step. `auto`: half on a CUDA GPU, float32 elsewhere, as in nnU-Net. `bfloat16` "
        "on a CPU is faster only if the processor has AMX or AVX-512 BF16.",
        choices=PRECISIONS,
    )
    ema_decay: float = _setting(
        "training",
        0.999,
        "Decay of the weights' moving average, reached by the warm-up (1 + n) / (10 + n).",
        low=0,
        high=0.999999,
    )
    # inference
    sampler: str = _setting("inference", "ddim", "Sampler of the reverse process.", choices=tuple(SAMPLERS))
    start_step: int = _setting(
        "inference",
        100,
        "T' of PD-DDPM: noising steps at the start of the reverse process, 1..max_train_step. `start_snr` in its place states "
        "T' as a signal-to-noise ratio, which means the same in every schedule.",
        low=1,
    )
    steps: int = _setting("inference", 1, "Network evaluations of one reverse process, 1..start_step.", low=1)
    eta: float = _setting("inference", 0.0, "Randomness of DDIM: 0 deterministic, 1 as DDPM.", low=0, high=1)
    draw: str = _setting(
        "inference",
        NOTHING,
        "What is noised again between two steps. `no`: the clean estimate; `voxels`: a mask whose voxels are drawn from it "
        "one by one; `level`: one of its level sets. Without effect in a single step. HiDiff draws its states in any case: "
        "their voxels one by one, with `level` whole level sets, the first state too.",
        choices=DRAWS,
    )
    samples: int = _setting("inference", 1, "Reverse processes whose probabilities are averaged.", low=1, high=1000)
    mirror_samples: bool = _setting(
        "inference",
        False,
        "Samples of `nnunet_diffusion predict` see the image mirrored in turn, as nnU-Net mirrors it: the first one not, the "
        "second along the first axis, and so on.",
    )
    presegmentation_weight: float = _setting(
        "inference",
        0.5,
        "Weight of the pre-segmentor's own probabilities in that average, 0..1; not of a label map given as start.",
        low=0,
        high=1,
    )
    presence_threshold: float = _setting(
        "inference",
        0.0,
        "A foreground class whose largest probability in the image is below this counts as a false alarm and is left out; 0: "
        "none. `nnunet_diffusion predict` only.",
        low=0,
        high=1,
    )
    temperature: float = _setting(
        "inference",
        0.0,
        "Temperature of the probabilities, fitted by `nnunet_diffusion calibrate`; 0: not fitted. `nnunet_diffusion predict "
        "--calibrated` only.",
        low=0,
        high=100,
    )
    volume_half_widths: tuple[float, ...] = field(
        default=(),
        metadata={
            "section": "inference",
            "doc": "Half widths in log-odds of the volumes' 90 % intervals, one for each foreground class, fitted by "
            "`nnunet_diffusion calibrate`. `nnunet_diffusion predict --uncertainty --calibrated` only.",
        },
    )
    start_from: str = _setting(
        "presegmentor",
        "presegmentor",
        "Segmentation the reverse process starts from: the embedded nnU-Net's, or in the cascade the previous stage's.",
        choices=("presegmentor", "previous_stage"),
    )
    from_noise: bool = _setting(
        "inference", False, "Start from pure noise at `timesteps` (DDPM) instead of the pre-segmentation."
    )
    seed: int = _setting(
        "inference", 1234, "Seed of training noise and of the reverse processes.", low=0, high=2**31 - 1
    )
    presegmentor_trainer: str = _setting(
        "presegmentor",
        "",
        "Trainer whose network is the pre-segmentor; empty: the nnU-Net trainer that the diffusion trainer names.",
    )

    presegmentor_architecture: Mapping[str, Any] = field(
        default_factory=dict,
        metadata={
            "section": "presegmentor",
            "doc": "`architecture` of the pre-segmentor's plans where it is another than that of these; written by the "
            "trainer for `nnUNet_diffusion_presegmentor`.",
        },
    )

    def __post_init__(self) -> None:
        """Check types, ranges and contradictions."""
        object.__setattr__(self, "features_per_stage", _positive_integers(self.features_per_stage))
        object.__setattr__(self, "attention_stages", _stages(self.attention_stages, len(self.features_per_stage)))
        object.__setattr__(self, "raters", _names(self.raters))
        object.__setattr__(self, "volume_half_widths", _half_widths(self.volume_half_widths))
        _check_architecture(self.presegmentor_architecture)
        for entry in dataclasses.fields(self):
            if entry.name not in SPECIAL:
                object.__setattr__(self, entry.name, _checked(entry, getattr(self, entry.name)))
        _at_most(self, "max_train_step", "timesteps")
        _at_most(self, "start_step", "timesteps")
        _at_most(self, "start_step", "max_train_step")
        _at_most(self, "steps", "start_step")
        if self.from_noise and self.start_step != self.timesteps:
            raise ValueError(
                f"diffusion.inference.from_noise is true, so start_step must be timesteps ({self.timesteps}), got "
                f"{self.start_step}."
            )
        self._check_network()
        self._check_training_starts()
        self._check_hidiff()

    @property
    def is_hidiff(self) -> bool:
        """Whether the method is HiDiff: a Bernoulli process, and a pre-segmentor that is trained in turns with the refiner."""
        return self.denoiser == HIDIFF

    @property
    def estimate_draw(self) -> str:
        """What is drawn from the estimates between two steps: nothing with HiDiff, which draws its states themselves."""
        return NOTHING if self.is_hidiff else self.draw

    @property
    def method(self) -> str:
        """Name of the method, for messages."""
        return "HiDiff" if self.is_hidiff else "PD-DDPM"

    @property
    def learning_networks(self) -> tuple[str, ...]:
        """Modules of the segmenter that training changes, the denoiser first."""
        return ("denoiser", "presegmentor") if self.is_hidiff else ("denoiser",)

    @property
    def uses_features(self) -> bool:
        """Whether the denoiser's condition comes from the pre-segmentor's features."""
        return self.is_hidiff or (self.denoiser == "pgdiffseg" and self.condition == "presegmentor")

    @property
    def features_user(self) -> str:
        """The setting that uses the pre-segmentor's features, for messages."""
        name, value = ("denoiser", HIDIFF) if self.is_hidiff else ("condition", self.condition)
        return f"diffusion.network.{name} {value!r}"

    @property
    def shows_presegmentation(self) -> bool:
        """Whether the denoiser's condition has the start's probabilities beside the image."""
        return self.is_hidiff or self.condition_on_presegmentation

    @property
    def condition_depends_on_time(self) -> bool:
        """Whether an image's condition is another at each timestep."""
        return self.denoiser == "pgdiffseg" and self.condition == "own" and self.time_in_condition_flow

    @property
    def noise_schedule(self) -> NoiseSchedule:
        """The noise schedule of the method's process."""
        if self.is_hidiff:
            return bernoulli_schedule(self.schedule, self.timesteps)
        return noise_schedule(self.schedule, self.timesteps, self.signal_scale)

    def _check_hidiff(self) -> None:
        if self.is_hidiff != (self.prediction_type == FLIP):
            raise ValueError(
                f"diffusion.process.prediction_type is {self.prediction_type!r} with diffusion.network.denoiser "
                f"{self.denoiser!r}: {FLIP!r} is what {HIDIFF!r} predicts, and no other denoiser."
            )
        if not self.is_hidiff:
            return
        if self.start_from == "previous_stage":
            raise NotImplementedError(
                "diffusion.presegmentor.start_from 'previous_stage' is not supported with HiDiff, which starts from the "
                "network it trains: set it to 'presegmentor'. Both networks then see the previous stage as they see the image."
            )
        only: dict[str, tuple[Any, str]] = {
            "signal_scale": (1.0, "a Bernoulli process has no scale"),
            "starts": ({"truth": 1.0}, "its noise already consists of nnU-Net's segmentation"),
            "from_noise": (False, "it always starts from a draw of nnU-Net's probabilities"),
            "start_step": (self.timesteps, "a draw of nnU-Net's probabilities is the state after all noising steps"),
        }
        for name, (value, why) in only.items():
            if getattr(self, name) != value:
                found = getattr(self, name)
                raise ValueError(f"diffusion.{path_of(name)} is {found!r}, but must be {value!r} with HiDiff: {why}.")
        if self.sampler in SOLVERS:
            raise ValueError(
                f"diffusion.inference.sampler {self.sampler!r} is for Gaussian processes: with HiDiff take 'ddim' or 'ddpm'."
            )

    def _check_network(self) -> None:
        if self.uses_features and not self.is_hidiff and self.attention == ATTENTIONS[1]:
            raise NotImplementedError(
                "diffusion.network.attention 'cross' needs a condition flow, which diffusion.network.condition 'presegmentor' "
                "replaces: choose attention 'paper'."
            )
        if self.condition_on_presegmentation and (self.denoiser != "pgdiffseg" or self.condition == "presegmentor"):
            raise ValueError(
                "diffusion.network.condition_on_presegmentation gives nnU-Net's segmentation to PGDiffSeg's condition flow, "
                f"which does not exist with denoiser {self.denoiser!r} and condition {self.condition!r}: set it to false."
            )

    def _check_training_starts(self) -> None:
        starts = self.starts
        wrong = not isinstance(starts, Mapping) or [
            kind for kind, share in starts.items() if kind not in STARTS or not _is_share(share)
        ]
        if wrong or abs(sum(starts.values()) - 1) > 1e-6:
            raise ValueError(
                f"diffusion.training.starts must have shares from 0 to 1 with the sum 1 of {', '.join(STARTS)}, got {starts!r}."
            )
        object.__setattr__(self, "starts", {kind: float(starts[kind]) for kind in STARTS if starts.get(kind)})
        if set(self.starts) == {"recycled"}:
            raise ValueError(
                "diffusion.training.starts has recycled starts only, but recycling begins with a start of another kind: give "
                "one of them a share too."
            )
        # with a start other than the truth, the targets of epsilon and v grow as 1 / sqrt(1 - alpha_bar)
        if set(self.starts) != {"truth"} and self.prediction_type in ("epsilon", "v"):
            raise ValueError(
                f"diffusion.process.prediction_type {self.prediction_type!r} has no bounded target for noisy states that "
                "are not made from the truth: set diffusion.training.starts to {\"truth\": 1}, or take 'x0' or 'logits'."
            )
        if self.condition_on_presegmentation and "truth" in self.starts:
            raise ValueError(
                "diffusion.network.condition_on_presegmentation would show the denoiser the truth: diffusion.training.starts "
                f"must not have a share of truth, got {self.starts}."
            )

    def start_step_at(self, snr: float) -> int:
        """Return T' for a start of this signal-to-noise ratio alpha_bar / (1 - alpha_bar), by the settings' schedule.

        Raises:
            ValueError: `snr` is not a positive number.
        """
        if isinstance(snr, bool) or not isinstance(snr, (int, float)):
            raise ValueError(f"diffusion.inference.start_snr must be a positive number, got {snr!r}.")
        return self.noise_schedule.start_step_at(snr)

    def to_plans(self) -> dict[str, Any]:
        """Return the JSON-ready section of the plans; `from_plans` reads it back unchanged."""
        content: dict[str, Any] = {"version": VERSION, **{section: {} for section in SECTIONS}}
        for entry in dataclasses.fields(self):
            value = getattr(self, entry.name)
            content[entry.metadata["section"]][_key(entry)] = list(value) if isinstance(value, tuple) else value
        return content

    @classmethod
    def from_plans(cls, configuration: Mapping[str, Any], denoiser: str = DENOISERS[0]) -> DiffusionSettings:
        """Read the settings of one resolved configuration of nnU-Net's plans.

        Args:
            configuration: `ConfigurationManager.configuration`; its `diffusion` section may be absent or partial, what
                is missing comes from `default_settings`.
            denoiser: denoiser where the plans name none.

        Raises:
            ValueError: on an unknown key (naming the nearest known ones) or a bad value.
        """
        section = configuration.get(PLANS_KEY, {})
        if not isinstance(section, Mapping):
            raise ValueError(
                f"The plans' {PLANS_KEY!r} section must be a dictionary, got {type(section).__name__}: {section!r}."
            )
        given = values_of(section)
        by_snr, snr = START_SNR in given, given.pop(START_SNR, None)
        settings = default_settings(configuration, given.get("prediction_type"), given.get("denoiser", denoiser))
        if by_snr:
            if settings.is_hidiff:
                raise ValueError(
                    f"diffusion.inference.start_snr is {snr}, but HiDiff always starts after all noising steps: leave it out."
                )
            if "start_step" in given:
                raise ValueError(
                    f"diffusion.inference has start_step {given['start_step']} and start_snr {snr}, which both state T': "
                    "keep one."
                )
            process = {key: value for key, value in given.items() if key in ("schedule", "timesteps", "signal_scale")}
            limit = {"max_train_step": process["timesteps"]} if "timesteps" in process else {}
            step = dataclasses.replace(settings, **process, **limit, start_step=1).start_step_at(snr)
            longest = given.get("max_train_step", settings.max_train_step)
            if step > longest:
                raise ValueError(
                    f"diffusion.inference.start_snr is {snr}, which is T' = {step}, more than "
                    f"diffusion.training.max_train_step ({longest}): give a larger ratio."
                )
            given["start_step"] = step
        return dataclasses.replace(settings, **given)


def values_of(section: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings that a `diffusion` section of the plans names, by field of `DiffusionSettings`.

    Versions 1 and 2 had all keys side by side, without sections; they are read as what they meant. Version 1 (0.1 before
    planning) had no `attention_stages`: attention stood at all stages, as it does without that key.

    Raises:
        ValueError: an unknown key (naming the nearest known ones), a key in another section than its own, or a version that
            is unknown, such as that of a later nnunet-diffusion.
    """
    version = section.get("version", VERSION if set(section) & set(SECTIONS) else VERSION - 1)
    if version not in range(1, VERSION + 1):
        raise ValueError(
            f"diffusion.version is {version!r}, this nnunet-diffusion reads 1 to {VERSION}: install a newer one, in its "
            "clone by git pull and pip install ."
        )
    entries = {key: value for key, value in section.items() if key != "version"}
    if version < VERSION:
        if version == 1 and "attention_stages" in entries:
            raise ValueError("diffusion.attention_stages contradicts diffusion.version 1: such plans have version 2.")
        places = {entry.name: entry.name for entry in dataclasses.fields(DiffusionSettings)}
    else:
        places = {path_of(entry.name): entry.name for entry in dataclasses.fields(DiffusionSettings)}
        places[f"inference.{START_SNR}"] = START_SNR
        for key in SECTIONS:
            if not isinstance(entries.get(key, {}), Mapping):
                raise ValueError(f"diffusion.{key} must be a dictionary, got {entries[key]!r}.")
        entries = {
            inner: value
            for key, part in entries.items()
            for inner, value in (
                {f"{key}.{name}": value for name, value in part.items()} if key in SECTIONS else {key: part}
            ).items()
        }
    prefix = "training." if version == VERSION else ""
    entries = {key: value for key, value in entries.items() if key not in [prefix + name for name in REMOVED]}
    _read_earlier_starts(entries, prefix)
    found = {}
    for key, value in entries.items():
        if key not in places:
            meant = [place for place in places if place.split(".")[-1] == key.split(".")[-1]]
            near = meant or difflib.get_close_matches(str(key), places, n=3) or places
            raise ValueError(f"Unknown key diffusion.{key} (value {value!r}) in the plans. Known: {', '.join(near)}.")
        found[places[key]] = value
    return found


def _read_earlier_starts(entries: dict[str, Any], prefix: str) -> None:
    """Replace the shares that earlier versions named one by one by `starts`; what they did not name had its default.

    Raises:
        ValueError: they are not numbers with a sum of at most 1, or stand beside `starts`.
    """
    given = {name: entries.pop(prefix + name) for name in EARLIER_STARTS if prefix + name in entries}
    if not given:
        return
    told = " and ".join(f"{prefix}{name} {value!r}" for name, value in given.items())
    if prefix + "starts" in entries:
        raise ValueError(f"diffusion has {told} beside {prefix}starts, which replaces them: keep starts alone.")
    truth_only = entries.get("prediction_type", entries.get("process.prediction_type")) in ("epsilon", "v")
    shares = {"corruption_probability": 0.0 if truth_only else 0.5, "presegmentation_start_probability": 0.0} | given
    if not all(_is_share(share) for share in shares.values()) or sum(shares.values()) > 1 + 1e-9:
        raise ValueError(
            f"diffusion has {told}. These are shares of the training samples, from 0 to 1 and at most 1 in all "
            f"({' and '.join(f'{name} {share!r}' for name, share in shares.items())})."
        )
    starts = {kind: float(shares[name]) for name, kind in EARLIER_STARTS.items()}
    # rounded, as folds with other shares would be refused
    entries[prefix + "starts"] = {"truth": round(max(0.0, 1 - sum(starts.values())), 9), **starts}


def _is_share(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1


def path_of(name: str) -> str:
    """Return the place of a field in the plans' `diffusion` section: `section.key`."""
    entry = next(entry for entry in dataclasses.fields(DiffusionSettings) if entry.name == name)
    return f"{entry.metadata['section']}.{_key(entry)}"


def presegmentor_architectures(section: Any) -> list[Any]:
    """Return what a `diffusion` section of any version, not checked in any way, names as the pre-segmentor's architecture."""
    if not isinstance(section, Mapping):
        return []
    inner = section.get("presegmentor")
    return [section.get("presegmentor_architecture"), inner.get("architecture") if isinstance(inner, Mapping) else None]


def inference_settings() -> tuple[str, ...]:
    """Names of the settings that may change after training."""
    return tuple(e.name for e in dataclasses.fields(DiffusionSettings) if e.metadata["section"] == "inference")


def _key(entry: dataclasses.Field) -> str:
    return entry.name.removeprefix("presegmentor_") if entry.metadata["section"] == "presegmentor" else entry.name


def default_settings(
    configuration: Mapping[str, Any], prediction_type: str | None = None, denoiser: str = DENOISERS[0]
) -> DiffusionSettings:
    """Return the settings for a configuration of plain nnU-Net plans.

    Args:
        configuration: resolved configuration with `architecture.arch_kwargs.features_per_stage` and `batch_size`.
        prediction_type: the defaults of training starts depend on it; None for the denoiser's default.
        denoiser: the defaults of process and training depend on it.

    Raises:
        NotImplementedError: if the plans' architecture does not describe nnU-Net's encoder-decoder topology.
    """
    topology = topology_of(configuration)
    own = {"nnunet": NNUNET_DENOISER, HIDIFF: HIDIFF_DENOISER}.get(denoiser, {"prediction_type": "x0"})
    if prediction_type is not None:
        own = {**own, "prediction_type": prediction_type}
    truth_only = own["prediction_type"] in ("epsilon", "v", FLIP)
    return DiffusionSettings(
        # half of nnU-Net's width: its two flows alone then take 1.0 to 1.3 times the FLOPs of nnU-Net
        features_per_stage=tuple(max(8, width // 2) for width in topology["features_per_stage"]),
        # statistics of a batch of two patches are unreliable (METHODS 2)
        norm="batch" if int(configuration["batch_size"]) >= 8 else "instance",
        denoiser=denoiser,
        **own,
        starts={"truth": 1.0} if truth_only else {"truth": 0.5, "corrupted": 0.5},
    )


def topology_of(configuration: Mapping[str, Any]) -> dict[str, Any]:
    """Return conv_op, strides, kernel_sizes and features_per_stage of nnU-Net's own network.

    Raises:
        NotImplementedError: naming the missing key, for architectures without that topology.
    """
    architecture = configuration["architecture"]
    keywords = architecture["arch_kwargs"]
    wanted = ("conv_op", "strides", "kernel_sizes", "features_per_stage")
    missing = [key for key in wanted if key not in keywords]
    if missing:
        raise NotImplementedError(
            f"Architecture {architecture.get('network_class_name')} has no {', '.join(missing)} in its arch_kwargs: the "
            "denoiser can be sized after nnU-Net's PlainConvUNet and ResidualEncoderUNet plans only."
        )
    return {key: keywords[key] for key in wanted}


def settings_table() -> str:
    """Return the reference of all settings as a markdown table (documentation/settings.md is made by it)."""
    rows = ["| section | key | default | legal values | meaning |", "|---|---|---|---|---|"]
    for entry in sorted(dataclasses.fields(DiffusionSettings), key=lambda e: SECTIONS.index(e.metadata["section"])):
        default = SPECIAL.get(entry.name, ("",))[0] or f"`{entry.default!r}`"
        rows.append(
            f"| `{entry.metadata['section']}` | `{_key(entry)}` | {default} | {_legal(entry) or 'text'} | "
            f"{entry.metadata['doc']} |"
        )
    return "\n".join(rows) + "\n"


def _legal(entry: dataclasses.Field) -> str:
    low, high, choices = (entry.metadata.get(key) for key in ("low", "high", "choices"))
    if choices:
        return ", ".join(f"`{choice}`" for choice in choices)
    if isinstance(entry.default, bool):
        return "true, false"
    if entry.name in SPECIAL:
        return SPECIAL[entry.name][1]
    if low is not None and low == high:
        return f"{low}"
    return " and ".join(f"{sign} {limit}" for sign, limit in ((">=", low), ("<=", high)) if limit is not None)


def _positive_integers(value: Any) -> tuple[int, ...]:
    if not isinstance(value, (list, tuple)) or not value or any(type(width) is not int or width < 1 for width in value):
        raise ValueError(
            f"diffusion.network.features_per_stage must be a list of positive integers, one per stage, got {value!r}."
        )
    return tuple(value)


def _stages(value: Any, count: int) -> tuple[int, ...]:
    legal = isinstance(value, (list, tuple)) and all(type(stage) is int and 1 <= stage < count for stage in value)
    if not legal or list(value) != sorted(set(value)):
        raise ValueError(
            f"diffusion.network.attention_stages must be ascending integers from 1 to {count - 1} (features_per_stage has "
            f"{count} stages), or empty for all, got {value!r}."
        )
    return tuple(value)


def _names(value: Any) -> tuple[str, ...]:
    legal = isinstance(value, (list, tuple)) and all(isinstance(name, str) and name.isidentifier() for name in value)
    if not legal or len(set(value)) < len(value):
        raise ValueError(
            f"diffusion.training.raters must be a list of different names of letters, digits and _, such as ['second_rater'] "
            f"for the folder labelsTr_second_rater, got {value!r}."
        )
    return tuple(value)


def _half_widths(value: Any) -> tuple[float, ...]:
    numbers = isinstance(value, (list, tuple)) and all(type(each) in (int, float) for each in value)
    if not numbers or not all(0 <= each <= 100 for each in value):
        raise ValueError(
            "diffusion.inference.volume_half_widths must be a list of numbers from 0 to 100, one for each foreground class, as "
            f"nnunet_diffusion calibrate writes it, or empty, got {value!r}."
        )
    return tuple(float(each) for each in value)


def _check_architecture(value: Any) -> None:
    needed = {"network_class_name", "arch_kwargs", "_kw_requires_import"}
    if not isinstance(value, Mapping) or (value and not needed <= set(value)):
        raise ValueError(
            f"diffusion.presegmentor.architecture must be empty or have {', '.join(sorted(needed))}, got {value!r}."
        )


def _checked(entry: dataclasses.Field, value: Any) -> Any:
    kind: Any = type(entry.default)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise ValueError(
            f"diffusion.{path_of(entry.name)} must be of type {kind.__name__}, got {value!r} ({type(value).__name__})."
        )
    low, high, choices = entry.metadata["low"], entry.metadata["high"], entry.metadata["choices"]
    outside = kind in (int, float) and not (
        (low is None or value >= low) and (high is None or value <= high) and math.isfinite(value)
    )
    if outside or (choices and value not in choices):
        raise ValueError(f"diffusion.{path_of(entry.name)} is {value!r}; legal: {_legal(entry)}.")
    return value


def _at_most(settings: DiffusionSettings, key: str, limit: str) -> None:
    if getattr(settings, key) > getattr(settings, limit):
        raise ValueError(
            f"diffusion.{path_of(key)} is {getattr(settings, key)}, more than diffusion.{path_of(limit)} "
            f"({getattr(settings, limit)})."
        )
